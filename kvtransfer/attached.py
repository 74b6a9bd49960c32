"""Backends whose peers attach once, over a Unix socket that passes descriptors, and then read by themselves.

The socket stays open because its end is how the owner's death is told; the memory itself would stay readable for ever.
"""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import Callable

from kvtransfer.config import TransportConfig
from kvtransfer.lanes import Link, PeerTransport
from kvtransfer.region import PoolMemory
from kvtransfer.session import Announcement, PeerServer, Session, listen_unix
from protocol.kv import KVLayout
from protocol.wire import Identity

LookUp = Callable[[float], None]


class AttachedTransport(PeerTransport):
    """`unix_path` is where peers attach; it lies in a directory that is ours alone (0700)."""

    def __init__(self, identity: Identity, secret: bytes, config: TransportConfig, *, unix_path: str) -> None:
        super().__init__(identity, secret, config)
        self._unix_path = unix_path
        self._server = PeerServer(
            listen_unix(unix_path),
            identity,
            secret,
            name=f"kv-{self.name}-serve",
            serve=self.hand_over,
            max_peers=config.max_peers,
            stall_timeout_s=config.stall_timeout_s,
        )

    @abstractmethod
    def hand_over(self, session: Session) -> None:
        """Give a peer what it reads from; then there is nothing to do but to be alive."""

    def close(self) -> None:
        super().close()
        self._server.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._unix_path)


def while_alive(link: Link, rest: LookUp) -> LookUp:
    """`rest`, which also raises once the owner of what is read is gone."""

    def look_up(seconds: float) -> None:
        rest(seconds)
        if link.session.has_ended():
            raise ConnectionResetError(f"{link.session.peer.name} went away during the copy")

    return look_up


def attach_all(announcement: Announcement, fds: list[int], *, layout: KVLayout | None = None) -> list[PoolMemory]:
    """The announced regions, mapped; takes ownership of `fds`. layout: of what the files hold; None: of the regions."""
    pools: list[PoolMemory] = []
    left = list(fds)
    try:
        for card in announcement.regions:
            pools.append(PoolMemory.attach(left.pop(0), layout or card.layout, card.num_blocks, card.region_id))
    except BaseException:
        for fd in left:
            os.close(fd)
        for pool in pools:
            pool.close()
        raise
    return pools
