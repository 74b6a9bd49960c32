"""From one trace to many that might have come in its place: what a verdict counts, since requests of one run wait for each other.

    generator              each replicate is drawn anew, from a seed of its own
    sessions in the trace  whole sessions are drawn with replacement, each with the gap before its begin
    prefixes shared        likewise families: requests over a prefix that few others have, as the turns of a conversation are
    nothing shared         moving blocks: requests that follow each other, drawn with replacement and put one behind the other

Blocks are for traces that share nothing, as a block ends most conversations: of Mooncake's first 2,000 requests a cache finds 29 % of the
prompt tokens, of 2,000 in blocks of 250 12 %, of 2,000 in families 23 %.

What is drawn a second time has other tokens: it must not find its own copy in a cache. What is drawn once keeps its tokens, so that two
sessions find of each other what they share in the trace. Copies of a second drawing share among themselves likewise: a part goes to the
first world that has no request of it yet, and worlds share nothing. So two requests of a replicate share at most what they do in the trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from heapq import heappop, heappush
from itertools import chain, pairwise
from random import Random

from simulator.traces.source import GENERATED_RATE_PER_S, Source
from simulator.traces.trace import Run, Trace, TraceRequest

MIN_PARTS = 20  # sessions or families; fewer are too few to draw from
COMMON_SHARE = 0.05  # of the requests; a prefix that more of them have belongs to no conversation
BLOCKS_PER_REPLICATE = 8
SEEDS = 1_000_000  # of replicates to a seed of the experiment


class Method(Enum):
    """How replicates come to be."""

    GENERATED = "generated anew, each from its own seed"
    SESSIONS = "sessions redrawn with replacement"
    FAMILIES = "requests over one prefix redrawn together, with replacement"
    BLOCKS = "moving blocks of consecutive requests redrawn with replacement"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a trace is made of, for redrawing."""

    method: Method
    positions: tuple[tuple[int, ...], ...] = ()  # of the requests of each session or family, in order of their begins; of blocks none


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicates:
    """Traces of `num_requests` each. Number i is the same trace for every policy and in every process."""

    source: Source
    num_requests: int
    seed: int
    parts: Parts
    trace: Trace | None  # what is redrawn; None: the source generates
    sha256: str | None  # of the trace's file, unpacked

    @classmethod
    def of(cls, source: Source, *, num_requests: int, seed: int) -> Replicates:
        """
        Raises:
            ConfigError: the source cannot be read.
        """
        trace = None if source.generator else source.whole(seed=seed)
        parts = Parts(method=Method.GENERATED) if trace is None else parts_of(trace)
        return cls(source=source, num_requests=num_requests, seed=seed, parts=parts, trace=trace, sha256=source.sha256())

    def seed_of(self, index: int) -> int:
        """Of whatever is drawn in replicate `index`."""
        assert 0 <= index < SEEDS
        return self.seed * SEEDS + index

    def make(self, index: int) -> Trace:
        """
        Raises:
            ConfigError: a source that does not go with its rate.
        """
        seed = self.seed_of(index)
        if self.trace is None:
            return replace(self.source, num_requests=self.num_requests).draw(seed=seed)
        return self.source.timed(redraw(self.trace, self.parts, num_requests=self.num_requests, seed=seed))

    @property
    def rate_per_s(self) -> float:
        """Mean arrivals a second; of a trace at its own rate about that of the trace."""
        if self.source.rate_per_s is not None:
            return self.source.rate_per_s
        return GENERATED_RATE_PER_S if self.trace is None else self.trace.rate_per_s

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out or made up in reading the trace."""
        return () if self.trace is None else self.trace.notes

    @property
    def told(self) -> str:
        """How they come to be, for a report."""
        if self.parts.method is Method.BLOCKS and self.trace is not None:
            return f"{self.parts.method.value}, {block_size(self.trace, self.num_requests):,} requests each"
        return self.parts.method.value


def parts_of(trace: Trace) -> Parts:
    """The largest parts that are told apart by name, by prefix, or not at all."""
    sessions = [request.session for request in trace.requests]
    if all(sessions) and len(set(sessions)) >= MIN_PARTS:
        return Parts(method=Method.SESSIONS, positions=_grouped(sessions))
    families = _grouped(_families(trace.requests))
    if MIN_PARTS <= len(families) < len(trace.requests):
        return Parts(method=Method.FAMILIES, positions=families)
    return Parts(method=Method.BLOCKS)


def block_size(trace: Trace, num_requests: int) -> int:
    """Requests in a moving block."""
    return max(1, min(num_requests, len(trace.requests)) // BLOCKS_PER_REPLICATE)


def redraw(trace: Trace, parts: Parts, *, num_requests: int, seed: int) -> Trace:
    """A trace of `num_requests` made of `parts` of another, the gaps between requests as there. The same arguments are the same trace.

    Raises:
        ValueError: nothing to draw from, or nothing to draw.
    """
    if not trace.requests or num_requests < 1:
        raise ValueError(f"{num_requests} requests cannot be redrawn from the {len(trace.requests)} of trace {trace.name!r}")
    rng, requests = Random(f"replicate {seed}"), trace.requests
    draw = _part_drawer(requests, parts.positions) if parts.positions else _block_drawer(requests, block_size(trace, num_requests))
    worlds: list[set[int]] = []  # positions in the trace of what each holds
    to_come: list[tuple[float, int, int, int]] = []  # when, number drawn, position, world
    drawn: list[TraceRequest] = []
    copies: dict[tuple[int, Run], Run] = {}  # by world and original: turns of a conversation have most in common
    begin_s, num_drawn = 0.0, 0
    while len(drawn) < num_requests:
        gap_s, positions = draw(rng)
        begin_s += gap_s
        world = _enter(worlds, positions)
        shift_s = begin_s - requests[positions[0]].at_s
        for position in positions:
            heappush(to_come, (requests[position].at_s + shift_s, num_drawn, position, world))
            num_drawn += 1
        if not parts.positions:  # the next block follows this one's end
            begin_s = requests[positions[-1]].at_s + shift_s
        while to_come and to_come[0][0] <= begin_s:  # nothing that is drawn from here on comes before it
            at_s, _, position, world = heappop(to_come)
            drawn.append(_copied(requests[position], at_s, world, copies))
    return replace(trace, requests=tuple(drawn[:num_requests]))


# --- parts --------------------------------------------------------------------------------------------------------------


def _grouped(keys: Iterable[Hashable]) -> tuple[tuple[int, ...], ...]:
    groups: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return tuple(map(tuple, groups.values()))


def _families(requests: Sequence[TraceRequest]) -> list[Hashable]:
    """Of each request: its shortest prefix that is not common. One of whose prompt all is common is alone."""
    known: dict[tuple[int, str], int] = {}  # number of a prefix, by the prefix before its last run and that run's name
    prefixes: list[list[int]] = []  # of each request
    for request in requests:
        own: list[int] = []
        for run in request.runs:  # how much of a run is used does not tell: one prompt may end within what another goes on with
            own.append(known.setdefault((own[-1] if own else -1, run.name), len(known)))
        prefixes.append(own)
    counts, most = Counter(chain.from_iterable(prefixes)), COMMON_SHARE * len(requests)
    return [next((prefix for prefix in each if counts[prefix] <= most), f"alone {position}") for position, each in enumerate(prefixes)]


# --- drawing ------------------------------------------------------------------------------------------------------------

Drawer = Callable[[Random], tuple[float, Sequence[int]]]  # the gap before what is drawn, in seconds, and its positions in the trace


def _part_drawer(requests: Sequence[TraceRequest], parts: Sequence[Sequence[int]]) -> Drawer:
    """Any part as often as any other; with it the time since the begin of the part before it."""
    gaps_s = _gaps_s([requests[positions[0]].at_s for positions in parts])

    def draw(rng: Random) -> tuple[float, Sequence[int]]:
        which = rng.randrange(len(parts))
        return gaps_s[which], parts[which]

    return draw


def _block_drawer(requests: Sequence[TraceRequest], size: int) -> Drawer:
    """Any `size` requests in a row as often as any other; with them the time since the request before."""
    gaps_s = _gaps_s([request.at_s for request in requests])

    def draw(rng: Random) -> tuple[float, Sequence[int]]:
        first = rng.randrange(len(requests) - size + 1)
        return gaps_s[first], range(first, first + size)

    return draw


def _gaps_s(begins_s: Sequence[float]) -> list[float]:
    """Before each; before the first, which nobody saw, as before the others on average."""
    gaps_s = [after - before for before, after in pairwise(begins_s)]
    return [sum(gaps_s) / len(gaps_s) if gaps_s else 0.0, *gaps_s]


def _enter(worlds: list[set[int]], positions: Sequence[int]) -> int:
    """The first world where none of these is yet; they are now."""
    world = next((number for number, held in enumerate(worlds) if held.isdisjoint(positions)), len(worlds))
    if world == len(worlds):
        worlds.append(set())
    worlds[world].update(positions)
    return world


def _copied(request: TraceRequest, at_s: float, world: int, copies: dict[tuple[int, Run], Run]) -> TraceRequest:
    if not world:
        return replace(request, at_s=at_s)
    mark = f"copy {world + 1} of "
    for run in request.runs:
        if (world, run) not in copies:
            copies[world, run] = Run(mark + run.name, run.num_tokens)
    runs = tuple(copies[world, run] for run in request.runs)
    return replace(request, at_s=at_s, runs=runs, session=mark + request.session if request.session else "")


__all__ = ["Method", "Parts", "Replicates", "block_size", "parts_of", "redraw"]
