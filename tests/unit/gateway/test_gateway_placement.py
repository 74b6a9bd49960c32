"""least_work at the gateway: what it chooses while no router answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.placement import least_work
from protocol.messages import Place
from protocol.worker import Role, WorkerSnapshot, WorkerState

pytestmark = pytest.mark.pure

PLACE = Place(
    request_id="r", attempt=0, model_id="m", num_tokens=10, expected_output_tokens=5, num_choices=1, block_hashes=(), tenant="t",
    priority=0, slo_ttft_s=None, slo_tpot_s=None, excluded=(), local_only=False,
)  # fmt: skip


def worker(worker_id: str, role: Role, *, waiting: int = 0, kv: int = 0, state: WorkerState = WorkerState.READY) -> WorkerSnapshot:
    return WorkerSnapshot(
        worker_id=worker_id, epoch=1, role=role, state=state, age_s=0.0, step_count=0, last_event_number=0, num_waiting=0, num_running=0,
        waiting_tokens=waiting, running_kv_tokens=kv, num_blocks_total=1, num_blocks_free=1, num_blocks_owned=0, num_blocks_leased=0,
        num_blocks_cached=0, num_preemptions=0, step_time_ewma_s=0.01, counters={},
    )  # fmt: skip


FLEET = [
    worker("p0", Role.PREFILL, waiting=50),
    worker("p1", Role.PREFILL, waiting=20),
    worker("d0", Role.DECODE, kv=10),
    worker("d1", Role.DECODE, kv=90),
]


def chosen(place: Place = PLACE, fleet: list[WorkerSnapshot] = FLEET, **booked: int) -> tuple[str, str] | None:
    found = least_work(place, fleet, booked)
    return None if found is None else (found.prefill_worker, found.decode_worker)


def test_least_waiting_prefills_and_least_kv_decodes() -> None:
    assert chosen() == ("p1", "d0")


def test_what_was_sent_since_the_snapshots_counts() -> None:
    """Else every request of a second goes to the same worker."""
    assert chosen(p1=40, d0=100) == ("p0", "d1")


def test_worker_that_failed_this_request_is_the_last_resort() -> None:
    assert chosen(replace(PLACE, excluded=("p1", "d0"))) == ("p0", "d1")
    assert chosen(replace(PLACE, excluded=("d0", "d1"))) == ("p1", "d0")


def test_choices_that_differ_prefill_where_they_decode() -> None:
    assert chosen(replace(PLACE, local_only=True)) == ("d0", "d0")


def test_without_prefill_workers_the_decode_worker_does_it() -> None:
    assert chosen(fleet=FLEET[2:]) == ("d0", "d0")


def test_worker_with_both_roles_hands_nothing_to_itself() -> None:
    assert chosen(fleet=[worker("b0", Role.BOTH), worker("b1", Role.BOTH)]) == ("b0", "b0")


def test_nobody_ready_to_decode_is_no_place() -> None:
    assert chosen(fleet=[FLEET[0], worker("d0", Role.DECODE, state=WorkerState.DRAINING)]) is None
