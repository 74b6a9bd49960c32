"""The wire carries every message unchanged, refuses strangers and malformed frames, and tells of each end once."""

from __future__ import annotations

import asyncio
import struct
from array import array
from dataclasses import fields, replace
from typing import Any

import pytest

from protocol.errors import HandshakeRefused, MalformedFrame, WireError
from protocol.kv import (
    DigestMode,
    Endpoint,
    FirstToken,
    HandoffKind,
    HandoffShard,
    KVHandoff,
    KVLayout,
    KVPeer,
    LayerGroup,
    LayerKind,
    Lease,
    ShardRectangle,
)
from protocol.kv_messages import PrefixOffered, PrefixRefused, RequestPrefix
from protocol.messages import Cancel, Ping, Pong, PrefixPull, StepOutput, Submit, TokenColumns, TokenLogprobs, TokenRun
from protocol.request import FinishReason, Request, SamplingParams, first_attempt, token_buffer
from protocol.wire import Connection, Identity, Listener, decode, dial, encode
from protocol.worker import BlocksRemoved

pytestmark = pytest.mark.pure

COLUMNS = ("attempts", "choices", "positions", "token_ids")


def make_submit() -> Submit:
    layout = KVLayout(
        block_size_tokens=16,
        groups=(LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32"),),
        shard=ShardRectangle(first_head=0, last_head=2, first_layer=0, last_layer=2),
    )
    shard = HandoffShard(
        worker_id="prefill-0",
        rank=0,
        epoch=1 << 60,
        endpoint=Endpoint(unix_path="/x"),
        region_id=0,
        layout=layout,
        block_ids=array("I", [3, 4]),
        generations=array("Q", [1 << 40, 2]),
        digest_mode=DigestMode.SAMPLED,
        digests=b"12345678" * 2,
    )
    request = Request(
        request_id="ab" * 16,
        model_id="m",
        prompt_token_ids=token_buffer(range(20)),
        sampling=SamplingParams(max_tokens=4, n=2, logit_bias=((3, -1.5),)),
        cache_root=b"r" * 16,
        arrival_s=1.5,
    )
    handoff = KVHandoff(
        handoff_id="cd" * 16,
        kind=HandoffKind.PREFILL,
        request_id=request.request_id,
        attempt=0,
        fingerprint=b"f" * 16,
        token_ids=token_buffer(range(20)),
        layer_watermark=2,
        first_tokens=(FirstToken(choice=0, token_id=7), FirstToken(choice=1, token_id=8)),
        lease=Lease(duration_s=30.0),
        shards=(shard,),
    )
    return Submit(attempt=first_attempt(request), prefill_only=False, handoff=handoff)


def test_words_of_a_peer_pull_survive_the_wire() -> None:
    submit = make_submit()
    assert submit.handoff is not None
    peer = KVPeer(worker_id="prefill-1", epoch=1 << 61, endpoint=Endpoint(host="h", control_port=9))
    asked = RequestPrefix(
        pull_id="ef" * 16,
        requester=peer,
        request_id="ab" * 16,
        attempt=2,
        cache_root=b"r" * 16,
        token_ids=token_buffer(range(32)),
        num_held_tokens=16,
    )
    told = replace(submit, handoff=None, prefix_pull=PrefixPull(peer=peer, num_tokens=32))
    for message in (asked, told, PrefixOffered(pull_id="ef" * 16, handoff=submit.handoff), PrefixRefused(pull_id="ef" * 16, reason="none")):
        assert decode(encode(message)[4:]) == message


def test_nested_records_survive_the_wire() -> None:
    submit = make_submit()
    assert decode(encode(submit)[4:]) == submit
    run = TokenRun(
        request_id="ab" * 16,
        attempt=1,
        choice=0,
        position=5,
        token_ids=token_buffer([1]),
        logprobs=(TokenLogprobs(logprob=-0.5, rank=1, top_token_ids=token_buffer([1, 2]), top_logprobs=(-0.5, -1.0)),),
        finish_reason=FinishReason.STOP,
    )
    output = StepOutput(worker_id="w", epoch=1, step=2, runs=(run,))
    assert decode(encode(output)[4:]) == output


def test_a_field_of_another_type_is_refused_by_name() -> None:
    """Seen to fail when `_exactly` returned its argument unchecked."""
    import msgpack

    from protocol.wire import ALL_MESSAGES as MESSAGES

    number = MESSAGES.index(Cancel)
    with pytest.raises(MalformedFrame, match=r"Cancel\.request_id: expected str"):
        decode(msgpack.packb([number, [5, 0]]))
    with pytest.raises(MalformedFrame, match="2 fields"):
        decode(msgpack.packb([number, ["x"]]))
    with pytest.raises(MalformedFrame):
        decode(msgpack.packb([len(MESSAGES), []]))
    with pytest.raises(MalformedFrame):
        decode(b"\xc1")


@pytest.mark.parametrize(
    ("record", "field", "wrong"),
    [
        (BlocksRemoved(number=1, hashes=(b"a" * 16, b"b" * 16)), "hashes", [b"a" * 16, "b"]),
        (BlocksRemoved(number=1, hashes=()), "hashes", [b"a" * 16, None]),
        (BlocksRemoved(number=1, hashes=()), "hashes", b"ab"),
        (TokenColumns(request_ids=("a", "b"), **dict.fromkeys(COLUMNS, token_buffer([1, 2]))), "request_ids", ["a", b"b"]),
    ],
)
def test_an_item_of_another_type_is_refused_with_its_field(record: object, field: str, wrong: object) -> None:
    """Tuples of bytes and of text are checked at once. Seen to fail with the join left out."""
    from protocol.codec import from_wire, pack, to_wire, unpack

    values = unpack(pack(to_wire(record)))
    assert from_wire(type(record), values) == record
    values[[f.name for f in fields(record)].index(field)] = wrong  # type: ignore[arg-type]
    with pytest.raises(MalformedFrame, match=rf"{type(record).__name__}\.{field}: expected a list"):
        from_wire(type(record), values)


class Pair:
    """A listener that answers Ping with Pong, and what both ends saw."""

    def __init__(self, secret: bytes = b"s") -> None:
        self.accepted: list[Connection] = []
        self.server_closes: list[Exception | None] = []
        self.listener = Listener(Identity(name="server", kind="worker", epoch=7), secret, self.accept)

    def accept(self, connection: Connection) -> None:
        self.accepted.append(connection)
        connection.on_message = lambda c, m: c.send(Pong(nonce=m.nonce))
        connection.on_close = lambda _, e: self.server_closes.append(e)


async def connect(pair: Pair, secret: bytes = b"s") -> tuple[Connection, asyncio.Queue[Any], list[Exception | None]]:
    received: asyncio.Queue[Any] = asyncio.Queue()
    closes: list[Exception | None] = []
    connection = await dial(
        Identity(name="client", kind="client", epoch=1),
        secret,
        host=pair.listener.host,
        port=pair.listener.port,
        on_message=lambda _, m: received.put_nowait(m),
        on_close=lambda _, e: closes.append(e),
    )
    return connection, received, closes


async def test_messages_arrive_in_order_and_the_peer_is_known() -> None:
    pair = Pair()
    await pair.listener.start()
    connection, received, closes = await connect(pair)
    assert connection.peer.name == "server" and connection.peer.epoch == 7
    for nonce in range(1000):
        connection.send(Ping(nonce=nonce))
    assert [(await received.get()).nonce for _ in range(1000)] == list(range(1000))
    pair.listener.close()
    await asyncio.sleep(0.05)
    assert len(closes) == 1 and len(pair.server_closes) == 1


async def test_a_stranger_without_the_secret_is_refused() -> None:
    """Seen to fail when `_handshake` skipped compare_digest."""
    pair = Pair()
    await pair.listener.start()
    with pytest.raises((HandshakeRefused, ConnectionError)):
        await connect(pair, secret=b"guess")
    await asyncio.sleep(0.05)
    assert pair.accepted == []
    pair.listener.close()


async def test_an_oversized_frame_ends_the_connection_without_being_read() -> None:
    pair = Pair()
    await pair.listener.start()
    connection, _, closes = await connect(pair)
    transport = connection._transport
    assert transport is not None
    transport.write(struct.pack("<I", 1 << 31) + b"x" * 100)
    await asyncio.sleep(0.05)
    assert isinstance(pair.server_closes[0], WireError) and len(closes) == 1
    pair.listener.close()


async def test_a_bind_outside_loopback_without_a_secret_is_refused() -> None:
    listener = Listener(Identity(name="s", kind="worker", epoch=1), b"", lambda _: None)
    with pytest.raises(HandshakeRefused, match="without a cluster secret"):
        await listener.start(host="0.0.0.0")
