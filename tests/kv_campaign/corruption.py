"""The corruption campaign as a whole: bulk slices over processes, the live part, the demo model; what it prints.

Bulk injections differ by number alone, so a slice of numbers is a task; each process builds its pools and transports once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

from baton.bench.report import Row
from tests.kv_campaign.backends import Hooks, Pair
from tests.kv_campaign.bulk import Bench
from tests.kv_campaign.cases import Kind, draw
from tests.kv_campaign.layouts import LAYOUTS
from tests.kv_campaign.live import run_live
from tests.kv_campaign.tally import Tally, corruption_rows, interval

SLICE = 2000
SWITCH_INTERVAL_S = 1e-4  # threads of one process hand each other the interpreter for every piece; 5 ms would be most of a pull
OnProgress = Callable[[int], None]


class Benches:
    """Every layout on every backend, in this process. Built when first used; closed by `close`."""

    def __init__(self, backends: Sequence[str], seed: int) -> None:
        self._backends = backends
        self._seed = seed
        self._hooks = Hooks()
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self._hooks.installed())
        self._benches: dict[str, list[Bench]] = {}

    def inject(self, first: int, last: int) -> Tally:
        """Cases `first` to `last` of the campaign."""
        tally = Tally()
        for number in range(first, last):
            case = draw(number, self._seed, self._backends)
            tally.add(self._of(case.backend)[case.layout_index].inject(case))
        return tally

    def close(self) -> None:
        self._stack.close()

    def _of(self, backend: str) -> list[Bench]:
        if backend not in self._benches:
            run_dir = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-"))
            pair = Pair(backend, run_dir, self._hooks)
            made = self._benches[backend] = [Bench(pair, index, self._hooks, self._seed) for index in range(len(LAYOUTS))]
            for bench in made:
                self._stack.callback(bench.close)
            self._stack.callback(pair.close)  # before the pools
        return self._benches[backend]


def run_bulk(total: int, seed: int, backends: Sequence[str], *, jobs: int, on_progress: OnProgress = lambda done: None) -> Tally:
    tally = Tally()
    slices = [(first, min(first + SLICE, total)) for first in range(0, total, SLICE)]
    if jobs == 1:
        with contextlib.closing(Benches(backends, seed)) as benches, _quick_switches():
            for part in slices:
                tally.merge(benches.inject(*part))
                on_progress(part[1])
        return tally
    context = multiprocessing.get_context("spawn")
    done = 0
    with context.Pool(jobs, _begin_process, (backends, seed)) as pool:
        for made in pool.imap_unordered(_inject_slice, slices):
            tally.merge(made)
            done += made.num_injected()
            on_progress(done)
        pool.close()
        pool.join()
    return tally


def run_live_part(total: int, seed: int, backends: Sequence[str], *, on_progress: OnProgress = lambda done: None) -> Tally:
    """`total` injections on each of `backends`, between two processes."""
    tally = Tally()
    with _quick_switches():
        for backend in backends:
            before = tally.num_injected()
            run_live(backend, total, seed, tally.add)
            assert tally.num_injected() == before + total
            on_progress(tally.num_injected())
    return tally


def run_demo(total: int, seed: int) -> list[Row]:
    """How often damage that nothing checked shows in the demo model's text."""
    from tests.kv_campaign.demo_tokens import NUM_DECODED, judge  # imports torch

    tally = judge(total, seed)
    rows = []
    for kinds, label in [(tuple(Kind), ""), *(((kind,), f"/{kind.value}") for kind in Kind)]:
        hits, changed, first = (sum(counter[k] for k in kinds) for counter in (tally.hits, tally.any_token, tally.next_token))
        details = {
            "count": changed,
            "of": hits,
            "interval": [round(end, 4) for end in interval(changed, hits)],
            "tokens_compared": NUM_DECODED,
            "next_token_differs": round(first / hits, 4) if hits else None,
        }
        name = f"corruption/unchecked/demo_model_text_differs{label}"
        rows.append(Row(name=name, value=round(changed / hits, 4) if hits else None, unit="share", details=details))
    return rows


def bulk_rows(tally: Tally) -> list[Row]:
    return corruption_rows("corruption", tally)


def live_rows(tally: Tally, backends: Sequence[str]) -> list[Row]:
    rows = corruption_rows("corruption/live", tally)
    return rows + [Row(name=f"corruption/live/injections/{b}", value=tally.num_injected(backend=b), unit="injections") for b in backends]


def sections(bulk: Tally, live: Tally) -> dict[str, object]:
    """What stands behind the rows."""
    return {
        "layouts": [
            {
                "name": layout.name,
                "model": layout.model,
                "block_bytes": layout.layout.block_bytes,
                "real_block_bytes": layout.real_block_bytes,
                "num_layers": len(layout.spans),
                "injections_a_layer": _ends([bulk.by_layer[index, layer] for layer in range(len(layout.spans))]),
            }
            for index, layout in enumerate(LAYOUTS)
        ],
        "transfer_errors": [
            {"part": part, "backend": backend, "kind": kind.value, "error": error, "count": count}
            for part, tally in (("bulk", bulk), ("live", live))
            for (backend, kind, error), count in sorted(tally.errors.items(), key=lambda item: str(item[0]))
        ],
        "cells": bulk.cells(),
        "live_cells": live.cells(),
    }


def _ends(counts: list[int]) -> list[int]:
    return [min(counts), max(counts)]


_benches: Benches | None = None  # of a process of the pool


def _begin_process(backends: Sequence[str], seed: int) -> None:
    global _benches
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _benches = Benches(backends, seed)
    # The pool ends its processes by leaving them; their sockets and files go with the temporary directories.
    multiprocessing.util.Finalize(_benches, _benches.close, exitpriority=10)


def _inject_slice(part: tuple[int, int]) -> Tally:
    assert _benches is not None
    return _benches.inject(*part)


@contextlib.contextmanager
def _quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    yield
    sys.setswitchinterval(before)
