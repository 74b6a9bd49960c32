"""`baton bench transfer`: targets, ratios and digest costs from known turns; sizes as they are written; who takes part; and the command
itself at tiny sizes, its own two processes included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from baton.bench.peers import Contender
from baton.bench.report import TREE, Row
from baton.bench.transfer import chunk_of, digest_words, size_of
from baton.bench.transfer_handoff import Handoff, HandoffRun, Record, handoff_of, handoff_rows
from baton.bench.transfer_rows import rows_of, target_of
from baton.bench.transfer_run import Chunk, Measured, Subject, Total, TransferPlan, Turn, find_subjects
from baton.bench.transfer_spoken import check, draw_repeats, make_pool, mark
from engine.demo import DEMO_MODEL_DIR
from protocol.errors import ConfigError, ServiceError

NUM_ROUNDS = 9
CHUNK = Chunk(label="16KiB", size_bytes=16 << 10)
TOTAL = Total(label="4MiB", size_bytes=4 << 20)
CELL = (CHUNK.label, TOTAL.label)


def subject(name: str, *paths: str) -> Subject:
    return Subject(contender=Contender(name=name, command=()), paths={path: path for path in paths or (name,)})


PLAN = TransferPlan(
    chunks=(CHUNK,),
    totals=(TOTAL,),
    subjects=(subject("baton", "copy", "shm", "shm_sampled", "shm_full"), subject("nixl")),
    pool_bytes=64 << 20,
    num_rounds=NUM_ROUNDS,
    seed=0,
)


def measured(seconds: dict[str, list[float]], others: list[float] | None = None) -> Measured:
    turns = {
        (CELL, path): {i: Turn(seconds=(s, s, s), offer_s=1e-4 if "_" in path else None) for i, s in enumerate(values)}
        for path, values in seconds.items()
    }
    return Measured(turns=turns, others={CELL: dict(enumerate(others or [0.0] * NUM_ROUNDS))}, moved_bytes={CELL: 4 << 20})


COPY = [100e-6 * (1 + i / 10) for i in range(NUM_ROUNDS)]  # a machine that grows slower: only pairs are comparable
KNOWN = {
    "copy": COPY,
    "shm": [s * 1.25 for s in COPY],
    "shm_sampled": [s * 1.25 + 42e-6 for s in COPY],
    "shm_full": [s * 1.25 + 84e-6 for s in COPY],
    "nixl": [s * 2.5 for s in COPY],
}


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


@pytest.mark.pure
def test_a_ratio_is_theirs_over_ours_pair_by_pair_and_held_against_its_target() -> None:
    """Turns of which the ratios are 0.8 and 2 in every round. Seen to fail with the pair turned round ("higher")."""
    rows = by_name(rows_of(PLAN, measured(KNOWN)))
    beside_copy, beside_nixl = rows["4MiB/16KiB/shm_vs_copy"], rows["4MiB/16KiB/shm_vs_nixl"]
    assert beside_copy.value == pytest.approx(0.8) and str(beside_copy.target) == ">= 0.8"
    assert beside_copy.details["interval"] == [0.8, 0.8] and beside_copy.details["verdict"] == "loses"
    assert beside_nixl.value == pytest.approx(2.0) and beside_nixl.ok and str(beside_nixl.target) == ">= 1.5"
    assert rows["4MiB/16KiB/copy"].value == pytest.approx((4 << 20) / 140e-6 / 1e9, rel=1e-3) and rows["4MiB/16KiB/copy"].unit == "GB/s"
    assert rows["4MiB/16KiB/copy"].details["p50_us"] == 140 and 179 < rows["4MiB/16KiB/copy"].details["p99_us"] <= 180  # type: ignore[operator]
    assert "4MiB/16KiB/shm_vs_ray" not in rows, "who is not there has no rows"


@pytest.mark.pure
def test_each_digest_mode_states_what_a_gigabyte_of_it_costs_beside_the_ratio() -> None:
    """42 us a 4 MiB at the target are 10 ms a GB, 100 us an offer 24. Seen to fail with `digested` taken for the difference."""
    costs = by_name(rows_of(PLAN, measured(KNOWN)))["4MiB/16KiB/shm_vs_copy"].details["digest_ms_per_gb"]
    assert isinstance(costs, dict) and list(costs) == ["sampled", "full"]
    assert (
        costs["sampled"]["pull"] == pytest.approx(42e-3 / ((4 << 20) / 1e9), rel=1e-3) and costs["full"]["pull"] > costs["sampled"]["pull"]
    )
    assert costs["full"]["offer"] == pytest.approx(23.84, rel=1e-3)
    assert digest_words(costs) == "10 + 23.8, 20 + 23.8" and digest_words({}) == ""


@pytest.mark.pure
def test_disturbed_rounds_are_passed_over_and_when_all_are_nothing_is_decided() -> None:
    """One round in which ours was ten times slower was disturbed. Seen to fail with `_quiet` giving every round."""
    slow = {**KNOWN, "shm": [10 * KNOWN["shm"][0], *KNOWN["shm"][1:]]}
    row = by_name(rows_of(PLAN, measured(slow, [1.0] + [0.0] * 8)))["4MiB/16KiB/shm_vs_copy"]
    assert row.details["disturbed_pairs"] == 1 and len(row.details["ratios"]) == 8  # type: ignore[arg-type]
    row = by_name(rows_of(PLAN, measured(KNOWN, [1.0] * NUM_ROUNDS)))["4MiB/16KiB/shm_vs_copy"]
    assert row.ok is None and row.details["verdict"] == "undecided"


@pytest.mark.pure
def test_a_lost_path_keeps_its_rows_with_the_reason() -> None:
    """Seen to fail with rows of paths without turns left out."""
    lost = measured({path: turns for path, turns in KNOWN.items() if path != "nixl"})
    lost.lost[CELL, "nixl"] = "it fell over"
    rows = by_name(rows_of(PLAN, lost))
    assert rows["4MiB/16KiB/nixl"].details["reason"] == "it fell over"
    assert rows["4MiB/16KiB/shm_vs_nixl"].details["reason"] == "nixl: it fell over" and rows["4MiB/16KiB/shm_vs_nixl"].ok is False


@pytest.mark.pure
@pytest.mark.parametrize(
    ("ours", "theirs", "chunk_kib", "total_kib", "bound"),
    [
        ("shm", "copy", 16, 4096, 0.8),
        ("shm", "copy", 576, 65536, 0.8),
        ("shm", "copy", 16, 256, None),
        ("shm", "copy", 4, 4096, 0.6),
        ("shm", "nixl", 64, 65536, 1.5),
        ("shm", "nixl", 4, 65536, 3.0),
        ("shm", "ray", 16, 256, 20.0),
        ("shm", "ray", 16, 65536, 2.5),
        ("tcp", "socket", 16, 4096, 0.55),
        ("tcp", "socket", 4, 4096, None),
        ("tcp", "nixl_tcp", 16, 65536, 3.0),
        ("tcp", "gloo", 16, 65536, 1.8),
        ("ucx", "ucxx", 16, 65536, None),
    ],
)
def test_targets_are_those_that_were_asked_for(ours: str, theirs: str, chunk_kib: int, total_kib: int, bound: float | None) -> None:
    """Seen to fail with 4 KiB chunks held to the bound of large ones."""
    target = target_of(ours, theirs, Chunk(label="", size_bytes=chunk_kib << 10), Total(label="", size_bytes=total_kib << 10))
    assert (None if target is None else target.bound) == bound


@pytest.mark.pure
def test_a_total_is_at_least_a_chunk_and_much_less_than_the_pool() -> None:
    """Seen to fail without the first condition: transfers of no block at all."""
    totals = tuple(Total(label=f"{kib}", size_bytes=kib << 10) for kib in (4, 16, 16384, 65536))
    assert [total.label for total in replace(PLAN, totals=totals).totals_of(CHUNK)] == ["16", "16384"]


@pytest.mark.pure
def test_sizes_and_shapes_are_read_as_they_are_written() -> None:
    assert [size_of(text) for text in ("4KiB", "64MiB", "1GiB")] == [4 << 10, 64 << 20, 1 << 30]
    assert chunk_of("125m") == Chunk(label="125m", size_bytes=16 * 12 * 2 * 12 * 64 * 2, layout="125m")
    for wrong in ("4", "0KiB", "-4KiB", "4kb", "many"):
        with pytest.raises(ConfigError, match="is no size"):
            size_of(wrong)
    with pytest.raises(ConfigError, match="not a multiple of 4 KiB"):
        chunk_of("6KiB")


@pytest.mark.pure
def test_a_peer_without_an_environment_is_left_out_and_said_so() -> None:
    """Seen to fail with peers that need no environment of their own left out too."""
    subjects, absent = find_subjects("nixl,nixl_tcp,gloo,ray", [])
    assert [s.contender.name for s in subjects] == ["baton", "gloo", "ray"] and list(absent) == ["nixl", "nixl_tcp"]
    assert "--peer-env nixl=" in absent["nixl_tcp"]
    subjects, _ = find_subjects("nixl_tcp,ucxx", [f"nixl={sys.executable}", f"ucxx={sys.executable}"])
    assert [s.contender.name for s in subjects] == ["baton", "nixl_tcp", "ucxx", "baton_ucx"]
    assert subjects[1].environment["UCX_TLS"] == "tcp" and subjects[3].paths == {"ucx": "ucx/off"}
    with pytest.raises(ConfigError, match="peer 'smoke' is unknown"):
        find_subjects("smoke", [])


@pytest.mark.pure
def test_blocks_that_did_not_come_are_noticed() -> None:
    """Seen to fail with the targets not wiped: the second look finds what the first transfer brought."""
    source, target = make_pool(4096, 1 << 20), make_pool(4096, 1 << 20)
    mark(source, 4096)
    (sources, targets), again = draw_repeats("0", 1, num_blocks=256, count=8)
    assert again != (sources, targets) and draw_repeats("0", 1, num_blocks=256, count=8) == [(sources, targets), again]
    rows = source.reshape(256, -1), target.reshape(256, -1)
    rows[1][targets] = rows[0][sources]
    check(target, 4096, sources, targets)
    with pytest.raises(RuntimeError, match="8 of 8 blocks"):
        check(target, 4096, sources, targets)
    rows[1][targets] = rows[0][sources]
    rows[1][targets[3], 4095] ^= 1
    with pytest.raises(RuntimeError, match="1 of 8 blocks"):
        check(target, 4096, sources, targets)


@pytest.mark.pure
def test_a_handoff_is_cut_at_the_last_step_of_prefill_and_the_first_of_decode() -> None:
    """Two chunks of a prompt, then two tokens. Seen to fail with the first chunk's end taken, and with the last decode step."""
    prefill = [Record(what="step", began_s=0.0, ended_s=1.0), Record(what="step", began_s=1.0, ended_s=2.0)]
    prefill.append(Record(what="offer", began_s=2.125, ended_s=2.25))
    decode = [
        Record(what="copy", began_s=2.6, ended_s=2.9, size_bytes=10),
        Record(what="pull", began_s=2.5, ended_s=3.0, size_bytes=10, path="shm"),
        Record(what="step", began_s=3.25, ended_s=4.0),
        Record(what="step", began_s=4.0, ended_s=5.0),
    ]
    handoff = handoff_of(prefill, decode)
    assert (handoff.whole_s, handoff.pull_s, handoff.control_s, handoff.offer_s) == (
        1.25,
        0.5,
        0.75,
        0.125,
    ) and handoff.copy_s == handoff.exposed_s == pytest.approx(0.3)
    with pytest.raises(ServiceError, match="not handed off"):
        handoff_of(prefill, decode[2:])


@pytest.mark.pure
def test_the_handoff_is_held_to_a_millisecond_of_control_and_to_its_copy() -> None:
    """0.9 ms of control beside a copy of 10 ms. Seen to fail with the whole divided before the millisecond is taken off."""
    late = Handoff(
        until_pull_s=0.6e-3, offer_s=0.1e-3, pull_s=11e-3, copy_s=10e-3, exposed_s=10e-3, until_step_s=0.3e-3, size_bytes=1, path="shm"
    )
    early = replace(late, pull_s=1e-3, copy_s=200e-3, exposed_s=0.5e-3)
    run = HandoffRun(model="125m", num_layers=12, num_prompt_tokens=1024, early=(early,) * 9, late=(late,) * 9)
    rows = by_name(handoff_rows(run))
    control, whole = rows["handoff/125m/1024/late/control"], rows["handoff/125m/1024/late/whole_less_1ms_vs_copy"]
    assert control.value == pytest.approx(0.9) and control.ok and control.unit == "ms"
    over_tcp = by_name(handoff_rows(replace(run, late=(replace(late, path="tcp"),) * 9)))
    assert over_tcp["handoff/125m/1024/late/control"].ok is None, "what is asked is asked of shared memory"
    assert whole.value == pytest.approx(1.09) and whole.ok and rows["handoff/125m/1024/late/whole"].value == pytest.approx(11.9)
    assert rows["handoff/125m/1024/early/whole_less_1ms_vs_copy"].value == pytest.approx(0.09), "beside the copy alone"
    exposed = rows["handoff/125m/1024/layerwise_exposed"]
    assert exposed.value == pytest.approx(0.05) and exposed.ok and str(exposed.target) == "<= 0.1083"


@pytest.mark.pure
def test_an_early_handoff_is_cut_at_its_completion_and_only_what_is_left_of_its_copy_counts() -> None:
    """The copy began long before the step's end. Seen to fail with `began_s` of the pull, and with the whole copy exposed."""
    prefill = [Record(what="step", began_s=0.0, ended_s=2.0), Record(what="offer", began_s=2.0, ended_s=2.25)]
    decode = [
        Record(what="complete", began_s=2.5, ended_s=2.5),
        Record(what="copy", began_s=0.5, ended_s=2.75, size_bytes=10),
        Record(what="pull", began_s=0.25, ended_s=3.0, size_bytes=10, path="shm"),
        Record(what="step", began_s=3.25, ended_s=4.0),
    ]
    handoff = handoff_of(prefill, decode)
    assert (handoff.until_pull_s, handoff.pull_s, handoff.until_step_s, handoff.exposed_s) == (0.5, 0.5, 0.25, 0.75)


def test_the_command_moves_blocks_over_every_path_it_can_and_says_who_is_missing(tmp_path: Path) -> None:
    """Tiny pools, one round, our two processes for real; every word that arrives is compared there. Seen to fail with `copy_runs` of the
    subject's `copy` given the targets as sources."""
    command = [sys.executable, "-P", "-m", "baton", "bench", "transfer", "--chunks", "4KiB,15m", "--totals", "64KiB,256KiB"]
    command += ["--pool", "4MiB", "--rounds", "1", "--prompts", "", "--compare", "nixl", "--json", "--output", str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHONPATH": str(TREE)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout)
    assert document["schema"] == "baton.bench.transfer.v1" and {"machine", "commit", "seed", "rows"} <= document.keys()
    assert document["absent"].keys() == {"nixl"} and document["subjects"].keys() == {"baton"}
    rows = {row["name"]: row for row in document["rows"]}
    for path in ("copy", "shm", "shm_sampled", "shm_full", "socket", "tcp", "tcp_full"):
        assert rows[f"64KiB/4KiB/{path}"]["value"] > 0 and rows[f"256KiB/15m/{path}"]["value"] > 0
    assert rows["256KiB/4KiB/shm_vs_copy"]["digest_ms_per_gb"].keys() == {"sampled", "full"}
    assert rows["256KiB/15m/shm"]["size_bytes"] == 2 * 16 * 6 * 2 * 6 * 48 * 2 and "64KiB/15m/shm" not in rows
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == document["rows"]


def test_chunks_of_a_layout_are_its_blocks() -> None:
    """The pool that is measured is the one a worker would have. Seen to fail with layers of one head for every shape."""
    from baton.bench.transfer_source import layout_of
    from baton.bench.transfer_source import make_pool as make_worker_pool

    layout = layout_of("125m", chunk_of("125m").size_bytes)
    assert (layout.num_layers, layout.groups[0].num_kv_heads, layout.groups[0].head_dim) == (12, 12, 64)
    assert layout_of("", 16 << 10).block_bytes == 16 << 10 and layout_of("", 16 << 10).num_layers == 4
    pool = make_worker_pool(layout_of("", 4096), 1 << 20, marked=True)
    words = np.frombuffer(pool.region.blocks, dtype=np.uint64)
    assert words.all() and array("Q", pool.region.generations).count(1) == 256
    del words
    pool.close()


@pytest.mark.slow
def test_a_handoff_between_two_workers_is_timed() -> None:
    """The demo model's cluster for real, in a process of its own. Seen to fail with a worker keeping the
    records it has given: steps of the request before are cut."""
    command = [sys.executable, "-P", "-m", "baton", "bench", "transfer", "--chunks", "", "--compare", "", "--rounds", "1", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(TREE)}
    arguments = ["--model", str(DEMO_MODEL_DIR), "--prompts", "64,128"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["name"].rpartition("/")[2]: row for row in json.loads(done.stdout)["rows"] if "/128/late/" in row["name"]}
    assert rows["pull"]["path"] == "shm" and rows["pull"]["size_bytes"] > 0
    parts = rows["until_pull"]["value"] + rows["pull"]["value"] + rows["until_step"]["value"]
    assert rows["whole"]["value"] == pytest.approx(parts, rel=1e-3)
    assert (
        rows["until_pull"]["value"] > rows["offer"]["value"] > 0
        and rows["until_step"]["value"] > 0
        and 0 < rows["copy"]["value"] < rows["pull"]["value"]
    )
