"""Requests with an objective are judged by the load they will find, not by the one that is there when they ask.

Every worker here is known to be the prior's machine: a step takes 6 ms, and 50 us for each sequence of the batch; a prompt token 60 us.
With an objective of 8 ms a token some 35 sequences of 320 tokens may decode beside a request.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import Assignment, Refused
from protocol.request import AttemptKey
from protocol.worker import Role
from router.admission import RETRY_AFTER_MAX_S
from router.config import Disaggregate
from router.decode_outlook import BatchLoad, DecodeOutlook
from router.holds import Hold, Phase
from tests.unit.router.router_world import World, address, place

pytestmark = pytest.mark.pure

STEPS_KNOWN = 120  # of each worker when the tests begin


def known_world(num_prefill: int = 1, **config: Any) -> World:
    """Each worker has told of 12 times 10 steps that took what the prior says."""
    prefillers = [address(f"prefill-{n}", Role.PREFILL, max_num_seqs=256) for n in range(num_prefill)]
    config = {"estimate_bias": 1.0, "disaggregate": Disaggregate.ALWAYS, "inbox_steps": 100.0} | config
    world = World([*prefillers, address("decode-0", Role.DECODE, max_num_seqs=256, num_kv_blocks=65536)], **config)
    for number in range(13):
        world.now += 0.05
        for worker_id in world.addresses:
            counters = {"generated_tokens": 10 * number, "busy_us": 60_500 * number}
            world.report(worker_id, step_count=10 * number, counters=counters)
    return world


def book(world: World, count: int, *, decoding: bool, **changes: Any) -> None:
    """So many requests of 64 tokens that will make 256 each; `decoding`: their prompts are computed."""
    for number in range(1000, 1000 + count):
        request = place(number, num_tokens=64, expected_output_tokens=1000, **changes)
        world.assign(request)
        if decoding:
            world.prefill_done(request)


def ask(world: World, number: int = 1, **changes: Any) -> Assignment | Refused:
    fields: dict[str, Any] = {"num_tokens": 64, "slo_tpot_s": 0.008}
    answer = world.place(place(number, **(fields | changes)))
    assert answer is not None
    return answer


def report_decode(world: World, num_running: int, steps_since: int) -> None:
    world.now += 0.05
    world.report("decode-0", num_running=num_running, step_count=STEPS_KNOWN + steps_since)


def test_a_load_that_is_about_to_fall_lets_in_and_one_that_stays_does_not() -> None:
    """60 sequences decode, 9.4 ms a token. 2,000 tokens wait before the prompt: 0.14 s until it decodes, some 15 steps.

    After 246 of 256 tokens the 60 will be gone by then; after 20 they will not be for 236 steps, 2.2 s. How: one world each.

    Seen to fail with `ending` left out of `decode_load_at` (the first is refused), and with every hold taken for ended (the second
    is let in).
    """
    for steps_since, let_in in ((246, True), (20, False)):
        world = known_world()
        book(world, 60, decoding=True)
        report_decode(world, 60, steps_since)
        world.report("prefill-0", waiting_tokens=2000, step_count=STEPS_KNOWN)
        answer = ask(world)
        assert isinstance(answer, Assignment) is let_in
        if isinstance(answer, Refused):
            assert answer.status == 429 and "0.0094 s, once the prompt is computed in 0.14 s" in answer.message
            assert answer.retry_after_s == 3.0, "236 steps of 9.4 ms, less what the prompt takes: 2.08 s"


def test_prompts_that_are_about_to_land_count_and_those_that_land_later_do_not() -> None:
    """The decode worker is idle, and 60 prompts are on their way to it. Whether they come first is the queue of their prefill worker.

    Seen to fail with `landing_after` left out of `decode_load_at`: the second is refused.
    """
    for waiting_tokens, let_in in ((0, False), (100_000, True)):
        world = known_world(num_prefill=2)
        world.report("prefill-0", waiting_tokens=waiting_tokens, step_count=STEPS_KNOWN)
        book(world, 60, decoding=False, excluded=("prefill-1",))
        report_decode(world, 0, 1)
        world.report("prefill-0", waiting_tokens=waiting_tokens + 20_000, step_count=STEPS_KNOWN)
        world.report("prefill-1", waiting_tokens=0 if let_in else 20_000, step_count=STEPS_KNOWN)
        answer = ask(world)
        assert isinstance(answer, Assignment) is let_in
        if let_in:
            assert isinstance(answer, Assignment) and answer.prefill_worker == "prefill-1"


def test_one_that_outlived_its_prediction_is_not_expected_to_end() -> None:
    world = known_world()
    book(world, 60, decoding=True)
    report_decode(world, 60, 300)
    assert isinstance(ask(world), Refused)


def test_an_old_report_ends_nothing() -> None:
    """Leaning high. Seen to fail with the staleness not looked at."""
    world = known_world()
    book(world, 60, decoding=True)
    report_decode(world, 60, 255)
    assert isinstance(ask(world, 1), Assignment)
    world.done(place(1))
    world.now += 0.5
    assert isinstance(ask(world, 2), Refused)


@pytest.mark.parametrize("prefix_pull", [True, False])
def test_time_to_first_token_is_that_of_the_choice(prefix_pull: bool) -> None:
    """4,096 tokens: 285 ms to compute; prefill-0 holds them but is busy for 600 ms. Pulled from there, prefill-1 has them in some 10 ms.

    Let in, the assignment predicts what admission went by. Seen to fail with the pull left out of admission's sum.
    """
    world = known_world(num_prefill=2, prefix_pull=prefix_pull)
    request = place(1, num_tokens=4096)
    world.hold("prefill-0", request.block_hashes)
    world.report("prefill-0", waiting_tokens=10_000, step_count=STEPS_KNOWN)
    answer = ask(world, num_tokens=4096, slo_tpot_s=None, slo_ttft_s=0.1)
    assert isinstance(answer, Assignment) is prefix_pull
    if isinstance(answer, Assignment):
        first = world.core.fleet.get("prefill-1")
        assert answer.prefill_worker == "prefill-1" and first is not None
        assert answer.predicted_ttft_s is not None and answer.predicted_ttft_s < 0.1
    else:
        assert "0.285 s exceeds the objective 0.100 s" in answer.message and answer.message.endswith("retry later"), (
            "it would fit once prefill-0 is free"
        )


def test_estimates_do_not_lean_where_they_refuse() -> None:
    """A prompt of 1,000 tokens takes 68 ms; an objective of 75 ms is met though placement counts with 85. Seen to fail undivided."""
    world = known_world(estimate_bias=1.25)
    assert isinstance(ask(world, num_tokens=1000, slo_tpot_s=None, slo_ttft_s=0.075), Assignment)


def test_retry_after_is_when_the_queue_will_have_shortened() -> None:
    """50,000 tokens wait, 3.06 s and 0.01 for the prompt: at an objective of 1 s it fits in 2.07 s."""
    world = known_world()
    world.report("prefill-0", waiting_tokens=50_000, step_count=STEPS_KNOWN)
    answer = ask(world, slo_tpot_s=None, slo_ttft_s=1.0)
    assert isinstance(answer, Refused) and answer.retry_after_s == 3.0 and answer.message.endswith("retry later")


@pytest.mark.parametrize("objective", [{"slo_tpot_s": 0.004}, {"slo_ttft_s": 0.004, "slo_tpot_s": None}])
def test_an_objective_that_an_idle_cluster_misses_is_told_as_that(objective: dict[str, float | None]) -> None:
    answer = ask(known_world(), **objective)
    assert isinstance(answer, Refused) and "idle ones too" in answer.message and answer.retry_after_s == RETRY_AFTER_MAX_S


def test_a_holder_in_the_decode_pool_may_be_the_one_that_meets_it() -> None:
    """As in the choice: the prompt is cached where it decodes. Seen to fail with `workers` left at the prefill pool."""
    world = known_world(disaggregate=Disaggregate.AUTO, prefix_pull=False)
    request = place(1, num_tokens=4096)
    world.hold("decode-0", request.block_hashes)
    answer = ask(world, num_tokens=4096, slo_tpot_s=None, slo_ttft_s=0.1)
    assert isinstance(answer, Assignment) and answer.prefill_worker == "decode-0"


holds = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 3), st.integers(0, 100)), max_size=12)


@given(holds, holds, st.integers(0, 60), st.integers(0, 60), st.integers(0, 8))
def test_the_outlook_is_the_sum_over_its_holds(
    decoding: list[tuple[int, int, int]], under_way: list[tuple[int, int, int]], first: int, last: int, enough: int
) -> None:
    """Against plain sums; those under way stay for 5 steps of 2 s. Seen to fail with `bisect_left` for `bisect_right` in `ending`, and
    with the stay left out of `landing_outside`.
    """
    hold = Hold(key=AttemptKey(request_id="0", attempt=0), phase=Phase.DECODE, worker_id="w")
    outlook = DecodeOutlook(
        [(replace(hold, output_tokens=end - end // 2, num_sequences=n, kv_tokens=kv), end // 2) for end, n, kv in decoding],
        [replace(hold, lands_s=float(at), num_sequences=n, kv_tokens=kv, output_tokens=5) for at, n, kv in under_way],
    )

    def total(entries: list[tuple[int, int, int]]) -> BatchLoad:
        return BatchLoad(sum(n for _, n, _ in entries), sum(kv for *_, kv in entries))

    assert outlook.ending(first, last) == total([e for e in decoding if first < e[0] <= last])
    assert outlook.landing_after(float(first)) == total([e for e in under_way if e[0] > first])
    begin, end = min(first, last), max(first, last)
    outside = [e for e in under_way if e[0] + 10 <= begin or e[0] > end]
    assert outlook.landing_outside(float(begin), float(end), 2.0) == total(outside)
    by_end = sorted(e[0] for e in decoding if e[0] > first)
    ends = [end for end in by_end if total([e for e in decoding if first < e[0] <= end]).num_sequences >= enough]
    assert outlook.first_end(first, lambda ended: ended.num_sequences >= enough) == (ends[0] if ends else None)
