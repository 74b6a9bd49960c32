"""With the network cut everything still works: a server in a network namespace that has loopback and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import environment

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(200)]

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK_UP = "import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sH14s', b'lo', 0x41, b''))"  # SIOCSIFFLAGS
SCRIPT = f"""
{sys.executable} -c "{LOOPBACK_UP}"
{sys.executable} -m baton serve --port 8000 > serve.log 2>&1 &
server=$!
{sys.executable} {ROOT}/.ci/one_request.py http://127.0.0.1:8000
kill -TERM $server
wait $server
"""


def test_demo_model_is_served_without_any_network(tmp_path: Path) -> None:
    """No name look-up, no index, no Hub. Seen to fail with a start that asks the Hub first."""
    outcome = subprocess.run(
        ["unshare", "-rn", "bash", "-eu", "-c", SCRIPT],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    log = tmp_path / "serve.log"
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr + (log.read_text()[-2000:] if log.exists() else "")
    assert "answer:" in outcome.stdout
