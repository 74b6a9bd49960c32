"""Finding a running server and talking HTTP to it: plain requests with a deadline, and server-sent events.

Standard library only, so that a client command starts at once; proxies of the environment are not used.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from control.run_files import read_run_files
from protocol.errors import BatonError, ConfigError

BODY_BYTES_MAX = 64 << 20
EVENT_BYTES_MAX = 1 << 20

Json = dict[str, Any]


class ServerUnavailable(BatonError):
    """Nobody answers there, or not in a way we understand; the text has the remedy."""


class ServerRefused(BatonError):
    """The server answered with an error; the text is its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where to ask. `timeout_s` bounds connecting and every read."""

    url: str
    api_key: str | None
    timeout_s: float

    def get(self, path: str) -> Json:
        """The JSON object at `path`."""
        with self._answer("GET", path, None) as response:
            return _object(response.read(BODY_BYTES_MAX))

    def stream(self, path: str, body: Mapping[str, object]) -> Generator[Json, None, None]:
        """Events of a streamed answer, one JSON object each, until [DONE]. Closing the iterator cancels the request."""
        with self._answer("POST", path, body) as response:
            for event in read_events(response):
                if event == "[DONE]":
                    return
                yield _object(event.encode())
            raise ServerUnavailable(f"{self.url} broke the answer off; what came is not all of it")

    @contextmanager
    def _answer(self, method: str, path: str, body: Mapping[str, object] | None) -> Iterator[http.client.HTTPResponse]:
        headers = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            parts = urlsplit(self.url)
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(parts.hostname or "", parts.port, timeout=self.timeout_s)
        except (ValueError, http.client.InvalidURL):
            raise ConfigError(f"--url {self.url} is not an address such as http://127.0.0.1:8000") from None
        began = False
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, parts.path.rstrip("/") + path, body=payload, headers=headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise ServerRefused(_error_text(response.status, response.read(BODY_BYTES_MAX)))
            began = True
            yield response
        except (OSError, http.client.HTTPException) as error:
            if began:
                raise ServerUnavailable(f"{self.url} broke the answer off ({self._reason(error)})") from None
            remedy = "start one with `baton serve`, or name it with --url"
            raise ServerUnavailable(f"no server at {self.url} ({self._reason(error)}); {remedy}") from None
        finally:
            connection.close()

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer within {self.timeout_s:g} s"
        return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def find_server(url: str | None, api_key: str | None, environ: Mapping[str, str], *, timeout_s: float) -> tuple[Server, list[str]]:
    """The server at `url`, or the newest one of this user on this machine; and the URLs of the others.

    Raises:
        ServerUnavailable: none was named and none runs.
    """
    if url is not None:
        if not url.startswith(("http://", "https://")):
            url = f"http://{url}"
        return Server(url=url.rstrip("/").removesuffix("/v1"), api_key=api_key, timeout_s=timeout_s), []
    running = read_run_files(environ)
    if not running:
        raise ServerUnavailable("no server of yours runs on this machine; start one with `baton serve`, or name it with --url")
    others = [run.url for run in running[1:]]
    return Server(url=running[0].url, api_key=api_key, timeout_s=timeout_s), others


def read_events(lines: http.client.HTTPResponse) -> Iterator[str]:
    """The data of each server-sent event; comments and other fields are passed over.

    Raises:
        ServerUnavailable: the stream ended inside an event, or one is larger than EVENT_BYTES_MAX.
    """
    data: list[str] = []
    size = 0
    while line := lines.readline(EVENT_BYTES_MAX):
        size += len(line)
        if size > EVENT_BYTES_MAX:
            raise ServerUnavailable(f"an event is larger than {EVENT_BYTES_MAX:,} bytes; is this an OpenAI endpoint?")
        text = line.decode("utf-8", errors="replace").rstrip("\r\n")
        if not text:
            if data:
                yield "\n".join(data)
            data, size = [], 0
        elif text.startswith("data:"):
            data.append(text[5:].removeprefix(" "))
    if data:
        raise ServerUnavailable("the stream ended in the middle of an event; the server is gone")


def _object(body: bytes) -> Json:
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ServerUnavailable("the answer is not a JSON object; is this a Baton server?")
    return parsed


def _error_text(status: int, body: bytes) -> str:
    """The message of OpenAI's error object, or the status alone."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode("utf-8", errors="replace").strip()
    remedy = "; give the key with --api-key or BATON_API_KEY" if status == 401 else ""
    return f"the server answered {status}: {message or http.client.responses.get(status, 'no reason given')}{remedy}"
