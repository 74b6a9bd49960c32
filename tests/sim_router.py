"""A whole cluster on the virtual clock: worker cores, a router core and a gateway wired as the live ones are, for a policy to be tried on.

What `baton bench policies` measures in an hour of real time, without processes and without the noise of a machine: the same seed is the
same run. Snapshots, KV events and answers are as late as they are over loopback.

    python -m tests.sim_router --workloads fan_out --repeats 7        the same prompts, arrivals and table as the live bench's
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import typer

from baton.bench.policies import DEFAULT_POLICIES, DEFAULT_WORKLOADS, Plan, print_cells, split_list
from baton.bench.policy_rows import Cell, label
from baton.bench.policy_traffic import NUM_KV_BLOCKS, NUM_WORKERS, Traffic, cluster_config, traffic
from control.compose import core_config, pool_sizes, step_time
from control.config import ClusterConfig, load_config
from engine.core.events import Command as WorkerCommand
from engine.core.events import Event as WorkerEvent
from engine.core.events import PublishKvEvents, StepDone
from engine.core.worker_core import WorkerCore
from engine.hash_model import HashModel
from protocol.block_hash import block_hashes
from protocol.kv import Endpoint
from protocol.messages import Assigned, Assignment, Done, KvEvents, Membership, Place, PrefillDone, Refused, SnapshotFrame, Submit, TokenRun
from protocol.worker import Role, WorkerAddress
from router import policies
from router.core import RouterCore
from router.events import Event, FromGateway, FromWorker, MembershipChanged, Tick, ToGateway, WorkerUp
from simulator.loop import VirtualLoop
from simulator.sim_executor import SimExecutor, SimPool
from simulator.sim_gateway import Ledger, SimGateway
from simulator.sim_host_tier import SimHostTier
from simulator.sim_transport import NetworkFaults, SimTransport
from simulator.sim_worker import SimWorker
from tests.sim_cluster import FINGERPRINT, ROOT, layout, make_request

GATEWAY, MODEL_ID = "gateway-0", "m"  # the model of tests.sim_cluster.make_request
LINK_S = 0.0003  # from one process to another
TICK_S = 0.05
SNAPSHOT_S, SNAPSHOT_IDLE_S = 0.05, 0.5  # as cluster/worker_host.py sends them
BLOCK_S = 2e-5  # to copy one
MAX_MODEL_LEN = 2048
DEADLINE_S = 600.0


class RoutedGateway(SimGateway):
    """Asks the router where each attempt goes, and tells it of first tokens and ends."""

    def __init__(self, cluster: RoutedCluster) -> None:
        super().__init__(cluster.loop, _nobody, latency_s=LINK_S)
        self._cluster = cluster
        self.arrived_s: dict[str, float] = {}
        self.first_token_s: dict[str, float] = {}

    def assigned(self, assignment: Assignment) -> None:
        ledger = self.ledgers[assignment.request_id]
        if ledger.terminal or ledger.attempt != assignment.attempt:
            return
        ledger.prefill_worker, ledger.decode_worker = assignment.prefill_worker, assignment.decode_worker
        is_split = ledger.prefill_worker != ledger.decode_worker
        self._send(ledger.prefill_worker, Submit(attempt=self._attempt(ledger), prefill_only=is_split, handoff=None))

    def _begin(self, ledger: Ledger) -> None:
        ledger.decodes_elsewhere = ledger.is_ahead = False
        request = ledger.request
        self.arrived_s.setdefault(request.request_id, self._loop.now)
        place = Place(
            request_id=request.request_id,
            attempt=ledger.attempt,
            model_id=MODEL_ID,
            num_tokens=request.num_prompt_tokens,
            expected_output_tokens=request.sampling.max_tokens,
            num_choices=1,
            block_hashes=tuple(block_hashes(ROOT, request.prompt_token_ids)),
            tenant="default",
            priority=0,
            slo_ttft_s=None,
            slo_tpot_s=None,
            excluded=(),
            local_only=False,
        )
        self._cluster.tell_router(FromGateway(gateway=GATEWAY, message=place))

    def _take_run(self, run: TokenRun) -> None:
        if run.request_id not in self.first_token_s:
            self.first_token_s[run.request_id] = self._loop.now
            message = PrefillDone(request_id=run.request_id, attempt=run.attempt)
            self._cluster.tell_router(FromGateway(gateway=GATEWAY, message=message))
        super()._take_run(run)

    def _close(self, ledger: Ledger, terminal: str, reason: str) -> None:
        super()._close(ledger, terminal, reason)
        message = Done(request_id=ledger.request.request_id, attempt=ledger.attempt, num_output_tokens=len(ledger.tokens[0]))
        self._cluster.tell_router(FromGateway(gateway=GATEWAY, message=message))


class RoutedCluster:
    """Pools as `cluster_config` has them, all ready at 0 s."""

    def __init__(self, policy: str, *, num_workers: int = NUM_WORKERS) -> None:
        config = load_config(cluster_config(num_workers))
        self.loop = VirtualLoop()
        self.router = RouterCore(replace(config.router, policy=policy), policy=policies.load(policy), rng=Random(0))
        self.gateway = RoutedGateway(self)
        self.workers: dict[str, SimWorker] = {}
        self._snapshot_s: dict[str, float] = {}
        transport = SimTransport(self.loop, Random(0), faults=NetworkFaults(), latency_s=LINK_S, block_s=BLOCK_S)
        roles = {f"{role.value}-{i}": role for role, count in pool_sizes(config).items() for i in range(count)}
        for worker_id, role in roles.items():
            self._start(worker_id, role, config, transport)
        members = tuple(_address(worker_id, role, config) for worker_id, role in roles.items())
        self._route(MembershipChanged(membership=Membership(version=1, workers=members, services=())))
        for worker_id in roles:
            self._route(WorkerUp(worker_id=worker_id, epoch=1))
        self._tick()

    def run(self, traffic: Traffic) -> list[float]:
        """TTFT of each request, in seconds, after the last has ended."""
        began_s = self.loop.now + 2 * SNAPSHOT_IDLE_S
        requests = [make_request(i, prompt, max_tokens=traffic.output_len) for i, prompt in enumerate(traffic.prompts())]
        for request, arrival_s in zip(requests, traffic.arrivals_s(), strict=True):
            self.loop.call_at(began_s + arrival_s, lambda request=request: self.gateway.submit(request))  # type: ignore[misc]
        gateway = self.gateway
        assert self.loop.run(lambda: len(gateway.ledgers) == len(requests) and gateway.is_done, deadline_s=DEADLINE_S)
        assert all(ledger.terminal == "finished" for ledger in gateway.ledgers.values())
        assert self.loop.run(lambda: all(w.core.is_at_rest for w in self.workers.values()), deadline_s=self.loop.now + DEADLINE_S)
        return [gateway.first_token_s[request.request_id] - gateway.arrived_s[request.request_id] for request in requests]

    @property
    def num_computed_tokens(self) -> int:
        """Of prompts, on all workers."""
        return sum(w.core.snapshot(self.loop.now).counters["prompt_tokens_computed"] for w in self.workers.values())

    def tell_router(self, event: Event) -> None:
        self.loop.call_later(LINK_S, lambda: self._route(event))

    def _route(self, event: Event) -> None:
        for command in self.router.on(event, self.loop.now):
            if not isinstance(command, ToGateway):
                continue  # a Subscribe: everything is sent from the first event on
            message = command.message
            assert not isinstance(message, Refused), message
            if isinstance(message, Assigned):
                self.loop.call_later(LINK_S, lambda found=message.assignment: self.gateway.assigned(found))  # type: ignore[misc]
        self.router.catch_up()

    def _start(self, worker_id: str, role: Role, config: ClusterConfig, transport: SimTransport) -> None:
        pace = step_time(config)
        assert pace is not None, "paced workers have a pace"
        pool = SimPool(NUM_KV_BLOCKS, config.workers.block_size)
        worker = SimWorker(
            self.loop,
            transport,
            worker_id=worker_id,
            epoch=1,
            core=WorkerCore(
                core_config(config),
                worker_id=worker_id,
                epoch=1,
                role=role,
                layout=layout(config.workers.block_size),
                num_blocks=NUM_KV_BLOCKS,
                fingerprint=FINGERPRINT,
                max_model_len=MAX_MODEL_LEN,
                decode=config.decode,
                step_time=pace,
            ),
            pool=pool,
            executor=SimExecutor(self.loop, HashModel(None, vocab_size=1000), pace),
            to_gateway=lambda _, message: self.gateway.receive(worker_id, message),
            tier=SimHostTier(self.loop, pool, Random(0)),
        )
        worker.after_turn = lambda event, commands: self._look(worker, event, commands)
        self.workers[worker_id] = self.gateway.workers[worker_id] = worker
        self._snapshot_s[worker_id] = -SNAPSHOT_IDLE_S

    def _look(self, worker: SimWorker, event: WorkerEvent, commands: Sequence[WorkerCommand]) -> None:
        """What the worker's host would send the router after this turn."""
        for command in commands:
            if isinstance(command, PublishKvEvents):
                message = KvEvents(worker_id=worker.worker_id, epoch=1, events=command.events)
                self.tell_router(FromWorker(worker_id=worker.worker_id, epoch=1, message=message))
        if isinstance(event, StepDone):
            self._report(worker, SNAPSHOT_S)

    def _report(self, worker: SimWorker, interval_s: float) -> None:
        """A snapshot, unless there was one in this time."""
        if self.loop.now - self._snapshot_s[worker.worker_id] >= interval_s:
            self._snapshot_s[worker.worker_id] = self.loop.now
            frame = SnapshotFrame(snapshot=worker.core.snapshot(self.loop.now))
            self.tell_router(FromWorker(worker_id=worker.worker_id, epoch=1, message=frame))

    def _tick(self) -> None:
        self._route(Tick())
        for worker in self.workers.values():
            self._report(worker, SNAPSHOT_IDLE_S)
        self.loop.call_later(TICK_S, self._tick)


def simulated_cell(policy: str, traffic: Traffic, *, repeat: int = 0, num_workers: int = NUM_WORKERS) -> Cell:
    """A cell of `baton bench policies` as it would come out on an endlessly fast machine."""
    cluster = RoutedCluster(policy, num_workers=num_workers)
    ttft_s = cluster.run(traffic)
    cluster.router.check()
    return Cell(
        policy=policy,
        workload=traffic.shape.name,
        repeat=repeat,
        num_requests=len(ttft_s),
        ttft_s=tuple(ttft_s),
        hit_share=1.0 - cluster.num_computed_tokens / (traffic.input_len * len(ttft_s)),
        lag_p99_s=0.0,
        busy_share=0.0,
        own_share=0.0,
        decision_p50_s=None,
        invalid=(),
    )


def _address(worker_id: str, role: Role, config: ClusterConfig) -> WorkerAddress:
    workers = config.workers
    return WorkerAddress(
        worker_id=worker_id,
        role=role,
        epoch=1,
        host="127.0.0.1",
        port=1,
        pid=1,
        hostname="host",
        kv_endpoint=Endpoint(),
        model_id=MODEL_ID,
        fingerprint=FINGERPRINT,
        block_size_tokens=workers.block_size,
        num_kv_blocks=NUM_KV_BLOCKS,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=workers.max_num_seqs,
        max_num_batched_tokens=workers.max_num_batched_tokens,
    )


def _nobody(attempt: object) -> tuple[str, str]:
    raise AssertionError("the router places")


def main(
    policies: str = DEFAULT_POLICIES,
    workloads: str = DEFAULT_WORKLOADS,
    repeats: int = 7,
    seconds: float = 20.0,
    workers: int = NUM_WORKERS,
    seed: int = 0,
) -> None:
    plan = Plan(
        policies=tuple(split_list(policies)),
        workloads=tuple(split_list(workloads)),
        num_repeats=repeats,
        seconds=seconds,
        num_workers=workers,
        seed=seed,
    )
    cells = []
    for repeat, workload, policy in plan.cells():
        sys.stderr.write(f"{len(cells) + 1} of {plan.num_cells}: {workload}, {label(policy)}, repeat {repeat + 1}\n")
        asked = traffic(workload, seconds=seconds, seed=plan.seed_of(repeat), num_workers=workers)
        cells.append(simulated_cell(policy, asked, repeat=repeat, num_workers=workers))
    print_cells(cells)


if __name__ == "__main__":
    typer.run(main)
