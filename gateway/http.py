"""The little of HTTP the gateway needs on top of ASGI: bodies with limits, JSON, server-sent events, API keys."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from gateway.config import ApiKey
from gateway.dialect.errors import error_headers, error_object, error_status
from protocol.errors import BatonError, InvalidRequest, RequestTooLarge, Unauthorized
from protocol.request import Slo

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

SSE_DONE = b"data: [DONE]\n\n"
SSE_HEADERS: Headers = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx: pass each event on at once
)
MAX_DISCARDED_BODIES = 8  # of a body that is too large, this many times the limit is read and dropped so that the client hears why
MAX_REQUEST_ID_CHARS = 128


class ClientDisconnected(Exception):
    """The client closed the connection before the body was complete."""


class Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path = _path(scope)
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.receive = receive
        self.status = 0  # of the answer, once its head was sent
        self.tenant = "default"
        self.extra_headers: list[tuple[bytes, bytes]] = []
        self._send = send

    async def body(self, *, max_bytes: int, timeout_s: float) -> bytes:
        """
        Raises:
            RequestTooLarge, InvalidRequest (too slow), ClientDisconnected.
        """
        length = self.headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > max_bytes:
            await self._discard(int(length), max_bytes, timeout_s)
            raise _too_large(int(length), max_bytes)
        chunks, size = [], 0
        try:
            async with asyncio.timeout(timeout_s):
                more = True
                while more:
                    chunk, more = await self._next_chunk()
                    size += len(chunk)
                    if size > max_bytes:
                        break
                    chunks.append(chunk)
        except TimeoutError:
            raise InvalidRequest(f"the body did not arrive within {timeout_s:g} s; {size} bytes did", code="body_timeout") from None
        if size > max_bytes:
            await self._discard(MAX_DISCARDED_BODIES * max_bytes, max_bytes, timeout_s)
            raise _too_large(size, max_bytes)
        return b"".join(chunks)

    async def disconnected(self) -> None:
        """Returns when the client is gone; for use after the body was read."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def answer(self, status: int, body: bytes, content_type: bytes, headers: Headers = ()) -> None:
        head = [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *headers]
        await self.start(status, head)
        await self._send({"type": "http.response.body", "body": body})

    async def answer_json(self, value: object, *, status: int = 200, headers: Headers = ()) -> None:
        body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        await self.answer(status, body, b"application/json", headers)

    async def answer_error(self, error: BatonError) -> None:
        await self.answer_json(error_object(error), status=error_status(error), headers=error_headers(error))

    async def start(self, status: int, headers: Headers) -> None:
        """The head of an answer."""
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self.extra_headers]})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """A part of the body; waits while the client does not read."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _next_chunk(self) -> tuple[bytes, bool]:
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        return message.get("body", b""), message.get("more_body", False)

    async def _discard(self, length: int, max_bytes: int, timeout_s: float) -> None:
        """Read on without keeping anything, so that a client that writes before it reads gets its 413; not without end."""
        self.extra_headers.append((b"connection", b"close"))
        left = min(length, MAX_DISCARDED_BODIES * max_bytes)
        try:
            async with asyncio.timeout(timeout_s):
                more = True
                while more and left > 0:
                    chunk, more = await self._next_chunk()
                    left -= len(chunk)
        except TimeoutError:
            return


def sse_event(text: str) -> bytes:
    return f"data: {text}\n\n".encode()


def sse_error(error: BatonError) -> bytes:
    """How an error is told once a stream has begun."""
    return sse_event(json.dumps(error_object(error), ensure_ascii=False, separators=(",", ":")))


def tenant_of(headers: dict[bytes, bytes], keys: tuple[ApiKey, ...]) -> str:
    """The tenant whose key the request bears; never taken from a header of its own. Every key is compared, whichever matches.

    Raises:
        Unauthorized: keys are asked for, and this is none of them.
    """
    if not keys:
        return "default"
    scheme, _, given = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise Unauthorized("no API key was given; send the header Authorization: Bearer KEY")
    tenants = [key.tenant for key in keys if key.matches(given.strip())]
    if not tenants:
        raise Unauthorized("the API key is not known to this server")
    return tenants[0]


def client_request_id(headers: dict[bytes, bytes]) -> bytes | None:
    """The client's X-Request-Id, to be echoed, and a name to ask for the request by; None when absent or odd."""
    given = headers.get(b"x-request-id", b"")
    printable = all(0x21 <= byte <= 0x7E for byte in given)
    return given if given and len(given) <= MAX_REQUEST_ID_CHARS and printable else None


def client_session(headers: dict[bytes, bytes]) -> str:
    """The conversation the client says this request belongs to (X-Session-Id); "" when it does not."""
    return headers.get(b"x-session-id", b"").decode("latin-1").strip()


def client_slo(headers: dict[bytes, bytes]) -> Slo:
    """The latencies the client asks for, in milliseconds: X-SLO-TTFT-MS and X-SLO-TPOT-MS, as in llm-d.

    Raises:
        InvalidRequest: one is no number of milliseconds above 0.
    """
    return Slo(ttft_s=_milliseconds(headers, b"x-slo-ttft-ms"), tpot_s=_milliseconds(headers, b"x-slo-tpot-ms"))


def _milliseconds(headers: dict[bytes, bytes], name: bytes) -> float | None:
    given = headers.get(name)
    if given is None:
        return None
    text = given.decode("latin-1").strip()
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or float(text) <= 0.0:
        raise InvalidRequest(f"header {name.decode()} is {text[:40]!r}; give milliseconds above 0, such as 200")
    return float(text) / 1000.0


def _too_large(size: int, max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body has {size:,} bytes or more; the limit is {max_bytes:,}")


def _path(scope: Scope) -> str:
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    if root and path.startswith(root + "/"):
        path = path[len(root) :]
    return path.rstrip("/") or "/"
