"""Blocks through shared memory: the source passes its pool's descriptor once, targets copy out of the mapping.

    target ── connect, prove ──► source's Unix socket
    target ◄── regions + memfds (SCM_RIGHTS) ── source          once a pair of processes
    target: generation words? copy runs of blocks. generation words still?   for each pull; the source does nothing

The read is one-sided: a busy source slows nobody. The socket stays open because its end is how the owner's death is told; the
memory itself would stay readable for ever. What makes a copy safe is in kvtransfer.copying.
"""

from __future__ import annotations

from collections.abc import Callable

from kvtransfer.attached import AttachedTransport, attach_all, while_alive
from kvtransfer.copying import copy_verified
from kvtransfer.lanes import Link, Pull, PullFailed
from kvtransfer.region import PoolMemory
from kvtransfer.session import Announcement, Pause, RegionCard, Session, dial_unix
from kvtransfer.transport import RegionKind
from protocol.kv import Endpoint, HandoffShard, TransferError


class ShmTransport(AttachedTransport):
    """Passes the pool's memfd."""

    name = "shm"
    here_bytes_max = 4 << 20  # a quarter of a millisecond

    def endpoint(self) -> Endpoint:
        return Endpoint(unix_path=self._unix_path)

    def hand_over(self, session: Session) -> None:
        shared = [r for r in self._regions.values() if r.kind is RegionKind.MEMFD]
        cards = tuple(RegionCard(region_id=r.region_id, num_blocks=r.num_blocks, layout=r.layout) for r in shared)
        session.announce(Announcement(regions=cards), [r.fd for r in shared])
        session.receive_frame(0)  # raises when the peer leaves: it has nothing to say

    def connect(self, source: HandoffShard, pause: Pause) -> Link:
        path = source.endpoint.unix_path
        if not path:
            raise PullFailed(TransferError.REFUSED, f"{source.worker_id} offers no shared memory")
        session = dial_unix(path, pause)
        try:
            session.handshake(self._identity, self._secret, dialed=True)
            announcement, fds = session.receive_announcement(with_fds=True)
            return _Attached(session, {pool.region.region_id: pool for pool in attach_all(announcement, fds)})
        except BaseException:
            session.close()
            raise

    def copy(self, link: Link, pull: Pull, rest: Callable[[float], None]) -> None:
        assert isinstance(link, _Attached)
        pool = link.pools.get(pull.transfer.source.region_id)
        if pool is None or pool.region.layout != pull.transfer.source.layout:
            raise PullFailed(TransferError.REFUSED, f"region {pull.transfer.source.region_id} is not there, or not of the layout offered")

        copy_verified(pool.region, pull, while_alive(link, rest), slice_bytes=self._config.copy_slice_bytes)


class _Attached:
    """A peer's pools as we see them, for as long as it lives."""

    def __init__(self, session: Session, pools: dict[int, PoolMemory]) -> None:
        self.session = session
        self.pools = pools

    @property
    def in_step(self) -> bool:
        return not self.session.has_ended()

    def close(self) -> None:
        self.session.close()
        for pool in self.pools.values():
            pool.close()
