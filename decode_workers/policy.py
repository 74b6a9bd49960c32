"""Who joins the decode batch, and who leaves it when blocks run out. Pure: the scheduler asks."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

from engine.core.sequence import Sequence
from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class WatermarkDecode:
    """Admit while some blocks stay free for those that run to grow into; the last in order leaves first.

    blocks_per_running: every sequence that decodes will ask for a block soon; below that, who is admitted now is preempted next.
    """

    watermark_fraction: float = 0.01
    blocks_per_running: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.watermark_fraction < 1.0 or self.blocks_per_running < 0.0:
            raise ConfigError(
                f"watermark_fraction is {self.watermark_fraction}, blocks_per_running {self.blocks_per_running}; "
                "the first must lie in [0, 1), the second must not be negative"
            )

    def may_admit(self, num_blocks_left: int, num_running: int, num_blocks: int) -> bool:
        return num_blocks_left >= max(self.watermark_fraction * num_blocks, self.blocks_per_running * num_running)

    def victim(self, candidates: Many[Sequence]) -> Sequence:
        return candidates[-1]
