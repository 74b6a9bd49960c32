"""Ours beside colocated engines, none of which is installed here: turns, ratios, targets, the drawing; and a server that is held still."""

from __future__ import annotations

import json
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from baton.bench.disagg import Measured, Plan, _limit, _turns, disagg_document, rows_of
from baton.bench.load import LoadRun, SentRequest, Workload
from baton.bench.pareto import Panel, Point, pareto_svg
from baton.bench.servers import ServerCommand, ServerProcess, add_tokenizer
from engine.tokenizer import Tokenizer
from protocol.errors import ConfigError, ServiceError
from protocol.timeline import Timeline

pytestmark = pytest.mark.pure

WORKLOAD = Workload(num_requests=2, request_rate=1.0, input_len=8, output_len=3)


def measured(name: str, *, ttft_s: float, pause_s: float, num_rounds: int = 6) -> Measured:
    runs = []
    for _ in range(num_rounds):
        timelines = [Timeline(arrival_s=i, token_times_s=[i + ttft_s, i + ttft_s + 0.01, i + ttft_s + 0.01 + pause_s]) for i in range(2)]
        for timeline in timelines:
            timeline.token_counts, timeline.end_s = [1, 1, 1], timeline.token_times_s[-1]
        requests = [SentRequest(index=i, timeline=t, sent_s=t.arrival_s) for i, t in enumerate(timelines)]
        runs.append(LoadRun(workload=WORKLOAD, started_s=0.0, end_s=4.0, requests=requests))
    return Measured(name=name, start_s=9.0, runs=runs, others=[0.0] * num_rounds)


OURS = measured("baton", ttft_s=0.6, pause_s=0.02)
COLOCATED = [measured("vllm-128", ttft_s=0.5, pause_s=0.03), measured("vllm", ttft_s=0.3, pause_s=0.2)]


def test_ratios_say_how_often_theirs_is_ours_and_only_the_default_has_targets() -> None:
    """Pauses 0.2 against 0.02: ten times. First tokens 0.3 against 0.6: half. Seen to fail with the pair turned round."""
    rows = {row.name: row for row in rows_of([OURS, *COLOCATED])}
    pause, first = rows["itl/p99/baton_vs_vllm"], rows["ttft/p50/baton_vs_vllm"]
    assert pause.value == pytest.approx(0.2 / 0.02, rel=0.1) and pause.ok and pause.details["verdict"] == "wins"
    assert first.value == pytest.approx(0.5) and first.ok and str(first.target) == ">= 0.4348"
    assert rows["itl/p99/baton_vs_vllm-128"].target is None
    assert rows["ttft/p50/baton"].value == pytest.approx(600.0)


def test_document_names_the_machine_the_workload_and_who_else_was_there() -> None:
    plan = Plan(model="125m", workload=WORKLOAD, num_rounds=6, threads=1, peer_threads=2, python=None, token_limits=(None,))
    document = json.loads(json.dumps(disagg_document(plan, [OURS, *COLOCATED], took_s=1.0)))
    assert document["schema"] == "baton.bench.disagg.v1" and {"machine", "commit", "seed", "rows"} <= document.keys()
    assert document["rounds"] == 6 and document["servers"]["vllm"]["others"] == [0.0] * 6
    assert document["servers"]["baton"]["start_s"] == 9.0


def test_every_server_has_one_turn_a_round_and_not_always_the_same_place() -> None:
    """Seen to fail with `range(num_servers)` for every round."""
    rounds = [_turns(4, number) for number in range(6)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in rounds)
    assert len({order.index(0) for order in rounds}) >= 3


def test_rounds_have_their_own_prompts_and_servers_share_them() -> None:
    plan = Plan(model="m", workload=WORKLOAD, num_rounds=2, threads=1, peer_threads=2, python=None, token_limits=())
    assert plan.round_workload(0).prompts() == plan.round_workload(0).prompts() != plan.round_workload(1).prompts()


def test_limits_are_numbers_or_the_default() -> None:
    assert [_limit(text) for text in ("128", "default")] == [128, None]
    for wrong in ("0", "-1", "all"):
        with pytest.raises(ConfigError, match="max-num-batched-tokens"):
            _limit(wrong)


def test_the_drawing_is_xml_with_every_point() -> None:
    points = tuple(Point(name=name, x=x, y=y) for name, x, y in (("baton", 600, 20), ("vllm-128", 500, 30), ("<vllm>", 300, 200)))
    panel = Panel(points=points, x_title="TTFT", y_title="ITL", curve=("vllm-128", "<vllm>"))
    drawing = ElementTree.fromstring(pareto_svg([panel, panel]))
    kinds = [element.tag.rpartition("}")[2] for element in drawing.iter()]
    texts = [element.text for element in drawing.iter() if element.text]
    assert kinds.count("circle") == 6 and kinds.count("polyline") == 2 and {"baton", "vllm-128", "<vllm>"} <= set(texts)


SERVER = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def command(program: str, port: int = 1) -> ServerCommand:
    return ServerCommand(name="stub", argv=(sys.executable, "-c", program, str(port)), environment={}, port=port, ready_path="/")


def test_a_paused_server_stands_still_and_goes_on(tmp_path: Path) -> None:
    """Seen to fail without SIGCONT in `resume`."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ServerProcess(command(SERVER, port), log=tmp_path / "log") as server:
        server.wait_ready()
        server.pause()
        state = Path(f"/proc/{server.session}/stat").read_text().rpartition(")")[2].split()[0]
        assert state == "T"
        server.resume()
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 10 and not Path(f"/proc/{server.session}").exists()


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    with (
        ServerProcess(command("raise SystemExit('no such model')"), log=tmp_path / "log") as server,
        pytest.raises(ServiceError, match="no such model"),
    ):
        server.wait_ready()


def test_a_made_up_tokenizer_has_every_id(tmp_path: Path) -> None:
    """Ours reads it; so does vLLM's, through transformers. Seen to fail with one pair fewer."""
    add_tokenizer(tmp_path, 2000)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.vocab_size == 2000 and tokenizer.eos_token_id == 2
    assert list(tokenizer.encode("any text")) and all(tokenizer.token_bytes(i) for i in (300, 1999))
