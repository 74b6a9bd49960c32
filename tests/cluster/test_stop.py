"""Ctrl-C and SIGTERM, while it starts and under load: drained, gone within 15 s, and nothing left behind.

What could be left is looked for in /proc and on disk: processes that descend from the server or work in its run directory, listening
sockets, shared-memory segments, files in the temporary directory. Seen to fail with a gateway that does not drain.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.processes import ProcessId, descendants, wait_gone
from tests.cluster.ledger import Ledger, stream
from tests.serving import STOP_TIMEOUT_S, Serving, end, environment, start

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(150)]

SMALL = {"model": "demo", "workers": {"executor": "paced", "prefill_workers": 1, "decode_workers": 1}}
DRAINED = [pytest.param(signal.SIGTERM, id="sigterm"), pytest.param(signal.SIGINT, id="ctrl-c", marks=pytest.mark.slow)]


class Belongings:
    """What a server has while it lives, so that a test can see what of it outlives it."""

    def __init__(self, serving: Serving) -> None:
        self.processes: list[ProcessId] = descendants(serving.process.pid)
        self.segments = set(Path("/dev/shm").iterdir())

    def assert_gone(self, before: set[Path]) -> None:
        left = wait_gone(self.processes, timeout_s=1.0)
        assert not left, [f"{process.pid} {process.title}" for process in left]
        assert not {path for path in self.segments - before if path.exists()}


def segments() -> set[Path]:
    return set(Path("/dev/shm").iterdir())


@pytest.mark.parametrize("number", DRAINED)
async def test_server_under_load_drains_and_is_gone(number: signal.Signals, tmp_path: Path) -> None:
    """The server asks for a key; a stranger's is refused on the way."""
    before = segments()
    server = await asyncio.to_thread(start, tmp_path, config=SMALL, api_key="right")
    try:
        for key in ("wrong", ""):
            status, answer = server.request("/v1/models", Authorization=f"Bearer {key}")
            assert status == 401 and json.loads(answer)["error"]["code"] == "invalid_api_key"
        journal: list[Ledger] = []
        body: dict[str, Any] = {"model": "demo", "prompt": "Hello", "max_tokens": 64, "ignore_eos": True}
        streams = [
            asyncio.create_task(stream(server.host, server.port, "/v1/completions", body, api_key="right", journal=journal))
            for _ in range(16)
        ]
        while sum(ledger.num_tokens > 1 for ledger in journal) < 8:
            await asyncio.sleep(0.01)
        belongings = Belongings(server)
        assert len(belongings.processes) >= 4  # two workers, the router, Ray's own
        took_s = await asyncio.to_thread(server.stop, number)
        ledgers = await asyncio.gather(*streams)
        assert took_s <= STOP_TIMEOUT_S, f"took {took_s:.1f} s"
        assert server.process.returncode == 0, server.log[-2000:]
        unfinished = [ledger.broken_promises for ledger in ledgers if ledger.broken_promises]
        assert not unfinished, unfinished[:3]
        belongings.assert_gone(before)
    finally:
        await asyncio.to_thread(end, server)


@pytest.mark.parametrize(
    ("number", "after_s"),
    [
        pytest.param(signal.SIGINT, 3.0, id="ctrl-c-early"),
        pytest.param(signal.SIGTERM, 0.5, id="sigterm-at-once", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 6.0, id="sigterm-late", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 9.0, id="ctrl-c-late", marks=pytest.mark.slow),
    ],
)
def test_server_told_to_stop_while_it_starts_is_gone(number: signal.Signals, after_s: float, tmp_path: Path) -> None:
    before = segments()
    server = start(tmp_path, config=SMALL, wait=False)
    try:
        time.sleep(after_s)
        belongings = Belongings(server)
        assert server.stop(number) <= STOP_TIMEOUT_S
        belongings.assert_gone(before)
        assert "Traceback" not in server.log
    finally:
        end(server)


def test_busy_port_is_an_error_within_two_seconds_that_names_the_holder(serving: Serving, tmp_path: Path) -> None:
    started_s = time.monotonic()
    command = [sys.executable, "-m", "baton", "serve", "--port", str(serving.port)]
    outcome = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=30, check=False)
    took_s = time.monotonic() - started_s
    told = outcome.stdout + outcome.stderr
    assert outcome.returncode != 0 and took_s <= 2.0, f"{took_s:.1f} s: {told}"
    assert str(serving.process.pid) in told and "--port" in told
    assert "Traceback" not in told
