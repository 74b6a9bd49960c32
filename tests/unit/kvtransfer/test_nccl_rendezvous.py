"""Peers that stop, lie or differ while a process group is made: the pull ends with a reason, in its time, and takes no thread along."""

from __future__ import annotations

import select
import socket
import threading
import time
from array import array
from collections.abc import Callable, Iterator

import pytest

torch = pytest.importorskip("torch")

from kvtransfer.config import TransportConfig  # noqa: E402
from kvtransfer.nccl import NcclTransport  # noqa: E402
from kvtransfer.region import PoolMemory  # noqa: E402
from kvtransfer.session import Announcement, PeerServer, RegionCard, Session  # noqa: E402
from kvtransfer.transport import Transfer  # noqa: E402
from protocol.kv import (  # noqa: E402
    DigestMode,
    Endpoint,
    HandoffShard,
    KVLayout,
    LayerGroup,
    LayerKind,
    Outcome,
    ShardRectangle,
    TransferError,
)
from protocol.wire import Identity  # noqa: E402

SECRET = b"of this cluster"
GROUP = LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=1, num_kv_heads=1, head_dim=16, dtype="float32")
LAYOUT = KVLayout(block_size_tokens=16, groups=(GROUP,), shard=ShardRectangle(first_head=0, last_head=1, first_layer=0, last_layer=1))
CARD = RegionCard(region_id=0, num_blocks=8, layout=LAYOUT)

Serve = Callable[[Session], None]


@pytest.fixture
def pull() -> Iterator[Callable[[Serve, float], Outcome]]:
    pool = PoolMemory.create(LAYOUT, 8)
    target = NcclTransport(Identity(name="decode-0", kind="worker", epoch=2), SECRET, TransportConfig(), device=torch.device("cpu"))
    target.register(pool.region)
    servers = []

    def run(serve: Serve, deadline_s: float) -> Outcome:
        listener = socket.create_server(("127.0.0.1", 0))

        def announced(session: Session) -> None:
            session.announce(Announcement(regions=(CARD,)))
            serve(session)

        them = Identity(name="prefill-0", kind="worker", epoch=1)
        servers.append(PeerServer(listener, them, SECRET, name="kv-liar", serve=announced, max_peers=1, stall_timeout_s=5))
        shard = HandoffShard(
            worker_id="prefill-0",
            rank=0,
            epoch=1,
            endpoint=Endpoint(host="127.0.0.1", nccl_port=listener.getsockname()[1]),
            region_id=0,
            layout=LAYOUT,
            block_ids=array("I", [1]),
            generations=array("Q", [0]),
            digest_mode=DigestMode.OFF,
            digests=b"",
        )
        ids = array("I", [0])
        target.start(Transfer(source=shard, source_indices=ids, target_region_id=0, target_block_ids=ids, deadline_s=deadline_s))
        assert select.select([target.wakeup_fd()], [], [], 10)[0], "no outcome in 10 s"
        ((_, outcome),) = target.poll()
        return outcome

    yield run
    target.close()
    for server in servers:
        server.close()
    pool.close()
    give_up = time.monotonic() + 5
    while any(thread.name == "kv-nccl-make" for thread in threading.enumerate()):
        assert time.monotonic() < give_up, "a thread still makes a group that nobody wants"
        time.sleep(0.01)


Pull = Callable[[Serve, float], Outcome]


def say(session: Session, library: str) -> None:
    session.send_frame(library.encode())
    session.receive_frame()


def test_a_peer_that_stops_in_the_middle_costs_the_deadline(pull: Pull) -> None:
    """Fails when the store waits for an entry without an end of the conversation's (planted: the thread stays)."""

    def serve(session: Session) -> None:
        say(session, "gloo")
        session.receive_frame()  # of ours, and no answer
        while True:
            session.receive_frame()

    started = time.monotonic()
    outcome = pull(serve, 0.4)
    assert outcome.error is TransferError.DEADLINE, outcome.detail
    assert time.monotonic() - started < 2.0


def test_gloo_and_nccl_do_not_wait_for_each_other(pull: Pull) -> None:
    """Fails when the libraries' names are not compared (planted: PEER_LOST)."""

    def serve(session: Session) -> None:
        say(session, "nccl")
        session.receive_frame()

    outcome = pull(serve, 5.0)
    assert outcome.error is TransferError.REFUSED and "both need a GPU, or neither" in outcome.detail


def test_a_peer_that_leaves_is_lost_at_once(pull: Pull) -> None:
    outcome = pull(lambda session: say(session, "gloo"), 5.0)
    assert outcome.error is TransferError.PEER_LOST and outcome.duration_s < 2.0


def test_an_entry_without_a_key_is_malformed(pull: Pull) -> None:
    def serve(session: Session) -> None:
        say(session, "gloo")
        session.send_frame(b"\xff\xff\0\0short")
        while True:
            session.receive_frame()

    assert pull(serve, 5.0).error is TransferError.TRUNCATED
