"""Baton's engine as a benchmark's subject: `python -m baton.bench.subject` speaks baton/bench/spoken.py.

One aggregated worker without its sockets: the worker core that `baton serve` composes, the torch executor on its compute thread, and
this loop in the place of cluster/worker_host.py.
"""

from __future__ import annotations

import queue
import time
from array import array
from importlib.metadata import version
from pathlib import Path
from typing import Any

from baton.bench.spoken import Unsupported, answer
from control.compose import WorkerPlan, compose_worker, compose_worker_core
from control.sections import ClusterConfig, ModelSection, WorkersSection
from engine.core.events import Emit, Event, RaiseGenerations, RunStep, StepDone, SubmitReceived, Tell
from engine.core.executor import StepResult
from engine.core.worker_core import WorkerCore
from engine.runner.torch_executor import TorchExecutor
from kvtransfer.config import TransportConfig
from kvtransfer.fault_ahead import FaultAhead
from kvtransfer.region import PoolMemory
from protocol.errors import UnsupportedModel
from protocol.messages import Submit
from protocol.request import Request, SamplingParams, first_attempt
from protocol.worker import Role

STEP_TIMEOUT_S = 120.0
BLOCK_SIZE = 16  # as `baton serve` has it
CACHE_ROOT = bytes(16)


class BatonEngine:
    """One worker of both behaviours on this process's cores."""

    def __init__(self) -> None:
        self._core: WorkerCore | None = None
        self._results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
        self._requests: list[Request] = []
        self._num_requests = 0  # ever: request ids are never used again

    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        plan = self._plan(asked)
        self._pool = PoolMemory.create(plan.layout, plan.num_kv_blocks)
        self._fault_ahead = FaultAhead(self._pool.region, TransportConfig().fault_ahead_bytes)
        self._core = compose_worker_core(plan, worker_id="bench", epoch=1, role=Role.BOTH)
        self._executor = TorchExecutor(Path(asked["model"]), plan.runner, self._pool.region)
        self._executor.start(self._results.put)
        return {"engine": f"baton {version('baton-serve')}", "kernels": plan.kernels.name, "note": plan.kernels.note}

    def _plan(self, asked: dict[str, Any]) -> WorkerPlan:
        """What `baton serve --mixed-workers 1 --threads N` would compose; everything else as it comes."""
        config = ClusterConfig(
            model=ModelSection(path=asked["model"], dtype=asked["dtype"], numerics="fast", max_model_len=asked["max_model_len"]),
            workers=WorkersSection(
                prefill_workers=0,
                decode_workers=0,
                mixed_workers=1,
                threads=asked["num_threads"],
                block_size=BLOCK_SIZE,
                num_kv_blocks=-(-asked["num_kv_tokens"] // BLOCK_SIZE),
                max_num_seqs=asked["max_num_seqs"],
            ),
        )
        try:
            return compose_worker(config, Path(asked["model"]))
        except UnsupportedModel as refusal:
            raise Unsupported(str(refusal)) from None

    def prepare(self, requests: list[dict[str, Any]], is_streamed: bool) -> None:
        """Streamed or not, tokens are told as each step makes them."""
        self._requests = [
            Request(
                request_id=f"{self._num_requests + i:032x}",
                model_id="bench",
                prompt_token_ids=array("I", asked["prompt"]),
                sampling=SamplingParams(max_tokens=asked["num_tokens"], temperature=0.0, ignore_eos=True),
                cache_root=CACHE_ROOT,
                arrival_s=asked["at_s"],
            )
            for i, asked in enumerate(requests)
        ]
        self._num_requests += len(requests)

    def run(self) -> dict[str, Any]:
        requests = {request.request_id: index for index, request in enumerate(self._requests)}
        deliveries: list[list[tuple[float, int]]] = [[] for _ in requests]
        token_ids: list[list[int]] = [[] for _ in requests]
        arrivals = list(reversed(self._requests))
        num_open = len(requests)
        began_s = time.perf_counter()
        while num_open:
            now_s = time.perf_counter() - began_s
            while arrivals and arrivals[-1].arrival_s <= now_s:
                submit = Submit(attempt=first_attempt(arrivals.pop()), prefill_only=False, handoff=None)
                self._turn(SubmitReceived(gateway="bench", submit=submit))
            wait_s = arrivals[-1].arrival_s - now_s if arrivals else STEP_TIMEOUT_S
            try:
                result = self._results.get(timeout=max(0.0, wait_s))
            except queue.Empty:
                assert arrivals, f"no step was done in {STEP_TIMEOUT_S:.0f} s"
                continue
            for emitted in self._turn(StepDone(result=result)):
                at_s = time.perf_counter() - began_s
                for run in emitted.each():
                    index = requests[run.request_id]
                    deliveries[index].append((at_s, len(run.token_ids)))
                    token_ids[index].extend(run.token_ids)
                    num_open -= run.finish_reason is not None
        return {"deliveries": deliveries, "token_ids": token_ids}

    def _turn(self, event: Event) -> list[Emit]:
        """One event in, its commands performed; what was emitted is for the caller."""
        assert self._core is not None
        emitted = []
        for command in self._core.on(event, time.monotonic()):
            if isinstance(command, RunStep):
                self._executor.submit(command.plan)
            elif isinstance(command, RaiseGenerations):
                self._fault_ahead.reached(max(command.block_ids))
                self._pool.raise_generations(command.block_ids, command.generations)
            elif isinstance(command, Emit):
                emitted.append(command)
            else:
                assert not isinstance(command, Tell), f"the worker gave up: {command}"
        return emitted


if __name__ == "__main__":
    answer(BatonEngine())
