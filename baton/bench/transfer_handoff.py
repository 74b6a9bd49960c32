"""The hand-off as the engine sees it: from the end of prefill's last step to the start of decode's first, in a cluster of 1 + 1 workers.

    late     ..step──┐ offer, digests                                                  ┌─step  decode
             gateway └───────► Offered ──► Submit ──► start_pull ═ copy ═ verify ═ on_done
                     |<--------- until_pull --------->|<-------- pull ------->|<------>| until_step

    early    start_pull ═ copy of each layer behind its computing ═════╗
             ..step──┐ digests                                         ╟ verify ═ on_done ─┐
                     └───────► OfferCompleted ──► complete_pull ═══════╝                   └─step
                     |<--------- until_pull ----->|<--------- pull ---------->|<---------->| until_step

                     control = until_pull + until_step                  whole = all three

Workers are processes of their own, built as `baton serve` builds them; the gateway, the router and the directory live on this process's
loop, and nobody else asks for anything meanwhile. Instants are of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import secrets
import signal
import statistics
import threading
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from baton.bench.report import Row, Target, median_interval
from engine.core.executor import BatchPlan, Executor, StepResult
from kvtransfer.endpoint import KVEndpoint, OnDone
from kvtransfer.transport import KVTransport, Ticket, Transfer
from protocol.errors import ServiceError
from protocol.kv import Endpoint, KVHandoff, Outcome

if TYPE_CHECKING:
    from cluster.worker_build import WorkerSpec
    from control.config import ClusterConfig
    from gateway.service import GatewayService
    from kvtransfer.transport import Region

START_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 180.0
END_TIMEOUT_S = 10.0
POLL_S = 0.02
NUM_OUTPUT_TOKENS = 4
POOL_PROMPTS = 3  # a pool holds this many of the longest prompt
MAX_BATCHED_TOKENS = 2048
CONTROL_TARGET = Target(relation="<=", bound=1.0)  # ms
WHOLE_TARGET = Target(relation="<=", bound=1.2)  # of the copy, once a millisecond is taken off
ALLOWED_S = 1e-3
PREFILL, DECODE = "prefill-0", "decode-0"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """One of them; seconds."""

    until_pull_s: float  # from the end of prefill's last step: offer with its digests, gateway, target's queue
    offer_s: float  # of that the offer
    pull_s: float  # copy and verification; early: what is left of the copy, and verification
    copy_s: float  # the copy alone; early: with its waits for layers
    exposed_s: float  # of the copy, after the end of prefill's last step
    until_step_s: float  # from the end of the pull
    size_bytes: int
    path: str

    @property
    def whole_s(self) -> float:
        return self.until_pull_s + self.pull_s + self.until_step_s

    @property
    def control_s(self) -> float:
        return self.until_pull_s + self.until_step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffRun:
    """All hand-offs of prompts of one length, of an early and of a late cluster in turn."""

    model: str
    num_layers: int
    num_prompt_tokens: int
    early: tuple[Handoff, ...]
    late: tuple[Handoff, ...]


def handoff_rows(run: HandoffRun) -> list[Row]:
    """Medians of the rounds, with their intervals: of early offers, which are the default, then of late ones.

    The copy that an early one is set beside is that of the late one of its round.
    """
    at = f"handoff/{run.model}/{run.num_prompt_tokens}"
    rows = _figures(f"{at}/early", run.early, run.late)
    exposed = [early.exposed_s / late.copy_s for early, late in zip(run.early, run.late, strict=True)]
    rows += _rows(at, run.early[0], [("layerwise_exposed", "ratio", Target(relation="<=", bound=round(1.3 / run.num_layers, 4)), exposed)])
    return rows + _figures(f"{at}/late", run.late, run.late)


_Figure = tuple[str, str, Target | None, list[float]]


def _figures(at: str, handoffs: Sequence[Handoff], late: Sequence[Handoff]) -> list[Row]:
    figures: list[_Figure] = [
        ("whole", "ms", None, [handoff.whole_s * 1e3 for handoff in handoffs]),
        ("pull", "ms", None, [handoff.pull_s * 1e3 for handoff in handoffs]),
        ("copy", "ms", None, [handoff.copy_s * 1e3 for handoff in handoffs]),
        ("exposed", "ms", None, [handoff.exposed_s * 1e3 for handoff in handoffs]),
        ("until_pull", "ms", None, [handoff.until_pull_s * 1e3 for handoff in handoffs]),
        ("offer", "ms", None, [handoff.offer_s * 1e3 for handoff in handoffs]),
        ("until_step", "ms", None, [handoff.until_step_s * 1e3 for handoff in handoffs]),
        ("control", "ms", CONTROL_TARGET, [handoff.control_s * 1e3 for handoff in handoffs]),
        (
            "whole_less_1ms_vs_copy",
            "ratio",
            WHOLE_TARGET,
            [(handoff.whole_s - ALLOWED_S) / other.copy_s for handoff, other in zip(handoffs, late, strict=True)],
        ),
    ]
    return _rows(at, handoffs[0], figures)


def _rows(at: str, one: Handoff, figures: Sequence[_Figure]) -> list[Row]:
    size_bytes, path = one.size_bytes, one.path
    shared: dict[str, object] = {"size_bytes": size_bytes, "path": path}
    rows = []
    for name, unit, target, values in figures:
        low, high, confidence = median_interval(values)
        details = {
            "interval": [_round(low), _round(high)],
            "confidence": round(confidence, 4),
            "rounds": [_round(value) for value in values],
            **shared,
        }
        value = _round(statistics.median(values))
        # The targets are those of shared memory.
        rows.append(Row(name=f"{at}/{name}", value=value, unit=unit, target=target, details=details, is_decided=path == "shm"))
    return rows


def measure_handoff(model: str, lengths: Sequence[int], *, num_rounds: int, seed: int, scratch: Path, say: Say) -> Iterator[HandoffRun]:
    """`num_rounds` requests of each prompt length, one at a time, lengths in turn.

    Raises:
        ServiceError: a worker does not come up, or a request does not end well.
    """
    import uvloop

    from baton.bench.models import label_of, resolve_model
    from baton.bench.servers import checkpoint_to_serve
    from engine.models.config import load_model_config

    label = label_of(resolve_model(model))
    say(f"handoff: checkpoint of {label}")
    model_dir = checkpoint_to_serve(model, scratch)
    num_layers = load_model_config(model_dir).num_layers
    found = uvloop.run(_measure(model_dir, lengths, num_rounds, seed, scratch, say))
    for length in lengths:
        early, late = (tuple(found[is_early, length]) for is_early in (True, False))
        yield HandoffRun(model=label, num_layers=num_layers, num_prompt_tokens=length, early=early, late=late)


async def _measure(
    model_dir: Path, lengths: Sequence[int], num_rounds: int, seed: int, scratch: Path, say: Say
) -> dict[tuple[bool, int], list[Handoff]]:
    """By (early, length)."""
    found: dict[tuple[bool, int], list[Handoff]] = {(is_early, length): [] for is_early in (True, False) for length in lengths}
    say("handoff: starting 1 + 1 workers, twice")
    async with (
        _cluster(model_dir, max(lengths), scratch / "early", offer_early=True) as early,
        _cluster(model_dir, max(lengths), scratch / "late", offer_early=False) as late,
    ):
        rng = Random(f"{seed} handoff")
        for index in range(-1, num_rounds):  # the first is a warm-up
            for length in lengths:
                say(f"handoff: round {max(0, index + 1)}/{num_rounds}, {length} tokens")
                for cluster in (early, late) if index % 2 else (late, early):
                    handoff = await cluster.hand_off(length, rng)
                    if index >= 0:
                        found[cluster is early, length].append(handoff)
    return found


# --- the cluster ------------------------------------------------------------------------------------------------------


class _Cluster:
    def __init__(self, gateway: GatewayService, seen: dict[str, Connection]) -> None:
        self._gateway = gateway
        self._seen = seen

    async def hand_off(self, num_tokens: int, rng: Random) -> Handoff:
        """One request, prefilled on one worker and decoded on the other."""
        from gateway.live import Feed
        from gateway.text import ChoiceText
        from protocol.request import SamplingParams

        await self._recorded()  # what came before is of no interest
        tokenizer = self._gateway.model.tokenizer
        feed = Feed(1)
        self._gateway.open(
            request_id=secrets.token_hex(16),
            prompt_token_ids=array("I", [rng.randrange(3, tokenizer.vocab_size) for _ in range(num_tokens)]),
            sampling=SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, temperature=0.0, ignore_eos=True),
            texts=[ChoiceText(tokenizer.detokenizer(skip_special_tokens=True, continues_text=True), stop=(), hide_last=frozenset())],
            feed=feed,
            first_index=0,
            tenant="bench",
            priority=0,
            cache_salt="",
        )
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            while await feed.take():
                pass
        records = await self._recorded()
        return handoff_of(records[PREFILL], records[DECODE])

    async def _recorded(self) -> dict[str, list[Record]]:
        taken = {}
        for worker_id, pipe in self._seen.items():
            pipe.send("take")
            taken[worker_id] = await asyncio.to_thread(pipe.recv)
        return taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a worker saw; seconds of CLOCK_MONOTONIC."""

    what: str  # "step", "offer", "complete", "pull", "copy"
    began_s: float
    ended_s: float
    size_bytes: int = 0
    path: str = ""


def handoff_of(prefill: Sequence[Record], decode: Sequence[Record]) -> Handoff:
    """Of what the two workers saw of one request.

    Raises:
        ServiceError: it was not handed off.
    """
    offer = next((record for record in reversed(prefill) if record.what == "offer"), None)  # of an early one: its digests
    complete = next((record for record in decode if record.what == "complete"), None)
    pull = next((record for record in decode if record.what == "pull"), None)
    copy = next((record for record in decode if record.what == "copy"), None)
    computed = [record.ended_s for record in prefill if record.what == "step"]
    begun = [record.began_s for record in decode if record.what == "step"]
    if offer is None or pull is None or copy is None or not computed or not begun:
        raise ServiceError("a request was not handed off: it was decoded where it was prefilled, or recomputed")
    began_s = pull.began_s if complete is None else complete.began_s
    return Handoff(
        until_pull_s=began_s - max(computed),
        offer_s=offer.ended_s - offer.began_s,
        pull_s=pull.ended_s - began_s,
        copy_s=copy.ended_s - copy.began_s,
        exposed_s=max(0.0, copy.ended_s - max(max(computed), copy.began_s)),
        until_step_s=min(begun) - pull.ended_s,
        size_bytes=pull.size_bytes,
        path=pull.path,
    )


@asynccontextmanager
async def _cluster(model_dir: Path, longest: int, scratch: Path, *, offer_early: bool) -> AsyncIterator[_Cluster]:
    from cluster.directory import Directory
    from cluster.gateway_build import GatewaySpec, build_gateway
    from cluster.router_build import RouterSpec, build_router
    from cluster.worker_build import WorkerSpec
    from protocol.worker import Role

    config = _config(model_dir, longest, offer_early=offer_early)
    secret = secrets.token_bytes(32)
    directory = Directory(secret=secret, epoch=time.time_ns())
    await directory.start()
    host, port = directory.host, directory.port
    run_dir = scratch / "run"
    run_dir.mkdir(mode=0o700, parents=True)
    router = build_router(RouterSpec(config=config.router, secret=secret, seed=0, directory_host=host, directory_port=port))
    gateway = build_gateway(
        GatewaySpec(
            config=config,
            model_dir=model_dir,
            host="",
            port=0,
            secret=secret,
            salt=secrets.token_bytes(32),
            drain_s=0.0,
            own_ray=False,
            application="bench",
            directory_host=host,
            directory_port=port,
        )
    ).service
    context = multiprocessing.get_context("spawn")
    seen: dict[str, Connection] = {}
    processes = []
    try:
        for worker_id, role in ((PREFILL, Role.PREFILL), (DECODE, Role.DECODE)):
            spec = WorkerSpec(
                config=config,
                model_dir=model_dir,
                worker_id=worker_id,
                role=role,
                directory_host=host,
                directory_port=port,
                secret=secret,
                run_dir=run_dir,
            )
            seen[worker_id], theirs = multiprocessing.Pipe()
            process = context.Process(target=serve_worker, args=(spec, theirs), name=worker_id, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
        await router.start()
        await gateway.start()
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while len(directory.membership.workers) < len(processes) or gateway.reasons_not_ready:
            ended = [process.name for process in processes if process.exitcode is not None]
            if ended or time.monotonic() > deadline_s:
                raise ServiceError(f"{ended[0]} ended while it started" if ended else f"workers not ready after {START_TIMEOUT_S:.0f} s")
            await asyncio.sleep(POLL_S)
        yield _Cluster(gateway, seen)
    finally:
        await gateway.close()
        await router.close()
        for process in processes:
            process.terminate()
        for process in processes:
            await asyncio.to_thread(process.join, END_TIMEOUT_S)
            process.kill()
        directory.close()


def _config(model_dir: Path, longest: int, *, offer_early: bool) -> ClusterConfig:
    from control.config import ClusterConfig
    from control.sections import ModelSection, WorkersSection
    from router.config import Disaggregate, RouterConfig

    block_size = WorkersSection().block_size or 16
    return ClusterConfig(
        model=ModelSection(path=str(model_dir), dtype="bfloat16", numerics="fast", max_model_len=longest + 64),
        workers=WorkersSection(
            prefill_workers=1,
            decode_workers=1,
            mixed_workers=0,
            threads=1,
            block_size=block_size,
            num_kv_blocks=POOL_PROMPTS * -(-(longest + 64) // block_size),
            max_num_batched_tokens=min(MAX_BATCHED_TOKENS, longest),
            offer_early=offer_early,
        ),
        router=RouterConfig(disaggregate=Disaggregate.ALWAYS),
    )


# --- in a worker's process --------------------------------------------------------------------------------------------


def serve_worker(spec: WorkerSpec, pipe: Connection) -> None:
    """Entry of the process: a worker that notes its steps, pulls and copies until SIGTERM, and gives them when asked."""
    import torch
    import uvloop

    from cluster.worker_build import build_worker

    torch.set_num_threads(spec.config.workers.threads or 1)
    records: list[Record] = []
    threading.Thread(target=_give, args=(pipe, records), daemon=True).start()

    class NotingEndpoint(KVEndpoint):
        """Notes each offer and each pull, from the call to its end."""

        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **(options | {"wrap": partial(NotingTransport, records)}))  # type: ignore[arg-type]

        def digests_of(self, handoff: KVHandoff) -> bytes:
            began_s = time.monotonic()
            digests = super().digests_of(handoff)
            records.append(Record(what="offer", began_s=began_s, ended_s=time.monotonic()))
            return digests

        def complete_pull(self, handoff: KVHandoff, deadline_s: float) -> None:
            now_s = time.monotonic()
            records.append(Record(what="complete", began_s=now_s, ended_s=now_s))
            super().complete_pull(handoff, deadline_s)

        def start_pull(
            self,
            handoff: KVHandoff,
            source_indices: array[int],
            target_block_ids: array[int],
            deadline_s: float,
            on_done: OnDone,
            *,
            target_start_tokens: int | None = None,
        ) -> None:
            began_s = time.monotonic()

            def done(outcome: Outcome) -> None:
                note = Record(what="pull", began_s=began_s, ended_s=time.monotonic(), size_bytes=outcome.size_bytes, path=outcome.path)
                records.append(note)
                on_done(outcome)

            super().start_pull(handoff, source_indices, target_block_ids, deadline_s, done, target_start_tokens=target_start_tokens)

    async def main() -> None:
        host = build_worker(spec, wrap_executor=partial(NotingExecutor, records), endpoint_class=NotingEndpoint)
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await host.start()
        await stop.wait()
        await host.close()

    uvloop.run(main())


def _give(pipe: Connection, records: list[Record]) -> None:
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        given = list(records)
        del records[: len(given)]
        pipe.send(given)


class NotingExecutor:
    """An executor whose steps are noted where they end: on the compute thread."""

    def __init__(self, records: list[Record], inner: Executor) -> None:
        self._records = records
        self._inner = inner

    def start(self, on_done: Callable[[StepResult], None]) -> None:
        def done(result: StepResult) -> None:
            now_s = time.monotonic()
            self._records.append(Record(what="step", began_s=now_s - result.duration_s, ended_s=now_s))
            on_done(result)

        self._inner.start(done)

    def submit(self, plan: BatchPlan) -> None:
        self._inner.submit(plan)

    def close(self) -> None:
        self._inner.close()


class NotingTransport:
    """A backend whose copies are noted."""

    def __init__(self, records: list[Record], inner: KVTransport) -> None:
        self.name = inner.name
        self._records = records
        self._inner = inner

    def register(self, region: Region) -> None:
        self._inner.register(region)

    def forget(self, region_id: int) -> None:
        self._inner.forget(region_id)

    def endpoint(self) -> Endpoint:
        return self._inner.endpoint()

    def start(self, transfer: Transfer) -> Ticket:
        return self._inner.start(transfer)

    def poll(self) -> list[tuple[Ticket, Outcome]]:
        done = self._inner.poll()
        for _, outcome in done:
            now_s = time.monotonic()
            self._records.append(Record(what="copy", began_s=now_s - outcome.duration_s, ended_s=now_s, size_bytes=outcome.size_bytes))
        return done

    def cancel(self, ticket: Ticket) -> None:
        self._inner.cancel(ticket)

    def wakeup_fd(self) -> int:
        return self._inner.wakeup_fd()

    def close(self) -> None:
        self._inner.close()


def _round(value: float) -> float:
    return float(f"{value:.5g}")
