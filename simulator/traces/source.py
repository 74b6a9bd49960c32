"""Where the requests of an experiment come from: a published trace, or a generator; how many of them, and how fast."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ConfigError
from simulator.traces.formats import load_trace
from simulator.traces.generators import Arrivals, generate
from simulator.traces.timing import at_rate, begin_sessions, first, spread
from simulator.traces.trace import Trace

SESSIONS_PER_S = 0.2  # that begin, of a trace that gives times within sessions only; a rate stretches the whole
GENERATED_RATE_PER_S = 10.0  # where none is asked for
GENERATED_REQUESTS = 1000
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One of `path` and `generator`.

    Raises:
        ConfigError: neither, or both.
    """

    path: Path | None = None  # of a trace, in a format of formats.py
    generator: str = ""
    rate_per_s: float | None = None  # None: the trace's own; of a generator GENERATED_RATE_PER_S
    num_requests: int | None = None  # the first so many; None: all, of a generator GENERATED_REQUESTS
    num_prefixes: int | None = None  # of a generator's prompts, as in generate
    cv: float = 1.0  # of a generator's gaps, as in Arrivals
    burst_size: int = 1
    spread_s: float = 0.0  # steps that a trace rounds its arrivals down to, spread out; 0: left as they are

    def __post_init__(self) -> None:
        if (self.path is None) == (not self.generator):
            raise ConfigError("give --trace or --generate, one of them; `baton trace list` names traces, --help generators")

    def sha256(self) -> str | None:
        """Of the trace's file, unpacked; of a folder, of all its files in the order of their names. None: a generator has none."""
        if self.path is None:
            return None
        digest = hashlib.sha256()
        for file in sorted(self.path.glob("*.json")) if self.path.is_dir() else [self.path]:
            with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as data:
                while chunk := data.read(CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()

    def draw(self, *, seed: int) -> Trace:
        """
        Raises:
            ConfigError: no such trace or generator, or one that does not go with the rest.
        """
        if self.generator:
            rate_per_s = GENERATED_RATE_PER_S if self.rate_per_s is None else self.rate_per_s
            arrivals = Arrivals(rate_per_s=rate_per_s, cv=self.cv, burst_size=self.burst_size)
            count = self.num_requests or GENERATED_REQUESTS
            return generate(self.generator, arrivals, num_requests=count, seed=seed, num_prefixes=self.num_prefixes)
        trace = self.whole(seed=seed)
        return self.timed(trace if self.num_requests is None else first(trace, self.num_requests))

    def whole(self, *, seed: int) -> Trace:
        """All requests of the trace at its own rate. Sessions without a begin are given one."""
        assert self.path is not None, "a generator has no end"
        trace = load_trace(self.path)
        if all(request.session for request in trace.requests) and any(request.think_s is not None for request in trace.requests):
            trace = begin_sessions(trace, SESSIONS_PER_S, seed=seed)
        return spread(trace, self.spread_s, seed=seed) if self.spread_s else trace

    def timed(self, trace: Trace) -> Trace:
        """At the rate asked for."""
        try:
            return trace if self.rate_per_s is None else at_rate(trace, self.rate_per_s)
        except ValueError as error:
            raise ConfigError(str(error)) from None


__all__ = ["GENERATED_RATE_PER_S", "GENERATED_REQUESTS", "Source"]
