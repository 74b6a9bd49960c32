"""`baton trace`: fetched whole and hashed, or not at all; described for people and machines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from typer.testing import CliRunner

from baton.__main__ import app
from baton.trace import fetch_file
from protocol.errors import ServiceError
from simulator.traces.catalog import KNOWN, SourceFile

CONTENT = b'{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [1]}\n' * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Publisher:
    def __init__(self) -> None:
        self.num_asked = 0
        self.url = ""

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.num_asked += 1
        if request.path == "/cut":
            answer = web.StreamResponse(headers={"Content-Length": str(len(CONTENT))})
            await answer.prepare(request)
            await answer.write(CONTENT[:1000])
            assert request.transport is not None
            request.transport.abort()
            return answer
        return web.Response(body=CONTENT) if request.path == "/trace" else web.Response(status=404)

    def file(self, path: str, sha256: str | None = SHA256) -> SourceFile:
        return SourceFile(url=f"{self.url}{path}", saved_as="t.jsonl", sha256=sha256)


@pytest.fixture
async def publisher() -> AsyncIterator[Publisher]:
    publisher = Publisher()
    server = web.Application()
    server.router.add_get("/{path}", publisher.serve)
    runner = web.AppRunner(server)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    publisher.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield publisher
    await runner.cleanup()


async def test_a_file_is_fetched_once_and_hashed(publisher: Publisher, tmp_path: Path) -> None:
    """Seen to fail with what is there never looked at."""
    path = tmp_path / "t.jsonl"
    for _ in range(2):
        assert await fetch_file(publisher.file("/trace"), path) == (len(CONTENT), SHA256)
    assert path.read_bytes() == CONTENT and publisher.num_asked == 1
    path.write_bytes(b"damaged")
    assert await fetch_file(publisher.file("/trace"), path) == (len(CONTENT), SHA256)
    assert publisher.num_asked == 2


@pytest.mark.parametrize(
    ("path", "sha256", "why"), [("/trace", "0" * 64, "another file"), ("/none", SHA256, "404"), ("/cut", SHA256, "was not got")]
)
async def test_what_is_not_whole_leaves_nothing(publisher: Publisher, tmp_path: Path, path: str, sha256: str, why: str) -> None:
    """Seen to fail with the file written under its own name from the start."""
    with pytest.raises(ServiceError, match=why):
        await fetch_file(publisher.file(path, sha256), tmp_path / "t.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_the_command_lists_and_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_TRACES_DIR", str(tmp_path))
    (tmp_path / "mooncake_conversation.jsonl").write_bytes(CONTENT)
    runner = CliRunner()
    listed = runner.invoke(app, ["trace", "list"])
    assert listed.exit_code == 0 and "mooncake_conversation  (here)" in listed.stdout
    for trace in KNOWN.values():
        assert trace.licence in listed.stdout and trace.citation in listed.stdout
    told = json.loads(runner.invoke(app, ["trace", "list", "--json"]).stdout)
    assert [t["name"] for t in told["traces"] if t["is_here"]] == ["mooncake_conversation"]
    described = runner.invoke(app, ["trace", "describe", "mooncake_conversation"])
    assert "5,000" in described.stdout and "100.0%" in described.stdout, described.stdout
    facts = json.loads(runner.invoke(app, ["trace", "describe", "mooncake_conversation", "--json"]).stdout)
    assert (facts["schema"], facts["num_requests"], facts["input_tokens"]) == ("baton.trace.v1", 5000, [3, 3, 3])


def test_what_cannot_be_fetched_says_so() -> None:
    runner = CliRunner()
    for name, why in (("nobody", "choose from mooncake_conversation"), ("claude_code_sessions", "too many files")):
        result = runner.invoke(app, ["trace", "fetch", name])
        assert result.exit_code != 0 and why in str(result.exception)
