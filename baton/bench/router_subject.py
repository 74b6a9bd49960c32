"""Our router as a benchmark's subject: `python -m baton.bench.router_subject` speaks baton/bench/spoken.py.

    load      {stage, num_workers, num_blocks, num_live, seed}   ->  {subject, ...}      what the stage needs, filled
    prepare   {figure, repeats}                                  ->  {}
    run       {}                                                 ->  {seconds: [s, ...], cpu_s: [s, ...]}

One figure is one operation done `repeats` times; `seconds` are of the wall clock, `cpu_s` of the thread that did it, which other
processes of a busy machine lengthen less.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from random import Random
from typing import Any

from baton.bench.router_load import GATEWAY, NUM_PREFILLING, Fleet, Hashes, draw_hashes, fresh, make_index
from baton.bench.spoken import Unsupported, answer
from protocol.block_hash import block_hashes
from protocol.messages import Place
from protocol.request import token_buffer
from router.events import FromGateway

ROOT = b"r" * 16
LENGTHS = {"4k": 4096, "32k": 32768}


class Timer:
    """Seconds of each act on both clocks."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_s: list[float] = []

    def time(self, act: Callable[..., object], *arguments: object) -> None:
        cpu, wall = time.thread_time(), time.perf_counter()
        act(*arguments)
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_s.append(time.thread_time() - cpu)

    def reply(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "cpu_s": self.cpu_s}


class RouterSubject:
    """Answers for the stages of baton/bench/router_run.py."""

    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        self._asked = asked
        self._rng = Random(f"{asked['seed']} figures")
        self._kinds: dict[str, Callable[[str, int], Timer]] = {}
        load = {"index": self._load_indexes, "decide": self._load_fleets, "wide": self._load_wide, "socket": self._load_socket}
        told = load[asked["stage"]]()
        return {"subject": f"baton {version('baton-serve')}", **told}

    def prepare(self, figure: str, repeats: int) -> None:
        kind, _, of = figure.partition("/")
        if kind not in self._kinds:
            raise Unsupported(f"{figure} is no figure of this stage")
        self._figure = (self._kinds[kind], of, repeats)

    def run(self) -> dict[str, Any]:
        act, of, repeats = self._figure
        return act(of, repeats).reply()

    # --- the index alone ---

    def _load_indexes(self) -> dict[str, Any]:
        asked = self._asked
        before = resident_bytes()
        self._searched, self._caches = make_index(asked["num_workers"], asked["num_blocks"], asked["seed"], prefix_closed=True)
        taken = resident_bytes() - before
        self._walked, _ = make_index(asked["num_workers"], asked["num_blocks"], asked["seed"], prefix_closed=False)
        self._kinds = {"hash": self._hash, "match": self._match}
        index = self._searched
        return {"index_bytes": taken, "told_bytes": index.size_bytes, "num_blocks": index.num_entries, "num_pairs": index.num_pairs}

    def _hash(self, of: str, repeats: int) -> Timer:
        timer = Timer()
        for _ in range(repeats):
            tokens = token_buffer([self._rng.getrandbits(17) for _ in range(LENGTHS[of])])
            timer.time(block_hashes, ROOT, tokens)
        return timer

    def _match(self, of: str, repeats: int) -> Timer:
        index = self._searched if of == "4k/search" else self._walked
        timer = Timer()
        for _ in range(repeats):
            hashes = prompt_held(self._caches.held, self._rng)
            timer.time(index.match, hashes)
        return timer

    # --- decisions ---

    def _load_fleets(self) -> dict[str, Any]:
        """Two fleets alike, one with few live requests and one with `num_live`."""
        asked = self._asked
        fleets = {}
        for name, num_live in (("1k", 1000), ("100k", asked["num_live"])):
            fleets[name] = Fleet(asked["num_workers"], asked["num_blocks"], asked["seed"])
            fleets[name].fill_window(num_live, LENGTHS["4k"])
        self._fleets = fleets
        self._kinds = {"decide": self._decide, "life": self._life}
        return {name: len(fleet.core.bookings) for name, fleet in fleets.items()}

    def _load_wide(self) -> dict[str, Any]:
        self._fleets = {"1k": Fleet(self._asked["num_workers"], self._asked["num_blocks"], self._asked["seed"])}
        self._fleets["1k"].fill_window(1000, LENGTHS["4k"])
        self._kinds = {"decide": self._decide, "match": self._match_of_fleet}
        return {}

    def _decide(self, of: str, repeats: int) -> Timer:
        """Place in, Assigned out, booked. `of`: the prompt's length and the window."""
        length, _, window = of.partition("/")
        fleet, timer = self._fleets[window or "1k"], Timer()
        for _ in steps(fleet, [fleet.request(LENGTHS[length]) for _ in range(repeats)], partial(timer.time, fleet.core.on)):
            fleet.core.catch_up()
        return timer

    def _life(self, of: str, repeats: int) -> Timer:
        """All that a request costs the router: placed, index caught up, first token, end, and its share of reports and ticks.

        One figure for all of them, so that its mean is the inverse of the rate.
        """
        fleet, timer = self._fleets["1k"], Timer()
        requests = [fleet.request(LENGTHS[of]) for _ in range(repeats)]

        def live() -> None:
            for _ in steps(fleet, requests, fleet.core.on):
                fleet.core.catch_up()

        timer.time(live)
        return timer

    def _match_of_fleet(self, of: str, repeats: int) -> Timer:
        fleet, timer = self._fleets["1k"], Timer()
        for _ in range(repeats):
            hashes = prompt_held(fleet.caches.held, self._rng)
            timer.time(fleet.core.index.match, hashes)
        return timer

    # --- over the socket ---

    def _load_socket(self) -> dict[str, Any]:
        from baton.bench.router_socket import SocketRun

        self._socket = SocketRun(self._asked["num_workers"], self._asked["num_blocks"], self._asked["seed"])
        self._kinds = {"socket": self._over_socket}
        return {}

    def _over_socket(self, of: str, repeats: int) -> Timer:
        timer = Timer()
        timer.seconds = self._socket.run(LENGTHS[of], repeats)
        return timer


def steps(fleet: Fleet, requests: list[Place], decide: Callable[..., object]) -> Iterator[None]:
    """Each request from Place to Done, with as many living as before; `decide` makes the core take the Place. Yields after each."""
    prefilling: deque[Place] = deque()
    for place in requests:
        fleet.pass_time()
        decide(FromGateway(gateway=GATEWAY, message=place), fleet.now)
        yield
        prefilling.append(place)
        if len(prefilling) > NUM_PREFILLING:
            decoding = prefilling.popleft()
            fleet.prefill_done(decoding)
            fleet.live.append(decoding)
            fleet.done(fleet.live.popleft())
    for place in prefilling:
        fleet.prefill_done(place)
        fleet.done(place)


def prompt_held(held: list[Hashes], rng: Random) -> Hashes:
    """Half of the prompts are held from end to end by one worker, half up to the middle by many."""
    chain = rng.choice(held)
    middle = len(chain) // 2
    return fresh(chain) if rng.random() < 0.5 else fresh(chain[:middle]) + draw_hashes(rng, len(chain) - middle)


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * 4096


if __name__ == "__main__":
    sys.setswitchinterval(0.05)
    answer(RouterSubject())
