"""The block pool against a plain model of it: any history of taking, sharing, pinning, leasing, naming and giving back."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.core.block_pool import BlockKind, BlockPool

pytestmark = pytest.mark.pure

HOLDS = ("own", "pin", "lease")


class PoolMachine(RuleBasedStateMachine):
    """`held`: how often each block is held, by kind of hold; `named`: known to the cache; `generations`: as they must be."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.pool.on_evict = self.named_is_evicted
        self.held = [{hold: 0 for hold in HOLDS} for _ in range(num_blocks)]
        self.named: list[int] = []  # by time of their last release, oldest first
        self.generations = [0] * num_blocks

    def named_is_evicted(self, block_id: int) -> None:
        unheld = [b for b in self.named if not any(self.held[b].values())]
        assert block_id == unheld[0], "the least recently released goes first"
        self.named.remove(block_id)

    def of_kind(self, kind: BlockKind) -> list[int]:
        return [b for b in range(self.pool.num_blocks) if self.pool.kind(b) is kind]

    @precondition(lambda self: self.pool.num_available > 0)
    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, self.pool.num_available))
        for block_id in self.pool.allocate(count):
            assert not any(self.held[block_id].values()), "given out while somebody holds it"
            self.held[block_id]["own"] = 1
            self.generations[block_id] += 1

    @precondition(lambda self: self.of_kind(BlockKind.OWNED))
    @rule(data=st.data(), hold=st.sampled_from(HOLDS))
    def hold(self, data: st.DataObject, hold: str) -> None:
        block_id = data.draw(st.sampled_from(self.of_kind(BlockKind.OWNED)))
        {"own": self.pool.own, "pin": self.pool.pin, "lease": lambda b: self.pool.lease([b])}[hold](block_id)
        self.held[block_id][hold] += 1

    @precondition(lambda self: self.of_kind(BlockKind.CACHED))
    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(self.of_kind(BlockKind.CACHED)))
        self.pool.own(block_id)
        self.held[block_id]["own"] += 1

    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        held = [(b, hold) for b, holds in enumerate(self.held) for hold in HOLDS if holds[hold]]
        if held:
            block_id, hold = data.draw(st.sampled_from(held))
            release = {"own": self.pool.disown, "pin": self.pool.unpin, "lease": lambda b: self.pool.end_lease(array("I", [b]))}
            release[hold](block_id)
            self.held[block_id][hold] -= 1
            if block_id in self.named and not any(self.held[block_id].values()):
                self.named.remove(block_id)
                self.named.append(block_id)

    @rule(data=st.data())
    def name(self, data: st.DataObject) -> None:
        nameless = [b for b in self.of_kind(BlockKind.OWNED) if b not in self.named]
        if nameless:
            block_id = data.draw(st.sampled_from(nameless))
            self.pool.name(block_id)
            self.named.append(block_id)

    @invariant()
    def law_of_conservation(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        for block_id, holds in enumerate(self.held):
            kind = self.pool.kind(block_id)
            if holds["own"] or holds["pin"]:
                assert kind is BlockKind.OWNED
            elif holds["lease"]:
                assert kind is BlockKind.LEASED
            else:
                assert kind is (BlockKind.CACHED if block_id in self.named else BlockKind.FREE)
            assert self.pool.generation(block_id) == self.generations[block_id]


PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
