"""Real workers in processes of their own, without Ray, and a gateway's place at their wire for tests that must choose every move.

`Workers` starts a directory here and one process a worker. `WireGateway` speaks Submit and Cancel to them directly, so a test decides
which worker prefills, which decodes and when, and sees every frame.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import secrets
import signal
import tempfile
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from cluster.directory import Directory
from cluster.worker_build import WorkerSpec, build_worker
from control.config import ClusterConfig
from engine.core.executor import Entries
from protocol.links import Links, Target
from protocol.messages import (
    AttemptFailed,
    Cancel,
    HandoffDone,
    OfferCompleted,
    Offered,
    PrefixPull,
    SnapshotFrame,
    StepOutput,
    Submit,
    Subscribe,
    TokenLogprobs,
    TransferFailed,
)
from protocol.request import Attempt, FinishReason, Request, SamplingParams, first_attempt, token_buffer
from protocol.wire import Connection, Identity
from protocol.worker import Role, WorkerAddress, WorkerSnapshot

START_TIMEOUT_S = 90.0


def _serve_worker(spec: WorkerSpec, sabotage: str) -> None:
    """Entry of a worker process. `sabotage` names a planted bug for negative controls."""
    import torch

    torch.set_num_threads(1)

    async def main() -> None:
        host = build_worker(spec)
        if sabotage:
            SABOTAGE[sabotage](host)
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await host.start()
        await stop.wait()
        await host.close()

    asyncio.run(main())


def _zero_one_pulled_block(host: Any) -> None:
    """A copy that reports success and left one block empty."""
    endpoint = host._endpoint
    start_pull = endpoint.start_pull

    def sabotaged(
        handoff: Any, source_indices: Any, target_block_ids: Any, deadline_s: float, on_done: Callable[[Any], None], **options: Any
    ) -> None:
        def done(outcome: Any) -> None:
            region = endpoint._pool.region
            size = region.layout.block_bytes
            start = target_block_ids[0] * size
            region.blocks[start : start + size] = bytes(size)
            on_done(outcome)

        start_pull(handoff, source_indices, target_block_ids, deadline_s, done, **options)

    endpoint.start_pull = sabotaged


def _shift_positions(host: Any) -> None:
    """A decode that takes every token for the one after it: its angle is off by one, and its KV goes to the next slot."""
    runner = host._executor._runner
    forward = runner.forward

    def sabotaged(entries: Any, tokens: Any, sampled_entries: Any, **options: Any) -> Any:
        late = Entries.of(replace(e, start=e.start + 1, block_table=e.block_table + e.block_table[-1:]) for e in entries)
        return forward(late, tokens, sampled_entries, **options)

    runner.forward = sabotaged


def _zero_one_loaded_block(host: Any) -> None:
    """A load from the host tier that reports success and left one block empty."""
    memory = host._tier_copies._memory
    load = memory.load

    def sabotaged(slots: Any, generations: Any, block_ids: Any) -> str:
        outcome: str = load(slots, generations, block_ids)
        size = memory._pool.layout.block_bytes
        memory._pool.blocks[block_ids[0] * size : (block_ids[0] + 1) * size] = bytes(size)
        return outcome

    memory.load = sabotaged


SABOTAGE: dict[str, Callable[[Any], None]] = {
    "zero_block": _zero_one_pulled_block,
    "shift_positions": _shift_positions,
    "zero_load": _zero_one_loaded_block,
}


class Workers:
    """`async with Workers(config, model_dir, {"prefill-0": Role.PREFILL, ...}) as workers`: all registered, addresses known."""

    def __init__(self, config: ClusterConfig, model_dir: Path, roles: dict[str, Role], *, sabotage: dict[str, str] | None = None) -> None:
        self._config = config
        self._model_dir = model_dir
        self._roles = roles
        self._sabotage = sabotage or {}
        self.secret = secrets.token_bytes(32)
        self.processes: dict[str, BaseProcess] = {}
        self.directory = Directory(secret=self.secret, epoch=time.time_ns())
        self._run_dir = tempfile.TemporaryDirectory(prefix="baton-test-")

    async def __aenter__(self) -> Workers:
        await self.directory.start()
        context = multiprocessing.get_context("forkserver")  # a clean process with torch already imported: 20 ms, not 3 s
        context.set_forkserver_preload(["tests.worker_imports"])
        for worker_id, role in self._roles.items():
            spec = WorkerSpec(
                config=self._config,
                model_dir=self._model_dir,
                worker_id=worker_id,
                role=role,
                directory_host=self.directory.host,
                directory_port=self.directory.port,
                secret=self.secret,
                run_dir=Path(self._run_dir.name),
            )
            process = context.Process(target=_serve_worker, args=(spec, self._sabotage.get(worker_id, "")), daemon=True)
            process.start()
            self.processes[worker_id] = process
        async with asyncio.timeout(START_TIMEOUT_S):
            while len(self.directory.membership.workers) < len(self._roles):
                dead = [w for w, p in self.processes.items() if p.exitcode is not None]
                assert not dead, f"{dead} ended during the start"
                await asyncio.sleep(0.02)
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.is_alive():
                process.terminate()
        for worker_id, process in self.processes.items():
            await asyncio.to_thread(process.join, 10)
            if process.exitcode is None:
                process.kill()
                raise AssertionError(f"{worker_id} did not stop in 10 s")
        self.directory.close()
        await asyncio.sleep(0)
        self._run_dir.cleanup()

    @property
    def addresses(self) -> dict[str, WorkerAddress]:
        return {a.worker_id: a for a in self.directory.membership.workers}

    def kill(self, worker_id: str) -> None:
        pid = self.processes[worker_id].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)


@dataclass(slots=True)
class Completion:
    """What one request gave, by choice."""

    tokens: list[array[int]]
    logprobs: list[list[TokenLogprobs]]
    finish: list[FinishReason | None]
    path: str = ""  # how the KV moved; empty when it did not
    failures: list[str] = field(default_factory=list)


class WireGateway:
    """A gateway reduced to its wire: submits, forwards offers, collects tokens by position."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        identity = Identity(name=f"test-gateway-{secrets.token_hex(3)}", kind="gateway", epoch=time.time_ns())
        self._links = Links(identity, workers.secret, on_up=self._up, on_down=lambda *_: None, on_message=self._receive)
        self._inbox: dict[tuple[str, int], asyncio.Queue[tuple[str, Any]]] = {}
        self.snapshots: dict[str, WorkerSnapshot] = {}

    async def __aenter__(self) -> WireGateway:
        addresses = self._workers.addresses
        self._links.set_targets([Target(name=a.worker_id, epoch=a.epoch, host=a.host, port=a.port) for a in addresses.values()])
        async with asyncio.timeout(10):
            while set(self._links.up) != set(addresses):
                await asyncio.sleep(0.005)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._links.close()

    def _up(self, name: str, connection: Connection) -> None:
        connection.send(Subscribe(snapshots=True, kv_events=False, next_event_number=0))

    def _receive(self, name: str, message: Any) -> None:
        if isinstance(message, SnapshotFrame):
            self.snapshots[name] = message.snapshot
        elif isinstance(message, StepOutput):
            for run in message.each():
                self._put(run.request_id, run.attempt, name, run)
        elif isinstance(message, Offered):
            self._put(message.handoff.request_id, message.handoff.attempt, name, message)
        elif isinstance(message, (OfferCompleted, HandoffDone, TransferFailed, AttemptFailed)):
            self._put(message.request_id, message.attempt, name, message)

    def _put(self, request_id: str, attempt: int, name: str, message: Any) -> None:
        inbox = self._inbox.get((request_id, attempt))
        if inbox is not None:
            inbox.put_nowait((name, message))

    def cancel(self, request_id: str, attempt: int = 0) -> None:
        for name in self._links.up:
            self._links.send(name, Cancel(request_id=request_id, attempt=attempt))

    def request(self, prompt: list[int], sampling: SamplingParams, *, root: bytes = b"r" * 16) -> Request:
        return Request(
            request_id=secrets.token_hex(16),
            model_id="test",
            prompt_token_ids=token_buffer(prompt),
            sampling=sampling,
            cache_root=root,
            arrival_s=0.0,
        )

    async def complete(
        self, prompt: list[int], sampling: SamplingParams, *, prefill: str, decode: str, timeout_s: float = 120.0
    ) -> Completion:
        return await self.run(first_attempt(self.request(prompt, sampling)), prefill=prefill, decode=decode, timeout_s=timeout_s)

    async def run(
        self, attempt: Attempt, *, prefill: str, decode: str, timeout_s: float = 120.0, prefix_pull: PrefixPull | None = None
    ) -> Completion:
        """One attempt, prefilled on one worker (which may pull a prefix) and decoded on another (or on the same)."""
        n = attempt.request.sampling.n
        completion = Completion(tokens=[token_buffer() for _ in range(n)], logprobs=[[] for _ in range(n)], finish=[None] * n)
        key = (attempt.request.request_id, attempt.number)
        inbox = self._inbox[key] = asyncio.Queue()
        submit = Submit(attempt=attempt, prefill_only=prefill != decode, handoff=None, prefix_pull=prefix_pull)
        assert self._links.send(prefill, submit)
        is_ahead = False
        async with asyncio.timeout(timeout_s):
            while not all(reason is not None or done for reason, done in zip(completion.finish, attempt.finished, strict=True)):
                _, message = await inbox.get()
                if isinstance(message, Offered):
                    assert self._links.send(decode, Submit(attempt=attempt, prefill_only=False, handoff=message.handoff))
                    is_ahead = not message.handoff.is_complete
                elif isinstance(message, OfferCompleted):
                    assert self._links.send(decode, message)
                    is_ahead = False
                elif isinstance(message, HandoffDone):
                    completion.path = message.path
                elif isinstance(message, TransferFailed):
                    completion.failures.append(message.error)
                elif isinstance(message, AttemptFailed):
                    raise AssertionError(message.reason)
                else:
                    base = len(attempt.delivered[message.choice])
                    have = completion.tokens[message.choice]
                    assert message.position == base + len(have), f"position {message.position} after {base + len(have)} tokens"
                    have.extend(message.token_ids)
                    completion.logprobs[message.choice].extend(message.logprobs)
                    completion.finish[message.choice] = message.finish_reason
        if is_ahead:  # the first token was the last: nothing completes the offer
            self._links.send(decode, Cancel(request_id=attempt.request.request_id, attempt=attempt.number))
        del self._inbox[key]
        return completion

    async def at_rest(self, timeout_s: float = 10.0) -> dict[str, WorkerSnapshot]:
        """Snapshots of all workers once none runs, owns or leases anything; asserts the conservation law on the way."""
        async with asyncio.timeout(timeout_s):
            while True:
                for snapshot in self.snapshots.values():
                    assert snapshot.num_blocks_unaccounted == 0, snapshot
                busy = [s for s in self.snapshots.values() if s.num_running or s.num_waiting or s.num_blocks_owned or s.num_blocks_leased]
                if not busy and self.snapshots:
                    return dict(self.snapshots)
                await asyncio.sleep(0.05)
