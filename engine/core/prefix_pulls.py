"""The target's side of a peer pull: prompts that wait for a prefix another worker holds, before they go to the inbox.

    begin ─► ask the peer ─► offered: reserve blocks, pull, verify ─► in the prefix cache ─┐
                 │                └──► no room, or the copy failed ────────────────────────┼─► inbox: hit what is there, compute the rest
                 └──► refused, or nothing heard by the deadline ───────────────────────────┘

Whatever happens, the prompt is in the inbox `prefix_pull_deadline_s` after it came. A copy that is still under way then keeps its blocks
until it has stopped; verified late, it still goes to the cache. Prompts that begin alike wait for one copy.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import xxhash

from engine.core.attempts import LiveAttempt
from engine.core.block_pool import BlockPool
from engine.core.config import WorkerCoreConfig
from engine.core.events import AckSource, AskPrefix, CancelPull, Command, DropSource, StartPull
from engine.core.landing import Landing, Prefix
from engine.core.prefix_cache import PrefixCache
from engine.core.scheduler import Scheduler
from kvtransfer.handoff import Refusal, TargetHandoff, refuse
from protocol.kv import HandoffKind, KVHandoff, KVLayout, KVPeer, Outcome, TransferError
from protocol.kv_messages import PrefixOffered, PrefixRefused
from protocol.messages import PrefixPull

PREFIX_COUNTERS = (
    "prefixes_offered",  # to peers that asked
    "prefix_pulls",  # prefixes taken from peers instead of computed
    "prefix_pull_tokens",
    "prefix_pull_bytes",
    "prefix_pull_us",  # waited, from the question to the verified copy or the failure
    "prefix_pull_failures",  # refused, late or broken: computed here
)
POOL_SHARE = 2  # at most one block in so many may be waiting for copies of prefixes


@dataclass(slots=True, kw_only=True, eq=False)
class _Pull:
    """One prefix on its way here."""

    pull_id: str
    peer: KVPeer
    prefix: Prefix
    began_s: float
    waiters: list[LiveAttempt]  # empty once they were given up: the copy ends for nobody
    target: TargetHandoff | None = None  # None until it is offered
    landing: Landing | None = None


class PrefixPulls:
    """Pulls of one worker. Bounded by `max_prefix_pulls`, and by half of the pool."""

    def __init__(
        self,
        config: WorkerCoreConfig,
        scheduler: Scheduler,
        pool: BlockPool,
        cache: PrefixCache,
        counters: dict[str, int],
        *,
        worker_id: str,
        epoch: int,
        layout: KVLayout,
        fingerprint: bytes,
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._pool = pool
        self._cache = cache
        self._counters = counters
        self._name = f"{worker_id}\0{epoch}"
        self._layout = layout
        self._fingerprint = fingerprint
        self._waiting: dict[str, _Pull] = {}  # by pull id: prompts wait for it
        self._copying: dict[str, _Pull] = {}  # by handoff id: a copy is under way
        self._num_begun = 0
        self._num_blocks = 0  # of the landings

    def __len__(self) -> int:
        return len(self._waiting) + sum(not pull.waiters for pull in self._copying.values())

    @property
    def num_prompts(self) -> int:
        """That wait here instead of in the inbox."""
        return sum(len(pull.waiters) for pull in self._waiting.values())

    @property
    def num_tokens(self) -> int:
        """To be computed for them, as the inbox counts them: with what may come by the copy."""
        return sum(live.leader.compute_end for pull in self._waiting.values() for live in pull.waiters if live.leader is not None)

    def begin(self, live: LiveAttempt, wanted: PrefixPull | None, now: float) -> list[Command]:
        """Ask for what is missing here of a prompt, or wait with others that did; else it goes to the inbox."""
        assert live.leader is not None
        prefix = self._prefix(live, wanted) if wanted is not None and self._cache.enabled else None
        if prefix is None or wanted is None:
            self._scheduler.add(live.leader)
            return []
        for pull in self._waiting.values():
            if pull.prefix.hashes[-1] == prefix.hashes[-1]:
                pull.waiters.append(live)
                return []
        num_held_tokens = len(prefix.find(self._cache)) * self._layout.block_size_tokens
        if num_held_tokens >= len(prefix.token_ids) or len(self) >= self._config.max_prefix_pulls:
            self._scheduler.add(live.leader)
            return []
        self._num_begun += 1
        pull_id = xxhash.xxh3_128_hexdigest(f"{self._name}\0{self._num_begun}".encode())
        self._waiting[pull_id] = _Pull(pull_id=pull_id, peer=wanted.peer, prefix=prefix, began_s=now, waiters=[live])
        return [
            AskPrefix(
                peer=wanted.peer,
                pull_id=pull_id,
                request_id=live.key.request_id,
                attempt=live.key.attempt,
                cache_root=prefix.cache_root,
                token_ids=prefix.token_ids,
                num_held_tokens=num_held_tokens,
            )
        ]

    def answered(self, worker_id: str, message: PrefixOffered | PrefixRefused, now: float) -> list[Command]:
        """The peer keeps its blocks for us, or has nothing."""
        pull = self._asked(worker_id, message.pull_id)
        if isinstance(message, PrefixRefused):
            if pull is not None:
                self._failed(pull, now)
            return []
        if pull is None:
            return [DropSource(handoff=message.handoff, reason=TransferError.CANCELLED.value)]
        return self._take(pull, message.handoff, now)

    def is_ours(self, handoff_id: str) -> bool:
        """True when the copy of that hand-off was started here."""
        return handoff_id in self._copying

    def finish(self, handoff_id: str, outcome: Outcome, now: float) -> list[Command]:
        """The copy has stopped, well or not."""
        pull = self._copying.pop(handoff_id)
        assert pull.target is not None and pull.landing is not None
        self._num_blocks -= len(pull.landing.block_ids)
        pull.target.finish_pull(outcome)
        if pull.target.refusal is not None:
            pull.landing.discard()
            self._failed(pull, now)
            return [DropSource(handoff=pull.target.handoff, reason=pull.target.refusal.error.value)]
        pull.landing.keep()
        pull.target.release()
        self._counters["prefix_pulls"] += 1
        self._counters["prefix_pull_tokens"] += len(pull.landing.block_ids) * self._layout.block_size_tokens
        self._counters["prefix_pull_bytes"] += outcome.size_bytes
        self._counters["prefix_pull_us"] += round((now - pull.began_s) * 1e6)
        self._to_inbox(pull)
        return [AckSource(handoff=pull.target.handoff)]

    def cancel(self, live: LiveAttempt) -> list[Command]:
        """The attempt ends; with the last that waits for it, its pull does too."""
        for pull in self._waiting.values():
            if live in pull.waiters:
                pull.waiters.remove(live)
                return self._give_up(pull) if not pull.waiters else []
        return []

    def tick(self, now: float) -> list[Command]:
        """Prompts that waited long enough are computed."""
        commands: list[Command] = []
        for pull in list(self._waiting.values()):
            if now >= pull.began_s + self._config.prefix_pull_deadline_s:
                self._failed(pull, now)
                commands += self._give_up(pull)
        return commands

    # --- inside ---

    def _take(self, pull: _Pull, handoff: KVHandoff, now: float) -> list[Command]:
        """Reserve blocks for what is offered, and start the copy."""
        deadline_s = pull.began_s + self._config.prefix_pull_deadline_s
        lease_s = handoff.lease.duration_s
        pull.target = target = TargetHandoff(
            handoff=handoff, give_up_s=deadline_s, renew_interval_s=lease_s, next_renewal_s=now + lease_s, completed_s=now
        )
        refusal = self._refusal(pull, handoff)
        if refusal is None and now >= deadline_s:
            refusal = Refusal(error=TransferError.DEADLINE, detail="offered too late")
        if refusal is None:
            num_tokens = handoff.num_valid_tokens
            pull.prefix = Prefix(
                cache_root=pull.prefix.cache_root,
                token_ids=pull.prefix.token_ids[:num_tokens],
                hashes=pull.prefix.hashes[: num_tokens * len(pull.prefix.hashes) // len(pull.prefix.token_ids)],
            )
            room = self._pool.num_blocks // POOL_SHARE - self._num_blocks
            pull.landing = Landing.reserve(self._pool, self._cache, pull.prefix, num_blocks_max=room)
            if pull.landing is None:
                refusal = Refusal(error=TransferError.NO_BLOCKS, detail="no room for a prefix")
        if refusal is not None or pull.landing is None:
            assert refusal is not None
            target.fail(refusal)
            self._failed(pull, now)
            return [DropSource(handoff=handoff, reason=refusal.error.value)]
        landing = pull.landing
        self._num_blocks += len(landing.block_ids)
        target.reserve()
        target.pull(give_up_s=deadline_s)
        self._copying[handoff.handoff_id] = pull
        if not landing.block_ids:  # computed here meanwhile
            return self.finish(handoff.handoff_id, Outcome(num_blocks=0, size_bytes=0, duration_s=0.0, path="cached"), now)
        first = landing.first_block
        return [
            StartPull(
                handoff=handoff,
                source_indices=array("I", range(first, first + len(landing.block_ids))),
                target_block_ids=landing.block_ids,
                target_start_tokens=first * self._layout.block_size_tokens,
                deadline_s=deadline_s - now,
            )
        ]

    def _prefix(self, live: LiveAttempt, wanted: PrefixPull) -> Prefix | None:
        """The whole blocks of the prompt that the peer may have and that need no computing here; None when there is none."""
        leader, size = live.leader, self._layout.block_size_tokens
        assert leader is not None
        num_tokens = min(wanted.num_tokens, leader.num_hit_tokens_max) // size * size
        if num_tokens <= 0:
            return None
        return Prefix(cache_root=leader.cache_root, token_ids=leader.tokens[:num_tokens], hashes=leader.hash_blocks(num_tokens)[:])

    def _asked(self, worker_id: str, pull_id: str) -> _Pull | None:
        """The pull this worker was asked for and has not answered; an answer to anything else is late, or was never asked for."""
        pull = self._waiting.get(pull_id)
        if pull is None or pull.peer.worker_id != worker_id or pull.target is not None:
            self._counters["late_messages"] += 1
            return None
        return pull

    def _refusal(self, pull: _Pull, handoff: KVHandoff) -> Refusal | None:
        """Why this offer is not the one that was asked for; None when it is."""
        shard = handoff.shards[0] if len(handoff.shards) == 1 else None
        size, num_tokens = self._layout.block_size_tokens, handoff.num_valid_tokens
        is_asked = shard is not None and (shard.worker_id, shard.epoch) == (pull.peer.worker_id, pull.peer.epoch)
        is_alike = shard is not None and shard.layout == self._layout and handoff.is_complete
        if handoff.kind is not HandoffKind.PREFIX or not is_asked or not is_alike or handoff.handoff_id in self._copying:
            return Refusal(error=TransferError.REFUSED, detail="not the prefix that was asked for")
        if num_tokens % size or not num_tokens:
            return Refusal(error=TransferError.REFUSED, detail=f"{num_tokens} tokens are offered, a block has {size}")
        return refuse(handoff, fingerprint=self._fingerprint, layout=self._layout, token_ids=pull.prefix.token_ids[:num_tokens])

    def _give_up(self, pull: _Pull) -> list[Command]:
        """Nobody waits for it any more. Blocks a copy may still write are given back when it has stopped."""
        self._waiting.pop(pull.pull_id, None)
        if pull.target is not None and pull.target.is_pulling:
            return [CancelPull(handoff_id=pull.target.handoff_id)]
        return []

    def _failed(self, pull: _Pull, now: float) -> None:
        if pull.waiters:
            self._counters["prefix_pull_failures"] += 1
            self._counters["prefix_pull_us"] += round((now - pull.began_s) * 1e6)
        self._to_inbox(pull)

    def _to_inbox(self, pull: _Pull) -> None:
        self._waiting.pop(pull.pull_id, None)
        waiters, pull.waiters = pull.waiters, []
        for live in waiters:
            assert live.leader is not None
            self._scheduler.add(live.leader)
