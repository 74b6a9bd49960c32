"""A client that trusts nobody: plain sockets, its own HTTP and SSE parsers, and a verdict on every stream.

It shares no code with the server. A Ledger is the ordered record of one request as its user saw it: tokens by choice and
position with their times, finish reasons, usage, the end. `Ledger.broken_promises` judges what one stream can show (I1: one
end; I6: exact usage), `difference` compares two streams of one request (I2: gap-free, duplicate-free, equal to the
undisturbed run). Tokens are told apart by the logprobs the request asks for: one entry a token, in order.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

READ_TIMEOUT_S = 120.0
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenToken:
    """One token as it arrived; its position is the number of tokens of its choice before it."""

    text: str
    logprob: float
    at_s: float


@dataclass(slots=True, kw_only=True)
class Ledger:
    """What one request gave its user. Times are of the client's monotonic clock."""

    body: dict[str, Any]
    started_s: float
    status: int = 0
    tokens: dict[int, list[SeenToken]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    finish_reasons: dict[int, list[str]] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    num_done: int = 0
    num_events_after_done: int = 0
    response_ids: set[str] = field(default_factory=set)
    ended_s: float | None = None

    @property
    def num_choices(self) -> int:
        return int(self.body.get("n", 1))

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for tokens in self.tokens.values())

    @property
    def broken_promises(self) -> list[str]:
        """What is wrong with this stream taken alone; empty when I1 and I6 hold and nothing failed."""
        found: list[str] = []
        if self.status != 200 or self.errors:
            return [f"status {self.status}, errors {self.errors}"]
        if self.ended_s is None or self.num_done != 1 or self.num_events_after_done:
            found.append(f"I1: {self.num_done} [DONE], {self.num_events_after_done} events after it, ended: {self.ended_s is not None}")
        for choice in range(self.num_choices):
            reasons = self.finish_reasons.get(choice, [])
            if len(reasons) != 1:
                found.append(f"I1: choice {choice} ended {len(reasons)} times: {reasons}")
        if set(self.finish_reasons) | set(self.tokens) > set(range(self.num_choices)):
            found.append(f"I1: choices {sorted(set(self.finish_reasons) | set(self.tokens))}, asked for {self.num_choices}")
        if len(self.response_ids) != 1:
            found.append(f"I1: one request, response ids {sorted(self.response_ids)}")
        for choice, tokens in self.tokens.items():
            if any(later.at_s < earlier.at_s for earlier, later in itertools.pairwise(tokens)):
                found.append(f"I2: times of choice {choice} run backwards")
        if self.usage is None:
            found.append("I6: no usage")
        elif self.usage["completion_tokens"] != self.num_tokens:
            found.append(f"I6: usage says {self.usage['completion_tokens']} tokens, {self.num_tokens} arrived")
        elif self.usage["total_tokens"] != self.usage["prompt_tokens"] + self.usage["completion_tokens"]:
            found.append(f"I6: usage does not add up: {self.usage}")
        return found


def difference(disturbed: Ledger, undisturbed: Ledger) -> list[str]:
    """Where two streams of one request part, as an undisturbed run would show it; empty when they are equal."""
    found: list[str] = []
    for choice in range(undisturbed.num_choices):
        got = disturbed.tokens.get(choice, [])
        want = undisturbed.tokens.get(choice, [])
        for position, (a, b) in enumerate(zip(got, want, strict=False)):
            if (a.text, a.logprob) != (b.text, b.logprob):
                found.append(f"I2: choice {choice} position {position}: {a.text!r} {a.logprob} instead of {b.text!r} {b.logprob}")
                break
        if len(got) != len(want):
            found.append(f"I2: choice {choice} has {len(got)} tokens instead of {len(want)}")
        if disturbed.text.get(choice) != undisturbed.text.get(choice):
            found.append(f"I2: choice {choice} reads {disturbed.text.get(choice)!r} instead of {undisturbed.text.get(choice)!r}")
        if disturbed.finish_reasons.get(choice) != undisturbed.finish_reasons.get(choice):
            found.append(f"I1: choice {choice} ended {disturbed.finish_reasons.get(choice)}, not {undisturbed.finish_reasons.get(choice)}")
    if disturbed.usage is not None and undisturbed.usage is not None:
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        if any(disturbed.usage[name] != undisturbed.usage[name] for name in counts):
            found.append(f"I6: usage {disturbed.usage} instead of {undisturbed.usage}")
    return found


async def stream(
    host: str, port: int, path: str, body: dict[str, Any], *, api_key: str | None = None, journal: list[Ledger] | None = None
) -> Ledger:
    """Send one streaming request and record everything that comes back. Asks for logprobs and usage, whatever the body says.

    The ledger is put into `journal` before anything is sent, so that a test can watch it grow.
    """
    body = {**body, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True if path.endswith("chat/completions") else 0}
    ledger = Ledger(body=body, started_s=time.monotonic())
    if journal is not None:
        journal.append(ledger)
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            async for line in _lines_of_answer(host, port, path, body, api_key, ledger):
                if line.startswith("data:"):
                    _record(ledger, line[5:].strip())
            ledger.ended_s = time.monotonic()
    except (OSError, EOFError, TimeoutError) as error:
        ledger.errors.append({"transport": repr(error)})
    return ledger


def _record(ledger: Ledger, payload: str) -> None:
    now_s = time.monotonic()
    if payload == "[DONE]":
        ledger.num_done += 1
        return
    if ledger.num_done:
        ledger.num_events_after_done += 1
    event = json.loads(payload)
    if "error" in event:
        ledger.errors.append(event["error"])
        return
    ledger.response_ids.add(event["id"])
    if event.get("usage") is not None:
        ledger.usage = event["usage"]
    for choice in event["choices"]:
        index = choice["index"]
        piece = choice["text"] if "text" in choice else choice["delta"].get("content")
        ledger.text[index] = ledger.text.get(index, "") + (piece or "")
        ledger.tokens.setdefault(index, []).extend(_tokens(choice.get("logprobs"), now_s))
        if choice.get("finish_reason") is not None:
            ledger.finish_reasons.setdefault(index, []).append(choice["finish_reason"])


def _tokens(logprobs: dict[str, Any] | None, now_s: float) -> list[SeenToken]:
    """Tokens of one event, in the form of chat (`content`) or of completions (`tokens`, `token_logprobs`)."""
    if logprobs is None:
        return []
    if "content" in logprobs:
        return [SeenToken(text=entry["token"], logprob=entry["logprob"], at_s=now_s) for entry in logprobs["content"] or []]
    pairs = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
    return [SeenToken(text=text, logprob=logprob, at_s=now_s) for text, logprob in pairs]


async def _lines_of_answer(
    host: str, port: int, path: str, body: dict[str, Any], api_key: str | None, ledger: Ledger
) -> AsyncIterator[str]:
    """Lines of the answer's body: HTTP/1.1, chunked or to the end of the connection."""
    reader, writer = await asyncio.open_connection(host, port, limit=MAX_LINE_BYTES)
    try:
        payload = json.dumps(body).encode()
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n{key}"
        writer.write(f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
        await writer.drain()
        ledger.status = int((await reader.readuntil(b"\r\n")).split()[1])
        headers: dict[str, str] = {}
        while (line := (await reader.readuntil(b"\r\n")).decode().strip()) != "":
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        pieces = _chunks(reader) if headers.get("transfer-encoding") == "chunked" else _rest(reader)
        if ledger.status != 200:
            ledger.errors.append({"body": b"".join([piece async for piece in pieces]).decode(errors="replace")})
            return
        pending = b""
        async for piece in pieces:
            *lines, pending = (pending + piece).split(b"\n")
            for complete in lines:
                yield complete.decode("utf-8")  # strict: a split character is a fault
        assert pending == b"", f"the stream ended inside a line: {pending!r}"
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while (size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)) > 0:
        yield await reader.readexactly(size)
        assert await reader.readexactly(2) == b"\r\n"
    await reader.readuntil(b"\r\n")


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(1 << 16):
        yield piece
