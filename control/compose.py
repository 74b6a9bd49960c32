"""From the configuration to what a worker is made of: numbers, layout, blocks, cores. The live cluster and the simulator both call it.

ClusterConfig + checkpoint ──► WorkerPlan (the same for every worker of a run) ──► WorkerCore (one worker, by id and role)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from control.config import ClusterConfig
from engine.checkpoint import fingerprint as fingerprint_of
from engine.checkpoint import open_checkpoint
from engine.core.config import SchedulerConfig, WorkerCoreConfig
from engine.core.policy import DecodePolicy, PrefillPolicy
from engine.core.worker_core import WorkerCore
from engine.hardware import find_gpu
from engine.models.config import ModelConfig, load_model_config
from engine.models.memory import memory_plan
from engine.models.shapes import find_shape
from engine.roofline import roofline
from engine.runner.config import RunnerConfig
from engine.step_time import LinearStepTime, StepTimeModel
from kernels.native.library import ChosenKernels, choose_kernels
from kernels.numerics import Kernels, Numerics
from prefill_workers.policy import ChunkedPrefill
from protocol.errors import ConfigError
from protocol.kv import KVLayout, ModelFingerprint
from protocol.worker import Role, WorkerId

MEMORY_SHARE = 0.8  # of what is free now; the rest is for the other processes of a run, and for those of others
TORCH = ChosenKernels(name="torch")
KEPT_TOKENS_PER_SEQUENCE = 4096  # a pool of our choosing holds this much for each of max_num_seqs, and no more


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """What all workers of a run have in common."""

    model: ModelConfig
    fingerprint: ModelFingerprint
    layout: KVLayout
    num_kv_blocks: int
    max_model_len: int  # tokens
    core: WorkerCoreConfig
    prefill: PrefillPolicy
    decode: DecodePolicy
    runner: RunnerConfig
    kernels: ChosenKernels  # of this machine
    step_time: StepTimeModel | None  # of the paced executor; None: a real one

    @property
    def num_host_blocks(self) -> int:
        """Slots of one worker's host tier."""
        return self.core.host_tier_bytes // self.layout.block_bytes


def compose_worker(config: ClusterConfig, model_dir: Path, *, memory_bytes: int | None = None) -> WorkerPlan:
    """The plan for the checkpoint in `model_dir`; reads its headers, not its weights.

    memory_bytes: free on the machine, shared by all workers (control.memory); None: not looked at, as where `pinned` fixed the blocks.

    Raises:
        ModelDoesNotFit: with the arithmetic. ModelError: the checkpoint cannot be served. ConfigError: lengths and blocks contradict.
    """
    served = load_model_config(model_dir, dtype=config.model.dtype)
    numerics = numerics_of(config, served.dtype, _kernels_of(config, served))
    model = load_model_config(model_dir, dtype=config.model.dtype, numerics=numerics)
    kernels = _kernels_of(config, model)
    told = fingerprint_of(open_checkpoint(model_dir, model), model, numerics, kernels.bits)
    return plan_worker(config, model, fingerprint=told, kernels=kernels, memory_bytes=memory_bytes)


def plan_worker(
    config: ClusterConfig,
    model: ModelConfig,
    *,
    fingerprint: ModelFingerprint,
    kernels: ChosenKernels = TORCH,
    memory_bytes: int | None = None,
) -> WorkerPlan:
    """`compose_worker` without files."""
    layout = model.kv_layout(config.workers.block_size)
    num_kv_blocks, max_model_len = _pool_and_length(config, model, layout, memory_bytes, kernels=kernels.name)
    return WorkerPlan(
        model=model,
        fingerprint=fingerprint,
        layout=layout,
        num_kv_blocks=num_kv_blocks,
        max_model_len=max_model_len,
        core=core_config(config),
        prefill=prefill_policy(config),
        decode=config.decode,
        runner=runner_config(config, numerics_of(config, model.dtype, kernels), kernels),
        kernels=kernels,
        step_time=step_time(config),
    )


def pinned(config: ClusterConfig, plan: WorkerPlan) -> ClusterConfig:
    """`config` with the plan's choices made: workers that start later, in less free memory, come out alike."""
    return replace(
        config,
        workers=replace(config.workers, num_kv_blocks=plan.num_kv_blocks, kv_cache_memory_bytes=None),
        model=replace(config.model, max_model_len=plan.max_model_len),
    )


def compose_worker_core(plan: WorkerPlan, *, worker_id: WorkerId, epoch: int, role: Role) -> WorkerCore:
    """The pure core of one worker; `epoch` names this incarnation of its process. Either role has both policies: roles may change.

    No core is told how long a step takes, a paced one neither: it fits what it sees.
    """
    return WorkerCore(
        plan.core,
        worker_id=worker_id,
        epoch=epoch,
        role=role,
        layout=plan.layout,
        num_blocks=plan.num_kv_blocks,
        fingerprint=plan.fingerprint.digest,
        max_model_len=plan.max_model_len,
        prefill=plan.prefill,
        decode=plan.decode,
    )


def _kernels_of(config: ClusterConfig, model: ModelConfig) -> ChosenKernels:
    return choose_kernels(config.model.kernels, dtype=model.dtype, head_dim=model.head_dim, group=model.heads_per_kv_head)


# --- sections of the configuration as the rooms below want them -------------------------------------------------------


def pool_sizes(config: ClusterConfig) -> dict[Role, int]:
    """How many workers of each role."""
    workers = config.workers
    return {Role.PREFILL: workers.prefill_workers, Role.DECODE: workers.decode_workers, Role.BOTH: workers.mixed_workers}


def numerics_of(config: ClusterConfig, dtype: str, kernels: ChosenKernels = TORCH) -> Numerics:
    """auto: reference (exact, float32) for a model served in float32, unless something is asked for that only fast ones have: a GPU,
    or more than one thread in torch.

    dtype: what the model would be served in by its checkpoint and --dtype; a bfloat16 checkpoint is not blown up to be exact.
    """
    if config.model.numerics != "auto":
        return config.model.numerics
    has_threads = config.workers.threads == 1 or kernels.name != "torch"
    is_exact = dtype == "float32" and has_threads and config.workers.device != "cuda"
    return "reference" if is_exact else "fast"


def runner_config(config: ClusterConfig, numerics: Numerics, kernels: ChosenKernels) -> RunnerConfig:
    return RunnerConfig(
        numerics=numerics,
        dtype=config.model.dtype,
        device=config.workers.device,
        kernels=kernels.name,
        num_threads=config.workers.threads,
    )


def core_config(config: ClusterConfig) -> WorkerCoreConfig:
    workers = config.workers
    return WorkerCoreConfig(
        scheduler=SchedulerConfig(
            max_num_seqs=workers.max_num_seqs,
            max_num_batched_tokens=workers.max_num_batched_tokens,
            step_time_budget_s=workers.step_time_budget_s,
            max_inflight_steps=workers.max_inflight_steps,
            enable_prefix_caching=workers.enable_prefix_caching,
            block_size_tokens=workers.block_size,
            force_preempt_every=workers.force_preempt_every,
        ),
        max_waiting=workers.max_waiting,
        lease_s=workers.lease_s,
        pull_deadline_s=workers.pull_deadline_s,
        max_handoff_wait_s=workers.max_handoff_wait_s,
        max_offered_bytes=workers.max_offered_bytes,
        offer_early=workers.offer_early,
        prefix_pull_deadline_s=workers.prefix_pull_deadline_s,
        max_prefix_pulls=workers.max_prefix_pulls,
        host_tier_bytes=workers.kv_host_tier_bytes,
        digest_mode=config.transport.offer_digest_mode,
        kv_load_failure_policy=config.transport.kv_load_failure_policy,
    )


def prefill_policy(config: ClusterConfig) -> ChunkedPrefill:
    return ChunkedPrefill(
        max_offered_bytes=config.workers.max_offered_bytes,
        order_by=config.prefill.order_by,
        chunk_tokens_alone=config.prefill.chunk_tokens_alone,
        chunk_tokens_beside_decodes=config.prefill.chunk_tokens_beside_decodes,
    )


def step_time(config: ClusterConfig) -> StepTimeModel | None:
    """The pace of the paced executor; None for a real one, whose steps are measured."""
    if config.workers.executor != "paced":
        return None
    pace = config.paced
    if pace.gpu is not None and pace.model is not None:
        return roofline(find_gpu(pace.gpu), find_shape(pace.model), tensor_parallel=pace.tensor_parallel)
    return LinearStepTime(
        prefill_base_s=pace.prefill_base_s,
        prefill_token_s=pace.prefill_token_s,
        prefill_read_s=pace.prefill_read_s,
        decode_base_s=pace.decode_base_s,
        decode_sequence_s=pace.decode_sequence_s,
        decode_read_s=pace.decode_read_s,
    )


# --- how many blocks, how long a sequence -----------------------------------------------------------------------------


def _pool_and_length(
    config: ClusterConfig, model: ModelConfig, layout: KVLayout, memory_bytes: int | None, *, kernels: Kernels
) -> tuple[int, int]:
    """(blocks of one worker, most tokens of one sequence); what the user did not say follows from the model and the memory."""
    asked_len, size = config.model.max_model_len, layout.block_size_tokens
    if asked_len is not None and asked_len > model.max_model_len:
        raise ConfigError(
            f"max_model_len {asked_len:,} exceeds the {model.max_model_len:,} tokens the checkpoint can address; lower --max-model-len"
        )
    blocks = _asked_blocks(config, layout)
    if blocks is not None:
        if asked_len is not None and blocks * size < asked_len:
            raise ConfigError(
                f"{blocks:,} KV blocks of {size} tokens hold {blocks * size:,}, fewer than max_model_len {asked_len:,};"
                f" raise --kv-cache-memory-bytes to {div_ceil(asked_len, size) * layout.block_bytes:,}, or lower --max-model-len"
            )
        length = asked_len or min(model.max_model_len, blocks * size)
    else:
        most = None if memory_bytes is None else _blocks_that_fit(config, model, memory_bytes, asked_len or size, None, kernels=kernels)
        length = asked_len or min(model.max_model_len, model.max_model_len if most is None else most * size)
        kept = config.workers.max_num_seqs * div_ceil(min(length, KEPT_TOKENS_PER_SEQUENCE), size)
        wanted = max(kept, div_ceil(length, size))
        blocks = wanted if most is None else min(wanted, most)
    if memory_bytes is not None:
        _blocks_that_fit(config, model, memory_bytes, length, blocks, kernels=kernels)
    return blocks, length


def _asked_blocks(config: ClusterConfig, layout: KVLayout) -> int | None:
    workers = config.workers
    if workers.num_kv_blocks is not None:
        return workers.num_kv_blocks
    if workers.kv_cache_memory_bytes is None:
        return None
    blocks = workers.kv_cache_memory_bytes // layout.block_bytes
    if blocks < 2:
        least = f"{2 * layout.block_bytes:,}"
        raise ConfigError(f"kv_cache_memory_bytes {workers.kv_cache_memory_bytes:,} holds {blocks} blocks; give at least {least}")
    return blocks


def _blocks_that_fit(
    config: ClusterConfig, model: ModelConfig, memory_bytes: int, length: int, blocks: int | None, *, kernels: Kernels
) -> int:
    num_workers = sum(pool_sizes(config).values())
    left_bytes = int(MEMORY_SHARE * memory_bytes) - num_workers * config.workers.kv_host_tier_bytes
    if left_bytes <= 0:
        raise ConfigError(
            f"kv_host_tier_bytes {config.workers.kv_host_tier_bytes:,} of {num_workers} workers leave nothing of the"
            f" {int(MEMORY_SHARE * memory_bytes):,} bytes that may be used; lower --kv-host-tier-bytes"
        )
    plan = memory_plan(
        model,
        memory_bytes=left_bytes,
        num_workers=num_workers,
        block_size_tokens=config.workers.block_size,
        max_model_len=length,
        num_blocks=blocks,
        kernels=kernels,
    )
    return plan.num_blocks


def div_ceil(tokens: int, size: int) -> int:
    """Blocks of `size` that hold `tokens`: rounds up."""
    return -(-tokens // size)
