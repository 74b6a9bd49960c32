"""`baton bench start`: a server's life is measured from its command to its end, on a stub that takes known times for each part of it."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from baton.bench.servers import ServerCommand
from baton.bench.start import Start, measure_start, rows_of
from protocol.errors import ServiceError

COMING_UP_S, GOING_S, HELD_BYTES = 0.4, 0.3, 64 << 20

STUB = """
import http.server, json, signal, sys, time
port, coming_up_s, going_s = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
held, can_answer = int(sys.argv[4]), sys.argv[5] == "yes"

def go(*_):
    time.sleep(going_s)
    raise SystemExit

signal.signal(signal.SIGTERM, go)

class Stub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if can_answer else 500)
        self.send_header("Content-Type", "text/event-stream"); self.end_headers()
        event = {"choices": [{"index": 0, "text": "a", "token_ids": [5], "finish_reason": "length"}]}
        self.wfile.write(f"data: {json.dumps(event)}\\n\\ndata: [DONE]\\n\\n".encode())

    def log_message(self, *_): pass

time.sleep(coming_up_s)
kept = b"x" * held
http.server.HTTPServer(("127.0.0.1", port), Stub).serve_forever()
"""


def stub(can_answer: str = "yes") -> ServerCommand:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = (sys.executable, "-c", STUB, str(port), str(COMING_UP_S), str(GOING_S), str(HELD_BYTES), can_answer)
    return ServerCommand(name="stub", argv=argv, environment={}, port=port, ready_path="/")


def test_each_part_of_a_servers_life_has_its_time(tmp_path: Path) -> None:
    """Seen to fail with the clock of the stop started after it, and with the memory read after it."""
    start = measure_start(stub(), log=tmp_path / "log")
    assert COMING_UP_S <= start.ready_s < start.answered_s < COMING_UP_S + 5
    assert GOING_S <= start.stop_s < GOING_S + 5
    assert HELD_BYTES <= start.resident_bytes < HELD_BYTES + (64 << 20)


def test_a_server_that_is_ready_and_does_not_answer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="stub did not answer"):
        measure_start(stub("no"), log=tmp_path / "log")


@pytest.mark.pure
def test_the_demo_cluster_is_held_against_its_target_and_peers_are_paired() -> None:
    """Seen to fail with the pair turned round."""
    ours = [Start(ready_s=10.0, answered_s=10.1, resident_bytes=10**9, stop_s=1.0)] * 6
    theirs = [Start(ready_s=30.0, answered_s=31.0, resident_bytes=3 * 10**9, stop_s=2.0)] * 6
    rows = {row.name: row for row in rows_of("demo", {"baton": ours, "vllm": theirs})}
    assert rows["demo/ready/baton"].ok and str(rows["demo/ready/baton"].target) == "<= 15"
    assert rows["demo/resident/baton"].value == 1000 and rows["demo/resident/baton"].unit == "MB"
    assert rows["demo/ready/vs_vllm"].value == 3 and rows["demo/ready/vs_vllm"].details["verdict"] == "wins"
    assert all(row.target is None for row in rows_of("125m", {"baton": ours}))
