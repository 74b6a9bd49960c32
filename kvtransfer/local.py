"""Blocks within one process: several workers' pools side by side, as in the simulator's real-bytes runs and in tests.

A transfer ends inside `start`, on the caller's thread, so there is no descriptor to wait on.
"""

from __future__ import annotations

import itertools

from kvtransfer.copying import copy_verified
from kvtransfer.lanes import Pull, PullFailed
from kvtransfer.transport import Region, Ticket, Transfer
from protocol.kv import Endpoint, Outcome, TransferError


class LocalExchange:
    """Where the transports of one process find each other; the caller makes one and gives it to each."""

    def __init__(self) -> None:
        self.transports: dict[str, LocalTransport] = {}  # by worker id


class LocalTransport:
    """`KVTransport` between pools of one process."""

    name = "local"

    def __init__(self, exchange: LocalExchange, *, worker_id: str, epoch: int) -> None:
        self.epoch = epoch
        self.regions: dict[int, Region] = {}
        self._exchange = exchange
        self._worker_id = worker_id
        self._tickets = itertools.count(1)
        self._outcomes: list[tuple[Ticket, Outcome]] = []
        exchange.transports[worker_id] = self

    def register(self, region: Region) -> None:
        self.regions[region.region_id] = region

    def forget(self, region_id: int) -> None:
        del self.regions[region_id]

    def endpoint(self) -> Endpoint:
        return Endpoint()

    def start(self, transfer: Transfer) -> Ticket:
        pull = Pull(next(self._tickets), transfer, self.regions[transfer.target_region_id])
        error: TransferError | None = None
        detail = ""
        try:
            copy_verified(self._source(pull), pull, lambda _: pull.check(), slice_bytes=pull.target.size_bytes)
        except PullFailed as failed:
            error, detail = failed.error, str(failed)
        self._outcomes.append((pull.ticket, pull.outcome(self.name, error, detail)))
        return pull.ticket

    def poll(self) -> list[tuple[Ticket, Outcome]]:
        done, self._outcomes = self._outcomes, []
        return done

    def cancel(self, ticket: Ticket) -> None:
        """Nothing to stop: the outcome waits in `poll` already."""

    def wakeup_fd(self) -> int:
        return -1

    def close(self) -> None:
        if self._exchange.transports.get(self._worker_id) is self:
            del self._exchange.transports[self._worker_id]
        self.regions.clear()

    def _source(self, pull: Pull) -> Region:
        offer = pull.transfer.source
        if pull.refusal:
            raise PullFailed(TransferError.REFUSED, pull.refusal)
        peer = self._exchange.transports.get(offer.worker_id)
        if peer is None:
            raise PullFailed(TransferError.PEER_LOST, f"{offer.worker_id} is not in this process (any more)")
        if peer.epoch != offer.epoch:
            raise PullFailed(TransferError.STALE_EPOCH, f"offered by epoch {offer.epoch}, {offer.worker_id} has epoch {peer.epoch} now")
        region = peer.regions.get(offer.region_id)
        if region is None or region.layout != offer.layout:
            raise PullFailed(TransferError.REFUSED, f"region {offer.region_id} is not there, or not of the layout offered")
        return region
