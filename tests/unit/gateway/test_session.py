"""Moves of one session, event by event; tests/property/test_session_property.py shuffles them."""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

import pytest

from gateway.config import GatewayConfig
from gateway.events import (
    AttemptEnded,
    CancelAt,
    ChoiceStopped,
    ClientGone,
    CompleteAt,
    Deliver,
    Fail,
    Finish,
    NoPlace,
    PlaceWithoutRouter,
    RouterAway,
    RouterLost,
    RouterUp,
    SendPlace,
    Start,
    SubmitTo,
    TellRouter,
    Tick,
    WorkerLost,
    WorkerSaid,
)
from gateway.session import Session
from protocol.block_hash import block_hashes
from protocol.errors import DeadlineExceeded, InvalidRequest, NoWorker, Overloaded
from protocol.kv import (
    DigestMode,
    Endpoint,
    FirstToken,
    HandoffCompletion,
    HandoffKind,
    HandoffShard,
    KVHandoff,
    KVLayout,
    LayerGroup,
    LayerKind,
    Lease,
    ShardRectangle,
)
from protocol.lifecycle import AttemptState
from protocol.messages import (
    Assigned,
    Assignment,
    AttemptFailed,
    Done,
    HandoffDone,
    OfferCompleted,
    Offered,
    PlaceAck,
    PrefillDone,
    Reassigned,
    Refused,
    TokenRun,
    TransferFailed,
)
from protocol.request import FinishReason, Request, SamplingParams, token_buffer

pytestmark = pytest.mark.pure

CONFIG = GatewayConfig(request_timeout_s=60.0, max_attempts=3, router_ack_s=0.2, placement_wait_s=5.0)


def make(n: int = 1, max_tokens: int = 8) -> Session:
    sampling = SamplingParams(max_tokens=max_tokens, n=n)
    prompt = token_buffer(range(40))
    return Session(
        Request(request_id="r", model_id="m", prompt_token_ids=prompt, sampling=sampling, cache_root=bytes(16), arrival_s=0.0), CONFIG
    )


def assigned(number: int, prefill: str = "p0", decode: str = "d0") -> Assigned:
    return Assigned(
        assignment=Assignment(
            request_id="r", attempt=number, prefill_worker=prefill, decode_worker=decode, cached_tokens=0, policy="x", reason="",
            prefill_scores=(), decode_scores=(), waited_s=0.0,
        )
    )  # fmt: skip


def run(position: int, *tokens: int, number: int = 0, choice: int = 0, reason: FinishReason | None = None, by: str = "d0") -> WorkerSaid:
    fact = TokenRun(
        request_id="r", attempt=number, choice=choice, position=position, token_ids=array("I", tokens), logprobs=(),
        finish_reason=reason, num_cached_tokens=7,
    )  # fmt: skip
    return WorkerSaid(worker_id=by, fact=fact)


def offered(number: int = 0, choices: tuple[int, ...] = (0,), by: str = "p0") -> WorkerSaid:
    handoff = KVHandoff(
        handoff_id="h", kind=HandoffKind.PREFILL, request_id="r", attempt=number, fingerprint=b"", token_ids=token_buffer(),
        layer_watermark=1, first_tokens=tuple(FirstToken(choice=c, token_id=0) for c in choices), lease=Lease(duration_s=1.0), shards=(),
    )  # fmt: skip
    return WorkerSaid(worker_id=by, fact=Offered(handoff=handoff))


DONE = WorkerSaid(worker_id="d0", fact=HandoffDone(request_id="r", attempt=0, size_bytes=1, duration_s=0.1, path="shm"))
FAILED = WorkerSaid(worker_id="d0", fact=TransferFailed(request_id="r", attempt=0, error="peer_lost", detail=""))


def play(session: Session, *events: Any, now: float = 1.0) -> list[Any]:
    return [command for event in events for command in session.on(event, now)]


def only(commands: list[Any], kind: type) -> list[Any]:
    return [c for c in commands if isinstance(c, kind)]


def test_whole_life_of_a_disaggregated_request() -> None:
    session = make()
    (place,) = play(session, Start(), now=0.0)
    assert place.place.block_hashes == tuple(block_hashes(bytes(16), range(40))) and place.place.num_tokens == 40
    (submit,) = play(session, assigned(0), now=0.1)
    assert submit.worker_id == "p0" and submit.submit.prefill_only and session.state is AttemptState.PREFILLING
    (first,) = play(session, run(0, 5, by="p0"), now=0.2)
    assert (first.position, list(first.token_ids)) == (0, [5]) and session.num_cached_tokens == 7
    told, submit = play(session, offered(), now=0.3)
    assert told.message == PrefillDone(request_id="r", attempt=0, num_cached_tokens=7, decode_worker="d0")
    assert submit.worker_id == "d0" and submit.submit.handoff is not None
    assert session.state is AttemptState.WAITING_KV
    assert play(session, DONE, now=0.4) == [] and session.state is AttemptState.DECODING
    deliver, ended, told, end = play(session, run(1, 6, 7, reason=FinishReason.STOP), now=0.5)
    assert list(deliver.token_ids) == [6, 7] and ended.state is AttemptState.FINISHED
    assert told.message == Done(request_id="r", attempt=0, num_output_tokens=3, handoff=DONE.fact) and isinstance(end, Finish)
    (timeline,) = session.timelines
    assert (timeline.assigned_s, timeline.prefill_end_s, timeline.handoff_end_s, timeline.end_s) == (0.1, 0.3, 0.4, 0.5)
    assert (timeline.ttft_s, timeline.num_tokens) == (0.2, 3)


def test_answer_of_one_token_needs_no_decode_worker() -> None:
    session = make()
    commands = play(session, Start(), assigned(0), run(0, 5, reason=FinishReason.STOP, by="p0"))
    assert [c.worker_id for c in only(commands, SubmitTo)] == ["p0"] and isinstance(session.end, Finish)


def test_router_hears_of_an_attempt_what_its_own_worker_found_and_how_it_ended() -> None:
    """Three attempts: recomputed and lost, cut short by its first token. How: every word to the router, in order.

    Seen to fail with `found_tokens` kept in `_next_attempt`, and without PrefillDone where the first token is the last.
    """
    session = make()
    moves = (Start(), assigned(0), run(0, 5, by="p0"), offered(), FAILED, WorkerLost(worker_id="d0"))
    first = [c.message for c in only(play(session, *moves), TellRouter)]
    assert first[0] == PrefillDone(request_id="r", attempt=0, num_cached_tokens=7, decode_worker="d0")
    assert first[1] == Done(request_id="r", attempt=0, num_output_tokens=1, state=AttemptState.LOST, transfer_error="peer_lost")
    later = run(1, 6, number=1, by="p1", reason=FinishReason.STOP)
    later = replace(later, fact=replace(later.fact, num_cached_tokens=32))
    second = [c.message for c in only(play(session, assigned(1, "p1", "d1"), later), TellRouter)]
    assert second == [
        PrefillDone(request_id="r", attempt=1, num_cached_tokens=32, decode_worker="d1"),
        Done(request_id="r", attempt=1, num_output_tokens=1),
    ]


def test_attempt_that_delivered_nothing_tells_the_router_of_no_first_token() -> None:
    """A stop string in what came before ends the request while its second attempt still computes. Seen to fail without the check
    for tokens of this attempt in `_finish_if_complete`."""
    session = make()
    play(session, Start(), assigned(0, "d0", "d0"), run(0, 5), WorkerLost(worker_id="d0"), assigned(1, "p1", "d1"))
    told = [c.message for c in only(play(session, ChoiceStopped(choice=0, num_tokens=1)), TellRouter)]
    assert told == [Done(request_id="r", attempt=1, num_output_tokens=0)]


def test_transfer_that_failed_is_recomputed_where_it_decodes() -> None:
    session = make()
    play(session, Start(), assigned(0), run(0, 5, by="p0"), offered(), FAILED)
    assert session.state is AttemptState.PREFILLING and session.workers == ("d0",)
    assert play(session, WorkerLost(worker_id="p0")) == []
    play(session, run(1, 6))
    assert session.state is AttemptState.DECODING


def test_same_worker_for_both_has_no_handoff() -> None:
    session = make()
    commands = play(session, Start(), assigned(0, "d0", "d0"), run(0, 5))
    assert not only(commands, SubmitTo)[0].submit.prefill_only and session.state is AttemptState.DECODING
    assert isinstance(only(commands, TellRouter)[0].message, PrefillDone)


def test_choice_that_ends_on_its_first_token_is_not_computed_again() -> None:
    session = make(n=2)
    play(session, Start(), assigned(0), run(0, 5, by="p0", reason=FinishReason.STOP), run(0, 6, choice=1, by="p0"))
    (submit,) = only(play(session, offered(choices=(1,))), SubmitTo)
    assert submit.submit.attempt.finished == (True, False) and [len(d) for d in submit.submit.attempt.delivered] == [0, 0]


@pytest.mark.parametrize(("moves", "lost", "survivors"), [
    ((), "p0", []),  # prefilling: the prefill worker
    ((run(0, 5, by="p0"), offered()), "d0", ["p0"]),  # waiting for KV
    ((run(0, 5, by="p0"), offered(), DONE), "d0", ["p0"]),  # decoding
])  # fmt: skip
def test_loss_in_each_phase_starts_a_new_attempt_without_the_lost_worker(moves: tuple[Any, ...], lost: str, survivors: list[str]) -> None:
    session = make()
    play(session, Start(), assigned(0), *moves)
    commands = play(session, WorkerLost(worker_id=lost))
    assert [c.worker_id for c in only(commands, CancelAt)] == survivors
    (ended,) = only(commands, AttemptEnded)
    assert ended.state is AttemptState.LOST and ended.number == 0
    (place,) = only(commands, SendPlace)
    assert place.place.attempt == 1 and place.place.excluded == (lost,)
    assert [list(d) for d in session.attempt.delivered] == [[5] if moves else []]


def reassigned(worker_id: str, number: int = 0) -> Reassigned:
    return Reassigned(request_id="r", attempt=number, decode_worker=worker_id, reason="d0 was lost")


def test_a_decode_worker_lost_before_its_turn_is_replaced_while_prefill_goes_on() -> None:
    """Whoever hears of the loss first, gateway or router. Seen to fail with `_reassign` not setting `_reassign_by_s` back."""
    for events in ((WorkerLost(worker_id="d0"), reassigned("d1")), (reassigned("d1"), WorkerLost(worker_id="d0"))):
        session = make()
        play(session, Start(), assigned(0), now=0.0)
        assert play(session, *events, now=0.1) == [] and session.workers == ("p0", "d1")
        assert play(session, Tick(), now=0.5) == []
        told, submit = play(session, offered(), now=0.6)
        assert submit.worker_id == "d1" and session.attempt.number == 0
        assert told.message == PrefillDone(request_id="r", attempt=0, decode_worker="d1")
        play(session, run(0, 5, 6, reason=FinishReason.STOP, by="d1"))
        assert isinstance(session.end, Finish)


@pytest.mark.parametrize("ends_waiting", ["time", "the offer", "the prefill worker is lost too"])
def test_a_lost_decode_worker_that_nobody_replaces_in_time_ends_the_attempt(ends_waiting: str) -> None:
    """Seen to fail (the offer) with `_on_offer` submitting to the lost worker."""
    session = make()
    play(session, Start(), assigned(0), WorkerLost(worker_id="d0"), now=1.0)
    assert play(session, reassigned("d0"), reassigned("p0"), reassigned("d1", number=1), now=1.0) == []
    assert session.wake_s == pytest.approx(1.2) and play(session, Tick(), WorkerLost(worker_id="d0"), now=1.1) == []
    event = {"time": Tick(), "the offer": offered()}.get(ends_waiting, WorkerLost(worker_id="p0"))
    commands = play(session, event, now=1.2 if ends_waiting == "time" else 1.15)
    (ended,) = only(commands, AttemptEnded)
    assert ended.state is AttemptState.LOST
    lost = ("d0", "p0") if ends_waiting.startswith("the prefill") else ("d0",)
    assert only(commands, SendPlace)[0].place.excluded == lost
    assert [c.worker_id for c in only(commands, CancelAt)] == ([] if "p0" in lost else ["p0"])
    assert session.wake_s == pytest.approx(1.4 if ends_waiting == "time" else 1.35), "asks the router, and waits for nothing else"


@pytest.mark.parametrize("offer_is_early", [True, False])
def test_another_decode_worker_is_too_late_once_the_first_has_its_submit(offer_is_early: bool) -> None:
    """PrefillDone says who really decodes. Seen to fail with `_handoff` not looked at: CompleteAt then went to d1."""
    session = make()
    offer = early() if offer_is_early else offered()
    commands = play(session, Start(), assigned(0), offer, reassigned("d1"))
    if offer_is_early:
        commands += play(session, COMPLETED)
        assert only(commands, CompleteAt)[0].worker_id == "d0"
    assert [c.worker_id for c in only(commands, SubmitTo)] == ["p0", "d0"]
    (told,) = only(commands, TellRouter)
    assert told.message == PrefillDone(request_id="r", attempt=0, decode_worker="d0")


def test_facts_of_an_older_attempt_are_ignored() -> None:
    session = make()
    play(session, Start(), assigned(0), WorkerLost(worker_id="p0"), assigned(1))
    assert play(session, run(0, 9, number=0, by="p0"), offered(0), DONE, FAILED, assigned(0)) == []
    assert only(play(session, run(0, 5, number=1, by="p0")), Deliver)


def test_repeated_and_early_runs_are_put_in_order() -> None:
    session = make()
    play(session, Start(), assigned(0, "d0", "d0"))
    commands = play(session, run(2, 7, 8), run(0, 5), run(0, 5, 6), run(1, 6, 7), run(4, 9))
    assert [t for d in only(commands, Deliver) for t in d.token_ids] == [5, 6, 7, 8, 9]
    assert [d.position for d in only(commands, Deliver)] == [0, 1, 2, 4]


def test_retry_of_choices_that_differ_is_local_and_shares_the_prompt_hashes() -> None:
    session = make(n=2)
    play(session, Start(), assigned(0, "d0", "d0"), run(0, *range(8)), run(0, *range(9), choice=1))
    (place,) = only(play(session, WorkerLost(worker_id="d0")), SendPlace)
    assert place.place.local_only and place.place.num_tokens == 49 and place.place.expected_output_tokens == 0
    assert len(place.place.block_hashes) == 2


def test_retry_of_equal_choices_may_be_handed_off() -> None:
    session = make(n=2)
    play(session, Start(), assigned(0, "d0", "d0"), *(run(0, *range(8), choice=c) for c in (0, 1)))
    (place,) = only(play(session, WorkerLost(worker_id="d0")), SendPlace)
    assert not place.place.local_only and place.place.num_choices == 2 and len(place.place.block_hashes) == 3


def test_worker_that_gave_up_is_avoided_until_there_is_nobody_else() -> None:
    session = make()
    fact = AttemptFailed(request_id="r", attempt=0, reason="inbox full", retryable=True)
    (place,) = only(play(session, Start(), assigned(0), WorkerSaid(worker_id="p0", fact=fact))[1:], SendPlace)
    assert place.place.excluded == ("p0",)
    refused = Refused(request_id="r", attempt=1, status=503, message="nobody", retry_after_s=0.5)
    play(session, refused, now=2.0)
    assert session.end is None and session.wake_s == 2.5
    (place,) = only(play(session, Tick(), now=2.5), SendPlace)
    assert place.place.excluded == () and place.place.attempt == 2


def test_worker_that_cannot_ever_do_it_ends_the_request() -> None:
    session = make()
    fact = AttemptFailed(request_id="r", attempt=0, reason="needs 9 blocks, has 4", retryable=False)
    play(session, Start(), assigned(0), WorkerSaid(worker_id="p0", fact=fact))
    assert isinstance(session.end, Fail) and "needs 9 blocks" in str(session.end.error)


def test_attempts_are_bounded() -> None:
    session = make()
    play(session, Start())
    for number in range(3):
        play(session, assigned(number, f"p{number}"), WorkerLost(worker_id=f"p{number}"))
    assert isinstance(session.end, Fail) and "3 attempts" in str(session.end.error)


def test_no_acknowledgement_in_200_ms_places_without_the_router() -> None:
    session = make()
    play(session, Start(), now=0.0)
    assert session.wake_s == pytest.approx(0.2) and play(session, Tick(), now=0.19) == []
    assert only(play(session, Tick(), now=0.2), PlaceWithoutRouter)
    assert only(play(session, assigned(0)), SubmitTo) and play(session, assigned(0, "p1", "d1")) == []


def test_acknowledged_request_waits_for_the_router_until_that_is_lost() -> None:
    session = make()
    play(session, Start(), PlaceAck(request_id="r", attempt=0, queue_position=3), now=0.0)
    assert session.wake_s == CONFIG.request_timeout_s
    play(session, RouterLost(), now=5.0)
    assert session.wake_s == pytest.approx(5.2)
    assert only(play(session, RouterUp(), now=5.1), SendPlace)
    assert only(play(session, RouterAway(), now=5.1), PlaceWithoutRouter)


@pytest.mark.parametrize(("status", "kind"), [(429, Overloaded), (503, NoWorker), (400, InvalidRequest)])
def test_first_refusal_is_final(status: int, kind: type) -> None:
    session = make()
    play(session, Start(), Refused(request_id="r", attempt=0, status=status, message="m", retry_after_s=2.0))
    assert isinstance(session.end, Fail) and isinstance(session.end.error, kind) and session.state is AttemptState.REJECTED


def test_nobody_at_first_is_503_and_later_is_waited_for() -> None:
    session = make()
    play(session, Start(), NoPlace())
    assert isinstance(session.end, Fail) and isinstance(session.end.error, NoWorker)
    session = make()
    play(session, Start(), assigned(0, "d0", "d0"), run(0, 5), WorkerLost(worker_id="d0"), now=1.0)
    play(session, NoPlace(), now=1.0)
    assert session.end is None and session.wake_s == 1.25
    play(session, Tick(), NoPlace(), now=5.9)
    play(session, Tick(), now=6.0)
    assert isinstance(session.end, Fail) and "5 s" in str(session.end.error)


def test_stop_string_ends_a_choice_and_cancels_the_rest_of_the_work() -> None:
    session = make(n=2)
    play(session, Start(), assigned(0, "d0", "d0"), run(0, 1, 2, 3), run(0, 4, choice=1))
    assert play(session, ChoiceStopped(choice=0, num_tokens=2)) == []
    assert play(session, run(3, 9)) == []
    commands = play(session, run(1, 5, choice=1, reason=FinishReason.LENGTH))
    assert [c.worker_id for c in only(commands, CancelAt)] == ["d0"] and isinstance(session.end, Finish)
    assert session.num_output_tokens == 2 + 2


def test_client_gone_cancels_in_every_phase() -> None:
    for moves, workers in (((), []), ((assigned(0),), ["p0"]), ((assigned(0), offered()), ["p0", "d0"])):
        session = make()
        commands = play(session, Start(), *moves, ClientGone())
        assert [c.worker_id for c in only(commands, CancelAt)] == workers and session.state is AttemptState.CANCELLED
        assert play(session, Tick(), WorkerLost(worker_id="p0"), ClientGone(), now=99.0) == [] and session.wake_s == float("inf")


def test_deadline_ends_the_request() -> None:
    session = make()
    play(session, Start(), assigned(0))
    assert only(play(session, Tick(), now=60.0), CancelAt)
    assert isinstance(session.end, Fail) and isinstance(session.end.error, DeadlineExceeded)


def early() -> WorkerSaid:
    group = LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32")
    rectangle = ShardRectangle(first_head=0, last_head=1, first_layer=0, last_layer=1)
    shard = HandoffShard(
        worker_id="p0", rank=0, epoch=1, endpoint=Endpoint(), region_id=0,
        layout=KVLayout(block_size_tokens=16, groups=(group,), shard=rectangle), block_ids=array("I"), generations=array("Q"),
        digest_mode=DigestMode.OFF, digests=b"",
    )  # fmt: skip
    fact = offered().fact
    assert isinstance(fact, Offered)
    return WorkerSaid(worker_id="p0", fact=Offered(handoff=replace(fact.handoff, layer_watermark=0, first_tokens=(), shards=(shard,))))


COMPLETION = HandoffCompletion(handoff_id="h", first_tokens=(FirstToken(choice=0, token_id=5),), digests=(b"",))
COMPLETED = WorkerSaid(worker_id="p0", fact=OfferCompleted(request_id="r", attempt=0, completion=COMPLETION))


def test_an_early_offer_reaches_its_target_while_prefill_goes_on() -> None:
    """Both workers are needed until it is complete. Seen to fail with `workers` looking at whether there is an offer."""
    session = make()
    play(session, Start(), assigned(0))
    (submit,) = play(session, early(), now=0.2)
    assert isinstance(submit, SubmitTo) and submit.worker_id == "d0" and submit.submit.attempt.delivered == (array("I"),)
    assert session.state is AttemptState.PREFILLING and session.workers == ("p0", "d0")
    play(session, run(0, 5, by="p0"))
    told, complete = play(session, COMPLETED, now=0.3)
    assert isinstance(told.message, PrefillDone) and complete == CompleteAt(worker_id="d0", completed=COMPLETED.fact)
    assert session.state is AttemptState.WAITING_KV and session.workers == ("d0",)
    assert play(session, COMPLETED) == [], "told twice"
    play(session, DONE, now=0.4)
    play(session, run(1, 6, reason=FinishReason.STOP))
    assert isinstance(session.end, Finish) and session.timelines[0].prefill_end_s == 0.3


def test_a_first_token_that_is_the_last_frees_the_target_of_an_early_offer() -> None:
    """It waits for a completion that will not come. Seen to fail without `is_ahead` in `_stop`."""
    session = make()
    play(session, Start(), assigned(0), early())
    commands = play(session, run(0, 5, reason=FinishReason.STOP, by="p0"))
    assert isinstance(session.end, Finish) and [c.worker_id for c in only(commands, CancelAt)] == ["p0", "d0"]


def test_prefill_lost_after_an_early_offer_is_tried_again_from_the_start() -> None:
    session = make()
    play(session, Start(), assigned(0), early())
    commands = play(session, WorkerLost(worker_id="p0"))
    assert [c.worker_id for c in only(commands, CancelAt)] == ["d0"] and session.attempt.number == 1
    assert play(session, COMPLETED) == [], "of the attempt before"


def test_attempts_that_come_to_nothing_are_further_and_further_apart() -> None:
    """How: the only worker cannot be reached, six times; then it delivers a token and is lost again.

    Seen to fail without the pauses (all attempts of a request were gone in a few milliseconds) and without a token starting the count anew.
    """
    session = Session(make().request, replace(CONFIG, max_attempts=10))
    session.on(Start(), 0.0)
    now, waited_s = 0.0, []
    for number in range(6):
        session.on(assigned(number), now)
        commands = session.on(WorkerLost(worker_id="p0"), now)
        asks_at_s = now if any(isinstance(command, SendPlace) for command in commands) else session.wake_s
        waited_s.append(asks_at_s - now)
        now = asks_at_s
        session.on(Tick(), now)
    assert waited_s == [0.0, 0.25, 0.5, 1.0, 2.0, 2.0]
    session.on(assigned(6), now)
    session.on(run(0, 5, number=6, by="p0"), now)
    assert any(isinstance(command, SendPlace) for command in session.on(WorkerLost(worker_id="p0"), now))
