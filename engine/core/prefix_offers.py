"""The source's side of a peer pull: which of our cached blocks another worker may copy, and what is refused.

The tokens themselves are compared, block by block from the root of their chain; the root is salted by tenant, so nobody is offered
what another tenant computed. An offer holds back at most a quarter of the pool from our own work.
"""

from __future__ import annotations

from array import array

from engine.core.attempts import Limits
from engine.core.block_pool import BlockPool
from engine.core.config import WorkerCoreConfig
from engine.core.events import Command, OfferPrefix, RefusePrefix
from engine.core.landing import Prefix
from engine.core.offers import Offers
from engine.core.prefix_cache import PrefixCache
from protocol.block_hash import block_hashes
from protocol.kv_messages import RequestPrefix
from protocol.request import AttemptKey

POOL_SHARE = 4  # one block in so many may be leased to peers


class PrefixOffers:
    """Answers peers from one worker's prefix cache."""

    def __init__(self, config: WorkerCoreConfig, limits: Limits, pool: BlockPool, cache: PrefixCache, offers: Offers) -> None:
        self._pool = pool
        self._cache = cache
        self._offers = offers
        self._block_bytes = limits.layout.block_bytes
        self._size = limits.layout.block_size_tokens
        self._num_tokens_max = limits.max_model_len
        self._lease_s = min(config.lease_s, 2 * config.prefix_pull_deadline_s)  # when it ends the peer has long computed the prompt itself

    def answer(self, asked: RequestPrefix, now: float, *, is_draining: bool) -> Command:
        """Lease the longest run of cached blocks that holds the first of these tokens, or say why not."""
        if is_draining:
            return _refusal(asked, "the worker is draining")
        if not self._cache.enabled or len(asked.token_ids) > self._num_tokens_max:
            return _refusal(asked, f"{len(asked.token_ids)} tokens asked for; this worker caches up to {self._num_tokens_max}, or none")
        hashes = block_hashes(asked.cache_root, asked.token_ids)
        found = Prefix(cache_root=asked.cache_root, token_ids=asked.token_ids, hashes=hashes).find(self._cache)
        num_tokens = len(found) * self._size
        if num_tokens <= asked.num_held_tokens:
            return _refusal(asked, f"{num_tokens} of the tokens are cached here, {asked.num_held_tokens} there")
        offered_bytes, limit_bytes = self._offers.offered_prefix_bytes, self._pool.num_blocks * self._block_bytes // POOL_SHARE
        if offered_bytes + len(found) * self._block_bytes > limit_bytes:
            return _refusal(asked, f"{offered_bytes} bytes are offered to peers already, the limit is {limit_bytes}")
        block_ids = array("I", [block.block_id for block in found])
        for block_id in block_ids:
            self._pool.own(block_id)
        key = AttemptKey(request_id=asked.request_id, attempt=asked.attempt)
        handoff = self._offers.make_prefix(block_ids, asked.token_ids[:num_tokens], key, lease_s=self._lease_s, now=now)
        for block_id in reversed(block_ids):
            self._pool.disown(block_id)
        return OfferPrefix(peer=asked.requester, pull_id=asked.pull_id, handoff=handoff)


def _refusal(asked: RequestPrefix, reason: str) -> RefusePrefix:
    return RefusePrefix(peer=asked.requester, pull_id=asked.pull_id, reason=reason)
