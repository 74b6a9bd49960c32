"""The bounds of a worker core. Units are in the names; every queue, wait and cache of engine/core ends at one of these."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.errors import ConfigError
from protocol.kv import DigestMode, FailurePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What one step may hold.

    max_inflight_steps 2 plans step k+1 before the tokens of k are known; a stop found late discards the surplus token.
    step_time_budget_s bounds steps that mix prompts into decoding; it needs decodes to be protected, so a step of prompts alone is
    bounded by max_num_batched_tokens only.
    max_leap_steps lets one plan stand for several equal steps (`Scheduler.horizon`); only a driver that repeats plans sets it.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    step_time_budget_s: float | None = None  # None: no bound
    max_inflight_steps: int = 1
    enable_prefix_caching: bool = True
    block_size_tokens: int = 16
    max_leap_steps: int = 1
    force_preempt_every: int = 0  # test seam: preempt the last decoding sequence every so many steps; 0: off

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs is {self.max_num_seqs}; it must be 1 or more")
        if self.max_num_batched_tokens < 1:
            raise ConfigError(f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be 1 or more")
        if self.max_inflight_steps not in (1, 2):
            raise ConfigError(f"max_inflight_steps is {self.max_inflight_steps}; choose 1 or 2")
        if self.block_size_tokens < 1 or self.block_size_tokens % HASH_BLOCK_SIZE_TOKENS:
            raise ConfigError(f"block_size_tokens is {self.block_size_tokens}; it must be a multiple of {HASH_BLOCK_SIZE_TOKENS}")
        if self.step_time_budget_s is not None and self.step_time_budget_s <= 0:
            raise ConfigError(f"step_time_budget_s is {self.step_time_budget_s}; it must be positive, or None for no bound")
        if self.max_leap_steps < 1 or (self.max_leap_steps > 1 and self.max_inflight_steps != 1):
            raise ConfigError("max_leap_steps must be 1 or more, and 1 when two steps may be in flight")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCoreConfig:
    """What one worker may hold, and for how long."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    max_waiting: int = 256  # attempts in the inbox; beyond it they are given back to the gateway
    max_remembered_attempts: int = 4096  # ended attempts whose repeated Submit is ignored
    lease_s: float = 30.0  # offered blocks are kept this long after the last sign of life of the target
    pull_deadline_s: float = 30.0
    max_handoff_wait_s: float = 120.0  # an offer may wait this long for room here before it is given back and computed again
    max_offered_bytes: int = 1 << 40  # KV kept for targets; at the bound no further prompt is begun for a hand-off
    digest_mode: DigestMode = DigestMode.SAMPLED
    offer_early: bool = True  # offer KV when the last step of its prefill begins, so that the target's copy follows the layers
    kv_load_failure_policy: FailurePolicy = FailurePolicy.RECOMPUTE
    prefix_pull_deadline_s: float = 1.0  # a prompt waits this long for a peer's prefix, from the question to the last byte
    max_prefix_pulls: int = 16  # at once; more prompts are computed
    host_tier_bytes: int = 0  # of host memory that keep blocks evicted from the pool; 0: none

    def __post_init__(self) -> None:
        bounds = ["max_waiting", "max_remembered_attempts", "lease_s", "pull_deadline_s", "max_handoff_wait_s", "max_offered_bytes"]
        for name in [*bounds, "prefix_pull_deadline_s"]:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")

    @property
    def renew_interval_s(self) -> float:
        """How often a target renews the source's lease: five renewals may be lost."""
        return self.lease_s / 6
