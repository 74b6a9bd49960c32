"""Signals: one orderly stop, wherever they come."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from cluster.interrupts import FORCED_EXIT_CODE, Interrupted, Interrupts

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_raises_where_it_is_welcome(number: signal.Signals, reason: str) -> None:
    """Fails when the handler only notes it."""
    with Interrupts(force=lambda: None) as interrupts, pytest.raises(Interrupted, match=reason), interrupts.welcome():
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("not interrupted")


def test_a_signal_while_something_is_taken_waits_for_the_next_welcome() -> None:
    """What was acquired meanwhile is not lost. Fails when the handler raises everywhere."""
    taken = []
    with Interrupts(force=lambda: None) as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        taken.append("port")
        with pytest.raises(Interrupted), interrupts.welcome():
            raise AssertionError("entered")
        os.kill(os.getpid(), signal.SIGTERM)  # the stop is not interrupted by an echo
        taken.append("stopped")
    assert taken == ["port", "stopped"]


def test_handlers_are_back_afterwards() -> None:
    """Fails when __exit__ leaves ours."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts(force=lambda: None):
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_forces_the_end_and_a_second_sigterm_does_not() -> None:
    """In a process of its own, which hangs while it stops. Fails when the second signal is ignored, or an echo of the first forces."""
    script = """
import time
from cluster.interrupts import Interrupted, Interrupts
with Interrupts(force=lambda: print("forced", flush=True)) as interrupts:
    try:
        with interrupts.welcome():
            print("up", flush=True)
            time.sleep(60)
    except Interrupted:
        print("stopping", flush=True)
        time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "stopping\n"
    child.send_signal(signal.SIGINT)  # at once: an echo
    time.sleep(1.2)
    child.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline() == "forced\n"
    assert child.wait(timeout=10) == FORCED_EXIT_CODE
    child.stdout.close()
