"""`make reproduce`: a published tournament comes to the same again, and one that does not is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.__main__ import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def test_a_document_comes_to_the_same_by_its_own_command_and_a_changed_one_does_not(tmp_path: Path) -> None:
    """A tournament is run and published, then once more with one of its figures changed. Seen to fail with figures left uncompared."""
    words = "compare --policies least_work,round_robin --generate embodied --rate 12 --requests 12 --replicates 2 --jobs 1 --json"
    published = json.loads(CliRunner().invoke(app, words.split()).stdout)
    file = tmp_path / "compare-embodied.json"
    file.write_text(json.dumps(published | {"commit": "0" * 40}))
    assert reproduce(tmp_path).returncode == 0
    published["metrics"][0]["values"]["least_work"][1] *= 1.001
    file.write_text(json.dumps(published))
    outcome = reproduce(tmp_path)
    assert outcome.returncode == 1 and "compare-embodied: metrics[0].values.least_work[1] was " in outcome.stderr
    assert "no tournament of that name" in reproduce(tmp_path, "--only", "compare-else").stderr


def reproduce(results: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "benchmarks.reproduce", "--results", str(results), *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
