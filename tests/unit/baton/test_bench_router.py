"""`baton bench router`: rows from known turns, who takes part, and the command itself at a tiny size, its processes included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.bench.peers import Contender
from baton.bench.report import TREE
from baton.bench.router_rows import rows_of
from baton.bench.router_run import STAGES, Measured, RouterPlan, Turn, find_subjects, stages_of
from protocol.errors import ConfigError

PLAN = RouterPlan(
    stages=STAGES[:2],
    subjects=(Contender(name="baton", command=()), Contender(name="dynamo", command=())),
    num_workers=64,
    num_blocks=1000,
    num_live=5000,
    num_rounds=3,
    seed=0,
)


def turn(*microseconds: float) -> Turn:
    seconds = tuple(us * 1e-6 for us in microseconds)
    return Turn(seconds=seconds, cpu_s=tuple(s / 2 for s in seconds))


def measured() -> Measured:
    seen = Measured()
    seen.turns["index", "hash/4k", "baton"] = [turn(10, 20, 30), turn(41, 41, 41), turn(20, 25, 90)]
    seen.turns["index", "hash/4k", "dynamo"] = [turn(36)]
    seen.turns["decide", "decide/4k", "baton"] = [turn(100, 100), turn(200, 200), turn(120, 120)]
    seen.turns["decide", "decide/4k/100k", "baton"] = [turn(120, 120), turn(220, 220), turn(180, 180)]
    seen.turns["decide", "life/4k", "baton"] = [turn(500_000)]
    seen.lost["decide", "decide/32k", "dynamo"] = "it fell over"
    seen.subjects["index"] = {"baton": {"num_blocks": 10, "num_pairs": 20, "index_bytes": 3000, "told_bytes": 2800}}
    return seen


def test_a_figure_is_the_median_of_rounds_and_of_ours_alone_something_is_asked() -> None:
    """Seen to fail with the mean of a turn taken, and with the target on every subject's row."""
    rows = {row.name: row for row in rows_of(PLAN, measured())}
    assert (rows["hash/4k/baton"].value, rows["hash/4k/baton"].ok) == (25.0, True)
    assert rows["hash/4k/baton"].details["cpu_us"] == 12.5 and rows["hash/4k/baton"].details["rounds_us"] == [20.0, 41.0, 25.0]
    assert (rows["hash/4k/dynamo"].value, rows["hash/4k/dynamo"].target) == (36.0, None)
    assert (rows["decide/4k/p50/baton"].value, rows["decide/4k/p50/baton"].ok) == (120.0, False)
    assert rows["match/4k/confirmed/baton"].ok is False, "asked for and not measured"
    assert "match/4k/confirmed/dynamo" not in rows and rows["decide/32k/p50/dynamo"].details["reason"] == "it fell over"
    assert "socket/4k/p50/baton" not in rows, "a stage that was not asked for"


def test_growth_is_paired_by_round_and_a_rate_is_the_inverse_of_a_mean() -> None:
    """Seen to fail with the medians' ratio in place of the ratios' median."""
    rows = {row.name: row for row in rows_of(PLAN, measured())}
    assert (rows["growth/1k_to_100k"].value, rows["growth/1k_to_100k"].details["ratios"]) == (1.2, [1.2, 1.1, 1.5])
    assert (rows["rate/decisions"].value, rows["rate/decisions"].ok) == (8333, True)
    assert rows["rate/lives"].value == 4000 and rows["rate/lives"].target is None
    assert rows["memory/pair"].value == 150.0


def test_stages_and_environments_are_known_or_refused() -> None:
    assert [stage.name for stage in stages_of("decide, index")] == ["index", "decide"]
    with pytest.raises(ConfigError, match="'nothing' is unknown; choose from index, decide, wide, socket"):
        stages_of("nothing")
    subjects, absent = find_subjects([])
    assert [subject.name for subject in subjects] == ["baton"] and "--peer-env dynamo=" in absent["dynamo"]
    with pytest.raises(ConfigError, match="dynamo"):
        find_subjects(["vllm=/usr/bin/python3"])


@pytest.mark.slow
def test_the_command_measures_every_stage(tmp_path: Path) -> None:
    """At a size that says nothing, its processes included. Seen to fail with the gateway's answers left untold."""
    output = tmp_path / "router.json"
    command = [sys.executable, "-P", "-m", "baton", "bench", "router", "--workers", "4", "--blocks", "10000", "--window", "1000"]
    environment = os.environ | {"PYTHONPATH": str(TREE)}
    done = subprocess.run([*command, "--repeats", "1", "--json", "--output", str(output)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout)
    assert document["schema"] == "baton.bench.router.v1" and json.loads(output.read_text())["rows"] == document["rows"]
    rows = {row["name"]: row for row in document["rows"]}
    assert all(row["value"] is not None and row["value"] > 0 for row in rows.values()), rows
    for name in ("hash/4k", "match/4k/confirmed", "match/4k/prefix_closed", "decide/4k/p50", "decide/32k/p50", "socket/4k/p50"):
        assert rows[f"{name}/baton"]["target"] is not None
    assert rows["wide/decide/4k/p50/baton"]["unit"] == "us" and rows["growth/1k_to_100k"]["unit"] == "ratio"
