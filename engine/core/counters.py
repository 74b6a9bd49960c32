"""What a worker core counts."""

from __future__ import annotations

from engine.core.host_loads import HOST_COUNTERS
from engine.core.prefix_pulls import PREFIX_COUNTERS

COUNTERS = (
    "steps",
    "busy_us",  # sum of the steps' durations
    "chunks",  # entries of steps that computed prompt tokens
    "max_chunks_per_prompt",
    "max_batch",  # most sequences in one step
    "prompt_tokens_computed",  # again after preemption or a failed transfer: counted again
    "generated_tokens",
    "cached_tokens",  # prompt tokens found in the prefix cache instead
    "preemptions",
    "handoffs_offered",
    "handoffs_taken",
    "handoff_bytes_out",  # acknowledged by their targets
    "handoff_bytes_in",
    "transfer_failures",
    "recomputes",  # attempts whose offered KV was computed here after all
    "pulls_again",  # after one that broke off, under kv_load_failure_policy retry
    "leases_expired",
    *PREFIX_COUNTERS,
    *HOST_COUNTERS,
    "late_messages",  # about a hand-off that had ended, or was never ours
    "attempts_refused",
    "duplicates_ignored",
)
"""Monotonic counters of a worker core, by name."""
