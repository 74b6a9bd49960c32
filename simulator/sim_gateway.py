"""The least gateway that can drive worker cores on a virtual clock: it journals, retries, and lets a rule place each attempt.

Not the product's session (gateway/session.py): an independent small one, so that the worker's laws are judged by other code.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.core.events import CancelReceived, OfferCompletedReceived, SubmitReceived
from protocol.kv import KVHandoff
from protocol.messages import AttemptFailed, HandoffDone, OfferCompleted, Offered, PrefixPull, StepOutput, Submit, TokenRun, TransferFailed
from protocol.request import Attempt, FinishReason, Request, token_buffer
from simulator.loop import VirtualLoop
from simulator.sim_worker import FromWorker, SimWorker

Place = Callable[[Attempt], tuple[str, str]]  # (prefill worker, decode worker); equal: computed where it decodes

MAX_ATTEMPTS = 200


@dataclass(slots=True, kw_only=True)
class Ledger:
    """The ordered record of one request."""

    request: Request
    attempt: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    decodes_elsewhere: bool = False  # the hand-off was sent on: the prefill worker's end no longer matters
    is_ahead: bool = False  # an early offer was sent on
    tokens: list[array[int]] = field(default_factory=list)  # by choice, by position
    finish: list[FinishReason | None] = field(default_factory=list)
    num_cached_tokens: list[int] = field(default_factory=list)  # as told by each attempt
    num_handoffs: int = 0
    num_transfer_failures: int = 0
    terminal: str = ""  # "finished" | "failed" | "cancelled": exactly once
    reason: str = ""

    def journal(self) -> tuple[list[list[int]], list[FinishReason | None], str]:
        """What two runs of the same request must agree on."""
        return [list(t) for t in self.tokens], list(self.finish), self.terminal


class SimGateway:
    """One gateway, with a first-in-first-out link to each worker."""

    def __init__(self, loop: VirtualLoop, place: Place, *, name: str = "gateway-0", latency_s: float = 0.0003) -> None:
        self.name = name
        self.ledgers: dict[str, Ledger] = {}
        self.workers: dict[str, SimWorker] = {}
        self.prefix_pull: Callable[[Attempt, str], PrefixPull | None] = lambda _attempt, _prefill: None  # what the prefill worker may pull
        self._loop = loop
        self._place = place
        self._latency_s = latency_s

    @property
    def is_done(self) -> bool:
        return all(ledger.terminal for ledger in self.ledgers.values())

    def submit(self, request: Request) -> None:
        n = request.sampling.n
        ledger = Ledger(request=request, tokens=[token_buffer() for _ in range(n)], finish=[None] * n)
        self.ledgers[request.request_id] = ledger
        self._begin(ledger)

    def cancel(self, request_id: str) -> None:
        ledger = self.ledgers[request_id]
        if not ledger.terminal:
            self._cancel_attempt(ledger)
            self._close(ledger, "cancelled", "by its user")

    def lost(self, worker_id: str) -> None:
        """The worker's socket ended: what still needed it starts anew elsewhere."""
        for ledger in self.ledgers.values():
            needs = ledger.decode_worker == worker_id or (ledger.prefill_worker == worker_id and not ledger.decodes_elsewhere)
            if not ledger.terminal and needs:
                self._retry(ledger)

    def receive(self, worker_id: str, message: FromWorker) -> None:
        """From a worker, after the link's latency; facts of an older attempt are dropped."""
        self._loop.call_later(self._latency_s, lambda: self._handle(worker_id, message))

    # --- attempts ---

    def _begin(self, ledger: Ledger) -> None:
        attempt = self._attempt(ledger)
        ledger.prefill_worker, ledger.decode_worker = self._place(attempt)
        ledger.decodes_elsewhere = ledger.is_ahead = False
        is_split = ledger.prefill_worker != ledger.decode_worker
        pull = self.prefix_pull(attempt, ledger.prefill_worker)
        self._send(ledger.prefill_worker, Submit(attempt=attempt, prefill_only=is_split, handoff=None, prefix_pull=pull))

    def _attempt(self, ledger: Ledger) -> Attempt:
        return Attempt(
            request=ledger.request,
            number=ledger.attempt,
            delivered=tuple(tokens[:] for tokens in ledger.tokens),
            finished=tuple(reason is not None for reason in ledger.finish),
        )

    def _send(self, worker_id: str, submit: Submit) -> None:
        event = SubmitReceived(gateway=self.name, submit=submit)
        self._loop.call_later(self._latency_s, lambda: self.workers[worker_id].take(event))

    def _cancel_attempt(self, ledger: Ledger) -> None:
        event = CancelReceived(request_id=ledger.request.request_id, attempt=ledger.attempt)
        for worker_id in {ledger.prefill_worker, ledger.decode_worker}:
            worker = self.workers[worker_id]
            self._loop.call_later(self._latency_s, lambda worker=worker: worker.take(event))  # type: ignore[misc]

    def _retry(self, ledger: Ledger) -> None:
        self._cancel_attempt(ledger)
        ledger.attempt += 1
        if ledger.attempt >= MAX_ATTEMPTS:
            self._close(ledger, "failed", f"{MAX_ATTEMPTS} attempts")
        else:
            backoff_s = min(0.01 * 2 ** min(ledger.attempt, 8), 1.0)
            number = ledger.attempt
            self._loop.call_later(backoff_s, lambda: self._begin(ledger) if not ledger.terminal and ledger.attempt == number else None)

    def _close(self, ledger: Ledger, terminal: str, reason: str) -> None:
        assert not ledger.terminal, f"{ledger.request.request_id} ends twice: {ledger.terminal}, then {terminal}"
        ledger.terminal, ledger.reason = terminal, reason

    # --- what workers say ---

    def _handle(self, worker_id: str, message: FromWorker) -> None:
        if isinstance(message, StepOutput):
            for run in message.each():
                self._take_run(run)
            return
        about = message.handoff if isinstance(message, Offered) else message
        ledger = self.ledgers[about.request_id]
        if ledger.terminal or about.attempt != ledger.attempt:
            return
        match message:
            case Offered():
                ledger.decodes_elsewhere = message.handoff.is_complete
                ledger.is_ahead = not message.handoff.is_complete
                self._hand_on(ledger, message.handoff)
            case OfferCompleted():
                ledger.decodes_elsewhere = True
                event = OfferCompletedReceived(completed=message)
                worker = self.workers[ledger.decode_worker]
                self._loop.call_later(self._latency_s, lambda: worker.take(event))
            case HandoffDone():
                ledger.num_handoffs += 1
            case TransferFailed():
                ledger.num_transfer_failures += 1
            case AttemptFailed():
                if message.retryable:
                    self._retry(ledger)
                else:
                    self._cancel_attempt(ledger)
                    self._close(ledger, "failed", message.reason)

    def _hand_on(self, ledger: Ledger, handoff: KVHandoff) -> None:
        """As the session does: the attempt's delivered tokens are those of its start, the first tokens come with the hand-off."""
        first = {t.choice for t in handoff.first_tokens}
        attempt = Attempt(
            request=ledger.request,
            number=ledger.attempt,
            delivered=tuple(tokens[:-1] if choice in first else tokens[:] for choice, tokens in enumerate(ledger.tokens)),
            finished=tuple(reason is not None for reason in ledger.finish),
        )
        self._send(ledger.decode_worker, Submit(attempt=attempt, prefill_only=False, handoff=handoff))

    def _take_run(self, run: TokenRun) -> None:
        ledger = self.ledgers[run.request_id]
        if ledger.terminal or run.attempt != ledger.attempt:
            return
        tokens = ledger.tokens[run.choice]
        assert ledger.finish[run.choice] is None, f"a token after the end of choice {run.choice}"
        assert run.position == len(tokens), f"position {run.position} after {len(tokens)} tokens"
        if run.num_cached_tokens:
            ledger.num_cached_tokens.append(run.num_cached_tokens)
        tokens.extend(run.token_ids)
        ledger.finish[run.choice] = run.finish_reason
        if all(reason is not None for reason in ledger.finish):
            if ledger.is_ahead and not ledger.decodes_elsewhere:
                self._cancel_attempt(ledger)  # an early offer may wait for a first token that was the last
            self._close(ledger, "finished", "")
