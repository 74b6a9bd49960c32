"""The simulator's gateway before a router: it asks where each attempt goes, tells of first tokens and ends, and records when they came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from protocol.block_hash import block_hashes
from protocol.kv import Endpoint, KVPeer
from protocol.messages import Assigned, Done, Place, PrefillDone, PrefixPull, Reassigned, Refused, Submit, TokenRun
from protocol.request import Attempt, Request
from simulator.loop import VirtualLoop
from simulator.sim_gateway import Ledger, SimGateway


@dataclass(slots=True, kw_only=True)
class Served:
    """One request and what came of it; times on the virtual clock, in seconds. None: it did not come to that."""

    request_id: str
    arrived_s: float
    num_prompt_tokens: int
    first_token_s: float | None = None
    end_s: float | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found where it was computed; of the last attempt that began
    prefill_worker: str = ""
    decode_worker: str = ""
    num_attempts: int = 0
    terminal: str = ""  # "finished" | "failed" | "refused"
    reason: str = ""

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time between tokens; None where there is one at most."""
        if self.first_token_s is None or self.end_s is None or self.num_output_tokens < 2:
            return None
        return (self.end_s - self.first_token_s) / (self.num_output_tokens - 1)


class RoutedGateway(SimGateway):
    """`tell_router` carries a message over a link of its own.

    max_tokens: what clients are taken to allow, so that nobody who places sees how long an answer will be; None: they know, and say it.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        tell_router: Callable[[Place | PrefillDone | Done], None],
        *,
        name: str,
        latency_s: float,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__(loop, _nobody, name=name, latency_s=latency_s)
        self._tell_router = tell_router
        self._max_tokens = max_tokens
        self.served: dict[str, Served] = {}
        self.num_over = 0

    def receive_routed(self, message: Assigned | Reassigned | Refused) -> None:
        """From the router. What is about an earlier attempt is dropped."""
        about = message.assignment if isinstance(message, Assigned) else message
        ledger = self.ledgers[about.request_id]
        if ledger.terminal or ledger.attempt != about.attempt:
            return
        match message:
            case Refused():
                self._close(ledger, "refused", message.message)
            case Reassigned():
                if not ledger.decodes_elsewhere and not ledger.is_ahead:
                    ledger.decode_worker = self.served[about.request_id].decode_worker = message.decode_worker
            case Assigned(assignment=assignment):
                ledger.prefill_worker, ledger.decode_worker = assignment.prefill_worker, assignment.decode_worker
                served = self.served[assignment.request_id]
                served.prefill_worker, served.decode_worker = assignment.prefill_worker, assignment.decode_worker
                is_split, source = ledger.prefill_worker != ledger.decode_worker, assignment.prefix_source
                pull = PrefixPull(peer=self._peer(source.worker_id), num_tokens=source.num_tokens) if source is not None else None
                submit = Submit(attempt=self._attempt(ledger), prefill_only=is_split, handoff=None, prefix_pull=pull)
                self._send(ledger.prefill_worker, submit)

    def _peer(self, worker_id: str) -> KVPeer:
        return KVPeer(worker_id=worker_id, epoch=self.workers[worker_id].epoch, endpoint=Endpoint())

    def submit(self, request: Request) -> None:
        self.served[request.request_id] = Served(
            request_id=request.request_id, arrived_s=self._loop.now, num_prompt_tokens=request.num_prompt_tokens
        )
        super().submit(request)

    def _begin(self, ledger: Ledger) -> None:
        ledger.decodes_elsewhere = ledger.is_ahead = False
        request = ledger.request
        self.served[request.request_id].num_attempts += 1
        self._tell_router(
            Place(
                request_id=request.request_id,
                attempt=ledger.attempt,
                model_id=request.model_id,
                num_tokens=request.num_prompt_tokens + sum(len(tokens) for tokens in ledger.tokens),
                expected_output_tokens=request.sampling.max_tokens if self._max_tokens is None else self._max_tokens,
                num_choices=request.sampling.n,
                block_hashes=tuple(block_hashes(request.cache_root, request.prompt_token_ids)),
                tenant=request.tenant,
                priority=request.priority,
                slo_ttft_s=None,
                slo_tpot_s=None,
                excluded=(),
                local_only=False,
            )
        )

    def _take_run(self, run: TokenRun) -> None:
        served, ledger = self.served[run.request_id], self.ledgers[run.request_id]
        is_current = not ledger.terminal and run.attempt == ledger.attempt
        if is_current and served.first_token_s is None:
            served.first_token_s = self._loop.now
        if is_current and run.position == 0:
            served.num_cached_tokens = run.num_cached_tokens
            done = PrefillDone(
                request_id=run.request_id,
                attempt=run.attempt,
                num_cached_tokens=run.num_cached_tokens,
                decode_worker=ledger.decode_worker,
            )
            self._tell_router(done)
        super()._take_run(run)

    def _close(self, ledger: Ledger, terminal: str, reason: str) -> None:
        super()._close(ledger, terminal, reason)
        self.num_over += 1
        request_id = ledger.request.request_id
        served = self.served[request_id]
        served.end_s, served.terminal, served.reason = self._loop.now, terminal, reason
        served.num_output_tokens = sum(len(tokens) for tokens in ledger.tokens)
        self._tell_router(Done(request_id=request_id, attempt=ledger.attempt, num_output_tokens=served.num_output_tokens))


def _nobody(attempt: Attempt) -> tuple[str, str]:
    raise AssertionError("the router places")
