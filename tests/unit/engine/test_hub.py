"""Checkpoints from the Hub: a small server speaks the endpoints the client needs, and fails in the ways a Hub, a network and a disk do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.file_download
import pytest

from control.config import load_config
from engine.hub import resolve_model
from protocol.errors import ConfigError, ModelUnavailable

pytestmark = pytest.mark.pure

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": b"\x01" * 5000,
    "model-00002-of-00002.safetensors": b"\x02" * 3000,
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "pytorch_model.bin": b"pickle",
    "modeling_evil.py": b"import os",
    "tokenizer.model": b"sentencepiece",
    "onnx/model.safetensors": b"other format",
    "consolidated.safetensors": b"other format",
}
FETCHED = {name for name in FILES if not name.endswith((".bin", ".py", ".model")) and "/" not in name and "consolidated" not in name}


class FakeHub(BaseHTTPRequestHandler):
    """GET api/models/{id}[/revision/{rev}], GET api/models/{id}/tree/{commit}, HEAD and GET {id}/resolve/{commit}/{file}."""

    protocol_version = "HTTP/1.0"  # a connection for each question, so that a stopped server answers nobody
    asked: list[str]
    files: dict[str, bytes]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        type(self).asked.append(f"{self.command} {path}")
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        if name == "org/secret" and self.headers.get("Authorization") != "Bearer hf_good":
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}, body)
        if name == "org/broken":
            return self._send(503, b"{}", {}, body)
        if name not in ("org/model", "org/secret"):
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        rest = path.split(name, 1)[1]
        if rest == "" or rest.startswith("/revision/"):
            if rest.startswith("/revision/") and rest.split("/")[2] not in ("main", COMMIT):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            told = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in self.files]}
            return self._send(200, json.dumps(told).encode(), {}, body)
        if rest.startswith("/tree/"):
            tree = [{"type": "file", "path": file, "size": len(data), "oid": etag(data)} for file, data in self.files.items()]
            return self._send(200, json.dumps(tree).encode(), {}, body)
        data = self.files[rest.split("/", 3)[3]]
        return self._send(200, data, {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMIT}, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class Hub:
    def __init__(self, server: ThreadingHTTPServer, handler: type[FakeHub]) -> None:
        self.server = server
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        self.asked = handler.asked
        self.files = handler.files

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    handler = type("Handler", (FakeHub,), {"asked": [], "files": dict(FILES)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    running = Hub(server, handler)
    yield running
    running.stop()
    thread.join(timeout=5)


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)


def resolve(hub: Hub, cache: Path, name: str = "org/model", **options: Any) -> Path:
    return resolve_model(name, cache_dir=cache, endpoint=hub.endpoint, **options)


def test_hub_id_brings_weights_json_and_templates_and_nothing_that_runs(hub: Hub, tmp_path: Path) -> None:
    """Seen to fail with "*.py" added to the allowed files, and with the ignored ones emptied."""
    directory = resolve(hub, tmp_path)
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert found == FETCHED
    assert (directory / "model-00001-of-00002.safetensors").read_bytes() == FILES["model-00001-of-00002.safetensors"]


def test_variables_of_hugging_face_choose_hub_cache_and_token(hub: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN as users set them, through the configuration. Seen to fail without the token."""
    config = load_config(environ={"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_good"}).hub
    directory = resolve_model("org/secret", cache_dir=config.cache_dir, token=config.token, endpoint=config.endpoint)
    assert directory.is_relative_to(tmp_path / "hub")


def test_cached_id_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    """Branch and commit, with the Hub's socket closed, and offline. Seen to fail when `run` raised every refusal."""
    directory = resolve(hub, tmp_path)
    hub.stop()
    assert resolve(hub, tmp_path) == directory
    assert resolve(hub, tmp_path, revision=COMMIT) == directory
    assert resolve(hub, tmp_path, offline=True) == directory


def test_cached_commit_is_not_asked_for(hub: Hub, tmp_path: Path) -> None:
    resolve(hub, tmp_path, revision=COMMIT)
    hub.asked.clear()
    resolve(hub, tmp_path, revision=COMMIT)
    assert hub.asked == []


def test_half_a_download_is_finished_at_the_next_start(hub: Hub, tmp_path: Path) -> None:
    directory = resolve(hub, tmp_path)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match="not in"):
        resolve(hub, tmp_path, offline=True)
    assert (resolve(hub, tmp_path) / "model-00002-of-00002.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("org/nothing", {}, "neither a directory here nor a model on 127.0.0.1.*HF_TOKEN"),
        ("org/secret", {}, "is gated: accept its terms at http.*org/secret.*HF_TOKEN"),
        ("org/broken", {}, "answered 503.*try again later"),
        ("org/model", {"revision": "v9"}, "no revision v9; name a branch"),
        ("org/model", {"offline": True}, "not in .*HF_HUB_OFFLINE is set; unset it"),
        ("./models/none", {}, "no directory ./models/none.*check the path"),
        ("a/b/c", {}, "no directory a/b/c"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_sentence_with_the_remedy(
    hub: Hub, tmp_path: Path, name: str, options: dict[str, Any], sentence: str
) -> None:
    """Seen to fail with the order of Gated and RepositoryNotFound turned round."""
    with pytest.raises(ModelUnavailable, match=sentence) as caught:
        resolve(hub, tmp_path, name, **options)
    assert "\n" not in str(caught.value)


def test_no_network_and_nothing_cached_names_the_host(hub: Hub, tmp_path: Path) -> None:
    hub.stop()
    with pytest.raises(ModelUnavailable, match=r"cannot reach 127\.0\.0\.1:\d+ .*connect, or name a directory"):
        resolve(hub, tmp_path)


def test_full_disk_names_the_cache_and_what_to_set(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write of a file fails as on a full disk. Seen to fail without the ENOSPC branch."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    with pytest.raises(ModelUnavailable, match=r"no space left in .*set HF_HOME to a larger disk"):
        resolve(hub, tmp_path)


def test_pickle_weights_are_refused(hub: Hub, tmp_path: Path) -> None:
    directory = tmp_path / "old"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelUnavailable, match="pickle files only"):
        resolve_model(str(directory))


def test_directory_that_lacks_a_shard_is_refused(tmp_path: Path) -> None:
    """Seen to fail without a look at the index."""
    for name in FETCHED - {"model-00002-of-00002.safetensors"}:
        (tmp_path / name).write_bytes(FILES[name])
    with pytest.raises(ModelUnavailable, match="lacks 1 of its weight files, model-00002"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelUnavailable, match="damaged"):
        resolve_model(str(tmp_path))


def test_directory_is_used_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()
    with pytest.raises(ConfigError, match="has no revision main"):
        resolve_model(str(tmp_path), revision="main")
