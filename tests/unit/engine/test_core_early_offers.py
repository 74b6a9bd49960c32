"""Offers that precede the end of their prefill: made when its last step begins, pulled meanwhile, good only once completed."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from engine.core.events import (
    AckSource,
    CancelReceived,
    CompleteOffer,
    CompletePull,
    DropSource,
    Emit,
    GatewayLost,
    OfferCompletedReceived,
    OfferKv,
    PeerAcked,
    PublishKvEvents,
    PullDone,
    RunStep,
    Settle,
    Settled,
    StartPull,
)
from engine.core.intake import OVERDUE_S
from kvtransfer.handoff import step_begin
from protocol.kv import FirstToken, HandoffCompletion, KVHandoff, TransferError
from protocol.messages import AttemptFailed, HandoffDone, OfferCompleted, TransferFailed
from tests.core_bench import Bench, done, of, prompt
from tests.sim_cluster import EOS, FINGERPRINT, layout, make_request

pytestmark = pytest.mark.pure

NUM_LAYERS = layout().num_layers


def bench(**core: object) -> Bench:
    return Bench(core={"offer_early": True} | core)


def early_offer(source: Bench, *, num_tokens: int = 40, **sampling: object) -> KVHandoff:
    source.submit(make_request(1, prompt(num_tokens), **sampling), prefill_only=True)
    return source.all(OfferKv)[-1].handoff


def completion(handoff: KVHandoff, token: int = 9) -> OfferCompletedReceived:
    told = HandoffCompletion(handoff_id=handoff.handoff_id, first_tokens=(FirstToken(choice=0, token_id=token),), digests=(b"",))
    return OfferCompletedReceived(completed=OfferCompleted(request_id=handoff.request_id, attempt=handoff.attempt, completion=told))


# --- the source ---------------------------------------------------------------------------------------------------------


def test_an_offer_goes_out_behind_the_step_that_computes_its_last_tokens() -> None:
    """The step is submitted first: computing waits for nothing. Seen to fail with `_out` in front of the steps."""
    source = bench()
    commands = source.submit(make_request(1, prompt(40)), prefill_only=True)
    kinds = [type(c) for c in commands]
    assert kinds.index(RunStep) < kinds.index(OfferKv)
    (offered,) = of(commands, OfferKv)
    shard = offered.handoff.shards[0]
    assert not offered.handoff.is_complete and offered.handoff.first_tokens == () and offered.handoff.num_valid_tokens == 40
    assert (shard.layer_clock, shard.num_whole_blocks) == (step_begin(0, NUM_LAYERS), 0)
    commands = source.finish_step(9)
    (completed,) = of(commands, CompleteOffer)
    assert of(commands, OfferKv) == [] and completed.is_kept
    assert completed.handoff.first_tokens == (FirstToken(choice=0, token_id=9),)
    kinds = [type(c) for c in commands]
    assert kinds.index(Emit) < kinds.index(CompleteOffer)
    assert source.blocks == (29, 0, 3, 0)
    source.on(PeerAcked(handoff_id=completed.handoff.handoff_id))
    assert source.core.is_at_rest


def test_only_the_last_chunk_is_offered_ahead_and_the_blocks_before_it_are_whole() -> None:
    """Seen to fail with the offer made at the first chunk, and with the blocks rounded up."""
    source = Bench(core={"offer_early": True}, max_num_batched_tokens=20)
    source.submit(make_request(1, prompt(60)), prefill_only=True)
    assert source.all(OfferKv) == []
    source.finish_step()
    assert source.all(OfferKv) == []
    source.finish_step()
    (offered,) = source.all(OfferKv)
    shard = offered.handoff.shards[0]
    assert (shard.layer_clock, shard.num_whole_blocks) == (step_begin(2, NUM_LAYERS), 40 // 16)


@pytest.mark.parametrize("sampling", [{"max_tokens": 1}, {"n": 2, "max_tokens": 3}])
def test_what_cannot_be_followed_is_offered_when_it_is_done(sampling: dict[str, int]) -> None:
    """One token needs no target, and two choices no early one. Seen to fail without either condition."""
    source = bench()
    source.submit(make_request(1, prompt(40), **sampling), prefill_only=True)
    assert source.all(OfferKv) == []


def test_a_first_token_that_is_the_last_withdraws_the_offer() -> None:
    source = bench()
    early_offer(source, max_tokens=5, eos_token_ids=(EOS,))
    commands = source.finish_step(EOS)
    assert of(commands, CompleteOffer) == [] and source.core.is_at_rest


def test_prompts_that_begin_alike_and_are_offered_in_one_step_leave_a_cache_in_order() -> None:
    """The second one's blocks were leased before it was known that the first computed the same; its own end must not free a parent of what
    its offer still keeps.
    Seen to fail before an early offer's blocks were pinned until its step is done ("a block was evicted before its children").
    """
    source = Bench(core={"offer_early": True}, num_blocks=16)
    source.submit(make_request(0, prompt(5, first=100)), prefill_only=True)  # a step in flight, behind which the two meet
    for number, num_tokens in ((1, 20), (2, 60)):
        source.submit(make_request(number, prompt(num_tokens)), prefill_only=True)
    source.finish_step()
    assert len(source.steps) == 1 and len(source.steps[0].entries) == 2
    source.finish_step()
    for completed in source.all(CompleteOffer):
        source.on(PeerAcked(handoff_id=completed.handoff.handoff_id))
    assert source.core.is_at_rest
    source.submit(make_request(3, prompt(15 * 16, first=1000)), prefill_only=True)  # of nearly all blocks: what was cached is evicted
    source.finish_all()


@pytest.mark.parametrize("end", ["cancelled", "step failed"])
def test_an_early_offer_ends_with_its_attempt(end: str) -> None:
    """Seen to fail ("step failed") with `_fail` leaving the offer: its blocks stay leased until the lease is over."""
    source = bench()
    handoff = early_offer(source)
    if end == "cancelled":
        source.on(CancelReceived(request_id=handoff.request_id, attempt=0))
        source.finish_all()
    else:
        source.finish_step(error="boom")
    assert source.core.is_at_rest


def test_a_source_that_kept_no_blocks_says_so() -> None:
    source = bench(lease_s=1.0)
    early_offer(source)
    source.tick(1.5)
    (completed,) = of(source.finish_step(9), CompleteOffer)
    assert not completed.is_kept and source.core.is_at_rest


# --- the target ---------------------------------------------------------------------------------------------------------


def test_a_target_pulls_at_once_and_decodes_when_all_is_known() -> None:
    """No step, acknowledgement or word to the gateway before the completion. Seen to fail with `finish` called by `_pull` at once."""
    target = bench()
    handoff = early_offer(bench(), max_tokens=3)
    (pull,) = of(target.submit(make_request(1, prompt(40), max_tokens=3), handoff=handoff), StartPull)
    assert list(pull.source_indices) == [0, 1, 2] and target.steps == []
    (complete,) = of(target.on(completion(handoff)), CompletePull)
    assert complete.handoff.is_complete and complete.deadline_s == 30.0 and target.steps == []
    commands = target.on(PullDone(handoff_id=handoff.handoff_id, outcome=done()))
    assert of(commands, AckSource) and target.told(HandoffDone)
    assert [(e.start, e.num_tokens) for e in target.steps[0].entries] == [(40, 1)] and target.steps[0].starts[0].token_ids[-1] == 9
    target.finish_all()
    assert [r.position for r in target.runs()] == [1, 2] and target.core.is_at_rest


@pytest.mark.parametrize("error", [TransferError.PEER_LOST, TransferError.STALE_GENERATION])
def test_a_copy_that_fails_early_waits_for_the_first_token_and_then_computes(error: TransferError) -> None:
    """Its own first token could differ from the one delivered. Seen to fail with the sequence put back into the inbox at once."""
    target = bench()
    handoff = early_offer(bench(), max_tokens=3)
    target.submit(make_request(1, prompt(40), max_tokens=3), handoff=handoff)
    target.on(PullDone(handoff_id=handoff.handoff_id, outcome=done(error=error)))
    assert target.steps == [] and target.told(TransferFailed) == [] and target.blocks == (32, 0, 0, 0)
    commands = target.on(completion(handoff))
    assert of(commands, DropSource) and target.told(TransferFailed)[0].error == error.value
    assert [(e.start, e.num_tokens) for e in target.steps[0].entries] == [(0, 41)], "prompt and first token"
    target.finish_all()
    assert [r.position for r in target.runs()] == [1, 2] and target.core.is_at_rest


def test_a_refused_early_offer_waits_for_the_first_token_too() -> None:
    target = bench()
    handoff = replace(early_offer(bench(), max_tokens=3), fingerprint=b"x" * 16)
    assert handoff.fingerprint != FINGERPRINT
    assert of(target.submit(make_request(1, prompt(40), max_tokens=3), handoff=handoff), StartPull) == []
    assert target.steps == []
    target.on(completion(handoff))
    assert target.told(TransferFailed)[0].error == "refused"
    target.finish_all()
    assert [r.position for r in target.runs()] == [1, 2] and target.core.is_at_rest


def test_one_that_waits_for_room_is_pulled_whole_when_there_is_some() -> None:
    """Completed while it waits in the inbox; the inbox's count of tokens stays right. Seen to fail with the token appended in place."""
    target = Bench(num_blocks=4, core={"offer_early": True})
    target.submit(make_request(9, prompt(50, 100), max_tokens=2))
    handoff = early_offer(bench(), max_tokens=3)
    assert of(target.submit(make_request(1, prompt(40), max_tokens=3), handoff=handoff), StartPull) == []
    target.on(completion(handoff))
    assert target.core.snapshot(0.0).waiting_tokens == 41 + 50  # the other prompt is in the step under way
    target.finish_all()
    (pull,) = target.all(StartPull)
    assert pull.handoff.is_complete and pull.deadline_s == 30.0
    assert target.core.snapshot(0.0).waiting_tokens == 0


def test_a_prompt_that_lies_here_already_waits_only_for_its_first_token() -> None:
    target = bench()
    target.submit(make_request(8, prompt(48), max_tokens=1))
    target.finish_all()
    handoff = early_offer(bench(), num_tokens=48, max_tokens=3)
    assert of(target.submit(make_request(1, prompt(48), max_tokens=3), handoff=handoff), StartPull) == []
    commands = target.on(completion(handoff))
    assert of(commands, AckSource) and target.told(HandoffDone)[0].path == "cached"
    target.finish_all()
    assert [r.position for r in target.runs()][-2:] == [1, 2] and target.core.is_at_rest


@pytest.mark.parametrize("state", ["pulling", "parked", "cached"])
def test_an_attempt_cancelled_before_its_completion_leaves_nothing(state: str) -> None:
    """Seen to fail ("parked") with `cancel` failing a hand-off twice, ("cached") with its id kept."""
    target = bench()
    if state == "cached":
        target.submit(make_request(8, prompt(48), max_tokens=1))
        target.finish_all()
    num_tokens = 48 if state == "cached" else 40
    handoff = early_offer(bench(), num_tokens=num_tokens, max_tokens=3)
    target.submit(make_request(1, prompt(num_tokens), max_tokens=3), handoff=handoff)
    if state == "parked":
        target.on(PullDone(handoff_id=handoff.handoff_id, outcome=done(error=TransferError.PEER_LOST)))
    assert of(target.on(CancelReceived(request_id=handoff.request_id, attempt=0)), DropSource)
    if state == "pulling":
        target.on(PullDone(handoff_id=handoff.handoff_id, outcome=done(error=TransferError.CANCELLED)))
    late = target.counter("late_messages")
    target.on(completion(handoff))
    assert target.core.is_at_rest and target.counter("late_messages") == late + 1


def test_a_first_token_that_never_comes_gives_the_attempt_back() -> None:
    target = bench(max_handoff_wait_s=20.0)
    handoff = early_offer(bench(), max_tokens=3)
    target.submit(make_request(1, prompt(40), max_tokens=3), handoff=handoff)
    target.tick(19.0)
    target.on(PullDone(handoff_id=handoff.handoff_id, outcome=done(error=TransferError.PEER_LOST)))
    assert target.told(AttemptFailed) == []
    target.tick(20.5 + OVERDUE_S)
    (failed,) = target.told(AttemptFailed)
    assert failed.retryable and "20 s" in failed.reason and target.core.is_at_rest


def test_a_second_completion_changes_nothing() -> None:
    target = bench()
    handoff = early_offer(bench(), max_tokens=3)
    target.submit(make_request(1, prompt(40), max_tokens=3), handoff=handoff)
    target.on(completion(handoff))
    assert target.on(completion(handoff, token=5)) == [] and target.counter("late_messages") == 1
    target.on(PullDone(handoff_id=handoff.handoff_id, outcome=done()))
    assert target.steps[0].starts[0].token_ids == array("I", [*prompt(40), 9])


@pytest.mark.parametrize("end", ["acked", "cancelled", "gateway lost"])
def test_blocks_swapped_for_equal_ones_are_let_go_behind_those_that_hang_on_them(end: str) -> None:
    """Two prompts that begin alike, computed at once: the second takes the first one's blocks while its own are on offer.

    Seen to fail ("acked") without `Offers._follow`: a block is evicted before its children. Cancelled before, the step in flight still pins
    them all.
    """
    source = Bench(num_blocks=12, core={"offer_early": True}, max_num_batched_tokens=50, max_inflight_steps=2)
    source.submit(make_request(1, prompt(34), max_tokens=1))
    source.submit(make_request(2, prompt(66), max_tokens=9), prefill_only=True)
    source.finish_step()
    assert source.all(OfferKv), "its last step begins"
    source.finish_step()
    if end == "acked":
        source.finish_step()
        (completed,) = source.all(CompleteOffer)
        source.on(PeerAcked(handoff_id=completed.handoff.handoff_id))
    elif end == "cancelled":
        source.on(CancelReceived(request_id=make_request(2, []).request_id, attempt=0))
    else:
        source.on(GatewayLost(gateway="g"))
    source.finish_all()
    for number in range(3, 9):  # evict block after block
        source.submit(make_request(number, prompt(100, 1000 * number), max_tokens=1))
        source.finish_all()
    assert source.core.is_at_rest


def test_blocks_that_were_taken_are_named_once_their_first_step_is_under_way() -> None:
    """The step is not kept waiting for it. Seen to fail with `begin_decoding` naming them, and with Settled doing nothing."""
    target = bench()
    handoff = early_offer(bench(), max_tokens=3)
    target.submit(make_request(1, prompt(40), max_tokens=3), handoff=handoff)
    target.on(completion(handoff))
    commands = target.core.on(PullDone(handoff_id=handoff.handoff_id, outcome=done()), 0.0)
    assert of(commands, RunStep) and commands[-1] == Settle() and of(commands, PublishKvEvents) == []
    (published,) = of(target.core.on(Settled(), 0.0), PublishKvEvents)
    assert sum(len(event.hashes) for event in published.events) == 40 // 16


def test_blocks_that_were_given_up_before_they_were_named_stay_nameless() -> None:
    """Preempted with its first step, it computes its tokens itself: those blocks hold nothing yet. Seen to fail without the residency."""
    target = Bench(core={"offer_early": True}, force_preempt_every=1)
    handoff = early_offer(bench(), max_tokens=5)
    target.submit(make_request(1, prompt(40), max_tokens=5), handoff=handoff)
    target.on(completion(handoff))
    (run,) = of(target.core.on(PullDone(handoff_id=handoff.handoff_id, outcome=done()), 0.0), RunStep)
    target.steps.append(run.plan)
    commands = target.finish_step()
    assert target.counter("preemptions") == 1 and of(commands, PublishKvEvents) == []
