"""`baton bench engine`: the conversation with engines in processes of their own, rounds, and what follows from them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from baton.bench.conversation import EngineLost, EngineProcess, WorkUnsupported
from baton.bench.engine_rows import rows_of
from baton.bench.engine_run import BenchPlan, MeasuredModel, Sample, compare_tokens, measure_model
from baton.bench.models import MODELS, bytes_per_token, prefill_flops, read_model
from baton.bench.peers import OURS, SPOKEN, Contender, environment_of, find_peers
from baton.bench.processor_time import ProcessorTime, others_between, pids_of
from baton.bench.report import Row
from baton.bench.workloads import AskedRequest, parse_workloads
from protocol.errors import ConfigError
from protocol.timeline import Timeline

FAKE = """
import runpy, subprocess, sys, time
spoken = runpy.run_path(sys.argv[1])
step_s, mood = float(sys.argv[2]), sys.argv[3]

class Fake:
    def load(self, asked):
        self.dtype = asked["dtype"]
        self.child = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if mood == "spins" else None
        return {"engine": "fake 1"}

    def prepare(self, requests, is_streamed):
        if mood == "refuses":
            raise spoken["Unsupported"]("it has no mind to")
        self.requests = requests

    def run(self):
        print("noise on stdout is no answer")
        if mood == "dies":
            raise RuntimeError("out of sorts")
        if mood == "hangs":
            time.sleep(60)
        n = max(r["num_tokens"] for r in self.requests)
        began = time.perf_counter()
        times = []
        for _ in range(n):
            time.sleep(step_s)
            times.append(time.perf_counter() - began)
        other = mood == "differs"
        return {
            "deliveries": [[(t, 1) for t in times[: r["num_tokens"]]] for r in self.requests],
            "token_ids": [[(r["prompt"][0] + i + other * (i > 4)) % 100 for i in range(r["num_tokens"])] for r in self.requests],
        }

spoken["answer"](Fake())
"""
REQUESTS = [AskedRequest(prompt=(5, 6, 7), num_tokens=3), AskedRequest(prompt=(9,), num_tokens=2)]
LOAD = {"dtype": "bfloat16", "num_threads": 1, "max_model_len": 64, "num_kv_tokens": 256, "max_num_seqs": 4}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return path


def fake(script: Path, name: str = "fake", *, step_s: float = 0.001, mood: str = "well") -> Contender:
    return Contender(name=name, command=(sys.executable, "-P", str(script), str(SPOKEN), str(step_s), mood))


def start(contender: Contender, folder: Path) -> EngineProcess:
    return EngineProcess(contender.name, contender.command, environment=environment_of(contender), log=folder / f"{contender.name}.log")


# --- the conversation -------------------------------------------------------------------------------------------------


def test_engine_gives_tokens_and_when_they_came(script: Path, tmp_path: Path) -> None:
    """Noise an engine prints does not break the conversation. Seen to fail without the dup2 in spoken.answer."""
    with start(fake(script), tmp_path) as process:
        assert process.load(tmp_path, **LOAD) == {"engine": "fake 1"}  # type: ignore[arg-type]
        timelines, token_ids = process.generate(REQUESTS, is_streamed=True)
    assert token_ids == [[5, 6, 7], [9, 10]]
    assert [timeline.num_tokens for timeline in timelines] == [3, 2]
    assert timelines[0].ttft_s is not None and timelines[0].ttft_s >= 0.001
    assert pids_of([process.session]) == []


@pytest.mark.parametrize(("mood", "kind", "words"), [("dies", EngineLost, "out of sorts"), ("refuses", WorkUnsupported, "no mind to")])
def test_engine_that_fails_says_why(mood: str, kind: type[Exception], words: str, script: Path, tmp_path: Path) -> None:
    with start(fake(script, mood=mood), tmp_path) as process:
        process.load(tmp_path, **LOAD)  # type: ignore[arg-type]
        with pytest.raises(kind, match=words):
            process.generate(REQUESTS, is_streamed=True)


def test_silent_engine_is_given_up(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.bench.conversation.RUN_TIMEOUT_S", 0.3)
    monkeypatch.setattr("baton.bench.conversation.END_TIMEOUT_S", 0.5)
    with start(fake(script, mood="hangs"), tmp_path) as process:
        process.load(tmp_path, **LOAD)  # type: ignore[arg-type]
        with pytest.raises(EngineLost, match="no answer within"):
            process.generate(REQUESTS, is_streamed=True)


def test_paused_engine_stands_still_with_its_children(script: Path, tmp_path: Path) -> None:
    """A child that spins takes no processor time while it is paused. Seen to fail with the signal sent to the engine alone."""
    with start(fake(script, mood="spins"), tmp_path) as process:
        process.load(tmp_path, **LOAD)  # type: ignore[arg-type]
        process.pause()
        deadline_s = time.monotonic() + 5
        while not all(state == "T" for state in states(process.session)) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert states(process.session) == ["T", "T"]
        process.resume()
        assert process.generate(REQUESTS, is_streamed=True)[1] == [[5, 6, 7], [9, 10]]
    assert pids_of([process.session]) == []


def states(session: int) -> list[str]:
    return [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids_of([session])]


def test_what_others_used_is_what_is_left_of_the_busy_time() -> None:
    before = ProcessorTime(wall_s=10.0, busy_s=100.0, own_s=50.0)
    after = ProcessorTime(wall_s=12.0, busy_s=103.0, own_s=52.0)
    assert others_between(before, after) == pytest.approx(0.5)
    assert others_between(before, ProcessorTime(wall_s=12.0, busy_s=101.9, own_s=52.0)) == 0.0


# --- workloads --------------------------------------------------------------------------------------------------------


def test_workloads_are_drawn_from_their_seed() -> None:
    """Prompts are new in each run, a shared prefix is one within it, and arrivals grow. Seen to fail with a prefix for each."""
    shared, online, stream = parse_workloads("shared_prefix,online@4,one_stream")
    requests = shared.requests(Random(1), 500)
    assert requests == shared.requests(Random(1), 500) != shared.requests(Random(2), 500)
    assert len(requests) == 32 and {len(r.prompt) for r in requests} == {1152} and {r.num_tokens for r in requests} == {16}
    assert len({r.prompt[:1024] for r in requests}) == 1 and len({r.prompt for r in requests}) == 32
    arrivals = [r.at_s for r in online.requests(Random(1), 500)]
    assert arrivals == sorted(arrivals) and arrivals[0] == 0 and 2 < arrivals[-1] < 12
    assert (stream.max_model_len, stream.num_kv_tokens) == (320, 320)


@pytest.mark.parametrize("names", ["", "batch", "batch0", "prefill2", "online@0", "one_stream,nothing"])
def test_unknown_workload_is_told_with_those_there_are(names: str) -> None:
    with pytest.raises(ConfigError, match="shared_prefix"):
        parse_workloads(names)


def test_figures_follow_from_when_tokens_came() -> None:
    """Seen to fail with the first token's time in the pace of one stream."""
    stream, batch, prefill = parse_workloads("one_stream,batch2,prefill2k")
    slow_first = Timeline(arrival_s=0.0, token_times_s=[1.0, 1.1, 1.2, 1.3], token_counts=[1, 1, 1, 1])
    assert stream.measures[0].value([slow_first]) == pytest.approx(100.0)
    at_the_end = Timeline(arrival_s=0.0, token_times_s=[2.0], token_counts=[64])
    assert batch.measures[0].value([at_the_end, slow_first]) == pytest.approx(68 / 2.0)
    assert prefill.measures[0].value([slow_first]) == pytest.approx(2048.0)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "millions"), [("15m", 15), ("125m", 110), ("0.5b", 404), ("moe", 41.6)])
def test_arithmetic_counts_what_a_token_reads(name: str, millions: float, tmp_path: Path) -> None:
    """15M: tied, all weights are read. MoE: 2 of 16 experts. Seen to fail with all experts counted."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    model = read_model(tmp_path)
    assert bytes_per_token(model) / 2e6 == pytest.approx(millions, rel=0.05)
    inner = bytes_per_token(model) / 2 - model.vocab_size * model.hidden_size
    but_last = inner * (model.num_layers - 1) / model.num_layers
    assert (
        2 * but_last * 2048
        < prefill_flops(model, 2048)
        < 2 * inner * 2048 + 2048 * 2048 * 2 * model.num_layers * model.num_heads * model.head_dim
    )


def test_one_token_of_prefill_is_two_flops_a_weight_and_one_key(tmp_path: Path) -> None:
    """Seen to fail with the last layer's MLP counted for every token, by the next assertion's difference."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS["15m"]))
    model = read_model(tmp_path)
    attended = 4 * model.num_heads * model.head_dim
    one, two = prefill_flops(model, 1), prefill_flops(model, 2)
    assert one == pytest.approx(bytes_per_token(model) + attended * ((model.num_layers - 1) / 2 + 1), rel=1e-6)
    inner = bytes_per_token(model) / 2 - model.vocab_size * model.hidden_size
    kv = 2 * model.num_kv_heads * model.head_dim * model.hidden_size
    assert two - one == pytest.approx(2 * (inner * 5 / 6 + kv) + attended * (5 * 3 / 2 + 1), rel=1e-3)


# --- rounds and rows --------------------------------------------------------------------------------------------------


def test_each_engine_does_each_workload_in_each_round(script: Path, tmp_path: Path) -> None:
    """Three fakes: ours, one twice as slow, and one whose tokens differ and that dies in float32 and after it too."""
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    (model_dir / "config.json").write_text(json.dumps(MODELS["15m"]))
    contenders = (
        fake(script, OURS, step_s=0.001),
        fake(script, "vllm", step_s=0.004, mood="differs"),
        fake(script, "llamacpp", mood="dies"),
    )
    plan = BenchPlan(
        workloads=parse_workloads("one_stream,batch2"), contenders=contenders, num_threads=1, num_rounds=2, num_retries=0, seed=1
    )
    said: list[str] = []
    measured = measure_model(plan, model_dir, tmp_path, said.append)
    rows = {row.name: row for row in rows_of(plan, measured)}
    assert "differ: prompt 1, output token 6 of 32" in measured.tokens["vllm"] and "out of sorts" in measured.tokens["llamacpp"]
    for workload in ("one_stream", "batch2"):
        at = f"model/{workload}"
        assert len(rows[f"{at}/baton"].details["rounds"]) == 2  # type: ignore[arg-type]
        assert rows[f"{at}/vs_vllm"].value is not None and rows[f"{at}/vs_vllm"].value > 1.5  # type: ignore[operator]
        assert rows[f"{at}/vs_vllm"].details["verdict"] == "undecided"
        assert rows[f"{at}/llamacpp"].value is None and rows[f"{at}/llamacpp"].details["reason"] == "RuntimeError: out of sorts"
        assert rows[f"{at}/vs_llamacpp"].details["reason"] == "llamacpp: RuntimeError: out of sorts"
    assert any("round 2/2, batch2, vllm" in line for line in said)


def test_ratio_leaves_disturbed_pairs_out() -> None:
    """7 quiet pairs say 2, 2 disturbed ones say 0.1. Seen to fail with all pairs taken."""
    plan, measured = comparison([2.0] * 7 + [0.1] * 2, others=[0.0] * 7 + [0.9] * 2)
    row = ratio_row(plan, measured)
    assert row.value == 2.0 and row.details["verdict"] == "wins" and row.details["disturbed_pairs"] == 2
    assert row.ok is True and str(row.target) == ">= 1.15"


def test_nothing_is_decided_where_every_pair_was_disturbed() -> None:
    """Seen to fail without the replaced verdict."""
    row = ratio_row(*comparison([2.0] * 9, others=[0.5] * 9))
    assert row.value == 2.0 and row.details["verdict"] == "undecided" and row.ok is None


def test_each_streams_share_is_of_the_bandwidth_beside_it() -> None:
    """Half the bandwidth makes tokens twice as slow, and the share stays 0.9. Seen to fail with the median of all rounds' bandwidth."""
    from engine.models.config import parse_model_config

    engines = (Contender(name=OURS, command=()),)
    plan = BenchPlan(workloads=parse_workloads("one_stream"), contenders=engines, num_threads=2, num_rounds=5, num_retries=0, seed=0)
    model = parse_model_config(MODELS["0.5b"], {})
    measured = MeasuredModel(label="0.5b", model=model, stream_bytes_per_s=[60e9] * 5, peak_flops_per_s=[1e12] * 5)
    measured.stream_beside = {i: 30e9 if i % 2 else 60e9 for i in range(5)}
    of_round = {i: 1e3 * bytes_per_token(model) / (0.9 * beside) for i, beside in measured.stream_beside.items()}
    measured.samples[OURS, "one_stream"] = {i: Sample(values=(ms,), others=0.0, num_tries=1) for i, ms in of_round.items()}
    share = next(row for row in rows_of(plan, measured) if row.name == "0.5b/one_stream/stream_share")
    assert share.value == pytest.approx(0.9, rel=1e-3) and share.ok is not None
    assert share.details["rounds"] == pytest.approx([0.9] * 5, rel=1e-3)


def comparison(ratios: list[float], others: list[float]) -> tuple[BenchPlan, MeasuredModel]:
    engines = tuple(Contender(name=name, command=()) for name in (OURS, "vllm"))
    plan = BenchPlan(workloads=parse_workloads("batch32"), contenders=engines, num_threads=2, num_rounds=9, num_retries=0, seed=0)
    from engine.models.config import parse_model_config

    measured = MeasuredModel(label="125m", model=parse_model_config(MODELS["125m"], {}))
    for name, values in ((OURS, ratios), ("vllm", [1.0] * len(ratios))):
        samples = {i: Sample(values=(v,), others=o, num_tries=1) for i, (v, o) in enumerate(zip(values, others, strict=True))}
        measured.samples[name, "batch32"] = samples
    return plan, measured


def ratio_row(plan: BenchPlan, measured: MeasuredModel) -> Row:
    return next(row for row in rows_of(plan, measured) if row.name == "125m/batch32/vs_vllm")


def test_tokens_are_compared_to_the_first_that_differs() -> None:
    assert compare_tokens([[1, 2]], [[1, 2]]) == "equal"
    assert compare_tokens([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == "differ: prompt 2, output token 2 of 2: ours 4, theirs 5"


# --- peers and the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "environments", "words"),
    [
        ("vllm", [], "--peer-env vllm=/path/to/python (docs/benchmarks.md"),
        ("sglang", [], "choose from vllm, transformers, llamacpp"),
        ("vllm", ["vllm=/nowhere/python"], "/nowhere/python is not a Python"),
        ("vllm", ["/usr/bin/python3"], "is not NAME=PYTHON"),
    ],
)
def test_missing_environment_is_told_with_the_remedy(asked: str, environments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as told:
        find_peers(asked, environments)
    assert words in str(told.value)


def test_peer_takes_part_where_it_is_asked_to() -> None:
    (peer,) = find_peers("llamacpp:one_stream+batch8", [f"llamacpp={sys.executable}"])
    assert peer.takes_part_in("one_stream") and peer.takes_part_in("batch8") and not peer.takes_part_in("batch32")
    assert peer.command[1] == "-P"  # else `import vllm` in vllm.py would find itself
    assert "PYTHONPATH" not in environment_of(peer)


def test_command_prints_a_valid_document(tmp_path: Path) -> None:
    """The real engine, once through."""
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "baton", "bench", "engine", "--model", "15m", "--workloads", "one_stream", "--rounds", "1"]
    outcome = subprocess.run(
        [*command, "--threads", "1", "--retries", "0", "--json", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    assert document == json.loads(output.read_text())
    assert document["schema"] == "baton.bench.engine.v1" and document["rounds"] == 1
    rows = {row["name"]: row for row in document["rows"]}
    assert all({"name", "value", "unit", "target", "ok"} <= set(row) for row in rows.values())
    assert rows["15m/one_stream/baton"]["value"] > 0 and rows["15m/one_stream/baton"]["unit"] == "ms/token"
    assert rows["15m/memory_beyond/baton"]["value"] > 0 and document["engines"]["15m"]["baton"]["engine"].startswith("baton ")
