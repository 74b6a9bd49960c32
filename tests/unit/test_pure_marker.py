"""`pytest -m pure` stays possible where neither torch nor Ray is installed. Not pure itself: the pure run is its own proof."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_pure_tests_are_read_without_torch_or_ray() -> None:
    """`-m pure` denies both imports (tests/conftest.py), so collecting is the proof. Seen to fail with `import torch` in a pure test."""
    command = [sys.executable, "-m", "pytest", "tests/unit", "-m", "pure", "--collect-only", "-q"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]
