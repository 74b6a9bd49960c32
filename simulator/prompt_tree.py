"""What the prompts of a trace share, worked out once before anything runs: so that a fast simulation touches a prompt in a few places.

    prompts  system A B      ──►  segments   [system] ─┬─ [A] ─┬─ [B]
             system A C                                │       └─ [C]
             system D                                  └─ [D]

A segment is a run of KV blocks between two places where prompts part or end. All its blocks are always asked for together, so a cache
that evicts the least recently used block, children first, holds a beginning of it: one number a segment says what it holds exactly. A
block belongs to the segment in which it ends: only prompts that share all its tokens share it, as in protocol.block_hash. What follows the
last full block of a prompt is in no segment: nothing of it is ever found.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import cast, overload

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.messages import Place
from simulator.routed_cluster import MODEL_ID
from simulator.traces.trace import Trace

_NUMBERS = [b"%d" % number for number in range(4096)]


class Segment:
    """`num_blocks` KV blocks that are shared by the same prompts. Hash blocks in them are named for who asks."""

    __slots__ = ("_prefix", "asked", "hashes_per_block", "index", "num_blocks")

    def __init__(self, index: int, num_blocks: int, hashes_per_block: int) -> None:
        self.index = index
        self.num_blocks = num_blocks
        self.hashes_per_block = hashes_per_block
        self._prefix = b"%d " % index
        self.asked: dict[int, bytes] = {}  # by number of the hash block in it: names that were asked for one by one

    def name(self, number: int) -> bytes:
        name = self.asked.get(number)
        if name is None:
            name = self.asked[number] = self._prefix + b"%d" % number
        return name

    def names(self, first: int, last: int) -> list[bytes]:
        """Of its hash blocks from `first` to before `last`."""
        join = self._prefix.__add__
        names = list(map(join, _NUMBERS[first:last]))  # at C speed: a policy may read thousands for each request
        return names if last <= len(_NUMBERS) else names + [join(b"%d" % number) for number in range(max(first, len(_NUMBERS)), last)]

    def all_names(self, first: int, last: int) -> tuple[bytes, ...]:
        """Of the hash blocks of its blocks from `first` to before `last`."""
        size = self.hashes_per_block
        return tuple(self.names(first * size, last * size))

    def asked_names(self, first: int, last: int) -> tuple[bytes, ...]:
        """Of those of them that anybody ever asked for one by one."""
        low, high = first * self.hashes_per_block, last * self.hashes_per_block
        return tuple([name for number, name in self.asked.items() if low <= number < high])


class BlockNames(Sequence[bytes]):
    """A prompt's chain of hash blocks by name, as a router is told it. None is made before it is looked at."""

    __slots__ = ("ends", "segments")

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        self.segments = segments
        self.ends = tuple(accumulate([s.num_blocks * s.hashes_per_block for s in segments]))  # hash blocks from the start of the prompt

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[bytes, ...]: ...
    def __getitem__(self, index: int | slice) -> bytes | tuple[bytes, ...]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._names(start, stop) if step == 1 else tuple([self[i] for i in range(start, stop, step)])
        if index < 0:
            index += len(self)
        which = bisect_right(self.ends, index)
        if index < 0 or which == len(self.ends):
            raise IndexError(f"block {index} of {len(self)}")
        return self.segments[which].name(index - (self.ends[which - 1] if which else 0))

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._names(0, len(self)))

    def _names(self, start: int, stop: int) -> tuple[bytes, ...]:
        names: list[bytes] = []
        begin = 0
        for segment, end in zip(self.segments, self.ends, strict=True):
            if end > start and begin < stop:
                names += segment.names(max(start - begin, 0), min(stop, end) - begin)
            begin = end
        return tuple(names)


@dataclass(slots=True, kw_only=True)
class Prompt:
    """One request of the trace, ready to be placed again and again."""

    number: int
    at_s: float  # from the first arrival
    num_tokens: int
    output_tokens: int
    segments: tuple[Segment, ...]
    names: BlockNames
    place: Place  # as a gateway asks for it
    reusable_tokens: int  # of them, that a cache without end would have found: full blocks that an earlier prompt begins with too


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTree:
    """A trace, taken apart for workers with KV blocks of so many tokens."""

    prompts: tuple[Prompt, ...]
    block_tokens: int

    def first(self, count: int) -> PromptTree:
        return PromptTree(prompts=self.prompts[:count], block_tokens=self.block_tokens)

    @property
    def num_tokens(self) -> int:
        return sum(prompt.num_tokens for prompt in self.prompts)

    @property
    def reusable_share(self) -> float:
        """Of all prompt tokens: the most that any caches of the workers can find, in arrival order."""
        return sum(prompt.reusable_tokens for prompt in self.prompts) / max(1, self.num_tokens)


def prompt_tree(trace: Trace, *, block_tokens: int, max_tokens: int | None) -> PromptTree:
    """`block_tokens`: of a KV block, a multiple of HASH_BLOCK_SIZE_TOKENS. `max_tokens`: what clients are taken to allow, which is all that
    whoever places is told of the length of an answer; None: he is told how long it will be.
    """
    hashes_per_block = block_tokens // HASH_BLOCK_SIZE_TOKENS
    ends_of, ends, parents = _nodes(trace)
    is_boundary = [False] * len(ends)
    num_children = [0] * len(ends)
    for node in range(1, len(ends)):
        num_children[parents[node]] += 1
    for node in ends_of:
        is_boundary[node] = True
    for node in range(len(ends)):
        is_boundary[node] = is_boundary[node] or num_children[node] > 1
    is_boundary[0] = True
    paths: dict[int, tuple[Segment, ...]] = {0: ()}
    num_segments = 0

    def path_to(node: int) -> tuple[Segment, ...]:
        nonlocal num_segments
        below: list[tuple[int, int]] = []  # boundaries whose path is not known yet, deepest first, each with the one above
        while node not in paths:
            above = parents[node]
            while not is_boundary[above]:
                above = parents[above]
            below.append((node, above))
            node = above
        path = paths[node]
        for bottom, top in reversed(below):
            num_blocks = ends[bottom] // block_tokens - ends[top] // block_tokens
            if num_blocks:
                path = (*path, Segment(num_segments, num_blocks, hashes_per_block))
                num_segments += 1
            paths[bottom] = path
        return path

    first_s = trace.requests[0].at_s if trace.requests else 0.0
    seen: set[int] = set()
    prompts: list[Prompt] = []
    names_of: dict[int, BlockNames] = {}
    for number, (asked, node) in enumerate(zip(trace.requests, ends_of, strict=True)):
        segments, num_tokens = path_to(node), ends[node]
        names = names_of.get(node)
        if names is None:
            names = names_of[node] = BlockNames(segments)
        num_known = 0
        for segment in segments:
            if segment.index not in seen:
                break
            num_known += segment.num_blocks
        seen.update([segment.index for segment in segments])
        prompts.append(
            Prompt(
                number=number,
                at_s=asked.at_s - first_s,
                num_tokens=num_tokens,
                output_tokens=asked.output_tokens,
                segments=segments,
                names=names,
                place=_place(number, num_tokens, names, asked.output_tokens if max_tokens is None else max_tokens),
                reusable_tokens=min(num_known * block_tokens, max(0, num_tokens - 1)),
            )
        )
    return PromptTree(prompts=tuple(prompts), block_tokens=block_tokens)


def _nodes(trace: Trace) -> tuple[list[int], list[int], list[int]]:
    """(node at which each prompt ends, tokens from the root to each node, its parent). Node 0 is the root.

    A run that begins alike and ends sooner elsewhere is cut there: the longer one hangs below the shorter.
    """
    nodes: dict[tuple[int, str, int], int] = {}
    ends, begins = [0], [0]
    lengths: dict[tuple[int, str], list[int]] = {}  # nodes of runs of one content from one place
    ends_of: list[int] = []
    for request in trace.requests:
        node = 0
        for run in request.runs:
            key = (node, run.name, run.num_tokens)
            known = nodes.get(key)
            if known is None:
                known = nodes[key] = len(ends)
                ends.append(ends[node] + run.num_tokens)
                begins.append(node)
                lengths.setdefault(key[:2], []).append(known)
            node = known
        ends_of.append(node)
    parents = begins
    for alike in lengths.values():
        if len(alike) > 1:
            alike.sort(key=ends.__getitem__)
            for shorter, longer in pairwise(alike):
                parents[longer] = shorter
    return ends_of, ends, parents


def _place(number: int, num_tokens: int, names: BlockNames, max_tokens: int) -> Place:
    return Place(
        request_id=f"{number:032x}",
        attempt=0,
        model_id=MODEL_ID,
        num_tokens=num_tokens,
        expected_output_tokens=max_tokens,
        num_choices=1,
        block_hashes=cast("tuple[bytes, ...]", names),
        tenant="",
        priority=0,
        slo_ttft_s=None,
        slo_tpot_s=None,
        excluded=(),
        local_only=False,
    )
