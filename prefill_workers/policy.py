"""When a prompt is computed, how much of it in one step, and how much KV may wait for its targets. Pure: the scheduler asks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.core.hit_groups import HitGroups
from protocol.errors import ConfigError


class PromptOrder(Enum):
    """Order within one priority."""

    FIRST_COME = "first_come"
    SHORTEST_FIRST = "shortest_first"  # lower mean TTFT; long prompts wait for a lull
    HIT_RATIO = "hit_ratio"  # ten groups by the cached share, served in proportion; nobody starves (engine/core/hit_groups.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkedPrefill:
    """Prompts in chunks (Sarathi-Serve, OSDI'24): large ones alone, small ones beside decodes, which they delay.

    The prefill pool is the queue towards the decode workers (Sec. 4.3 of DistServe, OSDI'24), bounded here: at
    `max_offered_bytes` no further prompt is begun for a hand-off, while prompts that stay on this worker go on.
    """

    max_offered_bytes: int
    order_by: PromptOrder = PromptOrder.FIRST_COME
    chunk_tokens_alone: int = 1 << 30
    chunk_tokens_beside_decodes: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("max_offered_bytes", "chunk_tokens_alone", "chunk_tokens_beside_decodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    def order(self, priority: int, arrival: int, num_tokens: int) -> tuple[int, int]:
        return priority, num_tokens if self.order_by is PromptOrder.SHORTEST_FIRST else arrival

    def hit_groups(self) -> HitGroups | None:
        return HitGroups() if self.order_by is PromptOrder.HIT_RATIO else None

    def chunk_tokens(self, num_remaining_tokens: int, num_decodes: int) -> int:
        return min(num_remaining_tokens, self.chunk_tokens_beside_decodes if num_decodes else self.chunk_tokens_alone)

    def may_offer(self, offered_bytes: int, prompt_bytes: int) -> bool:
        """One prompt is always let through, or a prompt larger than the bound would wait for ever."""
        return offered_bytes == 0 or offered_bytes + prompt_bytes <= self.max_offered_bytes
