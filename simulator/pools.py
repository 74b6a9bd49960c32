"""What a plan is about: workers of some size, how many of them do what, and what carries KV between them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.step_time import StepTimeModel


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerModel:
    """One worker: a model over `num_gpus` tensor-parallel ranks."""

    num_gpus: int
    step_time: StepTimeModel
    kv_tokens: int  # that it holds at once, all ranks together
    kv_token_bytes: int


@dataclass(frozen=True, slots=True)
class Pool:
    """`count` workers alike, of `gpus_each` GPUs."""

    count: int
    gpus_each: int

    @property
    def num_gpus(self) -> int:
        return self.count * self.gpus_each

    def __str__(self) -> str:
        return f"{self.count} x TP{self.gpus_each}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """Prefill and decode apart, or workers that do both. One phase alone is half a plan: prompts only, or decoding only."""

    prefill: Pool | None = None
    decode: Pool | None = None
    mixed: Pool | None = None
    chunk_tokens: int | None = None  # of mixed workers: tokens of a step, decodes first; None: whole prompts before any decode

    def __post_init__(self) -> None:
        assert (self.mixed is None) != (self.prefill is None and self.decode is None), "apart or mixed"
        assert self.chunk_tokens is None or self.mixed is not None

    @property
    def num_gpus(self) -> int:
        return sum(pool.num_gpus for pool in (self.prefill, self.decode, self.mixed) if pool is not None)

    @property
    def is_split(self) -> bool:
        return self.prefill is not None and self.decode is not None

    def __str__(self) -> str:
        if self.mixed is not None:
            how = "whole prompts first" if self.chunk_tokens is None else f"chunks of {self.chunk_tokens:,}"
            return f"mixed {self.mixed}, {how}"
        named = (("prefill", self.prefill), ("decode", self.decode))
        return ", ".join(f"{name} {pool}" for name, pool in named if pool is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Each worker has one each way; a transfer has both ends' to itself."""

    latency_s: float
    bytes_per_s: float


class Affinity(Enum):
    """Between which GPUs KV moves fast."""

    HIGH = "high"  # any two: Algorithm 1
    LOW = "low"  # of one machine: Algorithm 2


class Criterion(Enum):
    """When an objective of two parts is met by a share of requests."""

    JOINT = "joint"  # by so many requests in both parts
    MARGINAL = "marginal"  # in each part by so many, whoever they are: as DistServe's released simulator has it
