"""What E2 remembers equals what a list of all requests would say."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.worker import BlocksRemoved, BlocksStored, Role
from router.policies.api import Booked, WorkerJoined
from router.policies.e2_history import History, PromptNode
from router.policies.sliding_sums import NUM_STEPS, SlidingSums
from tests.unit.router.policy_view import PER_TOKEN
from tests.unit.router.router_world import chain, place

pytestmark = pytest.mark.pure

WORKERS = ("a", "b")


def prompt(shape: tuple[int, ...]) -> tuple[bytes, ...]:
    """A path through a forest in which every three blocks may go on in several ways; its last block may be cut short."""
    hashes: tuple[bytes, ...] = ()
    for turn in shape:
        hashes += chain(("turn", turn), 3, parent=hashes[-1] if hashes else b"")
    return hashes


shapes = st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=5), st.integers(0, 2)).map(
    lambda drawn: prompt(tuple(drawn[0]))[: 3 * len(drawn[0]) - drawn[1]]
)
requests = st.lists(st.tuples(shapes, st.sampled_from(WORKERS)), max_size=25)


def booked(history: History, made: list[tuple[tuple[bytes, ...], str]]) -> None:
    for name in WORKERS:
        history.join(WorkerJoined(worker_id=name, role=Role.PREFILL))
    for number, (hashes, worker) in enumerate(made):
        request = place(number, num_tokens=16 * len(hashes), block_hashes=hashes)
        event = Booked(request=request, prefill_worker=worker, decode_worker="d", cached_tokens=0, prefill_cost=PER_TOKEN)
        history.book(event, 100.0)


def node_ending(history: History, hashes: tuple[bytes, ...]) -> PromptNode:
    node = history._tree.find(hashes)
    assert node is not None and node.name == hashes[-1], "every prompt ends where a node does"
    return node


@settings(max_examples=300, deadline=None)
@given(requests)
def test_counts_of_a_node_are_those_of_the_prompts_that_run_through_it(made: list[tuple[tuple[bytes, ...], str]]) -> None:
    """Whatever runs were cut in whatever order. Loads are those of prompts whose deepest large node it is.

    Seen to fail with `shared` not copied to the upper part of a cut run, and with a load left at a node that is large no more.
    """
    history = History(window_s=180.0, max_blocks=1 << 20, max_nodes=1 << 20)
    booked(history, made)
    leaves = [(node_ending(history, hashes), worker, len(hashes)) for hashes, worker in made]
    for node in history._tree:
        assert node.parent is not None and node.start == node.parent.end and node.parent.children[node.hashes[0]] is node
        for worker in WORKERS:
            through = [leaf for leaf, w, _ in leaves if w == worker and node in leaf.up()]
            keyed = [blocks for leaf, w, blocks in leaves if w == worker and next(n for n in leaf.up() if n.is_large) is node]
            shared, load = node.record.shared.get(worker), node.record.load.get(worker)
            assert (shared.at(history.step(100.0))[0] if shared is not None else 0) == len(through)
            counted = load.at(history.step(100.0)) if load is not None else (0, 0)
            assert tuple(counted[:2]) == (len(keyed), 16 * sum(keyed))
            assert node.record.held.get(worker, 0) == (len(node.hashes) if through else 0)


@settings(max_examples=100, deadline=None)
@given(requests, st.lists(st.tuples(shapes, st.sampled_from(WORKERS), st.booleans()), max_size=10), st.integers(6, 40))
def test_a_restored_history_tells_the_same(
    made: list[tuple[tuple[bytes, ...], str]], changes: list[tuple[tuple[bytes, ...], str, bool]], max_blocks: int
) -> None:
    """Through JSON, with evictions and a tree too small. Seen to fail with the order of `coldest` lost."""
    history = History(window_s=180.0, max_blocks=max_blocks, max_nodes=1 << 20)
    booked(history, made)
    for hashes, worker, stored in changes:
        event = BlocksStored(number=1, parent=b"", hashes=hashes[-2:]) if stored else BlocksRemoved(number=1, hashes=hashes[-2:])
        history.change(worker, (event,))
    assert history._tree.num_blocks <= max_blocks
    other = History(window_s=180.0, max_blocks=max_blocks, max_nodes=1 << 20)
    other.restore(json.loads(json.dumps(history.state())))
    assert json.dumps(other.state()) == json.dumps(history.state())
    for worker in WORKERS:
        assert [n.name for n, *_ in other.victims(worker, 100.0)] == [n.name for n, *_ in history.victims(worker, 100.0)]
    assert all(a.start == b.start for a, b in zip(history._tree, other._tree, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-5, 50), st.booleans()), max_size=40), st.integers(0, 60))
def test_sums_are_those_of_the_window(entries: list[tuple[int, int, bool]], later: int) -> None:
    """Against a list; two sums added and taken apart again are what they were. Seen to fail with a window a step too long in `at`."""
    step, kept = 0, []
    sums, others = SlidingSums(1), SlidingSums(1)
    for gap, value, other in entries:
        step += gap
        (others if other else sums).add(step, value)
        kept.append((step, value, other))
    now = step + later

    def expected(other: bool) -> int:
        return sum(value for at, value, o in kept if o is other and now - NUM_STEPS < at <= now)

    assert (sums.at(now)[0], others.at(now)[0]) == (expected(False), expected(True))
    sums.expire(now)
    others.expire(now)
    before = sums.at(now)[0]
    sums.absorb(others)
    assert sums.at(now)[0] == before + expected(True)
    sums.absorb(others, -1)
    assert sums.at(now)[0] == before
