"""Request to assignment over the framed socket: gateway here, router and workers in a process each.

    this process: gateway ──Place──► router process ──Assigned──►      1,000 a second, evenly spaced
                                     worker process: a directory and all workers, each with its own listener, reporting every 50 ms

A request's first token and its end follow it at once, so that the router does all it does for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
from multiprocessing.connection import Connection as Pipe
from random import Random
from time import perf_counter
from typing import Any

import uvloop

from baton.bench.router_load import (
    EPOCH,
    GATEWAY,
    REPORT_S,
    Caches,
    Hashes,
    address,
    draw_hashes,
    make_place,
    snapshot,
)
from cluster.directory import Directory
from protocol.links import MembershipWatch
from protocol.messages import Assigned, Done, KvSnapshot, Place, PrefillDone, Register, SnapshotFrame, StatusReply, StatusRequest, Subscribe
from protocol.wire import Connection, Identity, Listener, dial
from protocol.worker import BlocksStored, Role, WorkerAddress
from router.config import RouterConfig
from router.service import RouterService

SECRET = b"b" * 32
RATE_PER_S = 1000.0
START_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 5.0


class SocketRun:
    """Both other processes, for as long as this one lives."""

    def __init__(self, num_workers: int, num_blocks: int, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        workers, theirs = context.Pipe()
        context.Process(target=serve_workers, args=(theirs, num_workers, num_blocks, seed), daemon=True).start()
        directory_port = workers.recv()
        router, theirs = context.Pipe()
        context.Process(target=serve_router, args=(theirs, directory_port), daemon=True).start()
        self._port = router.recv()
        self._pipes = (workers, router)  # closed with this process, which ends the others
        self._num_workers = num_workers
        self._loop = uvloop.new_event_loop()
        self._rng = Random(f"{seed} prompts")
        self._shared = Caches(worker_ids(num_workers), num_blocks, seed).shared
        self._number = 0
        self._gateway: Gateway | None = None

    def run(self, num_tokens: int, repeats: int) -> list[float]:
        """Seconds from Place to Assigned of each request."""
        requests = [self._request(num_tokens) for _ in range(repeats)]
        return self._loop.run_until_complete(self._run(requests))

    async def _run(self, requests: list[Place]) -> list[float]:
        if self._gateway is None:
            self._gateway = Gateway()
            await self._gateway.start(self._port, self._num_workers)
        return await self._gateway.place_all(requests)

    def _request(self, num_tokens: int) -> Place:
        self._number += 1
        beginning = self._rng.choice(self._shared)
        return make_place(self._number, num_tokens, beginning + draw_hashes(self._rng, num_tokens // 16 - len(beginning)))


class Gateway:
    """Sends on time whatever the answers do, and notes when each came."""

    async def start(self, port: int, num_workers: int) -> None:
        """Ready once the router has all workers."""
        self._answers: dict[str, asyncio.Future[float]] = {}
        self._status: asyncio.Future[str] | None = None
        identity = Identity(name=GATEWAY, kind="gateway", epoch=EPOCH)
        self._connection = await dial(identity, SECRET, host="127.0.0.1", port=port, on_message=self._take, on_close=lambda *_: None)
        async with asyncio.timeout(START_TIMEOUT_S):
            while (await self._ask_status()).count('"ready"') < num_workers:
                await asyncio.sleep(0.1)

    async def place_all(self, requests: list[Place]) -> list[float]:
        loop = asyncio.get_running_loop()
        start_s = perf_counter() + 0.01
        sent: list[tuple[float, asyncio.Future[float]]] = []
        for number, place in enumerate(requests):
            wait_s = start_s + number / RATE_PER_S - perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            answered = self._answers[place.request_id] = loop.create_future()
            sent.append((perf_counter(), answered))
            self._connection.send(place)
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return [await answered - sent_s for sent_s, answered in sent]

    def _take(self, _: Connection, message: Any) -> None:
        now_s = perf_counter()
        if isinstance(message, Assigned):
            request_id = message.assignment.request_id
            self._answers.pop(request_id).set_result(now_s)
            self._connection.send(PrefillDone(request_id=request_id, attempt=0))
            self._connection.send(Done(request_id=request_id, attempt=0, num_output_tokens=1))
        elif isinstance(message, StatusReply) and self._status is not None:
            self._status.set_result(message.json)

    async def _ask_status(self) -> str:
        self._status = asyncio.get_running_loop().create_future()
        self._connection.send(StatusRequest(reply_id=0))
        return await self._status


# --- the other processes ----------------------------------------------------------------------------------------------


def worker_ids(num_workers: int) -> list[str]:
    return [f"{role.value}-{i}" for role in (Role.PREFILL, Role.DECODE) for i in range(max(1, num_workers // 2))]


def serve_router(pipe: Pipe, directory_port: int) -> None:
    async def serve() -> None:
        config = RouterConfig(index_max_bytes=1 << 40)
        service = RouterService(config, directory_host="127.0.0.1", directory_port=directory_port, secret=SECRET, epoch=EPOCH)
        pipe.send((await service.start()).port)
        await until_closed(pipe)
        await service.close()

    uvloop.run(serve())


def serve_workers(pipe: Pipe, num_workers: int, num_blocks: int, seed: int) -> None:
    held: dict[str, list[Hashes]] = {name: [] for name in worker_ids(num_workers)}
    for frame in Caches(list(held), num_blocks, seed).frames():
        held[frame.worker_id] += [event.hashes for event in frame.events if isinstance(event, BlocksStored)]

    async def serve() -> None:
        directory = Directory(secret=SECRET, epoch=EPOCH)
        await directory.start()
        workers = [ReportingWorker(name, held[name]) for name in held]
        for worker in workers:
            await worker.start(directory.port)
        pipe.send(directory.port)
        ending = asyncio.create_task(until_closed(pipe))
        while not ending.done():
            for worker in workers:
                worker.report()
                await asyncio.sleep(REPORT_S / len(workers))

    uvloop.run(serve())


class ReportingWorker:
    """Says what it holds when asked, and how it is every 50 ms."""

    def __init__(self, name: str, held: list[Hashes]) -> None:
        self._name = name
        self._hashes: Hashes = tuple(h for hashes in held for h in hashes)
        self._router: Connection | None = None
        self._address: WorkerAddress | None = None

    async def start(self, directory_port: int) -> None:
        identity = Identity(name=self._name, kind="worker", epoch=EPOCH)
        listener = Listener(identity, SECRET, self._accept)
        await listener.start()
        self._listener = listener
        role = Role(self._name.partition("-")[0])
        self._address = address(self._name, role, port=listener.port)
        self._watch = MembershipWatch(identity, SECRET, host="127.0.0.1", port=directory_port, on_change=lambda _: None)
        self._watch.register(Register(address=self._address))
        self._watch.start()

    def report(self) -> None:
        if self._router is not None and self._address is not None:
            self._router.send(SnapshotFrame(snapshot=snapshot(self._address)))

    def _accept(self, connection: Connection) -> None:
        connection.on_message = self._receive

    def _receive(self, connection: Connection, message: Any) -> None:
        if isinstance(message, Subscribe):
            hashes = self._hashes
            connection.send(KvSnapshot(worker_id=self._name, epoch=EPOCH, next_event_number=1, hashes=hashes, parents=hashes))
            self._router = connection


async def until_closed(pipe: Pipe) -> None:
    with contextlib.suppress(EOFError):
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
