"""The links between simulated workers: copies that meet on one share its rate, so a worker that everybody pulls from is slow for all.

    worker ──out──► fabric that never is the bottleneck ──in──► worker
    rate of a copy = bytes_per_s / max(copies out of its source, copies into its target)

Even shares at the busier end: what a fair network interface gives, without handing on what a copy that is slower elsewhere leaves over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from simulator.loop import Timer, VirtualLoop


@dataclass(slots=True, kw_only=True, eq=False)
class Copy:
    """Bytes on their way. `since_s`: when `left_bytes` was true."""

    source: str
    target: str
    left_bytes: float
    since_s: float
    on_done: Callable[[], None]
    rate: float = 0.0  # bytes a second
    timer: Timer | None = None


class SharedLinks:
    """Each worker has one link out and one in, of the same rate."""

    def __init__(self, loop: VirtualLoop, *, bytes_per_s: float) -> None:
        assert bytes_per_s > 0
        self._loop = loop
        self._bytes_per_s = bytes_per_s
        self._out: defaultdict[str, dict[Copy, None]] = defaultdict(dict)  # in the order they began
        self._in: defaultdict[str, dict[Copy, None]] = defaultdict(dict)

    @property
    def num_copies(self) -> int:
        """Under way."""
        return sum(map(len, self._out.values()))

    def alone_s(self, size_bytes: int) -> float:
        """What a copy takes that shares no link: none is quicker."""
        return size_bytes / self._bytes_per_s

    def start(self, source: str, target: str, size_bytes: int, on_done: Callable[[], None]) -> Copy:
        """`on_done` is called when all has arrived, unless `stop` came first."""
        copy = Copy(source=source, target=target, left_bytes=size_bytes, since_s=self._loop.now, on_done=on_done)
        self._out[source][copy] = self._in[target][copy] = None
        self._share_anew(copy)
        return copy

    def stop(self, copy: Copy) -> None:
        """Its share goes to the others. Nothing happens to one that is done."""
        if copy.timer is None:
            return
        copy.timer.cancel()
        copy.timer = None
        del self._out[copy.source][copy], self._in[copy.target][copy]
        self._share_anew(copy)

    def _share_anew(self, changed: Copy) -> None:
        """Of those that meet `changed` on a link, which came or went."""
        out, into = self._out[changed.source], self._in[changed.target]
        for copy in {**out, **into}:
            rate = self._bytes_per_s / max(len(self._out[copy.source]), len(self._in[copy.target]))
            if rate != copy.rate:
                self._pace(copy, rate)

    def _pace(self, copy: Copy, rate: float) -> None:
        now = self._loop.now
        copy.left_bytes = max(0.0, copy.left_bytes - copy.rate * (now - copy.since_s))
        copy.since_s, copy.rate = now, rate
        if copy.timer is not None:
            copy.timer.cancel()
        copy.timer = self._loop.call_later(copy.left_bytes / rate, lambda: self._end(copy))

    def _end(self, copy: Copy) -> None:
        self.stop(copy)
        copy.on_done()
