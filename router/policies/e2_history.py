"""What E2 remembers of the last minutes: which prompts share what, who computed them, what it cost, and what each worker holds.

Loads are kept as counts of requests and tokens, never as seconds: they are priced when they are asked for, with what is known of the
worker by then, so a cost model that was wrong at first does not weigh for three minutes. Memory is bounded by the tree's blocks and the
number of workers, whatever the rate of requests; nothing is ever summed over requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.request import AttemptKey
from protocol.worker import AllBlocksCleared, BlocksRemoved, BlocksStored, KvEvent, Role, Tier, WorkerId
from router.cost_model import StepCost
from router.policies.api import Booked, Finished, FirstToken, Moved, WorkerJoined
from router.policies.prefix_tree import Node, PrefixTree
from router.policies.sliding_sums import NUM_STEPS, SlidingSums

MAX_IN_FLIGHT = 65_536
MAX_KEYS = 128  # key portions of one worker that rebalancing looks at: the latest used
_LOAD_WIDTH = 5  # prompts, their missed tokens, those times context, sequences decoded, their context
_TIMES_WIDTH = 2  # count, sum


@dataclass(slots=True)
class Traffic:
    """Of one node, by worker."""

    shared: dict[WorkerId, SlidingSums] = field(default_factory=dict)  # requests that run through it
    load: dict[WorkerId, SlidingSums] = field(default_factory=dict)  # of requests whose key portion it is
    first_token_us: dict[WorkerId, SlidingSums] = field(default_factory=dict)  # likewise
    held: dict[WorkerId, int] = field(default_factory=dict)  # blocks of it in the worker's cache

    def forget(self, worker_id: WorkerId) -> None:
        for by_worker in (self.shared, self.load, self.first_token_us, self.held):
            by_worker.pop(worker_id, None)

    def state(self) -> list[Any]:
        sums = [{w: s.state() for w, s in by_worker.items()} for by_worker in (self.shared, self.load, self.first_token_us)]
        return [*sums, self.held]

    @classmethod
    def of_state(cls, state: list[Any]) -> Traffic:
        shared, load, first_token_us, held = state
        return cls(
            shared={w: SlidingSums.of_state(1, sums) for w, sums in shared.items()},
            load={w: SlidingSums.of_state(_LOAD_WIDTH, sums) for w, sums in load.items()},
            first_token_us={w: SlidingSums.of_state(_TIMES_WIDTH, sums) for w, sums in first_token_us.items()},
            held=held,
        )


PromptNode = Node[Traffic]


@dataclass(slots=True)
class Record:
    """Of one worker."""

    role: Role
    model_id: str
    cost: StepCost | None = None  # when it was last chosen; None: nothing was sent there
    load: SlidingSums = field(default_factory=lambda: SlidingSums(_LOAD_WIDTH))
    outputs: SlidingSums = field(default_factory=lambda: SlidingSums(_TIMES_WIDTH))
    coldest: OrderedDict[PromptNode, None] = field(default_factory=OrderedDict)  # what it holds, as an LRU cache would evict it
    keys: OrderedDict[PromptNode, None] = field(default_factory=OrderedDict)  # key portions of its load, latest last


class History:
    """Fed by `E2.observe`; everything it is asked it answers without a change."""

    def __init__(self, *, window_s: float, max_blocks: int, max_nodes: int) -> None:
        self._step_s = window_s / NUM_STEPS
        self.workers: dict[WorkerId, Record] = {}
        self.allocated: dict[PromptNode, tuple[WorkerId, ...]] = {}  # where requests with this prefix are to go, whoever holds it
        self.num_requests = 0
        self._tree: PrefixTree[Traffic] = PrefixTree(
            max_blocks=max_blocks, max_nodes=max_nodes, make=Traffic, on_split=self._split, on_drop=self._drop
        )
        self._in_flight: OrderedDict[AttemptKey, tuple[WorkerId, WorkerId, bytes]] = OrderedDict()  # and the name of its key portion

    def step(self, now: float) -> int:
        return int(now / self._step_s)

    # --- what happens ---

    def join(self, event: WorkerJoined) -> None:
        self.leave(event.worker_id)
        self.workers[event.worker_id] = Record(role=event.role, model_id=event.model_id)

    def leave(self, worker_id: WorkerId) -> None:
        if self.workers.pop(worker_id, None) is None:
            return
        for node in self._tree:
            node.record.forget(worker_id)
        for node, allocation in list(self.allocated.items()):
            self.allocate(node, tuple(w for w in allocation if w != worker_id))

    def book(self, event: Booked, now: float) -> int:
        """Returns how many nodes the prompt has below its key portion."""
        step, request = self.step(now), event.request
        self.num_requests += 1
        prefill, decode = self._worker(event.prefill_worker), self._worker(event.decode_worker)
        prefill.cost, decode.cost = event.prefill_cost, event.decode_cost
        missed = max(0, request.num_tokens - event.cached_tokens - event.pulled_tokens)
        computed = (1, missed, missed * request.num_tokens, 0, 0)
        decoded = (0, 0, 0, 1, request.num_tokens)
        together = event.prefill_worker == event.decode_worker
        prefill.load.add(step, *computed)
        decode.load.add(step, *decoded)
        leaf = self._tree.insert(request.block_hashes)
        name, depth = b"", 0
        if leaf is not None:
            path = list(leaf.up())
            for node in path:
                traffic = node.record
                _sums(traffic.shared, event.prefill_worker, 1).add(step, 1)
                traffic.held[event.prefill_worker] = len(node.hashes)
                prefill.coldest[node] = None
                prefill.coldest.move_to_end(node)  # deepest first: a leaf goes before its ancestors
            depth = next((i for i, node in enumerate(path) if node.is_large), len(path) - 1)
            key = path[depth]
            load = _sums(key.record.load, event.prefill_worker, _LOAD_WIDTH)
            load.add(step, *computed)
            if together:
                load.add(step, *decoded)
            self._use_key(event.prefill_worker, key)
            name = key.name
        self._in_flight[AttemptKey(request_id=request.request_id, attempt=request.attempt)] = (
            event.prefill_worker,
            event.decode_worker,
            name,
        )
        if len(self._in_flight) > MAX_IN_FLIGHT:
            self._in_flight.popitem(last=False)
        return depth

    def first_token(self, event: FirstToken, now: float) -> None:
        worker_id, _, name = self._in_flight.get(event.key, ("", "", b""))
        key = self._tree.node_of(name)
        if key is not None and worker_id in self.workers:
            _sums(key.record.first_token_us, worker_id, _TIMES_WIDTH).add(self.step(now), 1, round(event.since_booked_s * 1e6))

    def finish(self, event: Finished, now: float) -> None:
        _, worker_id, _ = self._in_flight.pop(event.key, ("", "", b""))
        record = self.workers.get(worker_id)
        if record is not None and event.num_output_tokens is not None:
            record.outputs.add(self.step(now), 1, event.num_output_tokens)

    def decode_elsewhere(self, event: Moved) -> None:
        """Its output is counted where it is decoded; what was sent to the first worker stays sent."""
        if event.key in self._in_flight:
            prefill_worker, _, name = self._in_flight[event.key]
            self._in_flight[event.key] = (prefill_worker, event.decode_worker, name)

    def change(self, worker_id: WorkerId, events: Sequence[KvEvent]) -> None:
        """A worker's own word on what it holds. What it stores that nobody asked for through this router is passed over."""
        record = self.workers.get(worker_id)
        if record is None:
            return
        for event in events:
            if isinstance(event, AllBlocksCleared):
                for node in record.coldest:
                    node.record.held.pop(worker_id, None)
                record.coldest.clear()
            elif isinstance(event, BlocksStored | BlocksRemoved) and event.tier is Tier.DEVICE:
                change = 1 if isinstance(event, BlocksStored) else -1
                for node, num_blocks in self._tree.count(event.hashes).items():
                    self._hold(worker_id, record, node, node.record.held.get(worker_id, 0) + change * num_blocks)

    # --- what follows ---

    def output_tokens(self, worker_id: WorkerId, now: float, default: float) -> float:
        """Mean output in the window on this worker; `default` while none has ended."""
        record = self.workers.get(worker_id)
        count, tokens = record.outputs.at(self.step(now)) if record is not None else (0, 0)
        return tokens / count if count else default

    def load(self, worker_id: WorkerId, now: float) -> Sequence[int]:
        record = self.workers.get(worker_id)
        return record.load.at(self.step(now)) if record is not None else (0,) * _LOAD_WIDTH

    def allocation(self, hashes: Sequence[bytes]) -> tuple[WorkerId, ...]:
        """Where the deepest allocated prefix of a prompt is to go; empty: nowhere in particular."""
        node = self._tree.find(hashes) if self.allocated else None
        return next((self.allocated[n] for n in node.up() if n in self.allocated), ()) if node is not None else ()

    def path(self, hashes: Sequence[bytes]) -> set[PromptNode]:
        node = self._tree.find(hashes)
        return set(node.up()) if node is not None else set()

    def victims(self, worker_id: WorkerId, now: float) -> Iterator[tuple[PromptNode, int, float]]:
        """What the worker would evict, coldest first: the node, its tokens there, and which share of the worker's requests had it."""
        record = self.workers.get(worker_id)
        if record is None:
            return
        step = self.step(now)
        num_requests = record.load.at(step)[0]
        for node in record.coldest:
            shared = node.record.shared.get(worker_id)
            share = shared.at(step)[0] / num_requests if shared is not None and num_requests else 0.0
            yield node, node.record.held[worker_id] * HASH_BLOCK_SIZE_TOKENS, share

    def keys(self, worker_id: WorkerId, now: float) -> Iterator[tuple[PromptNode, Sequence[int]]]:
        """The key portions that two requests or more had on this worker, with what they asked of it."""
        step = self.step(now)
        for node in self.workers[worker_id].keys:
            load = node.record.load[worker_id].at(step)
            if load[0] >= 2:
                yield node, load

    def slowdown(self, node: PromptNode, worker_id: WorkerId, now: float, min_samples: int) -> float:
        """Mean time to first token of the later half of the window over that of the earlier; 0 with fewer samples in a half."""
        sums = node.record.first_token_us.get(worker_id)
        if sums is None:
            return 0.0
        step, half = self.step(now), NUM_STEPS // 2
        count_before, us_before = sums.between(step - NUM_STEPS + 1, step - half)
        count_since, us_since = sums.between(step - half + 1, step)
        if min(count_before, count_since) < max(min_samples, 1) or not us_before:
            return 0.0
        return (us_since / count_since) / (us_before / count_before)

    # --- decisions carried out ---

    def allocate(self, node: PromptNode, workers: tuple[WorkerId, ...]) -> None:
        """Requests with this prefix go to one of `workers`, also those with a longer one; empty: wherever is best."""
        if workers:
            self.allocated[node] = workers
        else:
            self.allocated.pop(node, None)

    def move(self, node: PromptNode, source: WorkerId, target: WorkerId, now: float) -> None:
        """`node`'s requests, past and to come, belong to `target`."""
        self.allocate(node, (target,))
        step, load = self.step(now), node.record.load.pop(source)
        giver, taker = self.workers[source], self.workers[target]
        theirs, ours = giver.load, taker.load
        at_target = _sums(node.record.load, target, _LOAD_WIDTH)
        for sums in (load, theirs, ours, at_target):
            sums.expire(step)
        theirs.absorb(load, -1)
        ours.absorb(load)
        at_target.absorb(load)
        if taker.cost is None:
            taker.cost = giver.cost
        node.record.first_token_us.pop(source, None)
        del giver.keys[node]
        self._use_key(target, node)

    # --- to another process ---

    def state(self) -> list[Any]:
        """Of JSON values."""
        workers = [
            (
                (
                    name,
                    record.role.value,
                    record.model_id,
                    record.cost and record.cost.coefficients,
                    record.load.state(),
                    record.outputs.state(),
                ),
                [node.name.hex() for node in record.coldest],
                [node.name.hex() for node in record.keys],
            )
            for name, record in self.workers.items()
        ]
        runs = [(parent, [h.hex() for h in hashes], traffic.state()) for parent, hashes, traffic in self._tree.runs()]
        allocated = [(node.name.hex(), workers) for node, workers in self.allocated.items()]
        in_flight = [(key.request_id, key.attempt, *workers, name.hex()) for key, (*workers, name) in self._in_flight.items()]
        return [self.num_requests, runs, workers, allocated, in_flight]

    def restore(self, state: list[Any]) -> None:
        """Into a new one of the same window."""
        self.num_requests, runs, workers, allocated, in_flight = state
        self._tree.restore([(p, tuple(map(bytes.fromhex, hashes)), Traffic.of_state(traffic)) for p, hashes, traffic in runs])
        node_of = {node.name.hex(): node for node in self._tree}
        for (name, role, model_id, cost, load, outputs), coldest, keys in workers:
            self.workers[name] = Record(
                role=Role(role),
                model_id=model_id,
                cost=StepCost.of_coefficients(cost) if cost is not None else None,
                load=SlidingSums.of_state(_LOAD_WIDTH, load),
                outputs=SlidingSums.of_state(_TIMES_WIDTH, outputs),
                coldest=OrderedDict.fromkeys(node_of[n] for n in coldest),
                keys=OrderedDict.fromkeys(node_of[n] for n in keys),
            )
        self.allocated = {node_of[n]: tuple(names) for n, names in allocated}
        for request_id, attempt, prefill, decode, key in in_flight:
            self._in_flight[AttemptKey(request_id=request_id, attempt=attempt)] = (prefill, decode, bytes.fromhex(key))

    # --- nodes ---

    def _worker(self, worker_id: WorkerId) -> Record:
        return self.workers.setdefault(worker_id, Record(role=Role.BOTH, model_id=""))

    def _use_key(self, worker_id: WorkerId, key: PromptNode) -> None:
        keys = self.workers[worker_id].keys
        keys[key] = None
        keys.move_to_end(key)
        if len(keys) > MAX_KEYS:
            keys.popitem(last=False)

    def _hold(self, worker_id: WorkerId, record: Record, node: PromptNode, num_blocks: int) -> None:
        if num_blocks > 0:
            node.record.held[worker_id] = min(num_blocks, len(node.hashes))
            record.coldest.setdefault(node)
        elif node.record.held.pop(worker_id, None) is not None:
            record.coldest.pop(node, None)

    def _split(self, upper: PromptNode, lower: PromptNode) -> None:
        """What ran through the whole run ran through its upper part; of what is held, the beginning is kept longest."""
        upper.record.shared = {w: sums.copy() for w, sums in lower.record.shared.items()}
        for worker_id, num_blocks in list(lower.record.held.items()):
            record = self.workers[worker_id]
            self._hold(worker_id, record, upper, num_blocks)
            self._hold(worker_id, record, lower, num_blocks - len(upper.hashes))
        if lower in self.allocated:
            self.allocated[upper] = self.allocated[lower]
        if not lower.is_large:
            key = next((node for node in upper.up() if node.is_large), upper)
            for worker_id in list(lower.record.load):
                self._hand_up(worker_id, lower, key)

    def _hand_up(self, worker_id: WorkerId, lower: PromptNode, key: PromptNode) -> None:
        """`lower` is no key portion any more: its load on one worker counts for `key`."""
        _sums(key.record.load, worker_id, _LOAD_WIDTH).absorb(lower.record.load.pop(worker_id))
        if (times := lower.record.first_token_us.pop(worker_id, None)) is not None:
            _sums(key.record.first_token_us, worker_id, _TIMES_WIDTH).absorb(times)
        keys = self.workers[worker_id].keys
        if lower in keys:
            del keys[lower]
            self._use_key(worker_id, key)

    def _drop(self, leaf: PromptNode) -> None:
        self.allocated.pop(leaf, None)
        for record in self.workers.values():
            record.coldest.pop(leaf, None)
            record.keys.pop(leaf, None)


def prefill_s(load: Sequence[int], cost: StepCost) -> float:
    """Seconds to compute what `load` counts."""
    return load[0] * cost.step_s + load[1] * cost.prefill_token_s + load[2] * cost.prefill_pair_s


def decode_s(load: Sequence[int], cost: StepCost, output_tokens: float) -> float:
    """Seconds to decode what `load` counts, each sequence alone, `output_tokens` for each."""
    return output_tokens * (load[3] * (cost.step_s + cost.decode_sequence_s) + load[4] * cost.decode_kv_token_s)


def _sums(by_worker: dict[WorkerId, SlidingSums], worker_id: WorkerId, width: int) -> SlidingSums:
    sums = by_worker.get(worker_id)
    if sums is None:
        sums = by_worker[worker_id] = SlidingSums(width)
    return sums
