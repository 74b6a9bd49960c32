"""An open-loop client: requests arrive by a seeded Poisson process whether or not earlier ones are done, and every delivery is timed.

A closed loop waits for a slow server and so measures it when it is quiet; here a request's clock starts at the moment it was due, so
that waiting for a free place (`max_concurrency`) or for this process counts as the user would feel it. One thread, one uvloop.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import aiohttp

from baton.bench.report import percentile
from protocol.errors import ConfigError, ServiceError
from protocol.timeline import Timeline
from simulator.traces.content import LOWEST_TOKEN_ID

EVENT_BYTES_MAX = 1 << 20
SOCKETS_MAX = 4096
ERROR_CHARS = 300
BODIES_BYTES_MAX = 1 << 30  # of all requests of a run

OnProgress = Callable[["LoadRun"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked, and when. The same workload gives the same prompts at the same moments."""

    num_requests: int
    request_rate: float  # requests a second; inf: all at once
    input_len: int  # tokens of a prompt, shared ones included
    output_len: int
    shared_prefix: int = 0  # first tokens that all prompts have in common
    vocab_size: int = 1000  # prompts are drawn from the token ids below it
    seed: int = 0
    max_concurrency: int | None = None  # requests in flight; None: as many as arrive

    def arrivals_s(self) -> list[float]:
        """When each request is due, seconds from the start: exponential gaps."""
        if self.request_rate == float("inf"):
            return [0.0] * self.num_requests
        rng = random.Random(f"arrivals {self.seed}")
        return list(itertools.accumulate(rng.expovariate(self.request_rate) for _ in range(self.num_requests)))

    def prompts(self) -> list[list[int]]:
        """Token ids, uniform: nothing is shared by chance beyond the prefix asked for."""
        rng = random.Random(f"prompts {self.seed}")
        ids = range(LOWEST_TOKEN_ID, self.vocab_size)
        prefix = rng.choices(ids, k=self.shared_prefix)
        return [prefix + rng.choices(ids, k=self.input_len - self.shared_prefix) for _ in range(self.num_requests)]

    def output_lens(self) -> list[int]:
        """Tokens asked for, of each request."""
        return [self.output_len] * self.num_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Who is asked. `extra_body` goes into every request; a null takes a field out that would be there."""

    url: str  # without /v1
    model: str
    api_key: str | None = None
    timeout_s: float = 600.0  # of a whole request
    extra_body: Mapping[str, object] = field(default_factory=dict)

    def body(self, prompt: Sequence[int], output_len: int) -> bytes:
        usual: dict[str, object] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_len,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,  # a delivery says how many tokens it is, also when they are no whole character yet
        }
        given = usual | dict(self.extra_body)
        return json.dumps({name: value for name, value in given.items() if value is not None}).encode()


class ErrorKind(Enum):
    """Why a request did not end well."""

    CONNECT = "connect"  # nobody there
    REFUSED = "refused"  # a status of 400 or above
    FAILED = "failed"  # an error inside the stream
    BROKEN = "broken"  # the answer ended before [DONE], or is no stream of JSON events
    TIMEOUT = "timeout"
    SHORT = "short"  # fewer tokens than asked for


@dataclass(slots=True, kw_only=True)
class SentRequest:
    """One request: its timeline counts from the moment it was due."""

    index: int
    timeline: Timeline
    num_asked_tokens: int = 0
    sent_s: float | None = None  # None: still waiting for a place
    num_prompt_tokens: int = 0  # by the server's own count
    num_cached_tokens: int | None = None  # of the prompt, by the server's own count; None: it does not say
    error: ErrorKind | None = None
    error_text: str = ""

    @property
    def is_over(self) -> bool:
        return self.timeline.end_s is not None


@dataclass(slots=True, kw_only=True)
class LoadRun:
    """What came of a workload; filled while it runs. Moments are of time.perf_counter()."""

    workload: Workload
    started_s: float
    requests: list[SentRequest] = field(default_factory=list)
    num_waited: int = 0  # requests that max_concurrency held up
    end_s: float = 0.0
    cpu_s: float = 0.0  # of this process

    @property
    def well(self) -> list[SentRequest]:
        return [r for r in self.requests if r.is_over and r.error is None]

    @property
    def num_in_flight(self) -> int:
        return sum(r.sent_s is not None and not r.is_over for r in self.requests)

    @property
    def duration_s(self) -> float:
        return self.end_s - self.started_s

    @property
    def lateness_s(self) -> list[float]:
        """Of each request: how long after its moment it was sent."""
        return [r.sent_s - r.timeline.arrival_s for r in self.requests if r.sent_s is not None]

    @property
    def lag_p99_s(self) -> float:
        """p99 of how late requests left us, of the first of each moment: the others leave behind it, as fast as one client can write."""
        before_s = [None, *(r.timeline.arrival_s for r in self.requests)]
        firsts = [r for r, at_s in zip(self.requests, before_s, strict=False) if r.timeline.arrival_s != at_s]
        return percentile([r.sent_s - r.timeline.arrival_s for r in firsts if r.sent_s is not None] or [0.0], 0.99)


def drive(
    endpoint: Endpoint, workload: Workload, *, num_warmups: int = 0, on_progress: OnProgress | None = None, every_s: float = 0.5
) -> LoadRun:
    """Send the workload and wait for the last answer. The warm-ups go first, one after the other, and are not in the result.

    on_progress: called every `every_s` seconds while requests run.

    Raises:
        ConfigError: its requests are more than BODIES_BYTES_MAX.
        ServiceError: a warm-up is not answered as asked.
    """
    import uvloop

    return uvloop.run(_drive(endpoint, workload, num_warmups, on_progress, every_s))


async def _drive(endpoint: Endpoint, workload: Workload, num_warmups: int, on_progress: OnProgress | None, every_s: float) -> LoadRun:
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    if endpoint.api_key:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=SOCKETS_MAX),
        timeout=aiohttp.ClientTimeout(total=endpoint.timeout_s),
        headers=headers,
        trust_env=False,
    ) as session:
        client = _Client(session, endpoint)
        warm_ups = _warm_ups(workload, num_warmups)
        for prompt, output_len in zip(warm_ups.prompts(), warm_ups.output_lens(), strict=True):
            request = SentRequest(index=-1, timeline=Timeline(arrival_s=time.perf_counter()), num_asked_tokens=output_len)
            await client.send(request, endpoint.body(prompt, output_len))
            if request.error is not None:
                raise ServiceError(f"{endpoint.url} does not answer as asked ({request.error.value}): {request.error_text}")
        return await _open_loop(client, endpoint, workload, on_progress, every_s)


def _warm_ups(workload: Workload, count: int) -> Workload:
    """Other prompts than those of the run, so that nothing of it is in a prefix cache."""
    return replace(workload, seed=-1 - workload.seed, num_requests=count)


def _bodies(endpoint: Endpoint, workload: Workload) -> list[bytes]:
    """All are written before the first leaves: a prompt of 10k tokens takes milliseconds, and whoever is due then would be late.

    Raises:
        ConfigError: they are more than BODIES_BYTES_MAX.
    """
    bodies: list[bytes] = []
    size_bytes = 0
    for prompt, output_len in zip(workload.prompts(), workload.output_lens(), strict=True):
        bodies.append(endpoint.body(prompt, output_len))
        size_bytes += len(bodies[-1])
        if size_bytes > BODIES_BYTES_MAX:
            raise ConfigError(
                f"the first {len(bodies)} of {workload.num_requests} requests are more than {BODIES_BYTES_MAX >> 20} MiB, which is what "
                "this client holds; ask for fewer requests"
            )
    return bodies


async def _open_loop(client: _Client, endpoint: Endpoint, workload: Workload, on_progress: OnProgress | None, every_s: float) -> LoadRun:
    bodies, output_lens = _bodies(endpoint, workload), workload.output_lens()
    arrivals_s = workload.arrivals_s()
    places = None if workload.max_concurrency is None else asyncio.Semaphore(workload.max_concurrency)
    cpu_s, started_s = time.process_time(), time.perf_counter()
    run = LoadRun(workload=workload, started_s=started_s)
    ticker = asyncio.create_task(_tell(run, on_progress, every_s)) if on_progress is not None else None
    try:
        async with asyncio.TaskGroup() as group:
            for index, (due_s, body) in enumerate(zip(arrivals_s, bodies, strict=True)):
                await asyncio.sleep(max(0.0, started_s + due_s - time.perf_counter()))
                timeline = Timeline(arrival_s=started_s + due_s)
                request = SentRequest(index=index, timeline=timeline, num_asked_tokens=output_lens[index])
                run.requests.append(request)
                group.create_task(_in_its_place(client, run, request, body, places))
    finally:
        if ticker is not None:
            ticker.cancel()
    run.end_s = time.perf_counter()
    run.cpu_s = time.process_time() - cpu_s
    return run


async def _in_its_place(client: _Client, run: LoadRun, request: SentRequest, body: bytes, places: asyncio.Semaphore | None) -> None:
    if places is None:
        await client.send(request, body)
        return
    run.num_waited += places.locked()
    async with places:
        await client.send(request, body)


async def _tell(run: LoadRun, on_progress: OnProgress, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        on_progress(run)


class _Client:
    """Sends bodies over one session and notes what comes back. Errors become part of the request, never exceptions."""

    def __init__(self, session: aiohttp.ClientSession, endpoint: Endpoint) -> None:
        self._session = session
        self._endpoint = endpoint

    async def send(self, request: SentRequest, body: bytes) -> None:
        request.sent_s = time.perf_counter()
        try:
            await self._exchange(request, body)
        except TimeoutError:
            _fail(request, ErrorKind.TIMEOUT, f"no end within {self._endpoint.timeout_s:g} s")
        except aiohttp.ClientConnectorError as error:
            _fail(request, ErrorKind.CONNECT, str(error))
        except (aiohttp.ClientError, ValueError, OSError) as error:
            _fail(request, ErrorKind.BROKEN, f"{type(error).__name__}: {error}")
        request.timeline.end_s = time.perf_counter()

    async def _exchange(self, request: SentRequest, body: bytes) -> None:
        async with self._session.post(f"{self._endpoint.url}/v1/completions", data=body) as response:
            if response.status >= 400:
                _fail(request, ErrorKind.REFUSED, f"{response.status}: {(await response.text())[:ERROR_CHARS]}")
                return
            unread, is_done = b"", False
            async for chunk in response.content.iter_any():
                now_s = time.perf_counter()
                *lines, unread = (unread + chunk).split(b"\n")
                events = [line[5:].strip() for line in lines if line.startswith(b"data:")]
                is_done = is_done or b"[DONE]" in events
                for event in events:
                    if event != b"[DONE]":
                        _take(request, event, now_s)
                if len(unread) > EVENT_BYTES_MAX:
                    raise ValueError(f"an event is larger than {EVENT_BYTES_MAX:,} bytes")
        if request.error is None and not is_done:
            _fail(request, ErrorKind.BROKEN, "the stream ended before [DONE]")
        elif request.error is None and request.timeline.num_tokens < request.num_asked_tokens:
            _fail(request, ErrorKind.SHORT, f"{request.timeline.num_tokens} of {request.num_asked_tokens} tokens came")


def _take(request: SentRequest, data: bytes, now_s: float) -> None:
    """One event of a stream that arrived at `now_s`."""
    event = json.loads(data)
    if "error" in event:
        _fail(request, ErrorKind.FAILED, json.dumps(event["error"])[:ERROR_CHARS])
    if usage := event.get("usage"):
        request.num_prompt_tokens = int(usage["prompt_tokens"])
        found = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        request.num_cached_tokens = int(found) if found is not None else request.num_cached_tokens
    for choice in event.get("choices") or ():
        # A server that does not know return_token_ids is taken at its chunks: one token each.
        ids = choice.get("token_ids")
        count = len(ids) if ids is not None else int(bool(choice.get("text")))
        if count:
            request.timeline.add_tokens(now_s, count)


def _fail(request: SentRequest, kind: ErrorKind, text: str) -> None:
    request.error, request.error_text = kind, text


__all__ = ["Endpoint", "ErrorKind", "LoadRun", "SentRequest", "Workload", "drive"]
