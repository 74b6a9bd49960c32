"""An OpenAI endpoint made for tests of clients: it answers as it is told, on a thread of its own, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


def event(choice: dict[str, Any] | None, **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [choice] if choice else [], **more}).encode() + b"\n\n"


def good_stream(body: dict[str, Any]) -> list[bytes]:
    """Two tokens, one that is no character yet, one more, a last event without a token, usage."""
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 4}
    return [
        event({"text": "ab", "token_ids": [11, 12]}),
        event({"text": "", "token_ids": [13]}),
        event({"text": "d", "token_ids": [14]}),
        event({"text": "", "finish_reason": "length"}),
        event(None, usage=usage) + b"data: [DONE]\n\n",
    ]


@dataclass
class StubServer:
    """An OpenAI endpoint that answers with `pieces(body)`, `pause_s` before each; it remembers the bodies."""

    pieces: Any = good_stream
    pause_s: float = 0.0
    status: int = 200
    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_open_max: int = 0
    _num_open: int = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /v1/models"):
            models = json.dumps({"data": [{"id": "stub"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(models) + models)
        else:
            length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
            body = json.loads(await reader.readexactly(length))
            self.bodies.append(body)
            self._num_open += 1
            self.num_open_max = max(self.num_open_max, self._num_open)
            writer.write(b"HTTP/1.1 %d X\r\nConnection: close\r\nContent-Type: text/event-stream\r\n\r\n" % self.status)
            for piece in self.pieces(body):
                await asyncio.sleep(self.pause_s)
                writer.write(piece)
                await writer.drain()
            self._num_open -= 1
        writer.close()


@contextmanager
def running(stub: StubServer) -> Iterator[str]:
    """Its URL, while it serves on a thread of its own."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(stub.answer, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.close()
