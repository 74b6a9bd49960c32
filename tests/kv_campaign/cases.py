"""One injection: what is broken, where and when. Drawn evenly over kinds, backends, layouts and layers; the rest is chance.

Damage is told in terms of the hand-off's blocks in order ("places"), so the same case can be done to the copy's source, to the bytes on
the wire, or to the target after the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random

from tests.kv_campaign.layouts import LAYOUTS, CampaignLayout

PLACES_MAX = 4  # blocks a hand-off


class Kind(Enum):
    BIT_FLIP = "bit_flip"
    WRONG_BLOCK = "wrong_block"
    STALE_GENERATION = "stale_generation"  # the source wrote a block anew between the offer and the pull
    TRUNCATED = "truncated"
    LATE_WRITER = "late_writer"  # the source writes a block anew while it is copied
    SWAPPED_LAYERS = "swapped_layers"

    @property
    def is_staleness(self) -> bool:
        return self in (Kind.STALE_GENERATION, Kind.LATE_WRITER)


class Where(Enum):
    """Whose bytes are damaged."""

    SOURCE = "source"  # in the pool, after the digest was made, by somebody who raises no generation
    WIRE = "wire"  # what the source's process sends (backends with a conversation only)
    TARGET = "target"  # after the copy, before the check


class Mixup(Enum):
    """Which wrong block is delivered."""

    FOREIGN = "foreign"  # another block of the source's pool, of the right generation
    EXCHANGED = "exchanged"  # with another of the same hand-off
    EARLIER = "earlier"  # what lay in the target block before: one block was never written


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    number: int
    kind: Kind
    backend: str
    layout_index: int
    layer: int
    num_places: int
    num_tokens: int  # the last block may be partial
    place: int  # the damaged block, or the first of them
    other_place: int  # of Mixup.EXCHANGED
    other_layer: int  # of SWAPPED_LAYERS
    every_place: bool  # SWAPPED_LAYERS: in all blocks, or in one
    where: Where
    mixup: Mixup
    byte: int  # within the layer, for BIT_FLIP and where TRUNCATED cuts
    bit: int
    moment: int  # LATE_WRITER: before which block is copied
    half: bool  # LATE_WRITER: the copy sees a block half written


def draw(number: int, seed: int, backends: Sequence[str], layouts: Sequence[CampaignLayout] = LAYOUTS) -> Case:
    rng = Random(seed << 40 | number)
    kinds = list(Kind)
    turn, kind = divmod(number, len(kinds))
    turn, backend = divmod(turn, len(backends))
    turn, layout_index = divmod(turn, len(layouts))
    layout = layouts[layout_index]
    layer = turn % len(layout.spans)
    num_places = rng.randint(2, PLACES_MAX)
    size_tokens = layout.layout.block_size_tokens
    place = rng.randrange(num_places)
    has_wire = backends[backend] not in ("local", "shm")
    where = rng.choice([Where.SOURCE, Where.TARGET, *([Where.WIRE] if has_wire else [])])
    mixup = rng.choice(list(Mixup))
    never_written = kinds[kind] is Kind.TRUNCATED or (kinds[kind] is Kind.WRONG_BLOCK and mixup is Mixup.EARLIER)
    if (never_written or kinds[kind] is Kind.SWAPPED_LAYERS) and where is Where.SOURCE:
        where = Where.WIRE if has_wire else Where.TARGET  # nothing of a source does that
    return Case(
        number=number,
        kind=kinds[kind],
        backend=backends[backend],
        layout_index=layout_index,
        layer=layer,
        num_places=num_places,
        num_tokens=num_places * size_tokens - rng.choice([0, 0, 0, rng.randrange(size_tokens)]),
        place=place,
        other_place=rng.choice([p for p in range(num_places) if p != place]),
        other_layer=rng.choice([n for n in range(len(layout.spans)) if n != layer]),
        every_place=rng.random() < 0.5,
        where=where,
        mixup=mixup,
        byte=rng.randrange(layout.spans[layer][1]),
        bit=rng.randrange(8),
        moment=rng.randint(0, place),
        half=rng.random() < 0.5,
    )


def damage(case: Case, spans: Sequence[tuple[int, int]], blocks: Sequence[memoryview], *, earlier: Sequence[bytes], foreign: bytes) -> None:
    """Break the hand-off's blocks (one view a place) as `case` says. No kind that is a staleness comes here.

    spans: (offset, size) of each layer in a block.
    earlier: what the target held in each place. foreign: another block of the source's pool.
    """
    start, size = spans[case.layer]
    block = blocks[case.place]
    if case.kind is Kind.BIT_FLIP:
        block[start + case.byte] ^= 1 << case.bit
    elif case.kind is Kind.WRONG_BLOCK:
        if case.mixup is Mixup.FOREIGN:
            block[:] = foreign
        elif case.mixup is Mixup.EARLIER:
            block[:] = earlier[case.place]
        else:
            mine = bytes(block)
            block[:] = blocks[case.other_place]
            blocks[case.other_place][:] = mine
    elif case.kind is Kind.TRUNCATED:
        cut = start + case.byte
        while cut and case.place + 1 == case.num_places and block[cut:] == earlier[case.place][cut:]:
            cut -= 1  # the last bytes are the same by chance
        block[cut:] = earlier[case.place][cut:]
        for place in range(case.place + 1, case.num_places):
            blocks[place][:] = earlier[place]
    else:
        assert case.kind is Kind.SWAPPED_LAYERS
        other, other_size = spans[case.other_layer]
        assert size == other_size, "layers of one size are exchanged"
        for victim in blocks if case.every_place else [block]:
            mine = bytes(victim[start : start + size])
            victim[start : start + size] = victim[other : other + size]
            victim[other : other + size] = mine
