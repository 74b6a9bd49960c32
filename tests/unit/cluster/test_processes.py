"""Processes, listeners and memory as /proc tells them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.processes import ProcessId, descendants, kill_all, listeners, process_id, pss_bytes, wait_gone, working_under

pytestmark = pytest.mark.pure

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"]


def test_a_reused_pid_is_not_taken_for_the_process_that_had_it() -> None:
    """A ProcessId with another start time is dead and gets no signal. Fails when is_alive looks at the pid alone."""
    child = subprocess.Popen(SLEEP)
    try:
        found = process_id(child.pid)
        assert found is not None and found.is_alive
        earlier = ProcessId(pid=child.pid, start_ticks=found.start_ticks - 1)
        assert not earlier.is_alive
        earlier.signal(signal.SIGKILL)
        assert kill_all([earlier], grace_s=0.0, deadline_s=0.2) == []
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
    assert not found.is_alive


def test_a_zombie_has_ended() -> None:
    """Nobody has waited for the child, and it counts as gone. Fails when state Z counts as alive."""
    child = subprocess.Popen(SLEEP)
    found = process_id(child.pid)
    assert found is not None
    child.kill()
    assert wait_gone([found], timeout_s=5.0) == []
    child.wait()


def test_who_ignores_sigterm_is_killed_after_the_grace() -> None:
    """Fails when kill_all waits for the grace and sends nothing more."""
    child = subprocess.Popen(STUBBORN, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    found = process_id(child.pid)
    assert found is not None
    assert kill_all([found], grace_s=0.2, deadline_s=5.0) == []
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()


def test_grandchildren_are_descendants() -> None:
    """Fails when only direct children are listed."""
    script = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
child.wait()
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    try:
        assert {child.pid, grandchild} <= {p.pid for p in descendants(os.getpid())}
        assert grandchild in {p.pid for p in descendants(child.pid)}
    finally:
        os.kill(grandchild, signal.SIGKILL)
        child.wait()
        child.stdout.close()


def test_a_process_is_found_by_a_working_directory_that_was_removed(tmp_path: Path) -> None:
    """Fails when "(deleted)" is left at the end of the link."""
    directory = tmp_path / "run" / "cwd"
    directory.mkdir(parents=True)
    child = subprocess.Popen(SLEEP, cwd=directory)
    try:
        assert [p.pid for p in working_under(tmp_path / "run")] == [child.pid]
        directory.rmdir()
        assert [p.pid for p in working_under(tmp_path / "run")] == [child.pid]
        assert [p.pid for p in working_under(directory)] == [child.pid]
        assert working_under(tmp_path / "ru") == []
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    ("family", "host", "shown", "loopback"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1", True),
        (socket.AF_INET, "0.0.0.0", "0.0.0.0", False),
        (socket.AF_INET6, "::1", "::1", True),
        (socket.AF_INET6, "::", "::", False),
        (socket.AF_INET6, "::ffff:127.0.0.1", "::ffff:127.0.0.1", True),
    ],
)
def test_a_listener_is_seen_with_its_address_port_and_pid(family: socket.AddressFamily, host: str, shown: str, loopback: bool) -> None:
    """IPv4, IPv6 and mapped addresses; a bound socket that does not listen is none. Fails when words are read big-endian."""
    with socket.socket(family) as one:
        one.bind((host, 0))
        port = one.getsockname()[1]
        assert not [s for s in listeners([os.getpid()]) if s.port == port]
        one.listen(1)
        (found,) = [s for s in listeners([os.getpid()]) if s.port == port]
        assert (found.host, found.is_loopback, found.pids) == (shown, loopback, (os.getpid(),))
        assert found.port in {s.port for s in listeners()}


def test_memory_counts_what_a_process_holds() -> None:
    """Fails when KiB are taken for bytes."""
    assert 1 << 20 < pss_bytes([os.getpid()]) < 8 << 30
    assert pss_bytes([2**22 + 1]) == 0
