"""The host tier of a simulated worker: words of saved blocks, and loads that take a while on the virtual clock.

A load copies at some moment between its start and its end, and asserts at both that its slots are what they were: a core that reuses a
slot too early, or a block too late, is seen.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from random import Random

from engine.core.events import LoadBlocks, SaveBlocks
from simulator.loop import VirtualLoop
from simulator.sim_executor import SimPool


class SimHostTier:
    """Slots by number. `fail`: the probability that a load ends with an error; `block_s`: seconds to copy a block."""

    def __init__(self, loop: VirtualLoop, pool: SimPool, rng: Random, *, fail: float = 0.0, block_s: float = 0.00005) -> None:
        self._loop = loop
        self._pool = pool
        self._rng = rng
        self._fail = fail
        self._block_s = block_s
        self._slots: dict[int, tuple[int, array[int]]] = {}  # slot -> (generation, words)

    def save(self, command: SaveBlocks) -> None:
        for block_id, slot, generation in zip(command.block_ids, command.slots, command.generations, strict=True):
            assert slot not in self._slots or generation > self._slots[slot][0], f"the generation of slot {slot} does not grow"
            self._slots[slot] = (generation, self._pool.read_block(block_id))

    def load(self, command: LoadBlocks, on_done: Callable[[str], None]) -> None:
        """`on_done` comes later, once."""
        self._check(command)
        copy_s = len(command.slots) * self._block_s
        fails = self._rng.random() < self._fail

        def copy() -> None:
            for slot, block_id in zip(command.slots, command.block_ids, strict=True):
                if not fails or self._rng.random() < 0.5:
                    self._pool.write_block(block_id, self._slots[slot][1])

        def end() -> None:
            self._check(command)
            on_done("the copy failed" if fails else "")

        self._loop.call_later(copy_s * self._rng.random(), copy)
        self._loop.call_later(copy_s, end)

    def _check(self, command: LoadBlocks) -> None:
        for slot, generation in zip(command.slots, command.generations, strict=True):
            assert self._slots[slot][0] == generation, f"slot {slot} was reused while it was read"
