"""Peers that lie, stop half-way, or do not know the secret: the pull ends with a reason, and the next honest one works."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from kvtransfer.config import TransportConfig
from kvtransfer.region import PoolMemory, pool_bytes
from kvtransfer.session import Announcement, PeerServer, RegionCard, Session
from kvtransfer.shm import ShmTransport
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import KVTransport, Transfer
from protocol import wire
from protocol.bulk import PullTrailer
from protocol.errors import ConfigError, HandshakeRefused
from protocol.kv import DigestMode, Endpoint, HandoffShard, KVLayout, LayerGroup, LayerKind, Outcome, ShardRectangle, TransferError
from protocol.wire import Identity

pytestmark = pytest.mark.pure

SECRET = b"of this cluster"
GROUP = LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=1, num_kv_heads=1, head_dim=16, dtype="float32")
LAYOUT = KVLayout(block_size_tokens=16, groups=(GROUP,), shard=ShardRectangle(first_head=0, last_head=1, first_layer=0, last_layer=1))
CARD = RegionCard(region_id=0, num_blocks=8, layout=LAYOUT)
SIZE = LAYOUT.block_bytes
OURS = Identity(name="decode-0", kind="worker", epoch=2)
THEIRS = Identity(name="prefill-0", kind="worker", epoch=1)


def shard(endpoint: Endpoint) -> HandoffShard:
    return HandoffShard(
        worker_id="prefill-0",
        rank=0,
        epoch=1,
        endpoint=endpoint,
        region_id=0,
        layout=LAYOUT,
        block_ids=array("I", [1, 2]),
        generations=array("Q", [0, 0]),
        digest_mode=DigestMode.OFF,
        digests=b"",
    )


def pull(transport: KVTransport, endpoint: Endpoint, *, deadline_s: float = 3.0) -> Outcome:
    everywhere = array("I", [0, 1])
    transport.start(
        Transfer(source=shard(endpoint), source_indices=everywhere, target_region_id=0, target_block_ids=everywhere, deadline_s=deadline_s)
    )
    assert select.select([transport.wakeup_fd()], [], [], deadline_s + 2)[0]
    ((_, outcome),) = transport.poll()
    return outcome


@contextmanager
def tcp_target(secret: bytes = SECRET) -> Iterator[TcpTransport]:
    pool = PoolMemory.create(LAYOUT, 8)
    transport = TcpTransport(OURS, secret, TransportConfig(connect_timeout_s=1.0))
    transport.register(pool.region)
    yield transport
    transport.close()
    pool.close()


@contextmanager
def peer(serve: Callable[[Session], None], listener: socket.socket | None = None, secret: bytes = SECRET) -> Iterator[Endpoint]:
    """A listener that authenticates and then does whatever `serve` does."""
    if listener is None:
        listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    server = PeerServer(listener, THEIRS, secret, name="kv-confused", serve=serve, max_peers=8, stall_timeout_s=2)
    yield Endpoint(unix_path=address) if isinstance(address, str) else Endpoint(host=address[0], port=address[1])
    server.close()


def answering(answer: bytes) -> Callable[[Session], None]:
    def serve(session: Session) -> None:
        session.announce(Announcement(regions=(CARD,)))
        session.receive_frame()
        session.send([answer])

    return serve


def head(ticket: int, size: int) -> bytes:
    return struct.pack("<QQ", ticket, size)


def trailer(generations: list[int], error: str = "", ticket: int = 1) -> bytes:
    return wire.encode(PullTrailer(ticket=ticket, generations=array("Q", generations), error=error))


BODY = bytes(2 * SIZE)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (head(1, 2 * SIZE) + BODY + trailer([0, 0]), None),
        (head(1, 2 * SIZE) + BODY + trailer([0, 1]), TransferError.STALE_GENERATION),
        (head(1, 2 * SIZE) + BODY + trailer([0]), TransferError.STALE_GENERATION),
        (head(1, 2 * SIZE) + BODY + trailer([0, 0], ticket=2), TransferError.TRUNCATED),
        (head(1, 2 * SIZE) + BODY[: SIZE + 7], TransferError.PEER_LOST),
        (head(1, 2 * SIZE) + BODY, TransferError.PEER_LOST),
        (head(1, SIZE) + BODY, TransferError.TRUNCATED),
        (head(9, 2 * SIZE) + BODY, TransferError.TRUNCATED),
        (head(1, 0) + trailer([0, 0]), TransferError.TRUNCATED),
        (head(1, 0) + trailer([], "stale_generation"), TransferError.STALE_GENERATION),
        (head(1, 0) + trailer([], "no such error"), TransferError.TRUNCATED),
        (head(1, 2 * SIZE) + BODY + struct.pack("<I", 1 << 31), TransferError.TRUNCATED),
        (head(1, 2 * SIZE) + BODY + struct.pack("<I", 3) + b"abc", TransferError.TRUNCATED),
        (b"", TransferError.PEER_LOST),
    ],
)
def test_each_wrong_answer_has_its_error(answer: bytes, error: TransferError | None) -> None:
    """Fails when the generations of the trailer are not compared, or the announced size is believed (each planted)."""
    with tcp_target() as target, peer(answering(answer)) as endpoint:
        assert pull(target, endpoint).error is error


def test_silence_is_a_deadline_and_silence_before_the_handshake_a_lost_peer() -> None:
    with tcp_target() as target, peer(lambda session: session.receive_into([memoryview(bytearray(1 << 20))])) as endpoint:
        assert pull(target, endpoint, deadline_s=0.3).error is TransferError.DEADLINE
    with tcp_target() as target, socket.create_server(("127.0.0.1", 0)) as deaf:
        outcome = pull(target, Endpoint(host="127.0.0.1", port=deaf.getsockname()[1]))
        assert outcome.error is TransferError.PEER_LOST and "handshake" in outcome.detail


def test_another_secret_is_refused_by_both_sides() -> None:
    """Fails when either side skips the comparison of the proof (planted)."""
    reached = threading.Event()
    with tcp_target(b"another") as target, peer(lambda _: reached.set()) as endpoint:
        outcome = pull(target, endpoint)
        assert outcome.error in (TransferError.REFUSED, TransferError.PEER_LOST)
        assert not reached.is_set()


def test_a_listener_without_the_secret_gets_no_pull() -> None:
    with tcp_target() as target, peer(answering(head(1, 2 * SIZE) + BODY + trailer([0, 0])), secret=b"guess") as endpoint:
        outcome = pull(target, endpoint)
        assert outcome.error in (TransferError.REFUSED, TransferError.PEER_LOST)


STRANGE = [b"GET / HTTP/1.1\r\n\r\n", struct.pack("<I", 1 << 30), struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1", b""]


@pytest.mark.parametrize("garbage", STRANGE)
def test_strangers_on_our_port_do_no_harm(garbage: bytes) -> None:
    with tcp_target() as source, tcp_target() as target:
        endpoint = source.endpoint()
        with socket.create_connection((endpoint.host, endpoint.port), timeout=5) as stranger, suppress(ConnectionResetError):
            stranger.sendall(garbage)
            while garbage and stranger.recv(4096):  # our Hello, then the end
                pass
        # An honest peer is still served; it is only not the worker that was asked for.
        assert pull(target, endpoint).error is TransferError.STALE_EPOCH


def test_a_pool_of_another_size_than_announced_is_refused() -> None:
    for num_bytes, seals in ((pool_bytes(LAYOUT, 4), True), (pool_bytes(LAYOUT, 8), False)):
        fd = os.memfd_create("fake", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, num_bytes)
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        with tempfile.TemporaryDirectory(prefix="kv-") as run_dir, shm_target(run_dir) as target:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{run_dir}/fake")
            with peer(lambda session, fd=fd: session.announce(Announcement(regions=(CARD,)), [fd]), listener) as endpoint:
                assert pull(target, endpoint).error is TransferError.REFUSED
        os.close(fd)


def test_descriptors_that_do_not_match_the_announcement_are_closed() -> None:
    pool = PoolMemory.create(LAYOUT, 8)
    before = len(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryDirectory(prefix="kv-") as run_dir, shm_target(run_dir) as target:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{run_dir}/fake")
        with peer(lambda session: session.announce(Announcement(regions=(CARD,)), [pool.region.fd] * 3), listener) as endpoint:
            assert pull(target, endpoint).error is TransferError.TRUNCATED
    assert len(os.listdir("/proc/self/fd")) == before
    pool.close()


def test_idle_peer_is_let_go() -> None:
    """Fails when _next waits for ever (planted)."""
    with tempfile.TemporaryDirectory(prefix="kv-") as run_dir:
        pool = PoolMemory.create(LAYOUT, 8)
        source = ShmTransport(THEIRS, SECRET, TransportConfig(), unix_path=f"{run_dir}/s")
        source.register(pool.region)
        with shm_target(run_dir, idle_close_s=0.05) as target:
            for _ in range(2):
                assert pull(target, source.endpoint()).error is None
                end = time.monotonic() + 3
                while any(t.name == "kv-shm-pull" for t in threading.enumerate()):
                    assert time.monotonic() < end, "the lane is still there"
                    time.sleep(0.01)
        source.close()
        pool.close()


def test_bounds_turn_away_what_is_too_much() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        pool = PoolMemory.create(LAYOUT, 8)
        target = TcpTransport(OURS, SECRET, TransportConfig(max_peers=1, max_queued_pulls=1))
        target.register(pool.region)
        everywhere = array("I", [0, 1])
        endpoints = [Endpoint(host="127.0.0.1", port=deaf.getsockname()[1])] * 4 + [Endpoint(host="127.0.0.1", port=1)]
        for endpoint in endpoints:
            target.start(
                Transfer(source=shard(endpoint), source_indices=everywhere, target_region_id=0, target_block_ids=everywhere, deadline_s=9)
            )
            time.sleep(0.05)
        refused = dict(target.poll())
        assert [refused[t].error for t in (3, 4, 5)] == [TransferError.REFUSED] * 3 and len(refused) == 3
        assert "max_queued_pulls" in refused[3].detail and "max_peers" in refused[5].detail
        target.close()
        assert {t: o.error for t, o in target.poll()} == {1: TransferError.CANCELLED, 2: TransferError.CANCELLED}
        pool.close()


def test_listening_outside_loopback_needs_a_secret() -> None:
    with pytest.raises(HandshakeRefused, match="without a cluster secret"):
        TcpTransport(OURS, b"", TransportConfig(host="0.0.0.0", advertise_host="10.0.0.1"))


def test_too_long_socket_path_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="107 bytes"):
        ShmTransport(OURS, SECRET, TransportConfig(), unix_path="/tmp/" + "x" * 120)


@contextmanager
def shm_target(run_dir: str, **options: float) -> Iterator[ShmTransport]:
    pool = PoolMemory.create(LAYOUT, 8)
    transport = ShmTransport(OURS, SECRET, TransportConfig(**options), unix_path=f"{run_dir}/t")  # type: ignore[arg-type]
    transport.register(pool.region)
    yield transport
    transport.close()
    pool.close()
