"""What a worker core does about each event: prompts, decodes, bounds, errors and losses on one worker."""

from __future__ import annotations

from typing import Any

import pytest

from engine.core.counters import COUNTERS
from engine.core.events import (
    CancelReceived,
    DrainStarted,
    DropSource,
    Emit,
    GatewayLost,
    RaiseGenerations,
    RoleChanged,
    RunStep,
    Tell,
)
from protocol.messages import AttemptFailed
from protocol.request import Attempt, FinishReason, Request, token_buffer
from protocol.worker import Role, WorkerState
from tests.core_bench import Bench, of, prompt, taken
from tests.sim_cluster import EOS, make_request

pytestmark = pytest.mark.pure


# --- prompt and decode on one worker ----------------------------------------------------------------------------------


def test_tokens_come_by_position_until_max_tokens() -> None:
    bench = Bench()
    bench.submit(make_request(1, prompt(20), max_tokens=3))
    bench.finish_all()
    assert [(r.position, list(r.token_ids), r.finish_reason) for r in bench.runs()] == [
        (0, [7], None),
        (1, [7], None),
        (2, [7], FinishReason.LENGTH),
    ]
    assert bench.core.is_at_rest


@pytest.mark.parametrize(
    ("sampling", "token", "count", "reason"),
    [
        ({"eos_token_ids": (EOS,)}, EOS, 1, FinishReason.STOP),
        ({"eos_token_ids": (9, EOS)}, EOS, 1, FinishReason.STOP),
        ({"eos_token_ids": (EOS,), "ignore_eos": True}, EOS, 8, FinishReason.LENGTH),
        ({"stop_token_ids": (5,)}, 5, 1, FinishReason.STOP),
        ({"stop_token_ids": (5,), "min_tokens": 3}, 5, 4, FinishReason.STOP),
        ({"eos_token_ids": (EOS,), "min_tokens": 8}, EOS, 8, FinishReason.LENGTH),
        ({"max_tokens": 1}, 7, 1, FinishReason.LENGTH),
        ({"max_tokens": 500}, 7, 10, FinishReason.LENGTH),  # 290 + 10 = max_model_len
    ],
)
def test_a_choice_ends_where_its_sampling_says(sampling: dict[str, Any], token: int, count: int, reason: FinishReason) -> None:
    bench = Bench()
    bench.submit(make_request(1, prompt(290), **sampling))
    bench.finish_all(token)
    assert len(bench.runs()) == count and bench.runs()[-1].finish_reason is reason
    assert bench.core.is_at_rest


def test_a_retry_counts_from_the_original_boundary() -> None:
    """Positions, max_tokens and min_tokens. Seen to fail with `num_prompt_tokens` taken as prompt + delivered."""
    request = make_request(1, prompt(20), max_tokens=6, min_tokens=4, stop_token_ids=(5,))
    bench = Bench()
    bench.submit(Attempt(request=request, number=1, delivered=(token_buffer([5, 5, 5]),), finished=(False,)))
    start = bench.steps[0].starts[0]
    assert (start.num_prompt_tokens, len(start.token_ids)) == (20, 23)
    bench.finish_all(token=5)
    assert [(r.position, r.finish_reason) for r in bench.runs()] == [(3, None), (4, FinishReason.STOP)]


def test_finished_choices_of_a_retry_are_not_computed_again() -> None:
    request = make_request(1, prompt(20), n=3, max_tokens=4)
    delivered = (token_buffer([1]), token_buffer([1, 2, 3, 4]), token_buffer([6, 7]))
    bench = Bench()
    bench.submit(Attempt(request=request, number=2, delivered=delivered, finished=(False, True, False)))
    bench.finish_all()
    assert sorted((r.choice, r.position) for r in bench.runs()) == [(0, 1), (0, 2), (0, 3), (2, 2), (2, 3)]


def test_a_shared_prompt_is_computed_once() -> None:
    """n = 3: one prompt in the steps; partly filled last block copied for all but one. Seen to fail with siblings added to the inbox."""
    bench = Bench(num_blocks=16)
    bench.submit(make_request(1, prompt(40), n=3, max_tokens=2))
    assert [(e.start, e.num_tokens) for e in bench.steps[0].entries] == [(0, 40)] and len(bench.steps[0].samples) == 3
    bench.finish_step()
    (plan,) = bench.steps
    assert len(plan.entries) == 3 and len(plan.block_copies) == 2
    assert len({e.block_table[2] for e in plan.entries}) == 3, "each writes its own third block"
    assert len({e.block_table[0] for e in plan.entries}) == 1
    bench.finish_all()
    assert bench.counter("prompt_tokens_computed") == 40 and bench.core.is_at_rest


def test_one_emit_a_gateway_and_step() -> None:
    bench = Bench()
    for number in range(4):
        bench.submit(make_request(number, prompt(5)), gateway=f"g{number % 2}")
    bench.finish_step()
    emits = of(bench.finish_step(), Emit)
    assert sorted((e.gateway, len(list(e.each()))) for e in emits) == [("g0", 2), ("g1", 2)]


def test_cached_tokens_are_told_with_the_first_token() -> None:
    bench = Bench()
    bench.submit(make_request(1, prompt(40), max_tokens=2))
    bench.finish_all()
    bench.submit(make_request(2, prompt(40), max_tokens=2))
    bench.finish_all()
    assert [r.num_cached_tokens for r in bench.runs()] == [0, 0, 32, 0]
    bench.submit(make_request(3, prompt(32), max_tokens=1))
    bench.finish_all()
    assert bench.runs()[-1].num_cached_tokens == 31, "one token at least is computed, for its logits"


def test_of_a_prompt_that_is_all_cached_the_last_token_is_computed_in_a_copy() -> None:
    """Nobody who reads the cached block sees it written; equal content afterwards shares one block again.

    Seen to fail with the copy left out, and with the copied block still counted as stored.
    """
    bench = Bench()
    bench.submit(make_request(1, prompt(32), max_tokens=2))
    cached = bench.steps[0].entries[0].block_table
    bench.finish_all()
    bench.submit(make_request(2, prompt(32), max_tokens=20))
    (plan,) = bench.steps
    (entry,) = plan.entries
    assert (entry.start, entry.num_tokens) == (31, 1) and entry.block_table[0] == cached[0]
    assert plan.block_copies == ((cached[1], entry.block_table[1]),) and entry.block_table[1] != cached[1]
    bench.finish_step()
    assert bench.steps[0].entries[0].block_table[:2] == cached[:2], "the copy was given up for the block it equals"
    bench.finish_all()
    assert bench.core.is_at_rest and len(bench.runs()) == 22


def test_without_a_block_for_the_copy_the_last_block_is_computed_again() -> None:
    """A pool that holds the prompt and no more. Seen to wait for ever where the copy was counted on."""
    bench = Bench(num_blocks=2)
    for number in range(2):
        bench.submit(make_request(number, prompt(32), max_tokens=1))
        bench.finish_all()
    assert len(bench.runs()) == 2 and bench.runs()[-1].num_cached_tokens == 16 and bench.core.is_at_rest


def test_steps_are_asked_for_before_tokens_are_sent() -> None:
    bench = Bench()
    bench.submit(make_request(1, prompt(5)))
    kinds = [type(c) for c in bench.finish_step()]
    assert kinds.index(RunStep) < kinds.index(Emit)


def test_generations_are_raised_before_the_step_that_writes() -> None:
    commands = Bench().submit(make_request(1, prompt(20)))
    assert isinstance(commands[0], RaiseGenerations) and isinstance(commands[1], RunStep)
    assert set(commands[1].plan.entries[0].block_table) == set(commands[0].block_ids)
    assert commands[0].generations.typecode == "Q"


# --- two steps in flight ----------------------------------------------------------------------------------------------


def test_the_next_step_is_planned_before_the_token_is_known() -> None:
    bench = Bench(max_inflight_steps=2)
    bench.submit(make_request(1, prompt(20), max_tokens=3))
    first, second = bench.steps
    assert [(e.start, e.num_tokens) for e in (*first.entries, *second.entries)] == [(0, 20), (20, 1)]
    bench.finish_all()
    assert [r.position for r in bench.runs()] == [0, 1, 2] and bench.counter("steps") == 3


def test_a_stop_found_late_discards_the_surplus_token() -> None:
    """And its blocks wait for the step that still names them. Seen to fail with `give_back` not pinning."""
    bench = Bench(max_inflight_steps=2, enable_prefix_caching=False)
    bench.submit(make_request(1, prompt(20), eos_token_ids=(EOS,)))
    bench.finish_step(token=EOS)
    assert bench.blocks == (30, 2, 0, 0), "step 1 is in flight and names them"
    bench.finish_step(token=9)
    assert len(bench.runs()) == 1 and bench.blocks == (32, 0, 0, 0)
    assert bench.core.is_at_rest


# --- bounds and refusals ----------------------------------------------------------------------------------------------


def refused(bench: Bench, request: Request, **submit: Any) -> AttemptFailed:
    (tell,) = of(bench.submit(request, **submit), Tell)
    assert isinstance(tell.message, AttemptFailed)
    return tell.message


def test_a_full_inbox_gives_the_attempt_back() -> None:
    bench = Bench(core={"max_waiting": 2}, max_num_seqs=1)
    for number in range(3):
        bench.submit(make_request(number, prompt(5)))
    failed = refused(bench, make_request(9, prompt(5)))
    assert failed.retryable and failed.reason == "inbox full: 2 attempts wait, max_waiting is 2"


def test_draining_admits_nothing_new_and_finishes_the_rest() -> None:
    bench = Bench()
    bench.submit(make_request(1, prompt(5), max_tokens=3))
    bench.on(DrainStarted())
    assert bench.core.snapshot(0.0).state is WorkerState.DRAINING
    assert refused(bench, make_request(2, prompt(5))).retryable
    bench.finish_all()
    assert len(bench.runs()) == 3


@pytest.mark.parametrize(
    ("num_tokens", "sampling", "reason"),
    [
        (300, {}, "300 tokens (prompt and delivered) leave no room for another within max_model_len 300"),
        (100, {"max_tokens": 100}, "KV of 199 tokens needs 13 blocks of 16 tokens (13,312 bytes), this worker has 8"),
        (5, {"n": 9}, "9 choices exceed max_num_seqs 8"),
        (0, {}, "no live choice, or an empty prompt"),
    ],
)
def test_what_can_never_fit_is_refused_with_its_arithmetic(num_tokens: int, sampling: dict[str, Any], reason: str) -> None:
    failed = refused(Bench(num_blocks=8), make_request(1, prompt(num_tokens), **sampling))
    assert not failed.retryable and reason in failed.reason


def test_a_refused_offer_frees_its_source_at_once() -> None:
    bench = Bench()
    bench.on(DrainStarted())
    _, commands = taken(bench)
    assert of(commands, DropSource) and of(commands, Tell)


def test_a_repeated_submit_is_ignored_while_it_lives_and_after() -> None:
    bench = Bench()
    request = make_request(1, prompt(5), max_tokens=2)
    bench.submit(request)
    assert bench.submit(request) == []
    bench.finish_all()
    assert bench.submit(request) == [] and len(bench.runs()) == 2 and bench.counter("duplicates_ignored") == 2


def test_what_is_remembered_of_ended_attempts_is_bounded() -> None:
    bench = Bench(core={"max_remembered_attempts": 3})
    for number in range(9):
        bench.submit(make_request(number, prompt(5), max_tokens=1))
        bench.finish_all()
    assert len(bench.core._remembered) == 3


# --- errors, cancel, loss ---------------------------------------------------------------------------------------------


def test_an_error_of_one_sequence_fails_its_attempt_alone() -> None:
    bench = Bench()
    bench.submit(make_request(1, prompt(5), n=2))
    bench.submit(make_request(2, prompt(5), max_tokens=3))
    bench.finish_step()
    index = len(bench.steps[0].samples) - 3
    bench.finish_step(sequence_error={index: "logits are NaN"})
    (failed,) = bench.told(AttemptFailed)
    assert failed.reason == "logits are NaN" and not failed.retryable and failed.request_id[-1] == "1"
    bench.finish_all()
    assert bench.runs()[-1].request_id[-1] == "2" and bench.core.is_at_rest


def test_an_error_of_a_step_fails_what_was_in_it_retryably() -> None:
    bench = Bench(max_num_batched_tokens=32)
    bench.submit(make_request(0, prompt(3, 250), max_tokens=1))
    bench.submit(make_request(1, prompt(20)))
    bench.submit(make_request(2, prompt(12, 100)))
    bench.submit(make_request(3, prompt(5, 200), max_tokens=1))
    bench.finish_step()
    bench.finish_step(error="out of memory")
    assert [(f.request_id[-1], f.retryable) for f in bench.told(AttemptFailed)] == [("1", True), ("2", True)]
    bench.finish_all()
    assert [r.request_id[-1] for r in bench.runs()] == ["0", "3"] and bench.core.is_at_rest
    assert bench.counter("prompt_tokens_computed") == 8 and bench.core.kv_snapshot().hashes == ()


@pytest.mark.parametrize("moment", ["waiting", "in its prompt", "decoding", "twice"])
def test_cancel_ends_an_attempt_wherever_it_is(moment: str) -> None:
    bench = Bench(max_num_seqs=1, max_num_batched_tokens=16)
    if moment == "waiting":
        bench.submit(make_request(9, prompt(5), max_tokens=2))
    bench.submit(make_request(1, prompt(40)))
    if moment == "decoding":
        for _ in range(4):
            bench.finish_step()
    for _ in range(2 if moment == "twice" else 1):
        bench.on(CancelReceived(request_id=make_request(1, []).request_id, attempt=0))
    bench.finish_all()
    assert bench.core.is_at_rest and {r.request_id[-1] for r in bench.runs()} <= {"9", "1"}
    assert len([r for r in bench.runs() if r.request_id[-1] == "1"]) == (2 if moment == "decoding" else 0)


def test_cancel_of_another_attempt_is_not_ours() -> None:
    bench = Bench()
    bench.submit(make_request(1, prompt(5), max_tokens=2))
    bench.on(CancelReceived(request_id=make_request(1, []).request_id, attempt=1))
    bench.finish_all()
    assert len(bench.runs()) == 2


def test_a_lost_gateways_attempts_end_and_others_go_on() -> None:
    bench = Bench()
    bench.submit(make_request(1, prompt(5)), gateway="gone")
    bench.submit(make_request(2, prompt(5), max_tokens=2), gateway="here")
    bench.on(GatewayLost(gateway="gone"))
    bench.finish_all()
    assert bench.core.is_at_rest and bench.runs()[-1].request_id[-1] == "2"


def test_the_executor_is_told_of_every_sequence_that_ended() -> None:
    bench = Bench()
    for number in range(3):
        bench.submit(make_request(number, prompt(5), max_tokens=2))
        bench.finish_all()
    bench.submit(make_request(8, prompt(5), max_tokens=1))
    assert [list(plan.ended) for plan in bench.steps] == [[2]]


# --- what others see --------------------------------------------------------------------------------------------------


def test_snapshot_says_how_it_is() -> None:
    """Prompt tokens of a step under way are not computed yet. Seen to fail with them left out."""
    bench = Bench(max_num_batched_tokens=16, max_num_seqs=1)
    bench.on(RoleChanged(role=Role.DECODE))
    bench.submit(make_request(1, prompt(40)))
    bench.submit(make_request(2, prompt(30, 100)))
    snapshot = bench.core.snapshot(0.0)
    assert (snapshot.role, snapshot.num_waiting, snapshot.num_running, snapshot.waiting_tokens) == (Role.DECODE, 1, 1, 16 + 24 + 30)
    assert snapshot.running_kv_tokens == 16 and snapshot.num_blocks_unaccounted == 0
    bench.finish_step()
    assert bench.core.snapshot(0.0).waiting_tokens == 24 + 30
    assert tuple(snapshot.counters) == COUNTERS


def test_kv_snapshot_goes_on_where_events_do() -> None:
    bench = Bench()
    bench.submit(make_request(1, prompt(40), max_tokens=1))
    bench.finish_all()
    snapshot = bench.core.kv_snapshot()
    assert len(snapshot.hashes) == 2 and snapshot.parents[1] == snapshot.hashes[0]
    assert snapshot.next_event_number == bench.core.snapshot(0.0).last_event_number + 1 == 2
