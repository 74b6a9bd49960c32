"""The session under any interleaving: whatever is duplicated, reordered, late or lost, each position is delivered exactly once, in
order, and the request has exactly one end (laws I1 and I2 at the gateway).

A small world plays router and workers from a seeded generator: facts lie in a pool and are handed over in any order, some twice,
some after their worker died. A token names its attempt, choice and position, so one that is wrong, or comes from an attempt that
was given up, shows at once. Each of these one-line bugs was seen to fail: in Session._deliver `run.token_ids[:]` (a repeated run is
delivered again); in _on_fact the attempt number of a run or of an offer not compared; in _next_attempt the delivered tokens left out.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.config import GatewayConfig
from gateway.events import (
    Abandon,
    AttemptEnded,
    CancelAt,
    ChoiceStopped,
    ClientGone,
    CompleteAt,
    Deliver,
    Event,
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
from protocol.lifecycle import is_final
from protocol.messages import (
    Assigned,
    Assignment,
    AttemptFailed,
    Done,
    HandoffDone,
    OfferCompleted,
    Offered,
    Place,
    PlaceAck,
    Reassigned,
    Refused,
    Submit,
    TokenRun,
    TransferFailed,
)
from protocol.request import FinishReason, Request, SamplingParams, token_buffer

pytestmark = pytest.mark.pure

MAX_TOKENS = 12
CONFIG = GatewayConfig(request_timeout_s=100.0, max_attempts=5, router_ack_s=0.2, placement_wait_s=5.0)


def token(attempt: int, choice: int, position: int) -> int:
    return 1_000_000 * attempt + 1000 * choice + position


class World:
    """Router and workers of one request. `lengths`: the output tokens each choice has in the undisturbed run."""

    def __init__(self, rng: random.Random, n: int) -> None:
        self.rng = rng
        self.now = 10.0
        self.lengths = [rng.randint(1, MAX_TOKENS) for _ in range(n)]
        request = Request(
            request_id="r",
            model_id="m",
            prompt_token_ids=token_buffer(range(20)),
            sampling=SamplingParams(max_tokens=MAX_TOKENS, n=n),
            cache_root=bytes(16),
            arrival_s=self.now,
        )
        self.session = Session(request, CONFIG)
        self.seen: list[list[int]] = [[] for _ in range(n)]
        self.stopped: set[int] = set()
        self.ends: list[object] = []
        self.attempts_ended: list[int] = []
        self.done_told: list[int] = []
        self.pool: list[Event] = []
        self.next_worker = 0
        self.workers: dict[str, str] = {}  # id -> role
        self.ahead: Submit | None = None  # with an early offer that is not complete yet
        for role in ("prefill", "prefill", "decode", "decode"):
            self.start_worker(role)

    def start_worker(self, role: str) -> None:
        self.workers[f"{role}-{self.next_worker}"] = role
        self.next_worker += 1

    def say(self, event: Event) -> None:
        events = deque([event])
        while events:
            commands = deque(self.session.on(events.popleft(), self.now))
            while commands:
                command = commands.popleft()
                assert not self.ends, f"{command} after the end"
                if isinstance(command, Deliver):
                    stop = self.deliver(command)
                    if stop is not None:
                        commands += self.session.on(stop, self.now)
                else:
                    events += self.perform(command)

    def deliver(self, d: Deliver) -> ChoiceStopped | None:
        if d.choice in self.stopped:
            return None
        have = self.seen[d.choice]
        assert d.position == len(have), f"choice {d.choice}: position {d.position} after {len(have)} tokens"
        have += d.token_ids
        number = self.session.attempt.number
        assert list(d.token_ids) == [token(number, d.choice, p) for p in range(d.position, len(have))]
        if d.token_ids and self.rng.random() < 0.02:  # a stop string in what was just delivered
            count = d.position + self.rng.randint(1, len(d.token_ids))
            del have[count:]
            self.stopped.add(d.choice)
            return ChoiceStopped(choice=d.choice, num_tokens=count)
        return None

    def perform(self, command: object) -> list[Event]:
        match command:
            case SendPlace(place=place):
                return self.place(place)
            case PlaceWithoutRouter(place=place):
                return [self.assign(place) or NoPlace()]
            case SubmitTo(worker_id=worker_id, submit=submit):
                if worker_id not in self.workers:
                    return [WorkerLost(worker_id=worker_id)]
                if submit.handoff is not None and not submit.handoff.is_complete:
                    self.ahead = submit
                    first_tokens = (FirstToken(choice=submit.attempt.live_choices[0], token_id=0),)
                    completion = HandoffCompletion(handoff_id="h", first_tokens=first_tokens, digests=())
                    completed = OfferCompleted(request_id="r", attempt=submit.attempt.number, completion=completion)
                    self.pool.append(WorkerSaid(worker_id=self.session.assignments[-1].prefill_worker, fact=completed))
                else:
                    self.submit(worker_id, submit)
            case CompleteAt(worker_id=worker_id, completed=completed):
                assert self.ahead is not None and self.ahead.handoff is not None
                if worker_id not in self.workers:
                    return [WorkerLost(worker_id=worker_id)]
                handoff = replace(self.ahead.handoff, layer_watermark=1, first_tokens=completed.completion.first_tokens)
                self.submit(worker_id, replace(self.ahead, handoff=handoff))
            case AttemptEnded(number=number, state=state):
                assert is_final(state)
                self.attempts_ended.append(number)
            case TellRouter(message=Done(attempt=number)):
                self.done_told.append(number)
            case Finish() | Fail() | Abandon():
                self.ends.append(command)
            case _:
                assert isinstance(command, (CancelAt, TellRouter))
        return []

    def place(self, place: Place) -> list[Event]:
        assert place.attempt == self.session.attempt.number
        chance = self.rng.random()
        if chance < 0.1:
            return [RouterAway()]
        answer = self.assign(place)
        if chance < 0.2 or answer is None:
            status = self.rng.choice((429, 503))
            answer = Refused(request_id="r", attempt=place.attempt, status=status, message="no", retry_after_s=0.1)
        ack = PlaceAck(request_id="r", attempt=place.attempt, queue_position=0)
        if chance < 0.3:
            return []  # silent: the tick finds another way
        self.pool += [ack, answer]
        return []

    def assign(self, place: Place) -> Assigned | None:
        decode = [w for w, role in self.workers.items() if role == "decode" and w not in place.excluded]
        prefill = [w for w, role in self.workers.items() if role == "prefill" and w not in place.excluded]
        if not decode:
            return None
        target = self.rng.choice(decode)
        source = target if place.local_only or not prefill or self.rng.random() < 0.2 else self.rng.choice(prefill)
        return Assigned(
            assignment=Assignment(
                request_id="r", attempt=place.attempt, prefill_worker=source, decode_worker=target, cached_tokens=0, policy="p",
                reason="", prefill_scores=(), decode_scores=(), waited_s=0.0,
            )
        )  # fmt: skip

    def submit(self, worker_id: str, submit: Submit) -> None:
        """All the facts this submit will ever bring, into the pool at once: their order is the pool's."""
        attempt, rng = submit.attempt, self.rng
        assert attempt.number == self.session.attempt.number
        if submit.handoff is None:
            assert [list(tokens) for tokens in attempt.delivered] == self.seen, "a retry goes on from what the user has"
        else:
            assert submit.handoff.attempt == attempt.number
        facts: list[object] = []
        if rng.random() < 0.08:
            retryable = rng.random() < 0.8
            facts.append(AttemptFailed(request_id="r", attempt=attempt.number, reason="no", retryable=retryable))
        live = attempt.live_choices
        if submit.handoff is not None:
            live = tuple(t.choice for t in submit.handoff.first_tokens if t.choice in live)
            if rng.random() < 0.3:
                facts.append(TransferFailed(request_id="r", attempt=attempt.number, error="peer_lost", detail=""))
            else:
                facts.append(HandoffDone(request_id="r", attempt=attempt.number, size_bytes=1, duration_s=0.1, path="shm"))
        starts = {c: len(attempt.delivered[c]) + (submit.handoff is not None) for c in live}
        going_on = []
        for c, start in starts.items():
            end = start + 1 if submit.prefill_only else self.lengths[c]
            while start < end:
                size = min(rng.randint(1, 3), end - start)
                facts.append(self.run(attempt.number, c, start, size))
                start += size
            if start < self.lengths[c]:
                going_on.append(c)
        if submit.prefill_only and going_on:
            is_early = len(starts) == 1 and rng.random() < 0.5
            facts.append(Offered(handoff=self.offer(attempt.number, going_on, is_early=is_early)))
        self.pool += [WorkerSaid(worker_id=worker_id, fact=f) for f in facts]  # type: ignore[arg-type]

    def run(self, number: int, choice: int, position: int, size: int) -> TokenRun:
        last = position + size == self.lengths[choice]
        tokens = array("I", [token(number, choice, position + i) for i in range(size)])
        reason = FinishReason.STOP if last else None
        return TokenRun(
            request_id="r", attempt=number, choice=choice, position=position, token_ids=tokens, logprobs=(), finish_reason=reason
        )

    def offer(self, number: int, choices: list[int], *, is_early: bool) -> KVHandoff:
        group = LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32")
        rectangle = ShardRectangle(first_head=0, last_head=1, first_layer=0, last_layer=1)
        shard = HandoffShard(
            worker_id="p", rank=0, epoch=1, endpoint=Endpoint(), region_id=0,
            layout=KVLayout(block_size_tokens=16, groups=(group,), shard=rectangle), block_ids=array("I"), generations=array("Q"),
            digest_mode=DigestMode.OFF, digests=b"",
        )  # fmt: skip
        first_tokens = () if is_early else tuple(FirstToken(choice=c, token_id=0) for c in choices)
        return KVHandoff(
            handoff_id="h", kind=HandoffKind.PREFILL, request_id="r", attempt=number, fingerprint=b"", token_ids=token_buffer(),
            layer_watermark=0 if is_early else 1, first_tokens=first_tokens, lease=Lease(duration_s=1.0), shards=(shard,),
        )  # fmt: skip

    def hand_over(self) -> None:
        """One event of the pool, sometimes leaving a copy behind."""
        i = self.rng.randrange(len(self.pool))
        event = self.pool[i] if self.rng.random() < 0.15 else self.pool.pop(i)
        self.say(event)

    def kill(self) -> None:
        worker_id = self.rng.choice(list(self.workers))
        role = self.workers.pop(worker_id)
        if self.rng.random() < 0.5:  # what it had sent is lost with it; else it is late, and still comes
            self.pool = [e for e in self.pool if not (isinstance(e, WorkerSaid) and e.worker_id == worker_id)]
        if worker_id in self.session.workers or self.rng.random() < 0.5:
            self.say(WorkerLost(worker_id=worker_id))
        if self.rng.random() < 0.7:
            self.start_worker(role)

    def reassign(self) -> Reassigned:
        """Timely or late, to whoever is there, or just left."""
        decode = [w for w, role in self.workers.items() if role == "decode"] or ["decode-0"]
        number = self.session.attempt.number - (self.rng.random() < 0.2)
        return Reassigned(request_id="r", attempt=number, decode_worker=self.rng.choice(decode), reason="")

    def step(self) -> None:
        self.now += self.rng.choice((0.0, 0.01, 0.3))
        chance = self.rng.random()
        if chance < 0.70 and self.pool:
            self.hand_over()
        elif chance < 0.75:
            self.kill()
            while len(self.workers) < 2:
                self.start_worker(self.rng.choice(("prefill", "decode")))
        elif chance < 0.80:
            self.say(self.rng.choice((RouterLost(), RouterUp())))
        elif chance < 0.85:
            self.say(self.reassign())
        elif chance < 0.855:
            self.say(ClientGone())
        if self.now >= self.session.wake_s:
            self.say(Tick())


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**64), n=st.integers(1, 3))
def test_each_position_is_delivered_once_in_order_and_the_request_ends_once(seed: int, n: int) -> None:
    world = World(random.Random(seed), n)
    world.say(Start())
    for _ in range(300):
        if world.ends:
            break
        world.step()
    # The rest of the network arrives, late and in any order, and then time runs out.
    for _ in range(200):
        if world.pool and not world.ends:
            world.pool, event = world.pool[:-1], world.pool[-1]
            world.say(event)
    world.now = max(world.now, 10.0 + CONFIG.request_timeout_s)
    world.say(Tick())
    session = world.session
    assert len(world.ends) == 1 and session.end is world.ends[0] and is_final(session.state)
    numbers = list(range(session.attempt.number + 1))
    assert world.attempts_ended == numbers and world.done_told == numbers, "each attempt ends once, and the router hears of it"
    if isinstance(session.end, Finish):
        for choice in range(n):
            length = len(world.seen[choice]) if choice in world.stopped else world.lengths[choice]
            assert [t % 1_000_000 for t in world.seen[choice]] == [token(0, choice, p) for p in range(length)]
    assert [list(tokens) for tokens in session.delivered] == world.seen
    assert session.num_output_tokens == sum(len(tokens) for tokens in world.seen)
    for event in world.pool:  # nothing moves it any more
        assert session.on(event, world.now) == []


def test_most_runs_of_this_world_finish_and_many_retry() -> None:
    """The property above would be empty if the world never got anywhere."""
    ends, retried = [], 0
    for seed in range(300):
        world = World(random.Random(seed), 1 + seed % 3)
        world.say(Start())
        for _ in range(400):
            if world.ends:
                break
            world.step()
        ends.append(type(world.session.end))
        retried += isinstance(world.session.end, Finish) and world.session.attempt.number > 0
    assert ends.count(Finish) > 120 and retried > 60, (ends.count(Finish), retried)
