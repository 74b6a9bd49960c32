"""Blocks through shared memory: the source passes its pool's descriptor once, targets copy out of the mapping.

    target ── connect, prove ──► source's Unix socket
    target ◄── regions + memfds (SCM_RIGHTS) ── source          once a pair of processes
    target: generation words? copy runs of blocks. generation words still?   for each pull; the source does nothing

The read is one-sided: a busy source slows nobody. The socket stays open because its end is how the owner's death is told; the
memory itself would stay readable for ever. What makes a copy safe is in kvtransfer.copying.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from kvtransfer.config import TransportConfig
from kvtransfer.copying import copy_verified
from kvtransfer.lanes import Link, PeerTransport, Pull, PullFailed
from kvtransfer.region import PoolMemory
from kvtransfer.session import Announcement, Pause, PeerServer, RegionCard, Session, dial_unix, listen_unix
from kvtransfer.transport import RegionKind
from protocol.kv import Endpoint, HandoffShard, TransferError
from protocol.wire import Identity


class ShmTransport(PeerTransport):
    """`unix_path` is where peers attach; it lies in a directory that is ours alone (0700)."""

    name = "shm"
    here_bytes_max = 4 << 20  # a quarter of a millisecond

    def __init__(self, identity: Identity, secret: bytes, config: TransportConfig, *, unix_path: str) -> None:
        super().__init__(identity, secret, config)
        self._unix_path = unix_path
        self._server = PeerServer(
            listen_unix(unix_path),
            identity,
            secret,
            name="kv-shm-serve",
            serve=self._serve,
            max_peers=config.max_peers,
            stall_timeout_s=config.stall_timeout_s,
        )

    def endpoint(self) -> Endpoint:
        return Endpoint(unix_path=self._unix_path)

    def close(self) -> None:
        super().close()
        self._server.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._unix_path)

    def _serve(self, session: Session) -> None:
        """Hand over the pool; then there is nothing to do but to be alive."""
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
            return _Attached(session, _attach_all(announcement, fds))
        except BaseException:
            session.close()
            raise

    def copy(self, link: Link, pull: Pull, rest: Callable[[float], None]) -> None:
        assert isinstance(link, _Attached)
        pool = link.pools.get(pull.transfer.source.region_id)
        if pool is None or pool.region.layout != pull.transfer.source.layout:
            raise PullFailed(TransferError.REFUSED, f"region {pull.transfer.source.region_id} is not there, or not of the layout offered")

        def look_up(seconds: float) -> None:
            rest(seconds)
            if link.session.has_ended():
                raise ConnectionResetError(f"{link.session.peer.name} went away during the copy")

        copy_verified(pool.region, pull, look_up, slice_bytes=self._config.copy_slice_bytes)


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


def _attach_all(announcement: Announcement, fds: list[int]) -> dict[int, PoolMemory]:
    pools: dict[int, PoolMemory] = {}
    left = list(fds)
    try:
        for card in announcement.regions:
            pools[card.region_id] = PoolMemory.attach(left.pop(0), card.layout, card.num_blocks, card.region_id)
    except BaseException:
        for fd in left:
            os.close(fd)
        for pool in pools.values():
            pool.close()
        raise
    return pools
