"""What a worker's driver says to other workers about prefixes: commands of engine/core/prefix_pulls.py and prefix_offers.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from engine.core.events import AskPrefix, OfferPrefix, RefusePrefix
from kvtransfer.endpoint import KVEndpoint
from protocol.kv import KVHandoff, KVPeer
from protocol.messages import PrefixOffered, PrefixRefused, RequestPrefix


class PrefixPost:
    """Performs the three commands on one worker's endpoint. Digests of offers that read more than `inline_bytes` are made on a thread."""

    def __init__(self, endpoint: KVEndpoint, *, worker_id: str, epoch: int, inline_bytes: int) -> None:
        self.performers: dict[type, Callable[[Any], None]] = {
            AskPrefix: self._ask,
            OfferPrefix: self._offer,
            RefusePrefix: lambda c: endpoint.send_to_peer(c.peer, PrefixRefused(pull_id=c.pull_id, reason=c.reason)),
        }
        self._endpoint = endpoint
        self._worker_id = worker_id
        self._epoch = epoch
        self._inline_bytes = inline_bytes

    def _ask(self, command: AskPrefix) -> None:
        request = RequestPrefix(
            pull_id=command.pull_id,
            requester=KVPeer(worker_id=self._worker_id, epoch=self._epoch, endpoint=self._endpoint.endpoint()),
            request_id=command.request_id,
            attempt=command.attempt,
            cache_root=command.cache_root,
            token_ids=command.token_ids,
            num_held_tokens=command.num_held_tokens,
        )
        self._endpoint.send_to_peer(command.peer, request)

    def _offer(self, command: OfferPrefix) -> None:
        """Digests are read from the blocks: of a large offer on another thread, the blocks are leased and stay as they are."""

        def send(handoff: KVHandoff) -> None:
            self._endpoint.send_to_peer(command.peer, PrefixOffered(pull_id=command.pull_id, handoff=handoff))

        if self._endpoint.offer_read_bytes(command.handoff) <= self._inline_bytes:
            send(self._endpoint.fill_offer(command.handoff))
            return
        filling = asyncio.get_running_loop().run_in_executor(None, self._endpoint.fill_offer, command.handoff)
        filling.add_done_callback(lambda filled: send(filled.result()))
