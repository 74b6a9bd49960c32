"""The router as a state machine: `on(event, now) -> commands`. It holds bookings and a queue, never a request's contents.

    Place ──► PlaceAck ──► refused at the door (413, 429)
                      ├──► placed: Assigned, booked in the same turn
                      ├──► queue (fair)      every inbox is full: tried again at each snapshot, Done, PrefillDone and Tick; then 429
                      └──► stranded          no worker at all: tried again when one is ready; then 503

Losing the router loses nothing: a new one learns the load from snapshots and the caches from KvSnapshots, and gateways ask again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.messages import (
    Assigned,
    Assignment,
    Done,
    Place,
    PlaceAck,
    PrefillDone,
    Reassigned,
    Refused,
)
from protocol.request import AttemptKey
from router import admission, policies, status
from router.bookings import Booking, Bookings
from router.choice import Choice
from router.config import RouterConfig
from router.cost_model import StepCost
from router.early_rejection import EarlyRejection
from router.events import (
    Command,
    Event,
    FromGateway,
    FromWorker,
    GatewayDown,
    GatewayUp,
    MembershipChanged,
    Tick,
    ToGateway,
    WorkerDown,
    WorkerUp,
)
from router.eviction_regret import EvictionRegret
from router.explanations import Explanation, Explanations
from router.fleet import Fleet, Pools
from router.guarded_policy import GuardedPolicy, PoolPolicies
from router.hindsight import OverlapWatch, PredictionErrors
from router.peers import Peers
from router.placement import Placement
from router.policies.api import (
    Booked,
    Finished,
    FirstToken,
    Moved,
    PlacementPolicy,
    PolicyOverran,
)
from router.policies.api import Tick as PolicyTick
from router.prefix_index import PrefixIndex
from router.queue import Waiting
from router.readiness import Readiness
from router.reassignment import Reassignments
from router.waiting_room import WaitingRoom
from router.worker_reports import WorkerReports


class RouterCore:
    """One router. Two cores given the same events, times and `rng` seed give the same commands."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        policy: PlacementPolicy,
        rng: Random,
        prior: StepCost | None = None,
        decode_policy: PlacementPolicy | None = None,
        name: str = "router-0",
    ) -> None:
        """decode_policy: None: `policy` serves both pools. name: as the directory lists it; others of kind "router" there are peers."""
        self.config = config
        self.fleet = Fleet()
        self.index = PrefixIndex(
            max_bytes=config.index_max_bytes, speculative_ttl_s=config.speculative_ttl_s, prefix_closed=config.index_prefix_closed
        )
        self.bookings: Bookings[Booking] = Bookings(self.fleet, ttl_s=config.booking_ttl_s, on_over=self._over)
        self.peers = Peers(
            config,
            name=name,
            fleet=self.fleet,
            index=self.index,
            own=self.bookings,
            say=lambda command: self._commands.append(command),
            on_prefill_done=self._end_prefill,
            on_done=self._end,
        )
        self._rng = rng
        self.policies = PoolPolicies(*self._guards(policy, decode_policy))
        self.explanations = Explanations(max_count=config.num_explained)
        self.prediction_errors = PredictionErrors()
        self.overlap = OverlapWatch()
        self.counters: dict[str, int] = dict.fromkeys(status.COUNTERS, 0)
        self.regret = EvictionRegret()
        self._placement = Placement(config, fleet=self.fleet, index=self.index, policies=self.policies, regret=self.regret, rng=rng)
        self._early_rejection = EarlyRejection(self._placement)
        self.waiting_room = WaitingRoom(config, fleet=self.fleet, placement=self._placement, on_choice=self._book_next)
        reassignments = Reassignments(fleet=self.fleet, bookings=self.bookings, placement=self._placement, on_moved=self._moved)
        self.reports = WorkerReports(
            config,
            fleet=self.fleet,
            index=self.index,
            bookings=self.bookings,
            peers=self.peers,
            policies=self.policies,
            regret=self.regret,
            rng=rng,
            prior=prior if prior is not None else StepCost(),
            reassignments=reassignments,
            say=lambda command: self._commands.append(command),
            on_ready=self.waiting_room.worker_is_ready,
        )
        self.readiness = Readiness(
            config,
            fleet=self.fleet,
            index=self.index,
            reports=self.reports,
            peers=self.peers,
            say=lambda command: self._commands.append(command),
        )
        self._lost_gateways: dict[str, float] = {}  # gateway -> when its bookings end
        self._gateway_epochs: dict[str, int] = {}
        self._untold: list[AttemptKey] = []  # bookings that are over without a Done
        self._unwritten: tuple[Booking, Choice] | None = None  # booked and answered; `_write_down` does the rest
        self._commands: list[Command] = []
        self._perform: dict[type, Callable[[Any, float], None]] = {
            FromGateway: self._from_gateway,
            GatewayUp: lambda event, now: self._gateway_up(event),
            GatewayDown: lambda event, now: self._gateway_down(event.gateway, now),
            MembershipChanged: lambda event, now: self._membership_changed(event, now),
            **self.peers.performers,
            WorkerUp: self.reports.up,
            WorkerDown: self.reports.down,
            FromWorker: self.reports.receive,
            Tick: lambda event, now: self._tick(now),
            PolicyOverran: self.policies.observe,
        }

    def on(self, event: Event, now: float) -> list[Command]:
        """What follows from one event; `now` in seconds on any steady clock."""
        self._write_down()
        commands: list[Command] = []
        self._commands = commands
        self._perform[type(event)](event, now)
        while self._untold:
            self.policies.observe(Finished(key=self._untold.pop(), num_output_tokens=None), now)
        if type(event) is Tick or not self.readiness.is_ready:
            self.readiness.judge(now)
        return commands

    def use_policy(
        self,
        policy: PlacementPolicy,
        spec: str,
        now: float,
        *,
        forget: bool,
        decode_policy: PlacementPolicy | None = None,
        decode_spec: str = "",
    ) -> None:
        """Place by `policy`, which `spec` names, from now on. Bookings and waiting requests stay.

        decode_policy: None: `policy` serves both pools.
        forget: what was learned of the workers too, so that the next choices are those of a router just started.
        """
        self._write_down()
        self.config = replace(self.config, policy=spec, decode_policy=decode_spec)
        self.policies.use(*self._guards(policy, decode_policy))
        self._placement.forget_replications()
        if forget:
            self.reports.forget()
        self.reports.introduce(now)

    def catch_up(self) -> None:
        """Work that can wait until the answers are out. A driver calls it after it has performed the commands, or not at all."""
        self._write_down()
        self.index.catch_up()

    def status(self, now: float) -> dict[str, object]:
        """Everything an operator may ask, as plain JSON values; schema `baton.router.v1`."""
        self._write_down()
        return status.document(self, now)

    def notes(self, now: float) -> list[str]:
        """What is not as it should be, one line each."""
        return status.notes(self, now)

    def explain(self, name: str, tenant: str | None = None) -> tuple[Explanation, ...]:
        """What is still remembered of a request's attempts, oldest first; by its id or another name it is known as."""
        self._write_down()
        return self.explanations.find(name, tenant)

    @property
    def policy(self) -> GuardedPolicy:
        """The one that chooses prefill workers, and decode workers too unless there is another for them."""
        return self.policies.prefill

    def check(self) -> None:
        """Assert that every hold belongs to a live booking and that the sums over workers are those of their holds."""
        held = self.bookings.standing() | self.peers.bookings.standing()
        on_workers = {key for worker in self.fleet for key in worker.holds}
        assert on_workers == held, f"holds without a booking: {on_workers - held}; lost holds: {held - on_workers}"
        for part in (*self.fleet, *self.bookings):
            part.check()
        self.waiting_room.check()
        self.explanations.check()

    def _guards(self, policy: PlacementPolicy, decode_policy: PlacementPolicy | None) -> tuple[GuardedPolicy, GuardedPolicy | None]:
        """Of policies named by the config."""
        penalty_s, specs = self.config.policy_penalty_s, (self.config.policy, self.config.decode_policy)
        name, decode_name = (policies.split(spec)[0] for spec in specs)
        guard = GuardedPolicy(policy, name=name, rng=self._rng, penalty_s=penalty_s)
        if decode_policy is None:
            return guard, None
        return guard, GuardedPolicy(decode_policy, name=decode_name, rng=self._rng, penalty_s=penalty_s)

    # --- gateways ---

    def _from_gateway(self, event: FromGateway, now: float) -> None:
        message = event.message
        if isinstance(message, Place):
            self._place(event.gateway, message, now)
        elif isinstance(message, PrefillDone):
            if not self._end_prefill(message, now):
                self.peers.pass_on(message, now)
        elif not self._end(message, now):
            self.peers.pass_on(message, now)

    def _place(self, gateway: str, place: Place, now: float) -> None:
        key = AttemptKey(request_id=place.request_id, attempt=place.attempt)
        self.counters["places"] += 1
        queued = self.waiting_room.get(place.request_id)
        booked = self.bookings.live_attempt(place.request_id)
        newest = max([w.key.attempt for w in (queued, booked) if w is not None], default=-1)
        if self.bookings.has_ended(key) or place.attempt < newest:
            self.counters["stale_places"] += 1
            return
        if booked is not None and booked.key == key:  # asked again after a reconnection
            booked.gateway = gateway
            self._ack(gateway, place, 0)
            self._commands.append(ToGateway(gateway=gateway, message=Assigned(assignment=booked.assignment)))
            return
        if booked is not None:
            self.bookings.end(booked.key)
        if queued is not None:
            self.waiting_room.leave(queued.key)
        pools = self.fleet.pools(place.model_id)
        refusal = self._refusal(place, pools, now)
        queue = self.waiting_room.queues.get(place.model_id)
        self._ack(gateway, place, len(queue) if queue is not None else 0)
        if refusal is not None:
            self._refuse(gateway, place, refusal, now)
            return
        waiting = Waiting(key=key, gateway=gateway, place=place, since_s=now)
        placed = self.waiting_room.admit(waiting, now)
        if placed is not None:
            self._book(waiting, *placed, now)

    def _refusal(self, place: Place, pools: Pools, now: float) -> Refused | None:
        queue = self.waiting_room.queues.get(place.model_id)
        drain_s = admission.drain_s(queue.num_tokens, pools) if queue is not None and len(queue) else 0.0
        refusal = admission.refusal_by_size(place, pools) or admission.refusal_by_queue(
            place, num_waiting=len(self.waiting_room), max_queue=self.config.max_queue, drain_s=drain_s
        )
        if refusal is None and self.config.refuse_by_slo and (place.slo_ttft_s is not None or place.slo_tpot_s is not None):
            output = queue.predicted_output_tokens(place) if queue is not None else place.expected_output_tokens
            refusal = self._early_rejection.refusal(place, pools, now, queue_s=drain_s, predicted_output_tokens=output)
        return refusal

    def _end_prefill(self, message: PrefillDone, now: float) -> bool:
        """False: not booked here."""
        key, found_tokens = AttemptKey(request_id=message.request_id, attempt=message.attempt), message.num_cached_tokens
        booking = self.bookings.get(key)
        is_first_word = booking is not None and not booking.is_prefilled
        booked_on = booking.assignment.decode_worker if booking is not None else ""
        booking = self.bookings.end_prefill(key, message.decode_worker, now)
        if booking is None:
            return False
        if booking.assignment.decode_worker != booked_on:
            self.policies.observe(Moved(key=key, decode_worker=booking.assignment.decode_worker), now)
        self.peers.prefilled(booking)
        if is_first_word and found_tokens is not None:
            self.explanations.first_token(key, now, found_tokens=found_tokens)
            self.prediction_errors.observe(booking.assignment, now - booking.booked_s)
            self.overlap.observe(booking.assignment, found_tokens, booking.place.num_tokens, now)
        self.policies.observe(FirstToken(key=key, since_booked_s=now - booking.booked_s), now)
        self.waiting_room.pump(booking.place.model_id, now)
        return True

    def _end(self, message: Done, now: float) -> bool:
        """False: not booked here, though perhaps it waited."""
        key = AttemptKey(request_id=message.request_id, attempt=message.attempt)
        booking = self.bookings.end(key)
        self.explanations.ended(message, now)
        if booking is not None:
            self._untold.remove(key)
        if self.waiting_room.leave(key) or booking is None:
            return booking is not None
        queue = self.waiting_room.queues.get(booking.place.model_id)
        if queue is not None:
            queue.settle(
                booking.place.tenant,
                predicted_output_tokens=booking.predicted_output_tokens,
                num_output_tokens=message.num_output_tokens,
                num_choices=booking.place.num_choices,
            )
        self.policies.observe(Finished(key=key, num_output_tokens=message.num_output_tokens), now)
        self.waiting_room.pump(booking.place.model_id, now)
        return True

    def _membership_changed(self, event: MembershipChanged, now: float) -> None:
        self.reports.take_membership(event.membership, now)
        self.peers.take_membership(event.membership, now)
        self.readiness.take_membership(now)
        self._placement.is_one_of_several = self.peers.num_routers > 1

    def _gateway_up(self, event: GatewayUp) -> None:
        self.readiness.tell(event.gateway)
        self._lost_gateways.pop(event.gateway, None)
        if self._gateway_epochs.get(event.gateway, event.epoch) != event.epoch:
            self._end_all_of(event.gateway)
        self._gateway_epochs[event.gateway] = event.epoch

    def _gateway_down(self, gateway: str, now: float) -> None:
        self.readiness.forget(gateway)
        for waiting in self.waiting_room.of_gateway(gateway):
            self.waiting_room.leave(waiting.key)
        self._lost_gateways[gateway] = now + self.config.gateway_grace_s

    def _end_all_of(self, gateway: str) -> None:
        for booking in [b for b in self.bookings if b.gateway == gateway]:
            self.bookings.end(booking.key)

    # --- time ---

    def _tick(self, now: float) -> None:
        self.index.expire(now)
        for key in self.bookings.overdue(now):
            self.counters["bookings_expired"] += 1
            self.bookings.drop(key)
        for gateway in [g for g, until_s in self._lost_gateways.items() if until_s <= now]:
            del self._lost_gateways[gateway]
            self._gateway_epochs.pop(gateway, None)
            self._end_all_of(gateway)
        self.reports.tick(now)
        self.counters["bookings_expired"] += self.peers.tick(now)
        self.readiness.tick(now)
        for waiting, refusal in self.waiting_room.refuse_overdue(now):
            self._refuse(waiting.gateway, waiting.place, refusal, now)
        self.policies.observe(PolicyTick(), now)
        for wish in self.policies.commands(now):
            self._placement.replicate(wish, now)
        self.waiting_room.pump_all(now)

    # --- booking ---

    def _book(self, waiting: Waiting, choice: Choice, predicted_output_tokens: int, now: float) -> None:
        place, key, prefill, decode = waiting.place, waiting.key, choice.prefill, choice.decode
        assignment = Assignment(
            request_id=place.request_id,
            attempt=place.attempt,
            prefill_worker=prefill.worker_id,
            decode_worker=decode.worker_id,
            cached_tokens=choice.cached_tokens,
            policy=choice.policy,
            reason=choice.reason
            if self.policies.answered(choice.policy)
            else f"{choice.reason}; {self.policies.names} failed or was too slow",
            waited_s=now - waiting.since_s,
            prefix_source=choice.prefix_source,
            confirmed_tokens=self.index.confirmed_tokens(prefill.worker_id, place.block_hashes, choice.cached_tokens),
            predicted_ttft_s=now - waiting.since_s + choice.prefill_s,
            predicted_handoff_s=choice.handoff_s,
        )
        self.counters["prefix_pulls"] += choice.pull is not None
        booking = Booking(
            key=key,
            gateway=waiting.gateway,
            place=place,
            assignment=assignment,
            prefill_worker=prefill.worker_id,
            predicted_output_tokens=predicted_output_tokens,
            booked_s=now,
            holds=choice.holds(key, place, now, predicted_output_tokens),
        )
        self.peers.forget(place.request_id)
        self.bookings.add(booking)
        self.peers.made(booking, now)
        self.fleet.note_chosen(prefill, decode)
        self.index.speculate(prefill.worker_id, place.block_hashes, now, num_held=choice.num_marked_blocks)
        self.counters["splits" if choice.is_split else "locals"] += 1
        self._commands.append(ToGateway(gateway=waiting.gateway, message=Assigned(assignment=assignment)))
        self._unwritten = (booking, choice)

    def _book_next(self, waiting: Waiting, choice: Choice, predicted_output_tokens: int, now: float) -> None:
        """Another choice may follow in the same turn."""
        self._book(waiting, choice, predicted_output_tokens, now)
        self._write_down()

    def _write_down(self) -> None:
        """The rest of a booking, for which its answer did not wait: it is done before anything else happens."""
        if self._unwritten is None:
            return
        (booking, choice), self._unwritten = self._unwritten, None
        place, now, prefill, decode = booking.place, booking.booked_s, choice.prefill, choice.decode
        explained = replace(
            booking.assignment,
            prefill_scores=choice.prefill_ranking.scores() if choice.prefill_ranking is not None else (),
            decode_scores=choice.decode_ranking.scores(),
        )
        self.explanations.placed(place, explained, now)
        prefill.note_booked(place.num_tokens, choice.cached_tokens)
        self.regret.asked_in_vain(place.block_hashes[(choice.cached_tokens + choice.pulled_tokens) // HASH_BLOCK_SIZE_TOKENS :])
        booked = Booked(
            request=place,
            prefill_worker=prefill.worker_id,
            decode_worker=decode.worker_id,
            cached_tokens=choice.cached_tokens,
            confirmed_tokens=booking.assignment.confirmed_tokens,
            pulled_tokens=choice.pulled_tokens,
            prefill_cost=prefill.cost,
            decode_cost=decode.cost,
        )
        self.policies.observe(booked, now)

    def _over(self, booking: Booking) -> None:
        self.peers.over(booking)
        self._untold.append(booking.key)

    def _moved(self, booking: Booking, now: float) -> None:
        """Another worker is to decode it: tell its gateway, and whoever asks why."""
        assignment = booking.assignment
        self.counters["reassigned"] += 1
        self.peers.made(booking, now)
        self.explanations.reassigned(booking.key, assignment)
        self.policies.observe(Moved(key=booking.key, decode_worker=assignment.decode_worker), now)
        message = Reassigned(
            request_id=assignment.request_id,
            attempt=assignment.attempt,
            decode_worker=assignment.decode_worker,
            reason=assignment.reason,
        )
        self._commands.append(ToGateway(gateway=booking.gateway, message=message))

    # --- saying ---

    def _ack(self, gateway: str, place: Place, queue_position: int) -> None:
        ack = PlaceAck(request_id=place.request_id, attempt=place.attempt, queue_position=queue_position)
        self._commands.append(ToGateway(gateway=gateway, message=ack))

    def _refuse(self, gateway: str, place: Place, refusal: Refused, now: float) -> None:
        self.explanations.refused(place, refusal, now)
        self.counters[f"refused_{refusal.status}"] += 1
        self._commands.append(ToGateway(gateway=gateway, message=refusal))
