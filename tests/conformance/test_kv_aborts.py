"""A hand-off may end in any state, for any reason: no block, descriptor or thread is left, nobody waits for ever, no wrong byte is taken.

How: whole workers with the paced executor, slow at every step, that lose one word in ten between them; requests are given up when their
hand-off is in a drawn state, and processes are killed or stopped (tests/kv_campaign/aborts_*.py). The laws are asserted at every turn.
Seen to fail, each planted: a lease that expires without ending; target blocks given back while a copy runs, or never; a copy without its
look at the generations afterwards, on either path; a lane that leaves its descriptor open; a wait that does not look at the deadline; a
peer whose epoch is not compared; an early offer's completion that is waited for without end.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.kv_campaign.abort_gateway import DEADLINE_S
from tests.kv_campaign.aborts_inside import SLACK_S, Act, Phase, Report, run_inside
from tests.kv_campaign.aborts_processes import Blow, ProcessReport, run_processes

pytestmark = [pytest.mark.conformance]


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """Workers tell of every gateway that is lost."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def judge(report: Report) -> None:
    assert report.left_over == [] and report.held_blocks == 0
    assert report.wrong_blocks == 0 and report.good_pulls > 0
    assert report.slowest_pull_ms <= 1000 * (DEADLINE_S + SLACK_S)


@pytest.mark.parametrize(("kv_transport", "offer_early"), [("shm", True), ("tcp", False)])
def test_twenty_hand_offs_given_up_anywhere_leave_nothing(kv_transport: str, offer_early: bool) -> None:
    report = Report()
    run_inside(20, 3, kv_transport, report, offer_early=offer_early)
    judge(report)
    assert sum(report.rounds.values()) == 20


@pytest.mark.slow
@pytest.mark.parametrize("kv_transport", ["shm", "tcp"])
def test_hundreds_given_up_in_every_state_leave_nothing(kv_transport: str) -> None:
    report = Report()
    run_inside(150, 4, kv_transport, report, offer_early=False)
    run_inside(150, 5, kv_transport, report, offer_early=True)
    judge(report)
    for phase in set(Phase) - {Phase.PARKED}:
        assert sum(n for (_, seen), n in report.rounds.items() if seen is phase) >= 5, (phase, report.rounds)
    for act in Act:
        assert kv_transport == "shm" or sum(n for (done, _), n in report.rounds.items() if done is act) >= 3, (act, report.rounds)
    assert report.leases_expired, "the lost acknowledgements were not made up for by leases"
    assert kv_transport == "shm" or report.errors["deadline"], "nothing stalled"


@pytest.mark.slow
@pytest.mark.parametrize("kv_transport", ["shm", "tcp"])
def test_killed_and_stopped_workers_leave_the_other_as_it_was(kv_transport: str) -> None:
    report = ProcessReport()
    run_processes(4, 5, kv_transport, report, offer_early=False, blows=(Blow.KILL_SOURCE, Blow.KILL_TARGET))
    run_processes(4, 6, kv_transport, report, offer_early=True, blows=(Blow.KILL_SOURCE, Blow.KILL_TARGET))
    run_processes(1, 7, kv_transport, report, offer_early=True, blows=(Blow.STOP_SOURCE,))
    run_processes(1, 8, kv_transport, report, offer_early=False, blows=(Blow.STOP_TARGET,))
    assert set(report.episodes) == set(Blow)
    assert report.left_over == [] and report.held_blocks == 0 and report.wrong_blocks == 0 and report.good_pulls > 0
    assert not report.fresh_handoffs[False] and report.fresh_handoffs[True] == 2 * sum(report.episodes.values())
    assert report.slowest_pull_ms <= 1000 * (DEADLINE_S + SLACK_S)
    assert sum(n for (_, state), n in report.struck.items() if state in ("pulling", "following")) >= 10, report.struck
    assert report.old_offers["stale_epoch"] >= 3
