"""What the worker packages decide inside the one scheduler: the seams, and the plain choice that holds when none is given.

Pure and small on purpose: `prefill_workers.policy` and `decode_workers.policy` implement them, control/compose binds them by role.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from engine.core.hit_groups import HitGroups
from engine.core.sequence import Sequence


class PrefillPolicy(Protocol):
    """When a prompt is computed, and how much of it in one step."""

    def order(self, priority: int, arrival: int, num_tokens: int) -> tuple[int, int]:
        """Place in the inbox, lowest first. Decided once, at arrival; kept for preemption too."""
        ...

    def hit_groups(self) -> HitGroups | None:
        """Of one worker, anew: its prompts are then ordered by what is cached when they begin to wait. None: as `order` has it."""
        ...

    def chunk_tokens(self, num_remaining_tokens: int, num_decodes: int) -> int:
        """How many tokens of a prompt to compute in a step with `num_decodes` decodes, before token and time budgets."""
        ...

    def may_offer(self, offered_bytes: int, prompt_bytes: int) -> bool:
        """May a prompt be begun whose KV will be offered, when so many bytes are offered or being made for it?"""
        ...


class DecodePolicy(Protocol):
    """Who joins the batch, and who leaves it when blocks run out."""

    def may_admit(self, num_blocks_left: int, num_running: int, num_blocks: int) -> bool:
        """May a sequence join that would leave `num_blocks_left` of `num_blocks` available? Not asked when nothing runs."""
        ...

    def victim(self, candidates: Many[Sequence]) -> Sequence:
        """Which of these is preempted; they come in order, most urgent first, and are never empty."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainPrefill:
    """First come, first served within a priority; whole prompts; offers up to a bound."""

    max_offered_bytes: int

    def order(self, priority: int, arrival: int, num_tokens: int) -> tuple[int, int]:
        return priority, arrival

    def hit_groups(self) -> HitGroups | None:
        return None

    def chunk_tokens(self, num_remaining_tokens: int, num_decodes: int) -> int:
        return num_remaining_tokens

    def may_offer(self, offered_bytes: int, prompt_bytes: int) -> bool:
        return offered_bytes == 0 or offered_bytes + prompt_bytes <= self.max_offered_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainDecode:
    """Admit while blocks last; the last in order leaves first."""

    def may_admit(self, num_blocks_left: int, num_running: int, num_blocks: int) -> bool:
        return num_blocks_left >= 0

    def victim(self, candidates: Many[Sequence]) -> Sequence:
        return candidates[-1]
