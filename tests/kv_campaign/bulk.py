"""Injections by the hundred thousand: a whole pull each, within this process, judged under all three digest modes at once.

What is real: pools in memfds with their generation words, both transports of the backend with their threads, sockets and mappings,
the seqlock, `digest.compute` when the offer is made, `plan_parts` and `verify_parts` when it is pulled. What is left to the live part
(tests.kv_campaign.live): the event loop around them, and that source and target are two processes.

    offer (digests of each mode) ─► break something ─► pull ─► error?  caught in every mode
                                                         └─► verify under off, sampled, full: caught, or escaped
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from random import Random

from kvtransfer import digest
from kvtransfer.pulls import plan_parts, verify_parts
from kvtransfer.region import PoolMemory
from kvtransfer.transport import Transfer
from protocol.kv import KVHandoff, TransferError
from tests.kv_campaign.backends import Hooks, Pair
from tests.kv_campaign.cases import PLACES_MAX, Case, Where, damage
from tests.kv_campaign.layouts import LAYOUTS
from tests.kv_campaign.pools import MODES, SourcePool, Verdict
from tests.kv_campaign.tokens import EveryRow, first_decoded_token


class Bench:
    """The pools of one layout on one backend; `inject` does one case."""

    def __init__(self, pair: Pair, layout_index: int, hooks: Hooks, seed: int) -> None:
        layout = LAYOUTS[layout_index].layout
        self._pair = pair
        self._hooks = hooks
        self._source = SourcePool(layout_index, seed, region_id=2 * layout_index)
        self._target = PoolMemory.create(layout, PLACES_MAX, region_id=2 * layout_index + 1)
        self._rows = EveryRow(self._target.region)
        self._size = layout.block_bytes
        pair.add(self._source.pool, self._target)

    def close(self) -> None:
        del self._rows
        self._source.close()
        self._target.close()

    def inject(self, case: Case) -> Verdict:
        rng = Random(case.number)
        source = self._source
        ids = source.draw_ids(case, rng)
        offers = self._under_each_mode(source.offer(case, ids, rng, epoch=self._pair.epoch, endpoint=self._pair.source.endpoint()))
        expected = [source.content(b) for b in ids]
        words = source.rows.read(ids, case.num_tokens)
        earlier = [source.some_fresh(rng) for _ in ids]
        targets = array("I", range(case.num_places))
        views = [self._target.region.blocks[place * self._size : (place + 1) * self._size] for place in targets]
        for view, content in zip(views, earlier, strict=True):
            view[:] = content

        # First with no check at all: what is delivered must differ from what was offered, else nothing was injected.
        source.arm(case, ids, earlier, rng, self._hooks, fenced=False)
        unchecked = self._pull(offers[0], targets)
        self._hooks.clear()
        assert unchecked is None, f"{case}: with all checks off the pull ends with {unchecked}"
        if case.where is Where.TARGET and not case.kind.is_staleness:
            damage(case, LAYOUTS[case.layout_index].spans, views, earlier=earlier, foreign=source.content(source.foreign(case, ids)))
        assert [bytes(view) for view in views] != expected, f"nothing was injected: {case}"
        read = self._rows.read(targets, case.num_tokens)

        # Then as it is served. A content fault does not know of generations: the same pull stands for both.
        error = None
        if case.kind.is_staleness:
            source.restore()
            offers = self._under_each_mode(source.offer(case, ids, rng, epoch=self._pair.epoch, endpoint=self._pair.source.endpoint()))
            source.arm(case, ids, earlier, rng, self._hooks, fenced=True)
            error = self._pull(offers[0], targets)
            self._hooks.clear()
        caught = tuple(error is not None or bool(self._check(offer, targets)) for offer in offers)
        assert error is not None or [bytes(view) for view in views] != expected, f"delivered as offered: {case}"
        source.restore()
        return Verdict(
            case=case,
            caught=caught,
            error=error,
            reaches_tokens=read != words,
            wrong_token=first_decoded_token(read) != first_decoded_token(words),
        )

    # --- offer, pull, check: the three moves of a hand-off ---

    def _under_each_mode(self, handoff: KVHandoff) -> list[KVHandoff]:
        (shard,) = handoff.shards
        made = [handoff]
        for mode in MODES[1:]:
            digests = digest.compute(self._source.pool.region, shard.block_ids, shard.generations, mode, handoff.handoff_id)
            made.append(replace(handoff, shards=(replace(shard, digest_mode=mode, digests=digests),)))
        return made

    def _pull(self, offer: KVHandoff, targets: array[int]) -> TransferError | None:
        transfer = Transfer(
            source=offer.shards[0],
            source_indices=array("I", range(len(targets))),
            target_region_id=self._target.region.region_id,
            target_block_ids=targets,
            deadline_s=20.0,
        )
        return self._pair.pull(transfer).error

    def _check(self, offer: KVHandoff, targets: array[int]) -> str:
        parts = plan_parts(
            offer,
            array("I", range(len(targets))),
            targets,
            self._target.region,
            target_start_tokens=None,
            staging_bytes_max=0,
            first_region_id=0,
        )
        return verify_parts(offer, parts)
