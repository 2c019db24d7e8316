"""Model ids: local paths, and Hugging Face repositories on a small server that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pymistral.errors import ModelLoadError
from pymistral.loading.hub import cache_folder, choose_gguf, resolve, token_from
from pymistral.loading.huggingface import FolderLoader

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


# ---- local ----------------------------------------------------------------------------------------


def test_a_file_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "Model.GGUF"
    path.write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for model_id in (str(path), path, "Model.GGUF", "./Model.GGUF", "~/Model.GGUF"):
        assert resolve(model_id) == path
    assert resolve(tmp_path) == tmp_path
    assert resolve(tmp_path, files=["Model.GGUF"]) == path
    with pytest.raises(ModelLoadError, match=r"holds no file b\.gguf"):
        resolve(tmp_path, files=["b.gguf"])


@pytest.mark.parametrize("model_id", ["/no/such/model", "./model", "model.gguf", "a/b/c", "~/nothing", "not a model", "x" * 5000, "ä/ö"])
def test_no_such_path(model_id: str) -> None:
    with pytest.raises(ModelLoadError, match=r"no such file or folder|File name too long"):
        resolve(model_id)


@pytest.mark.parametrize("model_id", ["", "a\0b"])
def test_no_id_at_all(model_id: str) -> None:
    with pytest.raises(ModelLoadError, match="is not a model id"):
        resolve(model_id)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    for name, problem in (("weights.txt", r"is not a model: expected a \.gguf file"), ("weights.bin", "runs whatever code it holds")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ModelLoadError, match=problem):
            resolve(tmp_path / name)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(b"")
        assert resolve(tmp_path / name) == tmp_path


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYMISTRAL_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("PYMISTRAL_CACHE")
    assert cache_folder() == tmp_path / "b" / "pymistral"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification: to be ignored
    assert cache_folder() == tmp_path / ".cache" / "pymistral"


# ---- Hugging Face ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "part", "found"),
    [
        (["a.gguf", "README.md"], "", ["a.gguf"]),
        (["m-Q4_K_M.gguf", "m-Q8_0.gguf", "mmproj-f16.gguf"], "q4_k_m", ["m-Q4_K_M.gguf"]),
        (["m-Q8_0.gguf", "m-Q8_0-x.gguf"], "m-Q8_0.gguf", ["m-Q8_0.gguf"]),
        (["m-00002-of-00002.gguf", "m-00001-of-00002.gguf"], "", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]),
        (["model.safetensors", "config.json", "m.gguf"], "", []),
        (["model.safetensors", "m.gguf"], "m", ["m.gguf"]),
        (["adapter_model.safetensors", "m.gguf"], "", ["m.gguf"]),
    ],
)
def test_choose_gguf(names: list[str], part: str, found: list[str]) -> None:
    assert choose_gguf("owner/name", names, part) == found


@pytest.mark.parametrize(
    ("names", "part", "message"),
    [
        (["m-Q4_0.gguf", "m-Q8_0.gguf"], "", r"holds 2 GGUF models; choose one with owner/name:PART.*m-Q4_0\.gguf, m-Q8_0\.gguf"),
        (["m-Q4_0.gguf"], "q9", r"holds no GGUF models with 'q9' in the name.*m-Q4_0\.gguf"),
        (["pytorch_model.bin"], "", r"neither safetensors nor GGUF .*\(pickled weights are refused"),
        (["README.md"], "", r"neither safetensors nor GGUF .* can load$"),
        (["model.safetensors"], "q4", "no GGUF models"),
    ],
)
def test_choose_gguf_needs_help(names: list[str], part: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        choose_gguf("owner/name", names, part)


def test_several_models_in_a_folder() -> None:
    """Which a PART could not choose from."""
    with pytest.raises(ModelLoadError, match=r"^/models holds 2 GGUF models; give the path of one of them \(files: a\.gguf, b\.gguf\)$"):
        choose_gguf("/models", ["a.gguf", "b.gguf"])


def test_token_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv("MY_TOKEN", "secret")
    assert token_from(None) is token_from("cache") is None
    assert token_from("none") is False
    for source in ("literal:secret", "env:MY_TOKEN", f"path:{tmp_path / 'token'}"):
        assert token_from(source) == "secret"
    with pytest.raises(ModelLoadError, match="NO_TOKEN names an environment variable that is not set"):
        token_from("env:NO_TOKEN")
    with pytest.raises(ModelLoadError, match="cannot be read: No such file"):
        token_from("path:/no/such/file")
    with pytest.raises(ModelLoadError, match="a token source is one of") as caught:
        token_from("hf_secret")
    assert "hf_secret" not in str(caught.value)


@dataclass
class Hub:
    """The server: repositories, and how it misbehaves."""

    repos: dict[str, dict[str, bytes]]
    home: Path
    endpoint: str = ""
    token: str = ""  # what "owner/private" and "owner/gated" want
    cut: int = 0  # how many downloads break off in the middle
    down: bool = False
    short: bool = False  # whether downloads are half of what HEAD says, and end well
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def resolve(self, model_id: str, environment: dict[str, str] | None = None, **options: Any) -> str:
        """Resolve in a process of its own, as huggingface_hub reads its environment once; the path, or the error's text."""
        code = (
            "import json, sys\nfrom pymistral.errors import ModelLoadError\nfrom pymistral.loading.hub import resolve\n"
            "try:\n    print(resolve(sys.argv[1], **json.loads(sys.argv[2])))\nexcept ModelLoadError as error:\n    print('error:', error)"
        )
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and not key.lower().endswith("_proxy")}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        result = subprocess.run(
            [sys.executable, "-c", code, model_id, json.dumps(options)],
            capture_output=True,
            text=True,
            env={**clean, **own, **(environment or {})},
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip().splitlines()[-1]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    files = {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": b"weights" * 1000,
        "tokenizer.json": b"{}",
        "pytorch_model.bin": b"pickle",
        "README.md": b"",
    }
    hub = Hub({"owner/name": files, "owner/ggufs": {"m-Q4_0.gguf": b"GGUF" * 50_000, "m-Q8_0.gguf": b"GGUF"}}, tmp_path / "hf")
    hub.repos |= {"owner/private": files, "owner/gated": files, "owner/forbidden": files, "owner/expired": files}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            hub.tokens.add(self.headers.get("Authorization", ""))
            path = self.path.partition("?")[0].strip("/").split("/")
            api = path[:2] == ["api", "models"]
            repo = "/".join(path[2:4] if api else path[:2])
            revision = next((path[index + 1] for index, word in enumerate(path[:-1]) if word in ("tree", "revision", "resolve")), "main")
            authorized = self.headers.get("Authorization") == f"Bearer {hub.token}"
            if hub.down:
                self._fail(503, "")
            elif repo not in hub.repos or (repo == "owner/private" and not authorized):
                self._fail(401, "RepoNotFound", "Repository not found")
            elif repo == "owner/gated" and not authorized:
                self._fail(403, "GatedRepo", "Access to this model is restricted")
            elif repo == "owner/forbidden":
                self._fail(403, "", "no")
            elif repo == "owner/expired":
                self._fail(401, "", "Invalid credentials in Authorization header")
            elif revision not in ("main", COMMIT):
                self._fail(404, "RevisionNotFound", "Invalid rev id")
            elif api and "tree" in path:
                entries = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in hub.repos[repo].items()]
                self._send(json.dumps(entries).encode())
            elif api:
                siblings = [{"rfilename": name} for name in hub.repos[repo]]
                self._send(json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}).encode())
            elif (data := hub.repos[repo].get("/".join(path[4:]))) is None:
                self._fail(404, "EntryNotFound", "Entry not found")
            else:
                self._send(data, etag=hashlib.sha256(data).hexdigest())

        def _fail(self, status: int, code: str, message: str = "") -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, data: bytes, etag: str = "") -> None:
            if etag and hub.short and self.command == "GET":
                data = data[: len(data) // 2]
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{etag}"')
            self.end_headers()
            if self.command == "HEAD":
                return
            body = data[start:]
            if etag and hub.cut > 0:
                hub.cut -= 1
                body = body[: len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    yield hub
    server.shutdown()
    server.server_close()


def test_a_repository_of_safetensors(hub: Hub) -> None:
    folder = Path(hub.resolve("owner/name"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 1000
    assert hub.resolve("owner/name", offline=True) == str(folder)
    assert hub.resolve("owner/name", {"HF_HUB_OFFLINE": "1"}) == str(folder)
    hub.down = True
    assert hub.resolve("owner/name") == str(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "the architecture 'mamba' is not supported. Supported: gemma"),
        (CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "config.json: quantization_config says that "),
        ({key: value for key, value in CONFIG.items() if key != "rms_norm_eps"}, "config.json lacks rms_norm_eps. "),
        (CONFIG | {"rope_scaling": 2}, "config.json: rope_scaling is 2, not an object. "),
        (CONFIG | {"rope_scaling": {"rope_type": "spiral"}}, "config.json: rope_scaling: type 'spiral' is not supported ("),
        (CONFIG | {"rope_scaling": {"rope_type": "linear"}}, "config.json: rope_scaling of type 'linear' lacks 'factor'"),
        (CONFIG | {"head_dim": 100}, "config.json: head_dim is 100, not a multiple of 16 up to 1024. "),
        (CONFIG | {"head_dim": 1 << 30}, "config.json: head_dim is 1073741824, not a multiple of 16 up to 1024. "),
        (CONFIG | {"num_hidden_layers": 1 << 30}, "num_hidden_layers is 1073741824, more than 1000000 tensors allow. "),
    ],
)
def test_what_no_model_can_load_is_not_fetched(hub: Hub, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    """What config.json rules out is said as of a folder, and no weights are asked for."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    hub.repos["owner/other"] = {"model.safetensors": b"weights" * 1000, "config.json": json.dumps(config).encode()}
    with pytest.raises(ModelLoadError, match=f"^{re.escape(f'{folder}: {message}')}") as of_a_folder:
        FolderLoader(folder).check_config()
    for _ in range(2):  # the second time config.json is in the cache
        assert hub.resolve("owner/other") == "error: " + str(of_a_folder.value).replace(str(folder), "owner/other")
    assert not [request for request in hub.requests if ".safetensors" in request]


def test_a_repository_without_a_readable_configuration_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.repos["owner/other"] = {"model.safetensors": b"weights" * 1000}
    with pytest.raises(ModelLoadError, match="holds no ") as of_a_folder:
        FolderLoader(tmp_path)
    assert hub.resolve("owner/other") == "error: " + str(of_a_folder.value).replace(str(tmp_path), "owner/other")
    hub.repos["owner/other"]["config.json"] = b"{"
    assert hub.resolve("owner/other").startswith("error: owner/other/config.json: the file is not valid JSON")
    assert not [request for request in hub.requests if ".safetensors" in request]


def test_gguf_files(hub: Hub) -> None:
    assert "holds 2 GGUF models; choose one with owner/ggufs:PART" in hub.resolve("owner/ggufs")
    path = Path(hub.resolve("owner/ggufs:q4_0"))
    assert path.name == "m-Q4_0.gguf"
    assert path.read_bytes() == b"GGUF" * 50_000
    assert hub.resolve("owner/ggufs", files=["m-Q4_0.gguf"], revision=COMMIT) == str(path)
    assert hub.resolve("owner/ggufs", files=["m-Q4_0.gguf", "m-Q8_0.gguf"]) == str(path.parent)
    assert hub.resolve("owner/ggufs:q4_0", offline=True) == str(path)


def test_cache_dir(hub: Hub, tmp_path: Path) -> None:
    assert hub.resolve("owner/ggufs:q8_0", cache_dir=str(tmp_path / "other")).startswith(str(tmp_path / "other"))


def test_a_cut_connection_is_resumed(hub: Hub) -> None:
    hub.cut = 1
    assert Path(hub.resolve("owner/ggufs:q4_0")).read_bytes() == b"GGUF" * 50_000


def test_a_file_of_a_wrong_size(hub: Hub, tmp_path: Path) -> None:
    hub.short = True
    assert hub.resolve("owner/ggufs:q4_0").startswith("error: owner/ggufs:q4_0 cannot be fetched")
    assert not list(tmp_path.rglob("*.gguf"))
    hub.short = False
    assert Path(hub.resolve("owner/ggufs:q4_0")).read_bytes() == b"GGUF" * 50_000


def test_tokens(hub: Hub) -> None:
    hub.token = "secret"
    assert "no such local path, nor a Hugging Face repository" in hub.resolve("owner/private")
    assert Path(hub.resolve("owner/private", token="literal:secret")).is_dir()
    assert Path(hub.resolve("owner/gated", {"HF_TOKEN": "secret"})).is_dir()
    hub.tokens.clear()
    assert "is gated: accept its terms" in hub.resolve("owner/gated", {"HF_TOKEN": "secret"}, token="none")
    assert hub.tokens == {""}


@pytest.mark.parametrize(
    ("model_id", "options", "message"),
    [
        ("owner/nothing", {}, "error: owner/nothing: no such local path, nor a Hugging Face repository that you may read"),
        ("owner/forbidden", {}, "error: owner/forbidden: access is forbidden (403)"),
        ("owner/expired", {"token": "literal:old"}, "error: owner/expired: the Hugging Face token is not valid (401)"),
        ("owner/name", {"revision": "v9"}, "error: owner/name has no revision 'v9'"),
        ("owner/name", {"files": ["no.gguf"]}, "error: owner/name: "),
        ("owner/name", {"files": ["../../no.gguf"]}, "error: owner/name: the file name '../../no.gguf' points outside"),
        ("owner/name", {"offline": True}, "error: owner/name is not in the cache and fetching is switched off"),
        ("owner/ggufs:q4_0", {"offline": True}, "error: owner/ggufs:q4_0 is not in the cache and fetching is switched off"),
    ],
)
def test_errors(hub: Hub, model_id: str, options: dict[str, Any], message: str) -> None:
    assert hub.resolve(model_id, **options).startswith(message)


def test_a_hostile_list_of_files(hub: Hub, tmp_path: Path) -> None:
    hub.repos["owner/evil"] = {"../../../evil.gguf": b"GGUF"}
    assert "points outside" in hub.resolve("owner/evil")
    assert not list(tmp_path.rglob("evil*"))


def test_a_server_that_is_down(hub: Hub) -> None:
    hub.down = True
    assert "owner/ggufs:q4_0 cannot be fetched" in hub.resolve("owner/ggufs:q4_0")
    hub.endpoint = "http://127.0.0.1:9"
    assert "owner/ggufs:q4_0 cannot be fetched" in hub.resolve("owner/ggufs:q4_0")
