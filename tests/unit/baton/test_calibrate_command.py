"""`baton calibrate` on a real engine: a pace comes out, and a simulated cluster runs at it."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from baton.__main__ import app
from control.config import load_config
from simulator.token_accurate import run_token_accurate
from simulator.traces.source import Source


def test_a_real_engine_is_measured_and_its_pace_is_run_at(tmp_path: Path) -> None:
    """The 15M shape, few sizes, once. Seen to fail with decodes that are introduced without the token they begin with."""
    written = tmp_path / "paced.yaml"
    asked = ["calibrate", "--model", "15m", "--rounds", "1", "--max-tokens", "128", "--max-batch", "4", "--kv-bytes", str(16 << 20)]
    told = CliRunner().invoke(app, [*asked, "--json", "--output", str(written)])
    assert told.exit_code == 0, told.output
    document = json.loads(told.stdout)
    assert document["schema"] == "baton.calibrate.v1" and document["model"] == "15m" and document["machine"]["num_cores"] >= 1
    assert document["others"] >= 0.0 and (document["others"] < 0.15 or "measure again" in told.stderr)
    assert all(step["duration_s"] > 0 for step in document["steps"])
    paced = document["paced"]
    assert paced["prefill_token_s"] > 0 and min(paced.values()) >= 0.0
    assert {row["name"] for row in document["rows"]} >= {"15m/held_out/prefill_short", "15m/held_out/decode_small"}
    config = load_config({"workers": {"prefill_workers": 1, "decode_workers": 1}}, file=written)
    trace = Source(generator="unshared", rate_per_s=5.0, num_requests=5).draw(seed=0)
    assert [one.terminal for one in run_token_accurate(trace, config, policy="least_work", seed=0)] == ["finished"] * 5
