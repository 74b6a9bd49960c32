"""The load generator against a server made for the test: when requests come, what counts as a delivery, and what is said of it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from baton.__main__ import app
from baton.bench.load import Endpoint, ErrorKind, LoadRun, SentRequest, Workload, drive
from baton.bench.serve import figures, parse_slo
from protocol.errors import ConfigError
from protocol.request import Slo
from protocol.timeline import Timeline
from tests.stub_endpoint import StubServer, good_stream, running

pytestmark = pytest.mark.pure

WORKLOAD = Workload(num_requests=6, request_rate=200.0, input_len=32, output_len=4, seed=3)


def driven(stub: StubServer, workload: Workload = WORKLOAD) -> LoadRun:
    with running(stub) as url:
        return drive(Endpoint(url=url, model="stub"), workload)


def test_the_same_seed_gives_the_same_arrivals_and_prompts() -> None:
    """Seen to fail with random.Random() in `arrivals_s`."""
    again, other = Workload(**vars_of(WORKLOAD)), Workload(**vars_of(WORKLOAD, seed=4))
    assert again.arrivals_s() == WORKLOAD.arrivals_s() != other.arrivals_s()
    assert again.prompts() == WORKLOAD.prompts() != other.prompts()


def test_arrivals_are_poisson_and_prompts_share_only_what_is_asked() -> None:
    """Seen to fail with a constant gap, and with the prefix drawn anew for each prompt."""
    many = Workload(num_requests=4000, request_rate=8.0, input_len=6, output_len=1, shared_prefix=4, vocab_size=500)
    arrivals_s = many.arrivals_s()
    gaps_s = [b - a for a, b in zip([0.0, *arrivals_s], arrivals_s, strict=False)]
    assert statistics.mean(gaps_s) == pytest.approx(1 / 8, rel=0.1)
    assert statistics.stdev(gaps_s) == pytest.approx(1 / 8, rel=0.1)
    prompts = many.prompts()
    assert len({tuple(p[:4]) for p in prompts}) == 1 and len({tuple(p[4:]) for p in prompts}) > 3900
    assert all(len(p) == 6 and max(p) < 500 for p in prompts)


def test_arrivals_do_not_wait_for_answers() -> None:
    """Every answer takes longer than all arrivals together. Seen to fail with `await` in place of `create_task` in the loop."""
    stub = StubServer(pause_s=0.1)
    run = driven(stub)
    assert stub.num_open_max == WORKLOAD.num_requests and run.num_waited == 0
    assert max(run.lateness_s) < 0.1


def test_waiting_for_a_place_counts_as_latency() -> None:
    """One at a time, each 0.1 s: the last TTFT has the time of all before it. Seen to fail with arrival_s taken when a request is sent."""
    workload = Workload(**vars_of(WORKLOAD, num_requests=3, request_rate=float("inf"), max_concurrency=1))
    stub = StubServer(pause_s=0.02)
    run = driven(stub, workload)
    assert stub.num_open_max == 1 and run.num_waited == 2
    ttfts_s = [r.timeline.ttft_s or 0.0 for r in run.requests]
    assert ttfts_s == sorted(ttfts_s) and ttfts_s[2] > 0.2


def test_a_delivery_is_an_event_with_tokens() -> None:
    """Whatever its text: half a character is a token too. Seen to fail with deliveries counted by their text."""
    stub = StubServer(pause_s=0.01)
    run = driven(stub)
    assert [r.timeline.token_counts for r in run.requests] == [[2, 1, 1]] * 6
    assert all(r.num_prompt_tokens == 32 and r.error is None for r in run.requests)
    assert stub.bodies[0]["max_tokens"] == 4 and stub.bodies[0]["ignore_eos"] and len(stub.bodies[0]["prompt"]) == 32


def test_events_cut_anywhere_are_put_together() -> None:
    """Seen to fail without `unread` carried over to the next chunk."""
    stub = StubServer(pieces=lambda body: [b"".join(good_stream(body))[i : i + 7] for i in range(0, 600, 7)])
    assert [r.timeline.num_tokens for r in driven(stub).requests] == [4] * 6


@pytest.mark.parametrize(
    ("pieces", "status", "kind"),
    [
        (lambda body: [b'{"error": {"message": "no"}}'], 429, ErrorKind.REFUSED),
        (lambda body: good_stream(body)[:2], 200, ErrorKind.BROKEN),
        (lambda body: [good_stream(body)[0], b"data: [DONE]\n\n"], 200, ErrorKind.SHORT),
        (lambda body: [good_stream(body)[0], b'data: {"error": {"message": "lost"}}\n\n', b"data: [DONE]\n\n"], 200, ErrorKind.FAILED),
        (lambda body: [b"data: nonsense\n\n"], 200, ErrorKind.BROKEN),
    ],
    ids=["refused", "broken", "short", "failed", "nonsense"],
)
def test_every_bad_end_has_its_kind(pieces: Any, status: int, kind: ErrorKind) -> None:
    run = driven(StubServer(pieces=pieces, status=status))
    assert {r.error for r in run.requests} == {kind} and not run.well


def test_nobody_there_is_an_error_of_each_request() -> None:
    with running(StubServer()) as url:
        pass
    run = drive(Endpoint(url=url, model="stub"), WORKLOAD)
    assert {r.error for r in run.requests} == {ErrorKind.CONNECT}


def test_figures_are_those_of_the_timeline() -> None:
    """TTFT from arrival, TPOT over tokens after the first delivery, ITL over deliveries. Seen to fail with arrival_s + 1 ms."""
    run = LoadRun(workload=WORKLOAD, started_s=10.0, end_s=12.0)
    run.requests = [
        SentRequest(
            index=i, timeline=Timeline(arrival_s=10.0, token_times_s=[10.1 + i, 10.2 + i, 10.6 + i], token_counts=[1, 1, 2], end_s=11.0)
        )
        for i in range(2)
    ]
    rows = {row.name: row.value for row in figures(run, Slo(ttft_s=0.5))}
    assert rows["ttft/p50"] == pytest.approx(600.0) and rows["ttft/max"] == pytest.approx(1100.0)
    assert rows["tpot/mean"] == pytest.approx(500.0 / 3)
    assert rows["itl/p50"] == pytest.approx(250.0) and rows["itl_worst/p50"] == pytest.approx(400.0)
    assert rows["throughput/output"] == pytest.approx(4.0) and rows["goodput"] == pytest.approx(0.5)


def test_the_command_prints_one_document(tmp_path: Path) -> None:
    """Seen to fail with `completed` counted from all requests."""
    file = tmp_path / "run.json"
    stub = StubServer()
    with running(stub) as url:
        flags = [
            "--url",
            url,
            "--rate",
            "100",
            "--num-requests",
            "5",
            "--input-len",
            "16",
            "--output-len",
            "4",
            "--slo",
            "ttft:900 tpot:900",
        ]
        outcome = CliRunner().invoke(app, ["bench", "serve", *flags, "--json", "--detailed", "--output", str(file)])
    assert outcome.exit_code == 0, outcome.output
    document = json.loads(outcome.stdout)
    assert document == json.loads(file.read_text())
    assert document["schema"] == "baton.bench.serve.v1" and {"machine", "commit", "seed", "rows"} <= document.keys()
    assert document["completed"] == 5 and document["failed"] == 0 and document["errors"] == {}
    assert len(document["requests"]) == 5 and len(stub.bodies) == 6  # one warm-up
    assert {"ttft/p50", "itl/p99", "goodput"} <= {row["name"] for row in document["rows"]}
    assert document["client"]["cpu_s"] > 0


def test_objectives_are_milliseconds_and_misspelt_ones_are_told() -> None:
    assert parse_slo("ttft=500,tpot=50") == parse_slo("ttft:500 tpot:50") == Slo(ttft_s=0.5, tpot_s=0.05)
    for wrong in ("itl=5", "ttft=", "ttft=-1", "500"):
        with pytest.raises(ConfigError, match="ttft=500"):
            parse_slo(wrong)


def vars_of(workload: Workload, **changes: Any) -> dict[str, Any]:
    return {name: getattr(workload, name) for name in Workload.__slots__} | changes
