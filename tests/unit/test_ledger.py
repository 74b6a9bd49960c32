"""The ledger client sees each fault it is there to see. A server of a few lines plays good and bad streams to it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.cluster.ledger import Ledger, difference, stream

pytestmark = pytest.mark.pure


def event(text: str | None = None, *, choice: int = 0, finish: str | None = None, logprob: float = -1.0) -> str:
    content = [] if text is None else [{"token": text, "logprob": logprob, "bytes": list(text.encode())}]
    delta = {} if text is None else {"content": text}
    return json.dumps(
        {"id": "chatcmpl-1", "choices": [{"index": choice, "delta": delta, "logprobs": {"content": content}, "finish_reason": finish}]}
    )


def usage(num_tokens: int) -> str:
    counts = {"prompt_tokens": 3, "completion_tokens": num_tokens, "total_tokens": 3 + num_tokens}
    return json.dumps({"id": "chatcmpl-1", "choices": [], "usage": counts})


GOOD = [event("a"), event("é"), event("c"), event(finish="length"), usage(3), "[DONE]"]


async def play(events: list[str], *, cut: bool = False, status: str = "200 OK") -> Ledger:
    """The ledger of a stream that a server sends in small pieces; `cut` ends it without the last chunk."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        sent = "".join(f"data: {payload}\n\n" for payload in events).encode()
        for start in range(0, len(sent), 7):  # pieces that split events and characters
            piece = sent[start : start + 7]
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if not cut:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        return await stream("127.0.0.1", server.sockets[0].getsockname()[1], "/v1/chat/completions", {"n": 1})


async def test_whole_stream_keeps_its_promises() -> None:
    ledger = await play(GOOD)
    assert ledger.broken_promises == []
    assert ledger.text == {0: "aéc"}
    assert difference(ledger, await play(GOOD)) == []


@pytest.mark.parametrize(
    ("events", "law"),
    [
        (GOOD[:-1], "I1"),
        ([*GOOD, "[DONE]"], "I1"),
        ([*GOOD, event("d")], "I1"),
        ([*GOOD[:3], *GOOD[4:]], "I1"),
        ([*GOOD[:4], *GOOD[3:]], "I1"),
        ([*GOOD[:4], usage(4), "[DONE]"], "I6"),
        ([*GOOD[:4], "[DONE]"], "I6"),
        ([*GOOD[:2], json.dumps({"error": {"message": "lost"}}), "[DONE]"], "errors"),
    ],
    ids=["no-done", "two-done", "event-after-done", "no-finish", "two-finishes", "usage-off", "no-usage", "error"],
)
async def test_broken_stream_is_told(events: list[str], law: str) -> None:
    assert any(law in promise for promise in (await play(events)).broken_promises)


async def test_cut_stream_is_told() -> None:
    assert "transport" in str((await play(GOOD[:2], cut=True)).broken_promises)


async def test_refusal_is_told_with_its_body() -> None:
    assert "status 429" in (await play(["busy"], status="429 Too Many Requests")).broken_promises[0]


@pytest.mark.parametrize(
    "tokens", [["a", "a", "é", "c"], ["a", "c"], ["a", "c", "é"], ["a", "é", "x"]], ids=["twice", "gap", "order", "other"]
)
async def test_stream_that_differs_is_told(tokens: list[str]) -> None:
    changed: list[Any] = [*(event(token) for token in tokens), event(finish="length"), usage(len(tokens)), "[DONE]"]
    disturbed = await play(changed)
    assert disturbed.broken_promises == []  # taken alone it looks right
    assert any("I2" in promise for promise in difference(disturbed, await play(GOOD)))
