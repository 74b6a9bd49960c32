"""One accepted request, from its arrival to its one end: the journal, its attempts, and who works on it now.

The session owns the request. Workers and router only report facts, fenced by the attempt number; the session orders and
de-duplicates tokens by (choice, position), is the only caller of `advance` for attempts, and answers each loss with a new
attempt that carries what was delivered so far:

    attempt 0   QUEUED ─► PREFILLING ─► WAITING_KV ─► DECODING ──✕ LOST     user has 17 tokens
    attempt 1   QUEUED ─► PREFILLING ─► WAITING_KV ─► DECODING ─► FINISHED  continues with position 17

Pure: no clock, no socket, no random number.
"""

from __future__ import annotations

from array import array
from dataclasses import replace

from gateway.config import GatewayConfig
from gateway.events import (
    Abandon,
    Abort,
    AttemptEnded,
    CancelAt,
    ChoiceStopped,
    ClientGone,
    Command,
    CompleteAt,
    Deliver,
    End,
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
from gateway.placement import error_of, place_for
from protocol.errors import AttemptsExhausted, DeadlineExceeded, NoWorker, ServiceError
from protocol.lifecycle import AttemptState, advance, is_final
from protocol.messages import (
    Assigned,
    Assignment,
    AttemptFailed,
    Cancel,
    Done,
    HandoffDone,
    OfferCompleted,
    Offered,
    Place,
    PlaceAck,
    PrefillDone,
    Reassigned,
    Refused,
    Submit,
    TokenRun,
    TransferFailed,
)
from protocol.request import Attempt, FinishReason, Request, first_attempt
from protocol.timeline import Timeline

NEVER_S = float("inf")
REPLACE_PAUSE_S = 0.25  # between two tries to find a place for an accepted request
RETRY_PAUSE_S_MAX = 2.0
MAX_EARLY_RUNS = 1024  # runs of one choice that arrived before their turn; one socket is ordered, so few ever wait

_A = AttemptState
_WORKING = (_A.PREFILLING, _A.WAITING_KV, _A.DECODING)


class Session:
    """`on(event, now)` moves it; `end` says how it ended, None while it lives. Events after the end are ignored."""

    def __init__(self, request: Request, config: GatewayConfig, *, known_as: tuple[str, ...] = ()) -> None:
        """`known_as`: other names the client may ask for it by."""
        n = request.sampling.n
        self.request = request
        self.known_as = known_as
        self.delivered: list[array[int]] = [array("I") for _ in range(n)]
        self.finish_reasons: list[FinishReason | None] = [None] * n
        self.num_cached_tokens = 0  # of the prompt, as the first worker found it
        self.timelines = tuple(Timeline(arrival_s=request.arrival_s) for _ in range(n))  # one a choice
        self.attempt: Attempt = first_attempt(request)
        self.state: AttemptState = _A.QUEUED
        self.assignments: list[Assignment] = []  # one for each attempt that found its place
        self.end: End | None = None
        self._config = config
        self._deadline_s = request.arrival_s + config.request_timeout_s
        self._lost_workers: tuple[str, ...] = ()  # never asked again
        self._avoided_workers: tuple[str, ...] = ()  # gave this request up; asked again when nobody else is there
        self._num_failed = 0  # attempts a worker lost or gave up
        self._num_in_vain = 0  # those since one delivered anything
        # Of this attempt
        self.found_tokens: int | None = None  # cached, as its worker said with the first token
        self.handoff_done: HandoffDone | None = None
        self._transfer_error = ""
        self._handoff: Offered | None = None
        self._is_offered = False  # it is complete; an early offer is taken by its target while prefill goes on
        self._cancel_at_end = False  # we ended a choice that its worker still computes
        self._early: list[dict[int, TokenRun]] = [{} for _ in range(n)]  # by position
        # While QUEUED: ask (again) at `_place_at_s`; hear from the router by `_answer_by_s`; give up at `_place_by_s`.
        self._place_at_s = NEVER_S
        self._answer_by_s = NEVER_S
        self._place_by_s = NEVER_S
        # While PREFILLING, once the decode worker was lost before its turn: the router names another by then, or the attempt is lost.
        self._reassign_by_s = NEVER_S
        self._out: list[Command] = []

    # --- what others read ---

    @property
    def assignment(self) -> Assignment | None:
        """Of the current attempt; None while it is queued."""
        if self.assignments and self.assignments[-1].attempt == self.attempt.number:
            return self.assignments[-1]
        return None

    @property
    def workers(self) -> tuple[str, ...]:
        """Whose loss would hurt the current attempt."""
        assignment = self.assignment
        if assignment is None or self.state not in _WORKING:
            return ()
        if not self._is_offered and self.state is _A.PREFILLING and assignment.prefill_worker != assignment.decode_worker:
            return (assignment.prefill_worker, assignment.decode_worker)
        return (assignment.decode_worker,)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(tokens) for tokens in self.delivered)

    @property
    def wake_s(self) -> float:
        """When the next Tick is due."""
        return min(self._deadline_s, self._place_at_s, self._answer_by_s, self._place_by_s, self._reassign_by_s)

    # --- what happens ---

    def on(self, event: Event, now: float) -> list[Command]:
        if self.end is not None:
            if isinstance(event, ChoiceStopped):  # in the very run that ended the request: it still shortens the answer
                self._cut(event)
            return []
        self._out = []
        match event:
            case WorkerSaid(worker_id=worker_id, fact=fact):
                self._on_fact(worker_id, fact, now)
            case ChoiceStopped():
                self._on_stop(event, now)
            case Tick():
                self._on_tick(now)
            case Start():
                self._place(now)
            case PlaceAck(attempt=number) if self._awaits(number):
                self._answer_by_s = NEVER_S
            case Assigned(assignment=assignment) if self._awaits(assignment.attempt):
                self._begin(assignment, now)
            case Refused(attempt=number) if self._awaits(number):
                self._on_refused(event, now)
            case NoPlace() if self.state is _A.QUEUED:
                self._on_no_place(now)
            case RouterAway() if self.state is _A.QUEUED:
                self._place_without_router()
            case RouterLost() if self.state is _A.QUEUED and self._place_at_s == NEVER_S:
                self._answer_by_s = now + self._config.router_ack_s
            case RouterUp() if self.state is _A.QUEUED and self._place_at_s == NEVER_S:
                self._place(now)
            case Reassigned(attempt=number, decode_worker=worker_id) if number == self.attempt.number:
                self._reassign(worker_id)
            case WorkerLost(worker_id=worker_id):
                if worker_id in self.workers:
                    self._on_lost(worker_id, now)
            case ClientGone():
                self._stop(Abandon(), _A.CANCELLED, "the client went away", now)
            case Abort(error=error):
                self._stop(Fail(error=error), _A.CANCELLED, str(error), now)
        return self._out

    def _on_tick(self, now: float) -> None:
        if now >= self._deadline_s:
            limit_s = self._config.request_timeout_s
            error = DeadlineExceeded(f"the request took longer than its limit of {limit_s:g} s; raise it or ask for fewer tokens")
            self._stop(Fail(error=error), _A.FAILED, "deadline", now)
        elif now >= self._reassign_by_s:
            self._lose_decoder(now)
        elif self.state is not _A.QUEUED:
            pass
        elif now >= self._place_by_s:
            limit_s = self._config.placement_wait_s
            error_ = NoWorker(f"no worker for the rest of this request within {limit_s:g} s", retry_after_s=limit_s)
            self._stop(Fail(error=error_), _A.FAILED, "no worker in time", now)
        elif now >= self._place_at_s:
            self._place(now)
        elif now >= self._answer_by_s:
            self._place_without_router()

    # --- finding a place ---

    def _awaits(self, number: int) -> bool:
        return self.state is _A.QUEUED and number == self.attempt.number

    def _place(self, now: float) -> None:
        self._place_at_s = NEVER_S
        self._answer_by_s = now + self._config.router_ack_s
        self._out.append(SendPlace(place=self._wanted()))

    def _place_without_router(self) -> None:
        self._place_at_s = NEVER_S
        self._answer_by_s = NEVER_S
        self._out.append(PlaceWithoutRouter(place=self._wanted()))

    def _wanted(self) -> Place:
        return place_for(self.attempt, excluded=self._lost_workers + self._avoided_workers, known_as=self.known_as)

    def _begin(self, assignment: Assignment, now: float) -> None:
        self._place_at_s = self._answer_by_s = self._place_by_s = NEVER_S
        self.assignments.append(assignment)
        self.state = advance(self.state, _A.PREFILLING)
        for timeline in self.timelines:
            if timeline.assigned_s is None:
                timeline.assigned_s = now
        apart = assignment.prefill_worker != assignment.decode_worker
        submit = Submit(attempt=self.attempt, prefill_only=apart, handoff=None)
        self._out.append(SubmitTo(worker_id=assignment.prefill_worker, submit=submit, prefix_source=assignment.prefix_source))

    def _on_refused(self, refused: Refused, now: float) -> None:
        if self.attempt.number == 0 or refused.status not in (429, 503):
            self._stop(Fail(error=error_of(refused)), _A.REJECTED, refused.message, now)
            return
        # Accepted once, so it is not turned away now: it asks again until placement_wait_s is over.
        self._avoided_workers = ()
        self._end_attempt(_A.REJECTED, refused.message)
        self._next_attempt(now, pause_s=max(refused.retry_after_s or 0.0, REPLACE_PAUSE_S))

    def _on_no_place(self, now: float) -> None:
        if self.attempt.number == 0:
            error = NoWorker("no worker is ready to take requests; see GET /ready", retry_after_s=1.0)
            self._stop(Fail(error=error), _A.REJECTED, "no worker is ready", now)
        else:
            self._avoided_workers = ()
            self._place_at_s, self._answer_by_s = now + REPLACE_PAUSE_S, NEVER_S

    # --- another decode worker ---

    def _waits_for_decoder(self) -> Assignment | None:
        """The assignment, while its prompt is computed and its decode worker has not been asked for anything."""
        assignment = self.assignment
        if assignment is None or self.state is not _A.PREFILLING or self._handoff is not None:
            return None
        return assignment if assignment.prefill_worker != assignment.decode_worker else None

    def _reassign(self, worker_id: str) -> None:
        assignment = self._waits_for_decoder()
        if assignment is not None and worker_id != assignment.prefill_worker and worker_id not in self._lost_workers:
            self.assignments[-1] = replace(assignment, decode_worker=worker_id)
            self._reassign_by_s = NEVER_S

    def _on_lost(self, worker_id: str, now: float) -> None:
        assignment = self._waits_for_decoder()
        if assignment is None or worker_id != assignment.decode_worker:
            self._retry(worker_id, _A.LOST, f"worker {worker_id} was lost", now)
        elif self._reassign_by_s == NEVER_S:
            self._lost_workers += (worker_id,)
            self._reassign_by_s = now + self._config.router_ack_s

    def _lose_decoder(self, now: float) -> None:
        """It was lost, and no other was named in time."""
        _, worker_id = self.workers
        self._retry(worker_id, _A.LOST, f"worker {worker_id} was lost", now)

    # --- work ---

    def _on_fact(self, worker_id: str, fact: object, now: float) -> None:
        assignment = self.assignment
        if assignment is None or self.state not in _WORKING or worker_id not in (assignment.prefill_worker, assignment.decode_worker):
            return
        number = self.attempt.number
        match fact:
            case TokenRun(attempt=n) if n == number:
                self._on_run(fact, now, by_decoder=worker_id == assignment.decode_worker)
            case Offered(handoff=handoff) if handoff.attempt == number and self.state is _A.PREFILLING and self._handoff is None:
                self._on_offer(fact, assignment, now)
            case OfferCompleted(attempt=n) if n == number and self._handoff is not None and not self._is_offered:
                self._hand_on(now)
                self._out.append(CompleteAt(worker_id=assignment.decode_worker, completed=fact))
            case HandoffDone(attempt=n) if n == number and self.state is _A.WAITING_KV:
                self.state = advance(self.state, _A.DECODING)
                self.handoff_done = fact
                for timeline in self.timelines:
                    timeline.handoff_end_s = now
            case TransferFailed(attempt=n, error=error) if n == number and self.state is _A.WAITING_KV:
                self.state = advance(self.state, _A.PREFILLING)  # the decode worker computes the prompt itself
                self._transfer_error = error
            case AttemptFailed(attempt=n, retryable=True, reason=reason) if n == number:
                self._retry(worker_id, _A.FAILED, f"worker {worker_id} gave it up: {reason}", now)
            case AttemptFailed(attempt=n, reason=reason) if n == number:
                self._stop(Fail(error=ServiceError(f"the worker could not compute this request: {reason}")), _A.FAILED, reason, now)

    def _on_run(self, run: TokenRun, now: float, *, by_decoder: bool) -> None:
        choice = run.choice
        if self.found_tokens is None:
            self.found_tokens = run.num_cached_tokens
        if choice >= len(self.delivered) or self.finish_reasons[choice] is not None:
            return
        early = self._early[choice]
        if run.position > len(self.delivered[choice]):
            early[run.position] = run
            if len(early) > MAX_EARLY_RUNS:
                at = len(self.delivered[choice])
                self._retry("", _A.FAILED, f"{MAX_EARLY_RUNS} runs of choice {choice} wait for position {at}", now)
            return
        self._deliver(run, now)
        while early and self.finish_reasons[choice] is None:
            position = min(early)
            if position > len(self.delivered[choice]):
                break
            self._deliver(early.pop(position), now)
        if by_decoder and self.state is not _A.DECODING:
            if self.state is _A.PREFILLING:
                self._prefilled(now)
            self.state = advance(self.state, _A.DECODING)
        self._finish_if_complete(now)

    def _deliver(self, run: TokenRun, now: float) -> None:
        """Take the part of `run` that is new; its position is at most the next one."""
        have = len(self.delivered[run.choice])
        new = run.token_ids[have - run.position :]
        if have > run.position + len(run.token_ids) or (not new and run.finish_reason is None):
            return
        if self.num_output_tokens == 0:
            self.num_cached_tokens = min(run.num_cached_tokens, self.request.num_prompt_tokens)
        self.delivered[run.choice] += new
        self.finish_reasons[run.choice] = run.finish_reason
        if new:
            self.timelines[run.choice].add_tokens(now, len(new))
        self._out.append(
            Deliver(
                choice=run.choice,
                position=have,
                token_ids=new,
                logprobs=run.logprobs[have - run.position :],
                finish_reason=run.finish_reason,
            )
        )

    def _on_offer(self, offered: Offered, assignment: Assignment, now: float) -> None:
        if self._reassign_by_s != NEVER_S:
            self._lose_decoder(now)
            return
        self._handoff = offered
        if offered.handoff.is_complete:
            self._hand_on(now)
        # What each choice had when the attempt began, with the choices that ended on their first token left out.
        attempt = replace(self.attempt, finished=self._finished)
        self._out.append(
            SubmitTo(
                worker_id=assignment.decode_worker,
                submit=Submit(attempt=attempt, prefill_only=False, handoff=offered.handoff),
            )
        )

    def _hand_on(self, now: float) -> None:
        self._is_offered = True
        self._prefilled(now)
        self.state = advance(self.state, _A.WAITING_KV)

    def _prefilled(self, now: float) -> None:
        for timeline in self.timelines:
            if timeline.prefill_end_s is None:
                timeline.prefill_end_s = now
        assert self.assignment is not None
        number, found, decode = self.attempt.number, self.found_tokens, self.assignment.decode_worker
        done = PrefillDone(request_id=self.request.request_id, attempt=number, num_cached_tokens=found, decode_worker=decode)
        self._out.append(TellRouter(message=done))

    def _on_stop(self, stop: ChoiceStopped, now: float) -> None:
        self._cut(stop)
        self._cancel_at_end = True
        self._finish_if_complete(now)

    def _cut(self, stop: ChoiceStopped) -> None:
        del self.delivered[stop.choice][stop.num_tokens :]
        self.finish_reasons[stop.choice] = FinishReason.STOP

    # --- ends ---

    @property
    def _finished(self) -> tuple[bool, ...]:
        return tuple(reason is not None for reason in self.finish_reasons)

    def _finish_if_complete(self, now: float) -> None:
        if all(self._finished):
            queued = self.state is _A.QUEUED  # a stop string found in what an earlier attempt delivered
            if self.state is _A.PREFILLING and not self._is_offered and self.found_tokens is not None:
                self._prefilled(now)  # the first token was the last
            self._stop(Finish(), _A.CANCELLED if queued else _A.FINISHED, "complete", now)

    def _stop(self, end: End, state: AttemptState, reason: str, now: float) -> None:
        """The request is over."""
        is_ahead = self._handoff is not None and not self._is_offered  # its target waits for what will not come
        if state is not _A.FINISHED or self._cancel_at_end or is_ahead:
            self._cancel_work(except_at="")
        self._end_attempt(state, reason)
        self._place_at_s = self._answer_by_s = self._place_by_s = self._deadline_s = self._reassign_by_s = NEVER_S
        self.end = end
        for timeline in self.timelines:
            timeline.end_s = now
        self._out.append(end)

    def _retry(self, worker_id: str, state: AttemptState, reason: str, now: float) -> None:
        """This attempt is over by no fault of the request: try again elsewhere, from what was delivered."""
        self._num_failed += 1
        is_in_vain = self.num_output_tokens == sum(len(tokens) for tokens in self.attempt.delivered)
        self._num_in_vain = self._num_in_vain + 1 if is_in_vain else 0
        if self._num_failed >= self._config.max_attempts:
            error = AttemptsExhausted(f"gave up after {self._num_failed} attempts, the limit; the last: {reason}")
            self._stop(Fail(error=error), state, reason, now)
            return
        self._cancel_work(except_at=worker_id if state is _A.LOST else "")
        self._end_attempt(state, reason)
        if state is _A.LOST:
            self._lost_workers += (worker_id,) if worker_id not in self._lost_workers else ()
        elif worker_id:
            self._avoided_workers += (worker_id,)
        self._next_attempt(now, pause_s=self._retry_pause_s)

    @property
    def _retry_pause_s(self) -> float:
        """Before the next attempt: none after the first that came to nothing. Then what is wrong needs time, or all attempts are gone in
        a few milliseconds: the only worker cannot be reached, or every inbox is full.
        """
        return min(REPLACE_PAUSE_S * 2.0 ** (self._num_in_vain - 2), RETRY_PAUSE_S_MAX) if self._num_in_vain > 1 else 0.0

    def _cancel_work(self, *, except_at: str) -> None:
        """Tell every worker that may hold a part of this attempt, the source of a hand-off included."""
        assignment = self.assignment
        if assignment is None or self.state not in _WORKING:
            return
        cancel = Cancel(request_id=self.request.request_id, attempt=self.attempt.number)
        submitted = [assignment.prefill_worker]
        if self._handoff is not None and assignment.decode_worker != assignment.prefill_worker:
            submitted.append(assignment.decode_worker)
        self._out += [CancelAt(worker_id=w, cancel=cancel) for w in submitted if w != except_at]

    def _end_attempt(self, state: AttemptState, reason: str) -> None:
        assert not is_final(self.state), f"attempt {self.attempt.number} of {self.request.request_id} ended twice"
        during, number, assignment = self.state, self.attempt.number, self.assignment
        self.state = advance(self.state, state)
        self._out.append(
            AttemptEnded(
                number=number,
                during=during,
                state=state,
                reason=reason,
                assignment=assignment,
                found_tokens=self.found_tokens,
                handoff=self.handoff_done,
            )
        )
        longest = max(len(tokens) for tokens in self.delivered)
        done = Done(
            request_id=self.request.request_id,
            attempt=number,
            num_output_tokens=max(0, longest - max(len(tokens) for tokens in self.attempt.delivered)),  # a stop string may lie before
            state=state,
            handoff=self.handoff_done,
            transfer_error=self._transfer_error,
        )
        self._out.append(TellRouter(message=done))  # whoever placed it: the router may hold a booking for it

    def _next_attempt(self, now: float, *, pause_s: float) -> None:
        self.attempt = Attempt(
            request=self.request,
            number=self.attempt.number + 1,
            delivered=tuple(tokens[:] for tokens in self.delivered),
            finished=self._finished,
        )
        self.state = _A.QUEUED
        self.found_tokens = self.handoff_done = self._handoff = None
        self._transfer_error = ""
        self._is_offered = False
        self._cancel_at_end = False
        self._reassign_by_s = NEVER_S
        for early in self._early:
            early.clear()
        if self._place_by_s == NEVER_S:
            self._place_by_s = now + self._config.placement_wait_s
        if pause_s > 0:
            self._place_at_s, self._answer_by_s = now + pause_s, NEVER_S
        else:
            self._place(now)
