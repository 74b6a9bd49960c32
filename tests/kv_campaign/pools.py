"""The source's pool of a campaign: random content, generations that differ from block to block, and every way to spoil an offer of it."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np

from kernels.copy_runs import Runs
from kvtransfer.lanes import Pull
from kvtransfer.pieces import Channel
from kvtransfer.region import PoolMemory
from protocol.kv import DigestMode, Endpoint, HandoffKind, HandoffShard, KVHandoff, Lease, TransferError
from tests.kv_campaign.backends import FINGERPRINT, SOURCE, Hooks
from tests.kv_campaign.cases import Case, Kind, Mixup, Where, damage
from tests.kv_campaign.layouts import LAYOUTS
from tests.kv_campaign.tokens import EveryRow

NUM_BLOCKS = 48
MODES = (DigestMode.OFF, DigestMode.SAMPLED, DigestMode.FULL)
_FRESH = 64  # blocks of content that lies in no pool: what was there before, what is written anew


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Of one injection."""

    case: Case
    caught: tuple[bool, ...]  # by mode, as in MODES
    error: TransferError | None  # of the transfer itself, before any digest
    reaches_tokens: bool  # a decode step would read damaged bytes
    wrong_token: bool  # and its token, with all checks off, is another


def is_mix_up(case: Case) -> bool:
    """The copy itself reads another block than it was asked for. With a conversation it is the source that does: damage like any other."""
    is_foreign = case.kind is Kind.WRONG_BLOCK and case.mixup is Mixup.FOREIGN
    return is_foreign and case.where is Where.SOURCE and case.backend in ("local", "shm")


def mix_up(case: Case, foreign: int) -> Callable[[Pull], None]:
    """For Hooks.before_copy, in the process that copies."""

    def act(pull: Pull) -> None:
        pull.source_block_ids[case.place] = foreign

    return act


class SourcePool:
    """`offer` and `arm` are the first two steps of an injection, `restore` the last."""

    def __init__(self, layout_index: int, seed: int, *, region_id: int = 0) -> None:
        layout = LAYOUTS[layout_index].layout
        self.pool = PoolMemory.create(layout, NUM_BLOCKS, region_id=region_id)
        self.rows = EveryRow(self.pool.region)
        self._size = layout.block_bytes
        rng = np.random.default_rng((seed, layout_index))
        np.frombuffer(self.pool.region.blocks, dtype=np.uint8)[:] = rng.integers(0, 256, NUM_BLOCKS * self._size, dtype=np.uint8)
        self._fresh = rng.integers(0, 256, (_FRESH, self._size), dtype=np.uint8)
        self._generation = 0
        self._wire = memoryview(b"")
        self._kept: list[tuple[int, bytes]] = []  # what the offered blocks held
        self._raise_all()

    def close(self) -> None:
        del self.rows
        self.pool.close()

    def draw_ids(self, case: Case, rng: Random) -> array[int]:
        return array("I", rng.sample(range(NUM_BLOCKS), case.num_places))

    def offer(self, case: Case, ids: array[int], rng: Random, *, epoch: int, endpoint: Endpoint) -> KVHandoff:
        """Without digests: mode OFF."""
        self._kept = [(b, self.content(b)) for b in ids]
        region = self.pool.region
        handoff_id = f"{rng.getrandbits(128):032x}"
        shard = HandoffShard(
            worker_id=SOURCE,
            rank=0,
            epoch=epoch,
            endpoint=endpoint,
            region_id=region.region_id,
            layout=region.layout,
            block_ids=ids,
            generations=array("Q", [region.generations[b] for b in ids]),
            digest_mode=DigestMode.OFF,
            digests=b"",
        )
        return KVHandoff(
            handoff_id=handoff_id,
            kind=HandoffKind.PREFILL,
            request_id=handoff_id,
            attempt=0,
            fingerprint=FINGERPRINT,
            token_ids=array("I", range(case.num_tokens)),
            layer_watermark=region.layout.num_layers,
            first_tokens=(),
            lease=Lease(duration_s=30),
            shards=(shard,),
        )

    def arm(self, case: Case, ids: array[int], earlier: list[bytes], rng: Random, hooks: Hooks, *, fenced: bool) -> Callable[[], None]:
        """Do, or prepare, what happens before and while the blocks move; returns the late writer's act.

        fenced: whoever writes a block anew raises its generation first, as Baton does. Not: the generation check has nothing to see.
        """
        victim, content = ids[case.place], self.some_fresh(rng)
        size, backend, foreign = self._size, case.backend, self.foreign(case, ids)

        def write_anew() -> None:
            if fenced:
                self.pool.raise_generations(array("I", [victim]), array("Q", [self.pool.region.generations[victim] + 1]))
            end = size // 2 if case.half and case.kind is Kind.LATE_WRITER else size
            self.block(victim)[:end] = content[:end]

        def send_late(channel: Channel, blocks: memoryview, runs: Runs) -> None:
            if backend != "tcp":  # one gather of the whole piece
                write_anew()
                channel.send(blocks, runs)
                return
            spans = np.array([(b * size, size) for b in ids], dtype=np.int64)
            channel.send(blocks, spans[: case.moment])
            write_anew()
            channel.send(blocks, spans[case.moment :])

        def send_damaged(channel: Channel, blocks: memoryview, runs: Runs) -> None:
            wire = memoryview(bytearray(b"".join([blocks[start : start + length] for start, length in runs.tolist()])))
            views = [wire[place * size : (place + 1) * size] for place in range(case.num_places)]
            damage(case, LAYOUTS[case.layout_index].spans, views, earlier=earlier, foreign=self.content(foreign))
            self._wire = wire  # which the channel may read until it is flushed
            channel.send(wire, np.array([(0, len(wire))], dtype=np.int64))

        if case.kind is Kind.STALE_GENERATION:
            write_anew()
        elif case.kind is Kind.LATE_WRITER:
            # The local backend copies in one slice: its only moment is before it.
            moment = 0 if backend == "local" else case.moment
            hooks.around_copy = lambda call: write_anew() if call == moment else None
            hooks.on_send = send_late
        elif case.where is Where.WIRE:
            hooks.on_send = send_damaged
        elif is_mix_up(case):
            hooks.before_copy = mix_up(case, foreign)
        elif case.where is Where.SOURCE:
            damage(case, LAYOUTS[case.layout_index].spans, [self.block(b) for b in ids], earlier=earlier, foreign=self.content(foreign))
        return write_anew

    def restore(self) -> None:
        """The content of the last offer again, under later generations."""
        for block_id, content in self._kept:
            self.block(block_id)[:] = content
        self._raise_all()

    def foreign(self, case: Case, ids: array[int]) -> int:
        """A block that is not in the hand-off and has the generation of the damaged one: generations would not tell them apart."""
        alike = [b for b in range(ids[case.place] % 3, NUM_BLOCKS, 3) if b not in ids]
        return alike[case.number % len(alike)]

    def some_fresh(self, rng: Random) -> bytes:
        return self._fresh[rng.randrange(_FRESH)].tobytes()

    def content(self, block_id: int) -> bytes:
        return bytes(self.block(block_id))

    def block(self, block_id: int) -> memoryview:
        return self.pool.region.blocks[block_id * self._size : (block_id + 1) * self._size]

    def _raise_all(self) -> None:
        """A later generation for the whole pool, not the same for each block."""
        self._generation += 4
        words = np.frombuffer(self.pool.region.generations, dtype=np.uint64)
        words[:] = self._generation + np.arange(NUM_BLOCKS, dtype=np.uint64) % 3
