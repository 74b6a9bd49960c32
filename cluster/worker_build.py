"""From a config to a running worker: memory, executor, core, endpoint and host put together in the process that serves."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cluster.worker_host import WorkerHost
from control.compose import WorkerPlan, compose_worker, compose_worker_core
from control.config import ClusterConfig
from engine.core.executor import Executor
from kvtransfer.endpoint import KVEndpoint
from kvtransfer.host_tier import CpuHostTier
from kvtransfer.region import PoolMemory
from kvtransfer.transport import KVTransport, Region
from protocol.kv import Endpoint
from protocol.worker import Role, WorkerAddress, WorkerId

WRAPPED_NOTE = "KV transfers pass through a wrapper that was given in code"
WrapTransport = Callable[[WorkerId, KVTransport], KVTransport]
"""Puts something between a worker and a backend of its KV transfers (kvtransfer.faulty), in the worker's process. For fault drills: it
comes from whoever builds a cluster in code, and no file, flag or variable reaches it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """All a worker process is told. Travels by Ray (private to the cluster), never over our own sockets."""

    config: ClusterConfig  # with the number of blocks decided (control.compose.pinned), so that all workers come out alike
    model_dir: Path
    worker_id: str
    role: Role
    directory_host: str
    directory_port: int
    secret: bytes
    run_dir: Path  # 0700, for this run's Unix sockets and what its workers tell each other of packed weights
    wrap_transport: WrapTransport | None = None


def build_worker(
    spec: WorkerSpec,
    *,
    wrap_executor: Callable[[Executor], Executor] = lambda executor: executor,
    endpoint_class: type[KVEndpoint] = KVEndpoint,
) -> WorkerHost:
    """Allocate the pool, load the weights, bind core and sockets; `await host.start()` puts it on the air.

    wrap_executor, endpoint_class: whoever measures or disturbs a worker looks on there.

    Raises:
        ModelError: the checkpoint cannot be served.
    """
    epoch = time.time_ns()
    plan = compose_worker(spec.config, spec.model_dir)
    fingerprint = plan.fingerprint.digest
    pool = PoolMemory.create(plan.layout, plan.num_kv_blocks)
    address = WorkerAddress(
        worker_id=spec.worker_id,
        role=spec.role,
        epoch=epoch,
        host=spec.config.transport.host,
        port=0,
        pid=os.getpid(),
        hostname=socket.gethostname(),
        kv_endpoint=Endpoint(),
        model_id=spec.config.model.model_id,
        fingerprint=fingerprint,
        block_size_tokens=plan.layout.block_size_tokens,
        num_kv_blocks=plan.num_kv_blocks,
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.core.scheduler.max_num_seqs,
        max_num_batched_tokens=plan.core.scheduler.max_num_batched_tokens,
        kv_token_bytes=plan.layout.token_bytes,
    )
    executor, held = _make_executor(spec, plan, pool.region)
    return WorkerHost(
        core=compose_worker_core(plan, worker_id=spec.worker_id, epoch=epoch, role=spec.role),
        executor=wrap_executor(executor),
        make_endpoint=lambda on_peer_message: endpoint_class(
            spec.config.transport,
            pool,
            worker_id=spec.worker_id,
            epoch=epoch,
            secret=spec.secret,
            run_dir=str(spec.run_dir),
            fingerprint=fingerprint,
            on_peer_message=on_peer_message,
            wrap=lambda transport: transport if spec.wrap_transport is None else spec.wrap_transport(spec.worker_id, transport),
        ),
        address=address,
        secret=spec.secret,
        directory_host=spec.directory_host,
        directory_port=spec.directory_port,
        counters=held.counters,
        notes=held.notes if spec.wrap_transport is None else (*held.notes, WRAPPED_NOTE),
        host_tier=CpuHostTier(pool.region, plan.num_host_blocks) if plan.num_host_blocks else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What a worker says of its executor besides the steps."""

    counters: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _make_executor(spec: WorkerSpec, plan: WorkerPlan, region: Region) -> tuple[Executor, _Held]:
    """Only what is used is imported: a paced worker needs no torch and starts in a tenth of the time."""
    if spec.config.workers.executor == "paced":
        from engine.paced import PacedExecutor

        assert plan.step_time is not None, "control.compose gives a paced worker its pace"
        return PacedExecutor(region, plan.step_time, vocab_size=plan.model.vocab_size, eos_period=spec.config.paced.eos_period), _Held()
    from engine.runner.torch_executor import TorchExecutor

    executor = TorchExecutor(spec.model_dir, plan.runner, region, packed_dir=spec.run_dir / "packed")
    notes = [plan.kernels.note]
    counters = {}
    if (packed := executor.packed) is not None:
        notes.append(packed.note)
        counters["weights_bytes_packed"] = packed.size_bytes if packed.was_packed_here else 0
        counters["weights_bytes_shared"] = packed.size_bytes if packed.is_shared else 0
    return executor, _Held(counters=counters, notes=tuple(filter(None, notes)))
