"""Everything a cluster may be told, as one frozen record. Field names are the keys of the YAML file.

Sections that one package alone reads are declared beside the code that reads them (router/config.py, gateway/config.py, ...);
those of the cluster as a whole stand here. control/config.py is the door they come in by.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from control.binding import check_limits, limited
from control.supervisor import SupervisorConfig
from decode_workers.policy import WatermarkDecode
from engine.hardware import find_gpu
from engine.models.shapes import find_shape
from gateway.config import GatewayConfig
from kvtransfer.config import TransportConfig
from prefill_workers.policy import PromptOrder
from protocol.errors import ConfigError
from router.config import RouterConfig

DEMO_MODEL = "demo"  # the built-in model: engine/demo_model
MAX_WORKERS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """Which checkpoint is served, under which name, in which numbers."""

    path: str = DEMO_MODEL  # a directory, a Hugging Face Hub id, or "demo"
    revision: str | None = None  # of a Hub id: branch, tag or commit; None: the default branch
    served_model_name: str = ""  # empty: `path` as given
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the checkpoint's own; float32 where numerics are reference
    max_model_len: int | None = limited(None, minimum=1)  # prompt + output tokens; None: what the checkpoint allows and memory holds
    numerics: Literal["auto", "reference", "fast"] = "auto"  # auto: reference where a CPU serves float32, else fast
    kernels: Literal["auto", "torch", "avx512_bf16", "avx512", "avx2", "portable"] = "auto"  # auto: the best each machine has

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.path:
            raise ConfigError("path is empty; name a directory, a Hub id or 'demo'")

    @property
    def model_id(self) -> str:
        """What clients call the model."""
        return self.served_model_name or self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSection:
    """Where checkpoints come from when `model.path` is a Hub id. The HF_* variables users have set already count."""

    endpoint: str | None = None  # None: https://huggingface.co
    cache_dir: Path | None = None  # None: $HF_HOME/hub
    token: str | None = field(default=None, repr=False)  # None: that of `hf auth login`, if any
    offline: bool = False  # use only what is in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersSection:
    """The pools and what one worker may hold."""

    prefill_workers: int = limited(1, minimum=0, maximum=MAX_WORKERS)
    decode_workers: int = limited(1, minimum=0, maximum=MAX_WORKERS)
    mixed_workers: int = limited(0, minimum=0, maximum=MAX_WORKERS)  # workers that do both
    executor: Literal["torch", "paced"] = "torch"  # paced: real processes and KV bytes, made-up tokens at a model's pace
    device: Literal["auto", "cpu", "cuda"] = "auto"
    block_size: int = limited(16, minimum=16, maximum=256)  # tokens of a KV block; a multiple of 16
    num_kv_blocks: int | None = limited(None, minimum=2)  # of each worker; None: from kv_cache_memory_bytes
    kv_cache_memory_bytes: int | None = limited(None, minimum=1)  # of each worker; None: a share of the memory that is free
    kv_host_tier_bytes: int = limited(0, minimum=0)  # of each worker, for blocks its pool had no room for any more; 0: none
    max_num_seqs: int = limited(64, minimum=1, maximum=65_536)
    max_num_batched_tokens: int = limited(512, minimum=16, maximum=1_048_576)
    step_time_budget_s: float | None = limited(None, minimum=0.001)  # of steps that mix prompts into decoding; None: no bound
    enable_prefix_caching: bool = True
    max_inflight_steps: int = limited(1, minimum=1, maximum=2)
    seed: int | None = limited(None, minimum=0, maximum=2**63 - 1)  # of placement, and of requests that bring none; None: drawn anew
    threads: int = limited(1, minimum=1, maximum=1024)  # compute threads of one worker
    # Bounds of what waits in a worker and between workers (engine/core/config.py).
    max_waiting: int = limited(256, minimum=1)  # attempts in the inbox
    lease_s: float = limited(30.0, minimum=0.1)  # offered blocks are kept this long after the target's last sign of life
    pull_deadline_s: float = limited(30.0, minimum=0.1)
    max_handoff_wait_s: float = limited(120.0, minimum=0.1)  # an offer waits this long for room on the decode worker
    max_offered_bytes: int = limited(1 << 40, minimum=1)  # KV kept for decode workers
    offer_early: bool = True  # a decode worker copies KV layer by layer while the last step of its prefill computes
    prefix_pull_deadline_s: float = limited(1.0, minimum=0.01)  # a prompt waits this long for another worker's prefix, then it is computed
    max_prefix_pulls: int = limited(16, minimum=0)  # prefixes on their way to one worker; more prompts are computed
    force_preempt_every: int = limited(0, minimum=0)  # for tests: preempt a sequence every so many steps; 0: never

    def __post_init__(self) -> None:
        check_limits(self)
        if self.block_size % 16:
            raise ConfigError(f"block_size is {self.block_size}, it must be a multiple of 16 (the hash block)")
        if self.prefill_workers + self.mixed_workers == 0:
            raise ConfigError("prefill_workers is 0 and so is mixed_workers: nobody would compute prompts; set one to 1 or more")
        if self.decode_workers + self.mixed_workers == 0:
            raise ConfigError("decode_workers is 0 and so is mixed_workers: nobody would decode; set one to 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSection:
    """In which order prompts are computed, and how much of one in a step (prefill_workers/policy.py)."""

    order_by: PromptOrder = PromptOrder.FIRST_COME
    chunk_tokens_alone: int = limited(1 << 30, minimum=1)  # max_num_batched_tokens bounds it too
    chunk_tokens_beside_decodes: int = limited(1 << 30, minimum=1)

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PacedSection:
    """The pace of the paced executor and the simulator: seconds a unit, in the order of a 7B model on one data-centre GPU.

    Or those of a model on GPUs by their datasheets (engine/roofline.py); a model alone says how large its KV is.
    """

    gpu: str | None = None  # A100, H100, H200 or L40S, in place of the seconds below
    model: str | None = None  # a name such as llama-3-8b (engine/models/shapes.py), or a directory with a config.json
    tensor_parallel: int = limited(1, minimum=1, maximum=64)  # GPUs of one worker
    prefill_base_s: float = limited(0.005, minimum=0.0)
    prefill_token_s: float = limited(1e-4, minimum=0.0)
    prefill_read_s: float = limited(0.0, minimum=0.0)  # a pair of (query, key)
    decode_base_s: float = limited(0.015, minimum=0.0)
    decode_sequence_s: float = limited(5e-5, minimum=0.0)
    decode_read_s: float = limited(1e-8, minimum=0.0)  # a token of KV
    eos_period: int = limited(0, minimum=0)  # one token in so many is EOS; 0: none

    def __post_init__(self) -> None:
        check_limits(self)
        if self.model is not None:
            find_shape(self.model)
        if self.gpu is None:
            return
        find_gpu(self.gpu)
        if self.model is None:
            raise ConfigError("model is not given beside gpu; name the one it computes, such as llama-3-8b")
        for spec in fields(self):
            if spec.name.endswith("_s") and getattr(self, spec.name) != spec.default:
                raise ConfigError(f"{spec.name} is given beside gpu, which says what steps take; leave out one of them")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSection:
    """What only simulated workers have: links as fast as one likes. A worker has one out and one in; copies that meet on it share it."""

    link_bytes_per_s: float = limited(50e9, minimum=1.0)  # 400 Gb/s
    link_latency_s: float = limited(3e-4, minimum=0.0)  # of a message, and before the first byte of a copy

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSection:
    """Where the OpenAI endpoint listens."""

    host: str = "127.0.0.1"
    port: int = limited(8000, minimum=0, maximum=65_535)  # 0: any free one

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySection:
    """Which Ray carries the cluster."""

    address: str | None = None  # None: a Ray of our own, gone with us; else join that one and leave it running
    namespace: str | None = None  # None: a fresh one for each start
    temp_dir: Path | None = None  # of our own Ray; None: inside the run directory


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSection:
    """How many there are of what every cluster has."""

    routers: int = limited(1, minimum=1, maximum=64)  # all place; each stands by for the others

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingSection:
    """The events of a live run, to be run again with `baton sim --events` (router/recording.py)."""

    dir: Path | None = None  # each router writes a file there; None: none does
    max_bytes: int = limited(1 << 30, minimum=1 << 16)  # of one file; then the recording ends, and `baton status` says so

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Everything `baton serve` may be told."""

    model: ModelSection = field(default_factory=ModelSection)
    hub: HubSection = field(default_factory=HubSection)
    workers: WorkersSection = field(default_factory=WorkersSection)
    prefill: PrefillSection = field(default_factory=PrefillSection)
    decode: WatermarkDecode = field(default_factory=WatermarkDecode)
    paced: PacedSection = field(default_factory=PacedSection)
    simulation: SimulationSection = field(default_factory=SimulationSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    router: RouterConfig = field(default_factory=RouterConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    http: HttpSection = field(default_factory=HttpSection)
    ray: RaySection = field(default_factory=RaySection)
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)
    recording: RecordingSection = field(default_factory=RecordingSection)
