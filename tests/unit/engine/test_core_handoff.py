"""Both sides of a hand-off in a worker core: who keeps which blocks for how long, and what happens when the copy fails."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from engine.core.events import (
    AckSource,
    CancelPull,
    CancelReceived,
    DropSource,
    Emit,
    Event,
    GatewayLost,
    LeaseRenewed,
    OfferKv,
    PeerAcked,
    PeerDropped,
    PullDone,
    RaiseGenerations,
    RenewSource,
    StartPull,
    StepDone,
    Tell,
)
from engine.core.executor import Sampled, SampledTokens, StepResult
from protocol.kv import FailurePolicy, TransferError
from protocol.messages import AttemptFailed, HandoffDone, TransferFailed
from protocol.request import FinishReason
from tests.core_bench import Bench, done, of, offer, prompt, taken
from tests.sim_cluster import EOS, FINGERPRINT, layout, make_request

pytestmark = pytest.mark.pure


# --- the source of a hand-off -----------------------------------------------------------------------------------------


def test_prefill_offers_its_blocks_with_the_first_token() -> None:
    bench = Bench()
    handoff = offer(bench, make_request(1, prompt(40)), token=9)
    shard = handoff.shards[0]
    assert (handoff.num_valid_tokens, len(shard.block_ids), list(shard.generations)) == (40, 3, [1, 1, 1])
    assert [(t.choice, t.token_id) for t in handoff.first_tokens] == [(0, 9)]
    assert handoff.fingerprint == FINGERPRINT and len(handoff.handoff_id) == 32
    assert [(r.position, list(r.token_ids)) for r in bench.runs()] == [(0, [9])]
    assert bench.blocks == (29, 0, 3, 0) and not bench.core.is_at_rest


def test_tokens_are_sent_before_the_offer() -> None:
    bench = Bench()
    bench.submit(make_request(1, prompt(40)), prefill_only=True)
    kinds = [type(c) for c in bench.finish_step()]
    assert kinds.index(Emit) < kinds.index(OfferKv)


@pytest.mark.parametrize("end", ["acked", "dropped", "cancelled", "gateway lost", "expired"])
def test_offered_blocks_are_kept_until_the_handoff_ends(end: str) -> None:
    """Full blocks stay cached afterwards. Seen to fail with `_close` not ending the lease."""
    bench = Bench()
    handoff = offer(bench, make_request(1, prompt(40)))
    bench.tick(29.9)
    assert bench.blocks == (29, 0, 3, 0)
    if end == "expired":
        bench.tick(30.1)
    else:
        bench.on(
            {
                "acked": PeerAcked(handoff_id=handoff.handoff_id),
                "dropped": PeerDropped(handoff_id=handoff.handoff_id, reason=""),
                "cancelled": CancelReceived(request_id=handoff.request_id, attempt=0),
                "gateway lost": GatewayLost(gateway="g"),
            }[end]
        )
    assert bench.blocks == (30, 0, 0, 2) and bench.core.is_at_rest
    assert bench.counter("handoff_bytes_out") == (3 * layout().block_bytes if end == "acked" else 0)
    assert bench.counter("leases_expired") == (end == "expired")


def test_a_renewed_lease_lasts_on() -> None:
    bench = Bench()
    handoff = offer(bench, make_request(1, prompt(40)))
    bench.now = 25.0
    bench.on(LeaseRenewed(handoff_id=handoff.handoff_id))
    bench.tick(54.0)
    assert bench.blocks[2] == 3
    bench.tick(55.1)
    assert bench.blocks[2] == 0


def test_messages_about_ended_handoffs_are_counted_not_believed() -> None:
    bench = Bench()
    handoff_id = offer(bench, make_request(1, prompt(40))).handoff_id
    bench.on(PeerAcked(handoff_id=handoff_id))
    late: list[Event] = [
        PeerAcked(handoff_id=handoff_id),
        PeerDropped(handoff_id="x", reason=""),
        LeaseRenewed(handoff_id=handoff_id),
        PullDone(handoff_id="y", outcome=done()),
    ]
    for event in late:
        bench.on(event)
    assert bench.counter("late_messages") == 4 and bench.counter("handoff_bytes_out") == 3 * layout().block_bytes


def test_a_choice_that_ends_with_its_first_token_is_not_handed_off() -> None:
    bench = Bench()
    bench.submit(make_request(1, prompt(40), eos_token_ids=(EOS,)), prefill_only=True)
    bench.finish_all(token=EOS)
    assert bench.all(OfferKv) == [] and bench.runs()[0].finish_reason is FinishReason.STOP
    assert bench.core.is_at_rest


def test_several_choices_are_offered_once_with_a_first_token_each() -> None:
    bench = Bench()
    bench.submit(make_request(1, prompt(40), n=2, eos_token_ids=(EOS,)), prefill_only=True)
    plan = bench.steps.pop()
    ids = [s.sequence_id for s in plan.samples]
    sampled = (SampledTokens(sequence_id=ids[0], token_ids=array("I", [EOS])), SampledTokens(sequence_id=ids[1], token_ids=array("I", [8])))
    bench.on(StepDone(result=StepResult(step_id=plan.step_id, sampled=Sampled.of(sampled), duration_s=0.01)))
    (offered,) = bench.all(OfferKv)
    assert [(t.choice, t.token_id) for t in offered.handoff.first_tokens] == [(1, 8)]


def test_at_the_bound_of_offered_bytes_no_prompt_is_begun_for_a_handoff() -> None:
    """Prompts that stay here go on. Seen to fail with `_may_offer` always true."""
    bench = Bench(core={"max_offered_bytes": 3 * layout().block_bytes})
    first = offer(bench, make_request(1, prompt(40)))
    bench.submit(make_request(2, prompt(40, 100)), prefill_only=True)
    bench.submit(make_request(3, prompt(40, 200), max_tokens=1))
    bench.finish_all()
    assert [r.request_id[-1] for r in bench.runs()] == ["1", "3"] and len(bench.all(OfferKv)) == 1
    bench.on(PeerAcked(handoff_id=first.handoff_id))
    bench.finish_all()
    assert len(bench.all(OfferKv)) == 2


# --- the target of a hand-off -----------------------------------------------------------------------------------------


def test_a_target_pulls_verifies_acknowledges_and_decodes() -> None:
    bench = Bench()
    handoff, commands = taken(bench, max_tokens=3)
    (pull,) = of(commands, StartPull)
    assert list(pull.source_indices) == [0, 1, 2] and len(pull.target_block_ids) == 3 and pull.deadline_s == 30.0
    assert commands.index(of(commands, RaiseGenerations)[0]) < commands.index(pull)
    commands = bench.on(PullDone(handoff_id=handoff.handoff_id, outcome=done()))
    (plan,) = bench.steps
    assert [(e.start, e.num_tokens) for e in plan.entries] == [(40, 1)]
    assert list(plan.starts[0].token_ids) == [*prompt(40), 9] and plan.starts[0].num_prompt_tokens == 40
    assert of(commands, AckSource)[0].handoff is handoff and isinstance(of(commands, Tell)[0].message, HandoffDone)
    bench.finish_all()
    assert [(r.position, r.num_cached_tokens) for r in bench.runs()] == [(1, 0), (2, 0)]
    assert bench.counter("prompt_tokens_computed") == 0 and bench.counter("handoff_bytes_in") == 3072
    assert bench.core.is_at_rest


def test_a_snapshot_says_how_many_pulls_are_under_way() -> None:
    """Not those that wait for room. Seen to fail with `num_pulling` counting open offers."""
    bench = Bench(num_blocks=4)

    def pulling_and_waiting() -> tuple[int, int]:
        snapshot = bench.core.snapshot(bench.now)
        return snapshot.num_pulling, snapshot.num_waiting

    handoff, _ = taken(bench)
    another = make_request(2, prompt(40, 100))
    bench.submit(another, handoff=offer(Bench(worker_id="w1"), another))
    assert pulling_and_waiting() == (1, 2)
    bench.on(PullDone(handoff_id=handoff.handoff_id, outcome=done()))
    assert pulling_and_waiting() == (0, 1)
    bench.finish_all()
    assert pulling_and_waiting() == (1, 1)


def test_blocks_already_here_are_not_pulled() -> None:
    bench = Bench()
    bench.submit(make_request(5, prompt(40), max_tokens=1))
    bench.finish_all()
    _, commands = taken(bench)
    (pull,) = of(commands, StartPull)
    assert list(pull.source_indices) == [2] and len(pull.target_block_ids) == 1


def test_a_prompt_wholly_here_needs_no_copy() -> None:
    bench = Bench()
    bench.submit(make_request(5, prompt(33), max_tokens=1))
    bench.finish_all()
    _, commands = taken(bench, num_tokens=32)
    assert of(commands, StartPull) == [] and of(commands, AckSource) and bench.told(HandoffDone)[0].path == "cached"
    assert [(e.start, e.num_tokens) for e in bench.steps[0].entries] == [(32, 1)]


def test_what_must_not_be_read_is_refused_and_computed_here() -> None:
    request = make_request(1, prompt(40), max_tokens=3)
    handoff = replace(offer(Bench(), request, token=9), fingerprint=b"x" * 16)
    bench = Bench()
    commands = bench.submit(request, handoff=handoff)
    assert of(commands, StartPull) == [] and of(commands, DropSource)[0].handoff is handoff
    assert bench.told(TransferFailed)[0].error == "refused"
    assert [(e.start, e.num_tokens) for e in bench.steps[0].entries] == [(0, 41)], "prompt and first token"
    bench.finish_all()
    assert [r.position for r in bench.runs()] == [1, 2]


@pytest.mark.parametrize("error", [TransferError.PEER_LOST, TransferError.STALE_GENERATION, TransferError.DEADLINE])
def test_a_failed_pull_is_computed_here(error: TransferError) -> None:
    bench = Bench()
    handoff, _ = taken(bench, max_tokens=3)
    commands = bench.on(PullDone(handoff_id=handoff.handoff_id, outcome=done(error=error)))
    assert of(commands, DropSource) and bench.told(TransferFailed)[0].error == error.value
    bench.finish_all()
    assert [r.position for r in bench.runs()] == [1, 2]
    assert bench.counter("recomputes") == 1 and bench.counter("prompt_tokens_computed") == 41 and bench.core.is_at_rest


@pytest.mark.parametrize("policy", FailurePolicy)
def test_a_pull_that_no_transport_ends_holds_up_its_request_for_its_deadline_only(policy: FailurePolicy) -> None:
    """Its blocks stay in quarantine, whatever the policy; it is not pulled again while a copy of it may run.

    Seen to fail with `tick` giving up only what waits for room.
    """
    bench = Bench(num_blocks=8, core={"kv_load_failure_policy": policy})
    handoff, _ = taken(bench, max_tokens=3)
    assert not of(bench.tick(30.9), CancelPull), "the transport's own word comes first"
    commands = bench.tick(31.0)
    assert of(commands, CancelPull) and of(commands, DropSource) and not of(commands, StartPull)
    if policy is FailurePolicy.FAIL:
        assert "1 s after its deadline of 30 s" in bench.told(AttemptFailed)[0].reason
    else:
        assert bench.told(TransferFailed)[0].error == "deadline"
        bench.finish_all()
        assert [r.position for r in bench.runs()] == [1, 2]
    assert bench.blocks[1] == 3 and not bench.core.is_at_rest, "the copy may still write"
    bench.on(PullDone(handoff_id=handoff.handoff_id, outcome=done(error=TransferError.DEADLINE)))
    assert bench.blocks[1] == 0 and bench.core.is_at_rest and bench.counter("transfer_failures") == 1


def under(policy: FailurePolicy, **core: object) -> Bench:
    return Bench(num_blocks=4, core={"kv_load_failure_policy": policy, **core})


def test_under_retry_a_failed_pull_is_made_once_more_into_the_same_blocks() -> None:
    """Then it counts as any other. Seen to fail with `_pull` counting from block 0 of a prompt half of which is here."""
    bench = under(FailurePolicy.RETRY)
    bench.submit(make_request(5, prompt(20), max_tokens=1))
    bench.finish_all()
    handoff, commands = taken(bench, max_tokens=3)
    (first,) = of(commands, StartPull)
    commands = bench.on(PullDone(handoff_id=handoff.handoff_id, outcome=done(error=TransferError.PEER_LOST)))
    assert of(commands, StartPull) == [first] and list(first.source_indices) == [1, 2]
    assert not of(commands, DropSource) and not bench.all(Tell) and bench.counter("pulls_again") == 1
    assert of(bench.tick(5.0), RenewSource), "the source keeps its blocks meanwhile"
    commands = bench.on(PullDone(handoff_id=handoff.handoff_id, outcome=done()))
    assert of(commands, AckSource) and bench.told(HandoffDone)
    bench.finish_all()
    assert bench.counter("transfer_failures") == bench.counter("recomputes") == 0 and bench.core.is_at_rest


def test_under_retry_the_second_failure_is_computed_here() -> None:
    """Seen to fail with `recourse` not looking at the number of pulls."""
    bench = under(FailurePolicy.RETRY)
    handoff, _ = taken(bench, max_tokens=3)
    for _ in range(2):
        commands = bench.on(PullDone(handoff_id=handoff.handoff_id, outcome=done(error=TransferError.DEADLINE)))
    assert of(commands, DropSource) and not of(commands, StartPull) and bench.told(TransferFailed)[0].error == "deadline"
    bench.finish_all()
    assert [r.position for r in bench.runs()] == [1, 2] and bench.counter("recomputes") == 1 and bench.core.is_at_rest


def test_under_retry_an_attempt_cancelled_in_its_second_pull_keeps_its_blocks_until_the_copy_has_stopped() -> None:
    bench = under(FailurePolicy.RETRY)
    handoff, _ = taken(bench)
    bench.on(PullDone(handoff_id=handoff.handoff_id, outcome=done(error=TransferError.PEER_LOST)))
    assert of(bench.on(CancelReceived(request_id=handoff.request_id, attempt=0)), CancelPull)
    assert bench.blocks == (1, 3, 0, 0) and not bench.core.is_at_rest
    bench.on(PullDone(handoff_id=handoff.handoff_id, outcome=done(error=TransferError.PEER_LOST)))
    assert bench.blocks == (4, 0, 0, 0) and bench.core.is_at_rest, "no third pull of what nobody wants"


@pytest.mark.parametrize("failure", ["pull", "refused", "no room"])
def test_under_fail_the_request_ends_and_the_reason_is_told(failure: str) -> None:
    """Nothing is computed or kept, the source is told. Seen to fail with `_give_up` not asking the policy."""
    bench = under(FailurePolicy.FAIL, max_handoff_wait_s=20.0)
    request = make_request(1, prompt(40), max_tokens=3)
    handoff = offer(Bench(), request, token=9)
    if failure == "pull":
        bench.submit(request, handoff=handoff)
        bench.on(PullDone(handoff_id=handoff.handoff_id, outcome=done(error=TransferError.DIGEST_MISMATCH)))
    elif failure == "refused":
        bench.submit(request, handoff=replace(handoff, fingerprint=b"x" * 16))
    else:
        bench.submit(make_request(9, prompt(50, 100), max_tokens=10))
        bench.submit(request, handoff=handoff)
        bench.tick(20.1)
    (failed,) = bench.told(AttemptFailed)
    assert failed.request_id == request.request_id and not failed.retryable
    why = {"pull": "digest_mismatch", "refused": "refused: offered by a model", "no room": "no_blocks: no room here within 20 s"}[failure]
    assert why in failed.reason and "kv_load_failure_policy is fail" in failed.reason
    assert len(bench.all(DropSource)) == 1 and bench.told(TransferFailed) == [] and bench.counter("recomputes") == 0
    bench.finish_all()
    assert {r.request_id for r in bench.runs()} <= {make_request(9, prompt(1)).request_id} and bench.core.is_at_rest


def test_target_blocks_are_quarantined_until_the_copy_has_stopped() -> None:
    """Cancelled while pulling: a late writer finds them unused. Seen to fail with `cancel` giving the blocks back at once."""
    bench = Bench(num_blocks=4)
    handoff, _ = taken(bench)
    commands = bench.on(CancelReceived(request_id=handoff.request_id, attempt=0))
    assert of(commands, CancelPull) and of(commands, DropSource)
    assert bench.blocks == (1, 3, 0, 0) and not bench.core.is_at_rest
    bench.submit(make_request(2, prompt(30, 100)))
    assert bench.steps == [], "it waits for the quarantined blocks"
    bench.on(PullDone(handoff_id=handoff.handoff_id, outcome=done(error=TransferError.CANCELLED)))
    assert len(bench.steps) == 1


def test_the_source_hears_of_a_target_that_waits_or_pulls() -> None:
    bench = Bench(num_blocks=4)
    bench.submit(make_request(9, prompt(50, 100), max_tokens=10))
    taken(bench)
    assert bench.all(StartPull) == []
    assert [len(of(bench.tick(t), RenewSource)) for t in (4.9, 5.0, 5.1, 9.9, 10.2)] == [0, 1, 0, 0, 1]


def test_an_offer_that_finds_no_room_in_time_is_given_back() -> None:
    bench = Bench(num_blocks=4, core={"max_handoff_wait_s": 20.0})
    bench.submit(make_request(9, prompt(50, 100), max_tokens=10))
    taken(bench)
    commands = bench.tick(20.1)
    assert of(commands, DropSource) and bench.told(TransferFailed)[0].error == "no_blocks"
    bench.finish_all()
    assert {r.request_id[-1] for r in bench.runs()} == {"9", "1"} and bench.core.is_at_rest


def test_choices_are_handed_on_over_one_prompt() -> None:
    request = make_request(1, prompt(40), n=2, max_tokens=3)
    handoff = offer(Bench(), request, token=9)
    bench = Bench()
    (pull,) = of(bench.submit(request, handoff=handoff), StartPull)
    assert len(pull.target_block_ids) == 3
    bench.on(PullDone(handoff_id=handoff.handoff_id, outcome=done()))
    assert len(bench.steps[0].entries) == 2 and len(bench.steps[0].block_copies) == 1
    bench.finish_all()
    assert sorted((r.choice, r.position) for r in bench.runs()) == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_one_worker_may_prefill_and_later_decode_the_same_attempt() -> None:
    bench = Bench()
    request = make_request(1, prompt(40), max_tokens=3)
    handoff = offer(bench, request, token=9)
    (pull,) = of(bench.submit(request, handoff=handoff), StartPull)
    assert list(pull.source_indices) == [2], "full blocks are in its cache"
