"""What `baton bench router` asks of a router: a fleet with full caches, and prompts of which half is one of 64 shared beginnings.

Everything follows from a seed. Time is virtual (`Fleet.now`): a worker reports every 50 ms of it and requests come at 8,000 a second,
so that between two decisions as much happens as there would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from random import Random

from protocol.kv import Endpoint
from protocol.messages import Done, KvEvents, Membership, Place, PrefillDone, SnapshotFrame
from protocol.worker import BlocksStored, Role, WorkerAddress, WorkerSnapshot, WorkerState
from router import policies
from router.config import RouterConfig
from router.core import RouterCore
from router.events import Command, Event, FromGateway, FromWorker, GatewayUp, MembershipChanged, Tick, WorkerUp
from router.prefix_index import PrefixIndex

MODEL, GATEWAY = "model", "gateway-0"
EPOCH = 1
BLOCK_TOKENS = 16
NUM_SHARED = 64  # beginnings
SHARED_BLOCKS = 128  # of each, in hash blocks
MAX_HOLDERS = 48  # of a beginning
RATE_PER_S = 8000.0
REPORT_S = 0.05
NUM_PREFILLING = 32  # requests between their assignment and their first token
EXPECTED_OUTPUT_TOKENS = 256

Hashes = tuple[bytes, ...]


class Caches:
    """Which worker holds what: each shared beginning on three workers of four, 48 at most, each other run of 128 blocks on one."""

    def __init__(self, worker_ids: list[str], num_blocks: int, seed: int) -> None:
        self._rng = Random(f"{seed} caches")
        self._worker_ids = worker_ids
        self._num_blocks = num_blocks
        self._numbers = dict.fromkeys(worker_ids, 0)
        self.shared = [draw_hashes(self._rng, SHARED_BLOCKS) for _ in range(NUM_SHARED)]
        self.held: list[Hashes] = []  # some of the chains that are held from end to end

    def frames(self) -> Iterator[KvEvents]:
        """Events after which `num_blocks` different blocks are held."""
        rng, holders = self._rng, {}
        for number, beginning in enumerate(self.shared):
            holders[number] = rng.sample(self._worker_ids, min(MAX_HOLDERS, max(1, len(self._worker_ids) * 3 // 4)))
            for worker_id in holders[number]:
                yield self._stored(worker_id, b"", beginning)
        for run in range((self._num_blocks - NUM_SHARED * SHARED_BLOCKS) // SHARED_BLOCKS):
            beginning, rest = self.shared[run % NUM_SHARED], draw_hashes(rng, SHARED_BLOCKS)
            if len(self.held) < 4096:
                self.held.append(beginning + rest)
            yield self._stored(rng.choice(holders[run % NUM_SHARED]), beginning[-1], rest)

    def _stored(self, worker_id: str, parent: bytes, hashes: Hashes) -> KvEvents:
        self._numbers[worker_id] += 1
        # As from the wire: each worker's hashes are objects of their own.
        stored = BlocksStored(number=self._numbers[worker_id], parent=parent, hashes=fresh(hashes))
        return KvEvents(worker_id=worker_id, epoch=EPOCH, events=(stored,))


def draw_hashes(rng: Random, count: int) -> Hashes:
    return tuple([rng.randbytes(BLOCK_TOKENS) for _ in range(count)])


def fresh(hashes: Hashes) -> Hashes:
    """Equal hashes whose Python objects, and so the memory of their own hashes, are new."""
    return tuple([bytes(bytearray(h)) for h in hashes])


def make_index(num_workers: int, num_blocks: int, seed: int, *, prefix_closed: bool) -> tuple[PrefixIndex, Caches]:
    """An index alone, filled."""
    worker_ids = [f"worker-{i}" for i in range(num_workers)]
    index = PrefixIndex(max_bytes=1 << 40, speculative_ttl_s=2.0, prefix_closed=prefix_closed)
    caches = Caches(worker_ids, num_blocks, seed)
    for worker_id in worker_ids:
        index.join(worker_id, EPOCH)
    for frame in caches.frames():
        index.apply(frame)
    return index, caches


class Fleet:
    """A router core over `num_workers` workers, half of each role, and what happens around its decisions."""

    def __init__(self, num_workers: int, num_blocks: int, seed: int, *, config: RouterConfig | None = None) -> None:
        self.config = config if config is not None else RouterConfig(index_max_bytes=1 << 40)
        self.core = RouterCore(self.config, policy=policies.load(self.config.policy), rng=Random(seed))
        self.now = 1000.0
        self.live: deque[Place] = deque()
        self._rng = Random(f"{seed} prompts")
        self._addresses = [
            address(f"{role.value}-{i}", role) for role in (Role.PREFILL, Role.DECODE) for i in range(max(1, num_workers // 2))
        ]
        self.caches = Caches([a.worker_id for a in self._addresses], num_blocks, seed)
        self._num_requests = self._num_reports = 0
        self._tails: list[Hashes] = []
        self._start()

    def _start(self) -> None:
        self.on(MembershipChanged(membership=Membership(version=1, workers=tuple(self._addresses), services=())))
        self.on(GatewayUp(gateway=GATEWAY))
        for a in self._addresses:
            self.on(WorkerUp(worker_id=a.worker_id, epoch=EPOCH))
            self._report(a)
        for frame in self.caches.frames():
            self.on(FromWorker(worker_id=frame.worker_id, epoch=EPOCH, message=frame))

    def on(self, event: Event) -> list[Command]:
        return self.core.on(event, self.now)

    # --- requests ---

    def request(self, num_tokens: int) -> Place:
        """The next one: half of a 4k prompt is a shared beginning, the rest new; a longer prompt has a longer rest."""
        rng, number = self._rng, self._num_requests
        self._num_requests += 1
        num_blocks = num_tokens // BLOCK_TOKENS
        beginning = rng.choice(self.caches.shared)[: num_blocks // 2]
        return make_place(number, num_tokens, fresh(beginning) + draw_hashes(rng, num_blocks - len(beginning)))

    def pass_time(self) -> None:
        """What happens between two decisions: time, the reports that are due in it, a tick now and then."""
        before, self.now = self.now, self.now + 1.0 / RATE_PER_S
        due = int(self.now / REPORT_S * len(self._addresses))
        for _ in range(max(0, due - int(before / REPORT_S * len(self._addresses)))):
            self._report(self._addresses[self._num_reports % len(self._addresses)])
            self._num_reports += 1
        if int(self.now / REPORT_S) != int(before / REPORT_S):
            self.on(Tick())

    def prefill_done(self, place: Place) -> None:
        self.on(FromGateway(gateway=GATEWAY, message=PrefillDone(request_id=place.request_id, attempt=place.attempt)))

    def done(self, place: Place) -> None:
        message = Done(request_id=place.request_id, attempt=place.attempt, num_output_tokens=EXPECTED_OUTPUT_TOKENS)
        self.on(FromGateway(gateway=GATEWAY, message=message))

    def fill_window(self, num_live: int, num_tokens: int) -> None:
        """Book requests until `num_live` decode; they share their chains, so that 100,000 of them fit in memory."""
        templates = [self.request(num_tokens).block_hashes for _ in range(256)]
        while len(self.live) < num_live:
            self._num_requests += 1
            place = make_place(self._num_requests, num_tokens, templates[len(self.live) % len(templates)])
            self.on(FromGateway(gateway=GATEWAY, message=place))
            self.prefill_done(place)
            self.live.append(place)
            self.pass_time()

    def _report(self, a: WorkerAddress) -> None:
        frame = SnapshotFrame(snapshot=snapshot(a))
        self.on(FromWorker(worker_id=a.worker_id, epoch=EPOCH, message=frame))


# --- records ----------------------------------------------------------------------------------------------------------


def make_place(number: int, num_tokens: int, hashes: Hashes) -> Place:
    return Place(
        request_id=f"{number:032x}",
        attempt=0,
        model_id=MODEL,
        num_tokens=num_tokens,
        expected_output_tokens=EXPECTED_OUTPUT_TOKENS,
        num_choices=1,
        block_hashes=hashes,
        tenant="default",
        priority=0,
        slo_ttft_s=None,
        slo_tpot_s=None,
        excluded=(),
        local_only=False,
    )


def address(worker_id: str, role: Role, *, port: int = 1) -> WorkerAddress:
    """A worker that is never full: what is measured is the choice, not the queue."""
    return WorkerAddress(
        worker_id=worker_id,
        role=role,
        epoch=EPOCH,
        host="127.0.0.1",
        port=port,
        pid=1,
        hostname="host",
        kv_endpoint=Endpoint(),
        model_id=MODEL,
        fingerprint=b"f" * 16,
        block_size_tokens=BLOCK_TOKENS,
        num_kv_blocks=1 << 22,
        max_model_len=1 << 17,
        max_num_seqs=1 << 14,
        max_num_batched_tokens=1 << 16,
        kv_token_bytes=1 << 17,
    )


def snapshot(a: WorkerAddress) -> WorkerSnapshot:
    return WorkerSnapshot(
        worker_id=a.worker_id,
        epoch=EPOCH,
        role=a.role,
        state=WorkerState.READY,
        age_s=0.001,
        step_count=1,
        last_event_number=0,
        num_waiting=1,
        num_running=8,
        waiting_tokens=1024 if a.role.prefills else 0,
        running_kv_tokens=8 * 4096,
        num_blocks_total=a.num_kv_blocks,
        num_blocks_free=a.num_kv_blocks // 2,
        num_blocks_owned=a.num_kv_blocks // 4,
        num_blocks_leased=0,
        num_blocks_cached=a.num_kv_blocks // 4,
        num_preemptions=0,
        step_time_ewma_s=0.01,
        counters={},
    )
