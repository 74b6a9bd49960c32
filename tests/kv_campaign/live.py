"""The same injections between two processes: KVEndpoint to KVEndpoint, over shared memory, sockets, UCX or gloo.

The source process makes offers, writes into its pool and damages what it sends; this process pulls and damages what arrived, after the
copy and before the check. A late writer over shared memory writes while our copy stands between two blocks: the hook of the copy asks
the other process to write and waits until it has.

Every injection is pulled once a digest mode. With mode off a content fault arrives, which shows that it is one; a staleness is pulled
once more with a source that raises no generation, for the same reason.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from random import Random
from typing import Any
from unittest.mock import patch

import kvtransfer.endpoint
from kvtransfer import ucx
from kvtransfer.config import TransportConfig
from kvtransfer.endpoint import KVEndpoint
from kvtransfer.faulty import FaultRates, FaultyTransport
from kvtransfer.region import PoolMemory
from kvtransfer.transport import KVTransport, Transfer
from protocol.kv import DigestMode, KVHandoff, Outcome, TransferError
from tests.kv_campaign.backends import FINGERPRINT, SECRET, SOURCE, TARGET, Hooks, tapped
from tests.kv_campaign.cases import PLACES_MAX, Case, Kind, Where, damage, draw
from tests.kv_campaign.layouts import LAYOUTS
from tests.kv_campaign.pools import MODES, SourcePool, Verdict, is_mix_up, mix_up
from tests.kv_campaign.tokens import EveryRow, first_decoded_token

EPOCH = 7
DEADLINE_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """What the source process says of one offer. The bytes are for judging only; the pull does not see them."""

    handoff: KVHandoff
    expected: list[bytes]
    earlier: list[bytes]
    foreign_id: int
    foreign: bytes
    words: bytes  # what a decode step reads of it


# --- the source's process ---


def serve_source(channel: Connection, backend: str, layout_index: int, run_dir: str, seed: int) -> None:
    """Entry of the source process: one endpoint, driven by what comes through `channel` until it is closed."""
    hooks = Hooks()
    with _tapped_transports(backend, hooks):
        asyncio.run(_serve(channel, backend, layout_index, run_dir, seed, hooks))


async def _serve(channel: Connection, backend: str, layout_index: int, run_dir: str, seed: int, hooks: Hooks) -> None:
    source = SourcePool(layout_index, seed)
    kv = _endpoint(backend, SOURCE, source.pool, run_dir)
    await kv.start()
    writes: list[Callable[[], None]] = []
    closed = asyncio.Event()

    def offer(case: Case, mode: DigestMode, fenced: bool) -> Offered:
        rng = Random(case.number)
        ids = source.draw_ids(case, rng)
        handoff = source.offer(case, ids, rng, epoch=EPOCH, endpoint=kv.endpoint())
        kv._config = replace(kv._config, digest_mode=mode)  # one endpoint makes offers of every mode
        handoff = kv.fill_offer(handoff)
        earlier = [source.some_fresh(rng) for _ in ids]
        said = Offered(
            handoff=handoff,
            expected=[source.content(b) for b in ids],
            earlier=earlier,
            foreign_id=source.foreign(case, ids),
            foreign=source.content(source.foreign(case, ids)),
            words=source.rows.read(ids, case.num_tokens),
        )
        writes[:] = [source.arm(case, ids, earlier, rng, hooks, fenced=fenced)]
        return said

    def answer() -> None:
        try:
            name, *arguments = channel.recv()
        except EOFError:
            closed.set()
            return
        if name == "offer":
            channel.send(offer(*arguments))
        elif name == "write":
            writes.pop()()
            channel.send(None)
        else:
            assert name == "restore"
            hooks.clear()
            source.restore()
            channel.send(None)

    asyncio.get_running_loop().add_reader(channel.fileno(), answer)
    channel.send(None)
    await closed.wait()
    asyncio.get_running_loop().remove_reader(channel.fileno())
    await kv.close()
    source.close()


# --- the target's process: this one ---


class DamagedOnArrival(FaultyTransport):
    """Damages the target blocks of a delivered transfer, if there is something to do, before its outcome is told."""

    def __init__(self, inner: KVTransport) -> None:
        super().__init__(inner, FaultRates(), Random(0))
        self.act: Callable[[Transfer], None] | None = None

    def _damage(self, transfer: Transfer) -> None:
        if self.act is not None:
            self.act(transfer)


def run_live(backend: str, total: int, seed: int, on_verdict: Callable[[Verdict], None]) -> None:
    """`total` injections, spread evenly over kinds, layouts and layers."""
    for layout_index in range(len(LAYOUTS)):
        chosen = [c for c in (draw(number, seed, [backend]) for number in range(total)) if c.layout_index == layout_index]
        if chosen:
            asyncio.run(_run_layout(backend, layout_index, chosen, seed, on_verdict))


async def _run_layout(backend: str, layout_index: int, chosen: Iterable[Case], seed: int, on_verdict: Callable[[Verdict], None]) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    hooks = Hooks()
    with tempfile.TemporaryDirectory(prefix="kv-") as run_dir, hooks.installed():
        process = context.Process(target=serve_source, args=(theirs, backend, layout_index, run_dir, seed), daemon=True)
        process.start()
        theirs.close()
        pool = PoolMemory.create(LAYOUTS[layout_index].layout, PLACES_MAX)
        wrapped: list[DamagedOnArrival] = []

        def wrap(transport: KVTransport) -> KVTransport:
            wrapped.append(DamagedOnArrival(transport))
            return wrapped[-1]

        kv = _endpoint(backend, TARGET, pool, run_dir, wrap=wrap)
        try:
            await asyncio.to_thread(ours.recv)
            await kv.start()
            (arrival,) = wrapped
            puller = _Puller(ours, kv, pool, hooks, arrival)
            for case in chosen:
                on_verdict(await puller.inject(case))
        finally:
            ours.close()
            await kv.close()
            await asyncio.to_thread(process.join, 10)
            process.kill()
            pool.close()


class _Puller:
    def __init__(self, channel: Connection, kv: KVEndpoint, pool: PoolMemory, hooks: Hooks, arrival: DamagedOnArrival) -> None:
        self._channel = channel
        self._kv = kv
        self._pool = pool
        self._hooks = hooks
        self._arrival = arrival
        self._size = pool.region.layout.block_bytes
        self._rows = EveryRow(pool.region)

    async def inject(self, case: Case) -> Verdict:
        control, offered, delivered = await self._pull(case, DigestMode.OFF, fenced=False)
        assert control.error is None and delivered != offered.expected, f"nothing was injected: {case}: {control}"
        read = self._rows.read(array("I", range(case.num_places)), case.num_tokens)
        caught: list[bool] = []
        error: TransferError | None = None
        for mode in MODES:
            if mode is DigestMode.OFF and not case.kind.is_staleness:
                caught.append(False)  # the control was this very pull
                continue
            outcome, offered_now, delivered_now = await self._pull(case, mode, fenced=True)
            assert outcome.error is not None or delivered_now != offered_now.expected, f"delivered as offered, nothing injected: {case}"
            caught.append(outcome.error is not None)
            error = outcome.error if outcome.error is not TransferError.DIGEST_MISMATCH else None
        return Verdict(
            case=case,
            caught=tuple(caught),
            error=error,
            reaches_tokens=read != offered.words,
            wrong_token=first_decoded_token(read) != first_decoded_token(offered.words),
        )

    async def _pull(self, case: Case, mode: DigestMode, *, fenced: bool) -> tuple[Outcome, Offered, list[bytes]]:
        offered: Offered = self._ask("offer", case, mode, fenced)
        blocks = self._pool.region.blocks
        views = [blocks[place * self._size : (place + 1) * self._size] for place in range(case.num_places)]
        for view, content in zip(views, offered.earlier, strict=True):
            view[:] = content
        if case.kind is Kind.LATE_WRITER:
            self._hooks.around_copy = lambda call: self._ask("write") if call == case.moment else None
        elif is_mix_up(case):
            self._hooks.before_copy = mix_up(case, offered.foreign_id)
        elif case.where is Where.TARGET and not case.kind.is_staleness:
            self._arrival.act = lambda _: damage(
                case, LAYOUTS[case.layout_index].spans, views, earlier=offered.earlier, foreign=offered.foreign
            )
        done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        places = array("I", range(case.num_places))
        self._kv.start_pull(offered.handoff, places, places, DEADLINE_S, done.set_result)
        outcome = await asyncio.wait_for(done, DEADLINE_S + 1)
        self._hooks.clear()
        self._arrival.act = None
        self._ask("restore")
        return outcome, offered, [bytes(view) for view in views]

    def _ask(self, *words: object) -> Any:
        """From the loop's thread, or from the lane's while the loop waits for its outcome: never from both at once."""
        self._channel.send(words)
        return self._channel.recv()


# --- both ---


def _endpoint(backend: str, name: str, pool: PoolMemory, run_dir: str, **options: Any) -> KVEndpoint:
    config = TransportConfig(kv_transport=backend, digest_mode=DigestMode.FULL, copy_slice_bytes=1, fault_ahead_bytes=0)
    return KVEndpoint(config, pool, worker_id=name, epoch=EPOCH, secret=SECRET, run_dir=run_dir, fingerprint=FINGERPRINT, **options)


def _tapped_transports(backend: str, hooks: Hooks) -> Any:
    """What `KVEndpoint` opens for `backend`, with the source side's channels tapped."""
    if backend == "tcp":
        return patch.object(kvtransfer.endpoint, "TcpTransport", tapped(kvtransfer.endpoint.TcpTransport, hooks))
    if backend == "ucx":
        return patch.object(ucx, "UcxTransport", tapped(ucx.UcxTransport, hooks))
    if backend == "nccl":
        from kvtransfer import nccl

        return patch.object(nccl, "NcclTransport", tapped(nccl.NcclTransport, hooks))
    return hooks.installed()
