"""How many of the blocks that caches push out are wanted again: what a block is worth that a new prompt would displace.

A cache evicts its coldest blocks, so its hit rate says little of them: beside one hot prefix most of what is evicted was used once and
never will be again. Here the evicted are remembered for a while, and counted when a prompt asks for them in vain.

    share = asked for again / evicted          both forgotten by half with each HALF_LIFE_BLOCKS evicted
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

HALF_LIFE_BLOCKS = 8192
PRIOR_BLOCKS = 256  # evicted and not wanted, before any was: a cache that was just filled has shown nothing yet
MAX_BLOCKS = 1 << 17  # remembered, some 100 bytes each


class EvictionRegret:
    """Of all workers together. `max_blocks`: the oldest are forgotten beyond it, and count as not wanted."""

    def __init__(self, *, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self.forget()

    def forget(self) -> None:
        self._gone: OrderedDict[bytes, None] = OrderedDict()  # oldest first
        self._num_evicted = float(PRIOR_BLOCKS)
        self._num_wanted = 0.0

    @property
    def share(self) -> float:
        return min(1.0, self._num_wanted / self._num_evicted)

    def evicted(self, hashes: tuple[bytes, ...]) -> None:
        gone, kept = self._gone, 0.5 ** (len(hashes) / HALF_LIFE_BLOCKS)
        self._num_evicted = self._num_evicted * kept + len(hashes)
        self._num_wanted *= kept
        gone.update(dict.fromkeys(hashes))
        while len(gone) > self._max_blocks:
            gone.popitem(last=False)

    def asked_in_vain(self, hashes: Iterable[bytes]) -> None:
        """Blocks of a prompt that were not found where it went; each counts once."""
        gone = self._gone
        if gone:
            again = [h for h in hashes if h in gone]
            self._num_wanted += len(again)
            for h in again:
                del gone[h]
