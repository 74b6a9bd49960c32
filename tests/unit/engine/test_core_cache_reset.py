"""A reset drops what nobody uses and nothing else, and the router is told exactly what is left."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.events import CacheCleared, Command, LoadBlocks, LoadDone, PublishKvEvents, SaveBlocks
from protocol.messages import KvEvents
from protocol.worker import AllBlocksCleared, KvEvent
from router.prefix_index import PrefixIndex
from tests.core_bench import Bench, of, offer, prompt
from tests.sim_cluster import layout, make_request

pytestmark = pytest.mark.pure

HOST_TIER = {"host_tier_bytes": 64 * layout().block_bytes}


def events_of(commands: list[Command]) -> list[KvEvent]:
    return [event for published in of(commands, PublishKvEvents) for event in published.events]


class Router:
    """The index a router keeps of one worker, fed from its commands."""

    def __init__(self) -> None:
        self.index = PrefixIndex(max_bytes=1 << 20, speculative_ttl_s=0.0)
        self.index.join("w0", 1)

    def hear(self, commands: list[Command]) -> None:
        for event in events_of(commands):
            _, complete = self.index.apply(KvEvents(worker_id="w0", epoch=1, events=(event,)))
            assert complete, f"a gap before {event}"

    def agrees_with(self, bench: Bench) -> bool:
        told = bench.core.kv_snapshot()
        assert max(1, self.index.next_number("w0")) == told.next_event_number
        held = [set(told.hashes), set(told.host_hashes)]
        return [held_by(self.index, tier) for tier in ("_device", "_host")] == held


def held_by(index: PrefixIndex, tier: str) -> set[bytes]:
    return set(getattr(index, tier))


def test_a_cached_block_is_dropped_and_a_held_one_is_not() -> None:
    """How: one prompt is done, one decodes; both share their first block.

    Seen to fail with `evict_cached` that evicts nothing, and with `restate` that does not tell what is left.
    """
    bench, router = Bench(num_blocks=32), Router()
    router.hear(bench.submit(make_request(1, prompt(48), max_tokens=1)))
    while bench.steps:
        router.hear(bench.finish_step())
    router.hear(bench.submit(make_request(2, prompt(16) + prompt(32, first=500), max_tokens=8)))
    router.hear(bench.finish_step())  # computed; seven more tokens to come
    _, owned, _, cached = bench.blocks
    assert owned and cached
    commands = bench.on(CacheCleared())
    router.hear(commands)
    assert isinstance(events_of(commands)[0], AllBlocksCleared)
    assert bench.blocks == (32 - owned, owned, 0, 0)
    assert held_by(router.index, "_device") and router.agrees_with(bench)
    while bench.steps:
        router.hear(bench.finish_step())
    assert [run.finish_reason is not None for run in bench.runs()].count(True) == 2, "the running request went on to its end"
    assert bench.blocks[1:3] == (0, 0) and router.agrees_with(bench)


def test_an_offer_that_is_read_keeps_its_blocks() -> None:
    """Seen to fail with a reset that ends leases."""
    bench = Bench(num_blocks=32)
    offer(bench, make_request(1, prompt(48), max_tokens=4))
    leased = bench.blocks[2]
    bench.on(CacheCleared())
    assert leased and bench.blocks == (32 - leased, 0, leased, 0)


def test_after_a_reset_a_prompt_is_computed_again() -> None:
    """With a host tier: the reset does not save what it drops. Seen to fail with `clear` that leaves `on_evict` in place."""
    bench = Bench(num_blocks=32, core=HOST_TIER)
    for number in (1, 2):
        bench.submit(make_request(number, prompt(64), max_tokens=1))
        bench.finish_all()
        assert not of(bench.on(CacheCleared()), SaveBlocks)
        assert bench.counter("prompt_tokens_computed") == number * 64 and bench.counter("host_blocks_saved") == 0
    assert bench.core.kv_snapshot().hashes == () and bench.core.kv_snapshot().host_hashes == ()


def test_a_slot_that_is_read_stays_until_it_was_read() -> None:
    """How: a prompt's blocks were evicted into the tier and are being loaded back while the reset comes.

    Seen to fail with `HostTier.clear` that drops entries with readers.
    """
    bench = Bench(num_blocks=8, core=HOST_TIER)
    bench.submit(make_request(1, prompt(64), max_tokens=1))
    bench.finish_all()
    bench.submit(make_request(2, prompt(112, first=500), max_tokens=1))  # evicts the first
    bench.finish_all()
    (load,) = of(bench.submit(make_request(3, prompt(64), max_tokens=1)), LoadBlocks)
    bench.on(CacheCleared())
    bench.on(LoadDone(load_id=load.load_id))
    bench.finish_all()
    assert bench.counter("host_loads") == 1
    assert len(bench.core.kv_snapshot().host_hashes) == len(load.slots)
    bench.on(CacheCleared())
    assert bench.core.kv_snapshot().host_hashes == ()


ACTS = st.lists(st.one_of(st.tuples(st.just("submit"), st.integers(0, 3), st.booleans()), st.just("step"), st.just("reset")), max_size=40)


@settings(max_examples=150, deadline=None)
@given(acts=ACTS, has_tier=st.booleans())
def test_router_and_worker_agree_after_any_resets(acts: list[Any], has_tier: bool) -> None:
    """How: prompts with common beginnings in a pool too small for them, resets at any moment; the core's laws are asserted at every event.

    Seen to fail with `restate` that numbers its event one too high.
    """
    bench, router = Bench(num_blocks=12, core=HOST_TIER if has_tier else None), Router()
    for number, act in enumerate([*acts, "reset"]):
        if act == "step":
            router.hear(bench.finish_step() if bench.steps else [])
        elif act == "reset":
            router.hear(bench.on(CacheCleared()))
        else:
            _, kind, is_long = act
            text = prompt(32) + prompt(32 + 16 * is_long, first=100 * kind)
            commands = bench.submit(make_request(number, text, max_tokens=3))
            router.hear(commands)
            for load in of(commands, LoadBlocks):
                router.hear(bench.on(LoadDone(load_id=load.load_id)))
        assert router.agrees_with(bench)
