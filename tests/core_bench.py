"""One worker core on the bench: events go in by hand, commands come out to be looked at. Tokens come from a script, not from a model."""

from __future__ import annotations

from array import array
from typing import Any, TypeVar

from engine.core.config import SchedulerConfig, WorkerCoreConfig
from engine.core.events import (
    Command,
    Emit,
    Event,
    OfferKv,
    RunStep,
    Settle,
    Settled,
    StepDone,
    SubmitReceived,
    Tell,
    Tick,
)
from engine.core.executor import BatchPlan, Sampled, SampledTokens, StepResult
from engine.core.worker_core import WorkerCore
from protocol.kv import KVHandoff, Outcome, TransferError
from protocol.messages import PrefixPull, Submit, TokenRun
from protocol.request import Attempt, Request, first_attempt
from protocol.worker import Role
from tests.sim_cluster import FINGERPRINT, layout, make_request

C = TypeVar("C")


class Bench:
    """One core; events go in, commands come out, steps wait until they are finished by hand."""

    def __init__(
        self, *, worker_id: str = "w0", num_blocks: int = 32, max_model_len: int = 300, core: dict[str, Any] | None = None, **scheduler: Any
    ):
        settings = {"scheduler": SchedulerConfig(**({"max_num_seqs": 8} | scheduler)), "offer_early": False} | (core or {})
        config = WorkerCoreConfig(**settings)
        self.core = WorkerCore(
            config,
            worker_id=worker_id,
            epoch=1,
            role=Role.BOTH,
            layout=layout(),
            num_blocks=num_blocks,
            fingerprint=FINGERPRINT,
            max_model_len=max_model_len,
        )
        self.now = 0.0
        self.steps: list[BatchPlan] = []
        self.said: list[Command] = []

    def on(self, event: Event) -> list[Command]:
        commands = self.core.on(event, self.now)
        if commands and commands[-1] == Settle():
            commands = [*commands[:-1], *self.core.on(Settled(), self.now)]
        self.core.check()
        self.steps += [c.plan for c in commands if isinstance(c, RunStep)]
        self.said += commands
        return commands

    def submit(
        self,
        attempt: Attempt | Request,
        *,
        prefill_only: bool = False,
        handoff: KVHandoff | None = None,
        gateway: str = "g",
        prefix_pull: PrefixPull | None = None,
    ) -> list[Command]:
        attempt = first_attempt(attempt) if isinstance(attempt, Request) else attempt
        submit = Submit(attempt=attempt, prefill_only=prefill_only, handoff=handoff, prefix_pull=prefix_pull)
        return self.on(SubmitReceived(gateway=gateway, submit=submit))

    def finish_step(self, token: int = 7, *, error: str | None = None, sequence_error: dict[int, str] | None = None) -> list[Command]:
        """The oldest step is done; every sample is `token`."""
        plan = self.steps.pop(0)
        sampled = Sampled.of(
            SampledTokens(sequence_id=s.sequence_id, token_ids=array("I", [token]), error=(sequence_error or {}).get(i))
            for i, s in enumerate(() if error else plan.samples)
        )
        return self.on(StepDone(result=StepResult(step_id=plan.step_id, sampled=sampled, duration_s=0.01, error=error)))

    def finish_all(self, token: int = 7) -> None:
        while self.steps:
            self.finish_step(token)

    def tick(self, now: float) -> list[Command]:
        self.now = now
        return self.on(Tick())

    def all(self, kind: type[C]) -> list[C]:
        return [c for c in self.said if isinstance(c, kind)]

    def runs(self) -> list[TokenRun]:
        return [run for emit in self.all(Emit) for run in emit.each()]

    def told(self, kind: type[C]) -> list[C]:
        return [t.message for t in self.all(Tell) if isinstance(t.message, kind)]

    @property
    def blocks(self) -> tuple[int, int, int, int]:
        s = self.core.snapshot(self.now)
        return s.num_blocks_free, s.num_blocks_owned, s.num_blocks_leased, s.num_blocks_cached

    def counter(self, name: str) -> int:
        return self.core.snapshot(self.now).counters[name]


def of(commands: list[Command], kind: type[C]) -> list[C]:
    return [c for c in commands if isinstance(c, kind)]


def prompt(num_tokens: int, first: int = 10) -> list[int]:
    return list(range(first, first + num_tokens))


def offer(source: Bench, request: Request, token: int = 7) -> KVHandoff:
    source.submit(request, prefill_only=True)
    source.finish_all(token)
    return source.all(OfferKv)[-1].handoff


def done(num_blocks: int = 3, error: TransferError | None = None) -> Outcome:
    return Outcome(num_blocks=num_blocks, size_bytes=num_blocks * 1024, duration_s=0.01, path="shm", error=error)


def taken(target: Bench, *, num_tokens: int = 40, **sampling: Any) -> tuple[KVHandoff, list[Command]]:
    request = make_request(1, prompt(num_tokens), **sampling)
    handoff = offer(Bench(), request, token=9)
    return handoff, target.submit(request, handoff=handoff)
