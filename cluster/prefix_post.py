"""What a worker's driver says to other workers about prefixes: commands of engine/core/prefix_pulls.py and prefix_offers.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.digesting import when_read
from engine.core.events import AskPrefix, OfferPrefix, RefusePrefix
from kvtransfer.endpoint import KVEndpoint
from protocol.kv import KVHandoff, KVPeer
from protocol.kv_messages import PrefixOffered, PrefixRefused, RequestPrefix


class PrefixPost:
    """Performs the three commands on one worker's endpoint."""

    def __init__(self, endpoint: KVEndpoint, *, worker_id: str, epoch: int) -> None:
        self.performers: dict[type, Callable[[Any], None]] = {
            AskPrefix: self._ask,
            OfferPrefix: self._offer,
            RefusePrefix: lambda c: endpoint.send_to_peer(c.peer, PrefixRefused(pull_id=c.pull_id, reason=c.reason)),
        }
        self._endpoint = endpoint
        self._worker_id = worker_id
        self._epoch = epoch

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
        def send(handoff: KVHandoff) -> None:
            self._endpoint.send_to_peer(command.peer, PrefixOffered(pull_id=command.pull_id, handoff=handoff))

        when_read(self._endpoint, command.handoff, self._endpoint.fill_offer, send)
