"""`baton plan`: a table, a document, and a cluster.yaml that the loader and the simulator take and that does what was planned."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from baton.__main__ import app
from baton.plan import draws_of
from baton.trace_options import source_of
from control.compose import compose_worker, pool_sizes, step_time
from control.config import load_config
from engine.demo import DEMO_MODEL_DIR
from engine.published_steps import PUBLISHED
from engine.step_time import LinearStepTime, StepShape
from simulator.phases import run_phases
from simulator.placement_search import Found, Trial
from simulator.plan_config import Typical, cluster_tree
from simulator.pools import Link, Pool, Pools
from simulator.summary import Objective, summarise
from simulator.token_accurate import run_token_accurate
from simulator.traces.source import Source
from simulator.worker_models import known_workers, paced_workers

pytestmark = pytest.mark.pure

RUNNER = CliRunner()
ASKED = ["plan", "--gpus", "2", "--requests", "60", "--draws", "2", "--slo-ttft", "0.4", "--slo-tpot", "0.1"]
LINK = Link(latency_s=1e-3, bytes_per_s=300e9)
TYPICAL = Typical(prompt_tokens=780, context_tokens=900, longest_prompt_tokens=2003)


def found(pools: Pools, num_decoding: float = 40.0) -> Found:
    return Found(pools=pools, trial=Trial(rate_per_s=6.0, attainment=0.9, ttft_s=0.2, tpot_s=0.05, pause_s=0.06, num_decoding=num_decoding))


def asked_for(*, trace: str = "", generate: str = "", requests: int) -> Source:
    return source_of(trace, generate, rate=None, requests=requests, folder=None)


def test_the_command_prints_a_table_with_its_best_and_its_advice(tmp_path: Path) -> None:
    told = RUNNER.invoke(app, [*ASKED, "--rate", "1", "--output", str(tmp_path / "cluster.yaml")])
    assert told.exit_code == 0, told.output
    lines = told.stdout.splitlines()
    assert lines[0].startswith("opt-13b on 2 x a100-80g: TTFT 400 ms and TPOT 100 ms for 90% of sharegpt (prompts of ")
    (best,) = [line for line in lines if line.startswith("*  ")]
    assert best.split("  ")[-1].strip() in ("1", "2") and lines[2].endswith("GPUs for 1/s")
    assert any("prefill 1 x TP1, decode 1 x TP1" in line for line in lines) and any(
        "mixed 2 x TP1, chunks of 512" in line for line in lines
    )
    assert "Note: no pipeline parallelism: a worker is one tensor-parallel group." in lines
    assert "under 2 seeds" in told.stdout and "DistServe's algorithm 2 says" in told.stdout


@pytest.mark.parametrize("slo_tpot", ["0.1", "0.03"])
def test_the_file_is_taken_by_serve_and_by_sim(tmp_path: Path, slo_tpot: str) -> None:
    """Workers come out of it as `baton serve` makes them, and a trace through it as `baton sim` does. Seen to fail with a section that
    the schema does not have, and with more blocks than the prompts' worker holds tokens."""
    file = tmp_path / "cluster.yaml"
    planned = RUNNER.invoke(app, [*ASKED, "--slo-tpot", slo_tpot, "--output", str(file), "--json"])
    assert planned.exit_code == 0, planned.output
    best = next(row for row in json.loads(planned.stdout)["rows"] if row["is_best"])
    config = load_config(file=file)
    made = compose_worker(config, DEMO_MODEL_DIR)
    held = {f"TP{tp}": published.kv_tokens for tp, published in PUBLISHED["opt-13b"].items()}
    assert made.num_kv_blocks == min(tokens for name, tokens in held.items() if name in best["name"]) // 16
    assert isinstance(made.step_time, LinearStepTime) and made.core.scheduler.max_num_seqs == 1024
    assert sum(pool_sizes(config).values()) == sum(map(int, re.findall(r"(\d) x TP", best["name"])))
    ran = RUNNER.invoke(app, ["sim", "--config", str(file), "--generate", "sharegpt", "--requests", "20", "--rate", "1", "--json"])
    assert ran.exit_code == 0 and json.loads(ran.stdout)["summary"]["num_finished"] == 20


def test_the_document_has_a_row_a_placement_and_the_same_seed_is_the_same_plan() -> None:
    """Seen to fail with the search's seed drawn from the system."""
    first, again = (json.loads(RUNNER.invoke(app, [*ASKED, "--json"]).stdout) for _ in range(2))
    assert first["schema"] == "baton.plan.v1" and first["asked"]["criterion"] == "joint" and first["lengths"]["name"] == "sharegpt"
    assert {row["name"]: row["gpus"] for row in first["rows"]}["prefill 1 x TP1, decode 1 x TP1"] == 2
    assert sum(row["is_best"] for row in first["rows"]) == 1 and first["as_published"]["unit"] == "prefill 1 x TP1, decode 1 x TP1"
    assert first["advice"] and len(first["draws"]["apart"]) == 2 and "no pipeline parallelism" in first["not_modelled"][0]
    assert first == again and first["command"].startswith("baton plan --gpus 2 --model opt-13b --gpu a100-80g --gpus-per-machine 8 ")
    other = json.loads(RUNNER.invoke(app, [*ASKED, "--json", "--seed", "5"]).stdout)
    assert other["rows"] != first["rows"]


def test_what_cannot_be_planned_is_told(tmp_path: Path) -> None:
    for change, why in (
        (["--model", "opt-14b"], "model is 'opt-14b', which is not known; did you mean 'opt-13b'"),
        (["--gpu", "h300"], "gpu is 'h300', which is not known; did you mean 'H200'"),
        (["--workload", "x"], "there is no generator 'x'"),
        (["--rate", "900", "--output", str(tmp_path / "x.yaml")], r"900 requests/s need [\d,]+ GPUs, 2 are given"),
        (["--slo-ttft", "0.001", "--output", str(tmp_path / "x.yaml")], "no placement meets the objective"),
    ):
        with pytest.raises(Exception, match=why):
            outcome = RUNNER.invoke(app, [*ASKED, *change])
            assert outcome.exception is not None, outcome.output
            raise outcome.exception
    assert not (tmp_path / "x.yaml").exists()
    with pytest.raises(Exception, match="nothing is asked for"):
        raise RUNNER.invoke(app, ["plan", "--gpus", "2"]).exception or AssertionError


def test_steps_of_the_file_are_those_of_its_pools_where_the_plan_works() -> None:
    """Prefill TP2, decode TP1, 40 sequences: within 0.1 % of what was published. Seen to fail with decode's pace taken from prefill's
    workers."""
    workers = known_workers("opt-13b", "a100-80g")
    tree = cluster_tree(found(Pools(prefill=Pool(1, 2), decode=Pool(1, 1))), 2, workers, TYPICAL, link=LINK, batch_tokens=512)
    config = load_config(tree)
    assert (config.workers.prefill_workers, config.workers.decode_workers, config.workers.mixed_workers) == (2, 2, 0)
    assert config.workers.num_kv_blocks == 66_144 // 16 and config.workers.max_num_batched_tokens == 2016
    assert config.router.transfer_s_per_token == pytest.approx(819_200 / 300e9, rel=1e-4) and config.model.model_id == "opt-13b"
    steps = step_time(config)
    assert steps is not None
    prompt, batch = StepShape().with_prefill(0, 780), StepShape(decodes=40, decode_reads=40 * 900)
    assert steps.step_s(prompt) == pytest.approx(PUBLISHED["opt-13b"][2].step_time.step_s(prompt), rel=1e-3)
    assert steps.step_s(batch) == pytest.approx(PUBLISHED["opt-13b"][1].step_time.step_s(batch), rel=1e-3)


@pytest.mark.parametrize("num_decodes", [1, 94, 95, 130])
def test_mixed_workers_read_their_weights_once_a_step_in_the_file_too(num_decodes: int) -> None:
    """Seen to fail with both bases in the file."""
    workers = known_workers("opt-13b", "a100-80g")
    pools = Pools(mixed=Pool(1, 1), chunk_tokens=512)
    config = load_config(cluster_tree(found(pools, num_decodes), 1, workers, TYPICAL, link=LINK, batch_tokens=512))
    assert config.workers.mixed_workers == 1 and config.workers.prefill_workers == 0 and config.workers.max_num_batched_tokens == 512
    steps = step_time(config)
    shape = StepShape(decodes=num_decodes, decode_reads=num_decodes * 900).with_prefill(0, 400)
    assert steps is not None and steps.step_s(shape) == pytest.approx(workers.by_gpus[1].step_time.step_s(shape), rel=0.02)


def test_a_pace_of_one_s_own_is_planned_with(tmp_path: Path) -> None:
    """The demo model's KV, one GPU each. Seen to fail with the published workers whatever is given."""
    file = tmp_path / "mine.yaml"
    tree = {"workers": {"executor": "paced", "num_kv_blocks": 500}, "paced": {"prefill_token_s": 1e-5, "decode_base_s": 0.004}}
    file.write_text(yaml.safe_dump(tree))
    (worker,) = paced_workers(load_config(file=file)).by_gpus.values()
    assert (worker.num_gpus, worker.kv_tokens, worker.kv_token_bytes) == (1, 8000, 4 * 2 * 2 * 64 * 2)
    assert worker.step_time.step_s(StepShape(prefill_tokens=100)) == pytest.approx(0.005 + 1e-3)
    told = RUNNER.invoke(app, [*ASKED, "--paced", str(file)])
    assert told.exit_code == 0 and told.stdout.startswith(f"{file} on 2 GPUs: TTFT 400 ms")
    file.write_text("workers: {executor: paced}")
    with pytest.raises(Exception, match=r"workers\.num_kv_blocks"):
        paced_workers(load_config(file=file))


def test_a_trace_is_played_at_each_rate(tmp_path: Path) -> None:
    """Its lengths and order as they are. Seen to fail with the trace's own times whatever the rate."""
    file = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 1000 * i, "input_length": 600, "output_length": 20, "hash_ids": [2 * i, 2 * i + 1]} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw = draws_of(asked_for(trace=str(file), requests=30))
    for rate in (2.0, 8.0):
        asked = draw(rate, 0)
        assert len(asked.requests) == 30 and asked.rate_per_s == pytest.approx(rate) and asked.requests[7].num_prompt_tokens == 600
    told = RUNNER.invoke(app, [*ASKED, "--trace", str(file)])
    assert told.exit_code == 0 and "prompts of 600 tokens, answers of 20" in told.stdout and "seeds" not in told.stdout


@pytest.mark.slow
@pytest.mark.parametrize("rate_per_s", [4.0, 6.0])
def test_the_cluster_itself_does_what_was_planned(rate_per_s: float) -> None:
    """DistServe's placement of OPT-13B on the cluster's own code, by the file: attainment within 5 points, medians within 10 %. Seen to
    fail with the prompts of the file in chunks of 512."""
    workers = known_workers("opt-13b", "a100-80g")
    pools, objective = Pools(prefill=Pool(1, 2), decode=Pool(1, 1)), Objective(ttft_s=0.2, tpot_s=0.1)
    trace = draws_of(asked_for(generate="sharegpt", requests=200))(rate_per_s, 0)
    tree = cluster_tree(found(pools), 1, workers, TYPICAL, link=LINK, batch_tokens=512)
    planned = summarise(run_phases(trace.requests, pools, workers.by_gpus, link=LINK, batch_tokens=512), objective)
    itself = summarise(run_token_accurate(trace, load_config(tree), policy="round_robin", seed=0), objective)
    assert planned.ttft is not None and planned.tpot is not None and itself.ttft is not None and itself.tpot is not None
    assert itself.attainment == pytest.approx(planned.attainment, abs=0.05)
    assert itself.ttft.p50 == pytest.approx(planned.ttft.p50, rel=0.1) and itself.tpot.p50 == pytest.approx(planned.tpot.p50, rel=0.1)
