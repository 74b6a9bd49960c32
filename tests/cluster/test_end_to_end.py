"""One cluster as its user and its operator see it: endpoints, metrics, status, loopback, the examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.processes import descendants, listeners, pss_bytes
from tests.cluster.ledger import stream
from tests.serving import Serving

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
PSS_BYTES_MAX = 2.5 * (1 << 30)


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_health_ready_and_models(serving: Serving) -> None:
    assert serving.request("/health")[0] == 200
    assert serving.request("/ready")[0] == 200
    models = serving.json("/v1/models")
    assert models["object"] == "list" and [model["id"] for model in models["data"]] == ["demo"]


def test_status_names_every_worker(serving: Serving) -> None:
    document = serving.status()
    assert document["schema"] == "baton.status.v1"
    rows = serving.wait_at_rest(num_workers=4).values()  # the endpoint is ready before the gateway has met every worker
    assert sorted(row["role"] for row in rows) == ["decode", "decode", "prefill", "prefill"]
    tree = {process.pid for process in descendants(serving.process.pid)}
    assert {row["pid"] for row in rows} <= tree and len({row["pid"] for row in rows}) == 4
    assert all(row["state"] == "ready" and row["epoch"] > 0 for row in rows)


def test_metrics_are_well_formed_and_count_requests(serving: Serving) -> None:
    before = serving.metric("baton_requests_total", outcome="finished")
    serving.json("/v1/completions", {"model": "demo", "prompt": "Hello", "max_tokens": 2})
    assert serving.metric("baton_requests_total", outcome="finished") == before + 1
    families = text_string_to_metric_families(serving.request("/metrics")[1].decode())
    assert all(family.name.startswith(("baton_", "vllm:")) for family in families)


def test_tokenize_agrees_with_usage(serving: Serving) -> None:
    text = "größe 東京 🙂 and a plain word"
    tokens = serving.json("/tokenize", {"model": "demo", "prompt": text})
    usage = serving.json("/v1/completions", {"model": "demo", "prompt": text, "max_tokens": 1})["usage"]
    assert tokens["count"] == len(tokens["tokens"]) == usage["prompt_tokens"]


async def test_stream_is_many_events_and_keeps_every_promise(serving: Serving) -> None:
    """Tokens come while others are computed, not in one piece at the end. Seen to fail with a gateway that buffers."""
    body: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Count"}], "max_tokens": 128, "ignore_eos": True}
    ledger = await stream(serving.host, serving.port, "/v1/chat/completions", body)
    assert ledger.broken_promises == []
    arrived_s = [token.at_s - ledger.started_s for token in ledger.tokens[0]]
    assert len(arrived_s) == 128 and arrived_s[31] < 0.9 * arrived_s[-1], arrived_s


def test_nothing_listens_outside_loopback(serving: Serving) -> None:
    pids = [serving.process.pid, *(process.pid for process in descendants(serving.process.pid))]
    found = listeners(pids)
    assert any(listener.port == serving.port for listener in found)
    assert not [listener for listener in found if not listener.is_loopback]


def test_demo_cluster_is_small(serving: Serving) -> None:
    """Four torch workers within what two may take. The time to ready is printed: it says more of the machine's other work than of ours."""
    pids = [serving.process.pid, *(process.pid for process in descendants(serving.process.pid))]
    size = pss_bytes(pids)
    print(f"ready after {serving.ready_s:.1f} s, {size / (1 << 30):.2f} GiB PSS in {len(pids)} processes")
    assert size <= PSS_BYTES_MAX


def test_what_serves_has_the_priority_it_was_started_with(serving: Serving) -> None:
    """Ray would start its workers at niceness 15. Seen to fail without RAY_worker_niceness."""
    own = os.getpriority(os.PRIO_PROCESS, serving.process.pid)
    niceness = {process.pid: os.getpriority(os.PRIO_PROCESS, process.pid) for process in descendants(serving.process.pid)}
    assert {niceness[row["pid"]] for row in serving.workers().values()} == {own}
    assert set(niceness.values()) == {own}, niceness


@pytest.mark.parametrize("command", [[sys.executable, "examples/openai_client.py"], ["bash", "examples/curl.sh"]], ids=["openai", "curl"])
def test_example_runs_against_the_cluster(serving: Serving, command: list[str]) -> None:
    url = f"{serving.url}/v1" if command[0] == sys.executable else serving.url
    outcome = run([*command, url])
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert "demo" in outcome.stdout


def test_status_command_prints_one_document(serving: Serving) -> None:
    outcome = run([sys.executable, "-m", "baton", "status", "--json", "--url", serving.url])
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert json.loads(outcome.stdout)["schema"] == "baton.status.v1"
