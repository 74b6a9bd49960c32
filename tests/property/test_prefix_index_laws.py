"""The prefix index equals plain sets, whatever happens: stores, evictions, gaps, replays, snapshots, churn, guesses and a full index."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages import KvEvents, KvSnapshot
from protocol.worker import AllBlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from router.prefix_index import ENTRY_BYTES, PAIR_BYTES, PrefixIndex
from tests.unit.router.router_world import chain

pytestmark = pytest.mark.pure

CHAINS = [chain(("chain", i), 12) for i in range(2)]
CHAINS.append(CHAINS[0][:6] + chain("branch", 6, parent=CHAINS[0][5]))


@dataclass
class Truth:
    """A worker's cache as a plain set, the events it has sent, and what a naive listener makes of those delivered."""

    held: set[bytes] = field(default_factory=set)
    log: list[KvEvent] = field(default_factory=list)
    believed: set[bytes] = field(default_factory=set)
    next_number: int = 1
    guesses: list[tuple[float, set[bytes]]] = field(default_factory=list)

    def happen(self, event: KvEvent) -> None:
        self.log.append(event)
        apply(self.held, event)

    def hear(self, events: list[KvEvent]) -> bool:
        for event in events:
            if event.number == self.next_number:
                apply(self.believed, event)
                self.next_number += 1
            elif event.number > self.next_number:
                return False
        return True

    def expects(self, h: bytes, now: float) -> bool:
        return h in self.believed or any(until > now and h in hashes for until, hashes in self.guesses)


def apply(held: set[bytes], event: KvEvent) -> None:
    if isinstance(event, BlocksStored):
        held.update(event.hashes)
    elif isinstance(event, BlocksRemoved):
        held.difference_update(event.hashes)
    else:
        held.clear()


def depth(hashes: tuple[bytes, ...], holds: object) -> int:
    return next((i for i, h in enumerate(hashes) if not holds(h)), len(hashes))  # type: ignore[operator]


index_operations = st.lists(
    st.tuples(
        st.sampled_from(("store", "store", "remove", "clear", "lose", "resync", "snapshot", "guess", "guess", "time", "rejoin")),
        st.integers(0, 1),
        st.sampled_from((0, 2)),
        st.integers(0, 12),
        st.integers(0, 12),
    ),
    min_size=10,
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(index_operations)
def test_index_equals_a_naive_set_model(steps: list[tuple[str, int, int, int, int]]) -> None:
    """Under any stores, removals, lost frames, replays, snapshots, guesses and rejoins; and once resynced it equals the workers.

    Seen to fail with a removal that clears the bit of a live guess, and with `>` for `>=` in the guess's end.
    """
    index = PrefixIndex(max_bytes=1 << 30, speculative_ttl_s=2.0)
    truths = {}
    for name in ("a", "b"):
        index.join(name, 1)
        index.replace(KvSnapshot(worker_id=name, epoch=1, next_event_number=1, hashes=(), parents=()))
        truths[name] = Truth()
    now = 0.0
    for operation, w, c, low, high in steps:
        name, hashes = "ab"[w], CHAINS[c]
        truth = truths[name]
        match operation:
            case "store" | "remove" | "clear" | "lose":
                number = len(truth.log) + 1
                event: KvEvent = {
                    "store": BlocksStored(number=number, parent=b"", hashes=hashes[low:high]),
                    "remove": BlocksRemoved(number=number, hashes=hashes[low:high]),
                    "clear": AllBlocksCleared(number=number),
                    "lose": BlocksStored(number=number, parent=b"", hashes=hashes[:high]),
                }[operation]
                truth.happen(event)
                if operation != "lose":
                    complete = index.apply(KvEvents(worker_id=name, epoch=1, events=(event,)))[1]
                    assert complete == truth.hear([event])
            case "resync":
                number = index.next_number(name)
                assert number == truth.next_number
                events = truth.log[max(0, number - 1 - low) :]  # a replay may begin early
                assert index.apply(KvEvents(worker_id=name, epoch=1, events=tuple(events)))[1] and truth.hear(events)
                assert truth.believed == truth.held
            case "snapshot":
                resync(index, name, truth)
            case "guess":
                num_held = index.match(hashes[:high]).device_tokens.get(name, 0) // 16
                index.speculate(name, hashes[:high], now, num_held=num_held if low % 2 else 0)
                truth.guesses.append((now + 2.0, set(hashes[:high])))
            case "time":
                now += low / 4
                index.expire(now)
            case "rejoin":
                index.join(name, 1)
                index.replace(KvSnapshot(worker_id=name, epoch=1, next_event_number=1, hashes=(), parents=()))
                truths[name] = Truth()
        for hashes in CHAINS:
            expected = {n: 16 * d for n, t in truths.items() if (d := depth(hashes, lambda h, t=t: t.expects(h, now)))}
            assert index.match(hashes).total_tokens == expected
    index.expire(now + 2.0)
    for name, truth in truths.items():
        resync(index, name, truth)
    for hashes in CHAINS:
        expected = {n: 16 * d for n, t in truths.items() if (d := depth(hashes, t.held.__contains__))}
        assert index.match(hashes).total_tokens == expected
    assert index.num_entries == len(set().union(*(t.held for t in truths.values())))


def resync(index: PrefixIndex, name: str, truth: Truth) -> None:
    number = len(truth.log) + 1
    index.replace(
        KvSnapshot(worker_id=name, epoch=1, next_event_number=number, hashes=tuple(sorted(truth.held)), parents=(b"",) * len(truth.held))
    )
    truth.believed, truth.next_number = set(truth.held), number


# --- prefix-closed ----------------------------------------------------------------------------------------------------

SLOT_BYTES = ENTRY_BYTES + PAIR_BYTES


def closed_event(operation: str, truth: Truth, hashes: tuple[bytes, ...], low: int, high: int) -> KvEvent | None:
    """What a worker tells that holds no block without its parents. None: nothing changes."""
    number = len(truth.log) + 1
    if operation == "clear":
        return AllBlocksCleared(number=number)
    if operation == "remove":
        branches = [c for c in CHAINS if low < len(hashes) and c[low] == hashes[low]]
        gone = dict.fromkeys(h for c in branches for h in reversed(c[low:]) if h in truth.held)
        return BlocksRemoved(number=number, hashes=tuple(gone)) if gone else None
    known = depth(hashes, truth.held.__contains__)
    return BlocksStored(number=number, parent=b"", hashes=hashes[known:high]) if known < high else None


def rejoin(index: PrefixIndex, truths: dict[str, Truth], name: str) -> None:
    index.join(name, 1)
    index.replace(KvSnapshot(worker_id=name, epoch=1, next_event_number=1, hashes=(), parents=()))
    truths[name] = Truth()


@settings(max_examples=400, deadline=None)
@given(index_operations, st.sampled_from((8, 16, 24, 1000)))
def test_prefix_closed_index_equals_the_sets_it_believes(steps: list[tuple[str, int, int, int, int]], num_slots: int) -> None:
    """As above with workers that keep what they promise, and with too little memory for all: what is found is what the walk would find.

    How: after each step every match is compared with the beginnings in plain sets, the index's own or those of what workers told. Once
    everything fits, a snapshot makes both the same.
    Seen to fail with a worker whose blocks were not all taken still searched, with the bisect of such a worker's own blocks, and with
    the second half of a run forgotten by the search.
    """
    index = PrefixIndex(max_bytes=num_slots * SLOT_BYTES, speculative_ttl_s=2.0, prefix_closed=True)
    truths: dict[str, Truth] = {}
    for name in ("a", "b"):
        rejoin(index, truths, name)
    now = 0.0
    for operation, w, c, low, high in steps:
        name, hashes = "ab"[w], CHAINS[c]
        truth = truths[name]
        match operation:
            case "store" | "remove" | "clear" | "lose":
                event = closed_event(operation, truth, hashes, low, high)
                if event is not None:
                    truth.happen(event)
                    if operation != "lose":
                        assert index.apply(KvEvents(worker_id=name, epoch=1, events=(event,)))[1] == truth.hear([event])
            case "resync":
                events = truth.log[max(0, index.next_number(name) - 1 - low) :]
                assert index.apply(KvEvents(worker_id=name, epoch=1, events=tuple(events)))[1] and truth.hear(events)
            case "snapshot":
                resync(index, name, truth)
            case "guess":
                num_held = index.match(hashes[:high]).device_tokens.get(name, 0) // 16
                index.speculate(name, hashes[:high], now, num_held=num_held)
            case "time":
                now += low / 4
                index.expire(now)
            case "rejoin":
                rejoin(index, truths, name)
        for hashes in CHAINS:
            found = index.match(hashes).total_tokens
            held = {n: index._holdings[n].device | index._holdings[n].guesses.keys() for n in truths}
            assert found == {n: 16 * d for n, held_by in held.items() if (d := depth(hashes, held_by.__contains__))}
            for n, truth in truths.items():
                told = 16 * depth(hashes, (truth.believed & index._holdings[n].device).__contains__)
                assert index.confirmed_tokens(n, hashes, 16 * len(hashes)) == told
                assert index.num_dropped or told == 16 * depth(hashes, truth.believed.__contains__)
        assert index.size_bytes <= num_slots * SLOT_BYTES


def test_events_that_began_before_we_listened_are_not_searched() -> None:
    """A worker whose first word is event 5 told of the parents earlier. Seen to fail with the number not looked at."""
    hashes = CHAINS[0]
    index = PrefixIndex(max_bytes=1 << 30, speculative_ttl_s=2.0, prefix_closed=True)
    for name in ("a", "b"):
        index.join(name, 1)
    index.apply(KvEvents(worker_id="a", epoch=1, events=(BlocksStored(number=1, parent=b"", hashes=hashes[:1]),)))
    index.apply(KvEvents(worker_id="b", epoch=1, events=(BlocksStored(number=5, parent=hashes[3], hashes=hashes[4:]),)))
    assert index.match(hashes).total_tokens == {"a": 16}
    index.replace(KvSnapshot(worker_id="b", epoch=1, next_event_number=6, hashes=hashes, parents=(b"",) * len(hashes)))
    assert index.match(hashes).total_tokens == {"a": 16, "b": 16 * len(hashes)}
