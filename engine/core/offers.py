"""The source's side of hand-offs in a worker: blocks kept for their targets until acknowledged, dropped, cancelled or expired."""

from __future__ import annotations

from array import array
from dataclasses import replace

import xxhash

from engine.core.attempts import LiveAttempt
from engine.core.block_pool import BlockPool
from engine.core.events import Command, CompleteOffer, LeaseRenewed, OfferKv, PeerAcked, PeerDropped
from engine.core.residence import StepInFlight
from kvtransfer.handoff import SourceHandoff, step_begin
from protocol.kv import DigestMode, Endpoint, HandoffKind, HandoffShard, KVHandoff, KVLayout, Lease
from protocol.request import AttemptKey


class Offers:
    """Open offers of one worker. Bounded by the pool: each holds blocks."""

    def __init__(
        self,
        pool: BlockPool,
        counters: dict[str, int],
        *,
        worker_id: str,
        epoch: int,
        layout: KVLayout,
        fingerprint: bytes,
        lease_s: float,
        digest_mode: DigestMode,
    ) -> None:
        self._pool = pool
        self._counters = counters
        self._worker_id = worker_id
        self._epoch = epoch
        self._layout = layout
        self._fingerprint = fingerprint
        self._lease_s = lease_s
        self._digest_mode = digest_mode
        self._open: dict[str, tuple[SourceHandoff, AttemptKey, str]] = {}  # by handoff id: (offer, attempt, gateway)
        self._num_made = 0
        self._prefixes: set[str] = set()  # those of `_open` that are cached prefixes
        self.offered_bytes = 0  # of computed prompts
        self.offered_prefix_bytes = 0

    def __len__(self) -> int:
        return len(self._open)

    def is_open(self, handoff_id: str) -> bool:
        """True while its blocks are kept."""
        return handoff_id in self._open

    def offer_early(self, step: StepInFlight, now: float) -> list[Command]:
        """Offer the prompts whose last tokens this step computes. Of one choice only: its target has nothing to share out meanwhile."""
        commands: list[Command] = []
        for sequence in step.sampled_prompts:
            live = sequence.attempt
            if not live.prefill_only or len(live.sequences) != 1 or live.early_offer is not None:
                continue
            if sequence.num_outputs + 1 >= sequence.sampling.max_tokens:
                continue
            (start,) = [entry.start for entry in step.plan.entries if entry.sequence_id == sequence.sequence_id]
            clock = step_begin(step.plan.step_id, self._layout.num_layers)
            num_whole_blocks = start // self._layout.block_size_tokens
            live.early_offer = self.make(live, sequence.tokens[:], now, clock=clock, num_whole_blocks=num_whole_blocks)
            commands.append(OfferKv(gateway=live.gateway, handoff=live.early_offer))
        return commands

    def offer(self, live: LiveAttempt, now: float) -> list[Command]:
        """The prompt is computed and every choice has its first token: offer its blocks, or complete the offer that was made early.

        Nothing where the first tokens were the last.
        """
        assert live.leader is not None
        early = live.early_offer
        if early is None:
            if not live.first_tokens:
                return []
            return [OfferKv(gateway=live.gateway, handoff=self.make(live, live.leader.tokens[:-1], now))]
        if not live.first_tokens:
            self.withdraw(early.handoff_id)
            return []
        is_kept = early.handoff_id in self._open
        if is_kept:
            self._follow(early.handoff_id, live.leader.block_table)
        return [CompleteOffer(gateway=live.gateway, handoff=replace(early, first_tokens=tuple(live.first_tokens)), is_kept=is_kept)]

    def make(self, live: LiveAttempt, token_ids: array[int], now: float, *, clock: int = 0, num_whole_blocks: int = 0) -> KVHandoff:
        """Lease the leader's blocks; the driver fills in endpoint, region and digests.

        clock: of the region when the last step of this prefill begins, for an offer that precedes the step's end; `num_whole_blocks`
        are computed in steps before it.
        """
        assert live.leader is not None and bool(live.first_tokens) != bool(clock)
        block_ids = live.leader.block_table[: -(-len(token_ids) // self._layout.block_size_tokens)]
        offer = self._keep(block_ids, live.key, live.gateway, lease_s=self._lease_s, now=now)
        self.offered_bytes += offer.size_bytes
        self._counters["handoffs_offered"] += 1
        return KVHandoff(
            handoff_id=offer.handoff_id,
            kind=HandoffKind.PREFILL,
            request_id=live.key.request_id,
            attempt=live.key.attempt,
            fingerprint=self._fingerprint,
            token_ids=token_ids,
            layer_watermark=0 if clock else self._layout.num_layers,
            first_tokens=tuple(live.first_tokens),
            lease=Lease(duration_s=self._lease_s),
            shards=(self._shard(block_ids, clock=clock, num_whole_blocks=num_whole_blocks),),
        )

    def make_prefix(self, block_ids: array[int], token_ids: array[int], key: AttemptKey, *, lease_s: float, now: float) -> KVHandoff:
        """Lease blocks that somebody owns at this moment, full ones of `token_ids`, for a peer that computes attempt `key`."""
        offer = self._keep(block_ids, key, "", lease_s=lease_s, now=now)
        self._prefixes.add(offer.handoff_id)
        self.offered_prefix_bytes += offer.size_bytes
        self._counters["prefixes_offered"] += 1
        return KVHandoff(
            handoff_id=offer.handoff_id,
            kind=HandoffKind.PREFIX,
            request_id=key.request_id,
            attempt=key.attempt,
            fingerprint=self._fingerprint,
            token_ids=token_ids,
            layer_watermark=self._layout.num_layers,
            first_tokens=(),
            lease=Lease(duration_s=lease_s),
            shards=(self._shard(block_ids),),
        )

    def _keep(self, block_ids: array[int], key: AttemptKey, gateway: str, *, lease_s: float, now: float) -> SourceHandoff:
        """Lease blocks under the id of a new offer. gateway: whose loss ends it; empty: nobody's."""
        self._pool.lease(block_ids)
        self._num_made += 1
        offer = SourceHandoff(
            handoff_id=xxhash.xxh3_128_hexdigest(f"{self._worker_id}\0{self._epoch}\0{self._num_made}".encode()),
            block_ids=block_ids,
            size_bytes=len(block_ids) * self._layout.block_bytes,
            lease_s=lease_s,
            expires_s=now + lease_s,
        )
        self._open[offer.handoff_id] = (offer, key, gateway)
        return offer

    def _shard(self, block_ids: array[int], *, clock: int = 0, num_whole_blocks: int = 0) -> HandoffShard:
        return HandoffShard(
            worker_id=self._worker_id,
            rank=0,
            epoch=self._epoch,
            endpoint=Endpoint(),
            region_id=0,
            layout=self._layout,
            block_ids=block_ids[:],
            generations=array("Q", [self._pool.generation(b) for b in block_ids]),
            digest_mode=self._digest_mode,
            digests=b"",
            layer_clock=clock,
            num_whole_blocks=num_whole_blocks,
        )

    def hear(self, event: PeerAcked | PeerDropped | LeaseRenewed, now: float) -> None:
        """What a target says of an offer."""
        if isinstance(event, PeerAcked):
            self.acknowledge(event.handoff_id)
        elif isinstance(event, PeerDropped):
            self.drop(event.handoff_id)
        else:
            self.renew(event.handoff_id, now)

    def renew(self, handoff_id: str, now: float) -> None:
        if (offer := self._find(handoff_id)) is not None:
            offer.renew(now)

    def acknowledge(self, handoff_id: str) -> None:
        if (offer := self._find(handoff_id)) is not None:
            offer.acknowledge()
            self._counters["handoff_bytes_out"] += offer.size_bytes
            self._close(offer)

    def drop(self, handoff_id: str) -> None:
        if (offer := self._find(handoff_id)) is not None:
            offer.drop()
            self._close(offer)

    def _follow(self, handoff_id: str, block_table: array[int]) -> None:
        """The prompt of an early offer is computed; keep the blocks its sequence lives in now as well.

        Where another sequence computed the same meanwhile, it has taken that one's block for its own, and the blocks behind hang on it in
        the prefix cache: whoever holds a block holds its parents.
        """
        offer, _, _ = self._open[handoff_id]
        kept = array("I")
        for now, then in zip(block_table, offer.block_ids, strict=False):
            kept.append(then)
            if now != then:
                self._pool.lease((now,))
                kept.append(now)
        offer.block_ids = kept

    def withdraw(self, handoff_id: str) -> None:
        """It will not be completed; it may have ended before."""
        if handoff_id in self._open:
            self.drop(handoff_id)

    def cancel(self, key: AttemptKey) -> None:
        """The attempt is not wanted any more; a target still reading sees the generations rise."""
        for offer, owner, _ in list(self._open.values()):
            if owner == key:
                offer.drop()
                self._close(offer)

    def cancel_of(self, gateway: str) -> None:
        for offer, _, owner in list(self._open.values()):
            if owner == gateway:
                offer.drop()
                self._close(offer)

    def expire(self, now: float) -> None:
        for offer, _, _ in list(self._open.values()):
            if offer.expire_if_due(now):
                self._counters["leases_expired"] += 1
                self._close(offer)

    def _find(self, handoff_id: str) -> SourceHandoff | None:
        """The open offer of that id. A message about any other is late or a repetition: counted, no more."""
        if handoff_id not in self._open:
            self._counters["late_messages"] += 1
            return None
        return self._open[handoff_id][0]

    def _close(self, offer: SourceHandoff) -> None:
        assert not offer.is_open
        del self._open[offer.handoff_id]
        if offer.handoff_id in self._prefixes:
            self._prefixes.remove(offer.handoff_id)
            self.offered_prefix_bytes -= offer.size_bytes
        else:
            self.offered_bytes -= offer.size_bytes
        self._pool.end_lease(offer.block_ids)
