"""A whole cluster on the virtual clock: worker cores, a router core and a gateway, wired as the live ones are. A seed is a run.

Snapshots, KV events and answers are as late as they are over loopback. Workers take the paced executor's time for a step, or that of a
model of another form (true_steps.py). What decides is told no time but those that workers report: the router by snapshots, a worker's
scheduler by the steps it saw end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from random import Random

from control.compose import core_config, pool_sizes, prefill_policy
from control.config import ClusterConfig
from engine.core.events import Command as WorkerCommand
from engine.core.events import Event as WorkerEvent
from engine.core.events import PublishKvEvents, StepDone
from engine.core.worker_core import WorkerCore
from engine.hardware import find_gpu
from engine.hash_model import HashModel
from engine.models.shapes import find_shape
from engine.roofline import kv_capacity_blocks
from protocol.errors import ConfigError
from protocol.kv import Endpoint
from protocol.messages import Assigned, Done, KvEvents, Membership, Place, PrefillDone, Reassigned, Refused, SnapshotFrame
from protocol.request import Request
from protocol.worker import Role, WorkerAddress
from router import policies
from router.core import RouterCore
from router.events import Event, FromGateway, FromWorker, MembershipChanged, Tick, ToGateway, WorkerUp
from simulator.estimate_error import EXACT, EstimateError, ReportedTimes
from simulator.loop import VirtualLoop
from simulator.prompt_tokens import PromptTokens
from simulator.routed_gateway import RoutedGateway, Served
from simulator.sim_executor import SimExecutor, SimPool
from simulator.sim_host_tier import SimHostTier
from simulator.sim_transport import NetworkFaults, SimTransport
from simulator.sim_worker import SimWorker
from simulator.true_steps import TrueSteps, plain_steps

GATEWAY, MODEL_ID = "gateway-0", "simulated"
FINGERPRINT = b"simulated model."
VOCAB_SIZE = 1000
LINK_S = 0.0003  # from one process to another
TICK_S = 0.05
SNAPSHOT_S, SNAPSHOT_IDLE_S = 0.05, 0.5  # as cluster/worker_host.py sends them
DEFAULT_MODEL = "llama-3-8b"  # whose KV workers hold, where paced.model names none
DEFAULT_MAX_MODEL_LEN = 1 << 20
MAX_LEAP_STEPS = 64
PROGRESS_S = 1.0  # of virtual time between two words about it
PATIENCE_S = 3600.0
DEADLINE_S = 90 * 86_400.0  # of virtual time; what is not over then never will be


class RoutedCluster:
    """Pools as `config` has them, all ready at 0 s. `seed`: of the router's draws; `max_tokens`: as in RoutedGateway.

    is_checked: KV is simulated, a word a token, so that a block that is mapped wrongly gives another token; steps are taken one by one.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        policy: str = "",
        seed: int = 0,
        max_tokens: int | None = None,
        is_checked: bool = False,
        steps: TrueSteps | None = None,
        estimate_error: EstimateError = EXACT,
    ) -> None:
        """steps: what they take; None: the pace of `config` to the letter. estimate_error: of the times workers report.

        Raises:
            ConfigError: workers without a pace or a number of KV blocks.
        """
        self.config = config
        self._is_checked = is_checked
        self._num_kv_blocks = num_kv_blocks(config)
        self._layout = find_shape(config.paced.model or DEFAULT_MODEL).kv_layout(config.workers.block_size)
        self._max_model_len = config.model.max_model_len or DEFAULT_MAX_MODEL_LEN
        self._steps = steps or plain_steps(config)
        self._estimate_error = estimate_error
        self._seed = seed
        self.loop = VirtualLoop()
        policy = policy or config.router.policy
        of_decode = policies.load(config.router.decode_policy) if config.router.decode_policy else None
        told = replace(config.router, policy=policy)
        self.router = RouterCore(told, policy=policies.load(policy), decode_policy=of_decode, rng=Random(seed))
        self.gateway = RoutedGateway(self.loop, self._from_gateway, name=GATEWAY, latency_s=LINK_S, max_tokens=max_tokens)
        self.workers: dict[str, SimWorker] = {}
        self._snapshot_s: dict[str, float] = {}
        self._reported: dict[str, ReportedTimes] = {}
        links = config.simulation
        transport = SimTransport(
            self.loop, Random(seed), faults=NetworkFaults(), latency_s=links.link_latency_s, bytes_per_s=links.link_bytes_per_s
        )
        roles = {f"{role.value}-{i}": role for role, count in pool_sizes(config).items() for i in range(count)}
        for worker_id, role in roles.items():
            self._start(worker_id, role, transport)
        members = tuple(self._address(worker_id, role) for worker_id, role in roles.items())
        self._route(MembershipChanged(membership=Membership(version=1, workers=members, services=())))
        for worker_id in roles:
            self._route(WorkerUp(worker_id=worker_id, epoch=1))
        self._tick()

    def run(self, requests: Iterable[tuple[float, Request]], *, on_over: Callable[[int], None] = lambda num_over: None) -> list[Served]:
        """Send each at its time, in seconds from a moment at which all have reported, in order; wait until all is over and at rest.

        on_over(how many requests are over) is told now and then.

        Raises:
            AssertionError: something never ends.
        """
        began_s, gateway, due = self.loop.now + 2 * SNAPSHOT_IDLE_S, self.gateway, iter(requests)
        sent: list[str] = []
        is_all_sent, told_s = False, self.loop.now

        def send_next() -> None:
            nonlocal is_all_sent
            at_s, request = next(due, (0.0, None))
            if request is None:
                is_all_sent = True
                return
            sent.append(request.request_id)

            def send() -> None:
                gateway.submit(request)
                send_next()

            self.loop.call_at(max(self.loop.now, began_s + at_s), send)

        def is_over() -> bool:
            nonlocal told_s
            if self.loop.now >= told_s + PROGRESS_S:
                told_s = self.loop.now
                on_over(gateway.num_over)
            return is_all_sent and gateway.num_over == len(sent)

        send_next()
        assert self.loop.run(is_over, deadline_s=began_s + DEADLINE_S), f"{len(sent) - gateway.num_over} requests do not end"
        on_over(gateway.num_over)
        at_rest = self.loop.run(lambda: all(w.core.is_at_rest for w in self.workers.values()), deadline_s=self.loop.now + PATIENCE_S)
        assert at_rest, "workers do not come to rest"
        return [gateway.served[request_id] for request_id in sent]

    @property
    def num_computed_tokens(self) -> int:
        """Of prompts, on all workers."""
        return sum(w.core.snapshot(self.loop.now).counters["prompt_tokens_computed"] for w in self.workers.values())

    def _from_gateway(self, message: Place | PrefillDone | Done) -> None:
        self._tell_router(FromGateway(gateway=GATEWAY, message=message))

    def _tell_router(self, event: Event) -> None:
        self.loop.call_later(LINK_S, lambda: self._route(event))

    def _route(self, event: Event) -> None:
        for command in self.router.on(event, self.loop.now):
            message = (
                command.message if isinstance(command, ToGateway) else None
            )  # else a Subscribe: everything is sent from the first event on
            if isinstance(message, (Assigned, Reassigned, Refused)):
                self.loop.call_later(LINK_S, lambda message=message: self.gateway.receive_routed(message))  # type: ignore[misc]
        self.router.catch_up()

    def _start(self, worker_id: str, role: Role, transport: SimTransport) -> None:
        config, steps = self.config, self._steps
        pool = SimPool(self._num_kv_blocks, config.workers.block_size, holds_words=self._is_checked)
        model = HashModel(pool, vocab_size=VOCAB_SIZE) if self._is_checked else PromptTokens(vocab_size=VOCAB_SIZE)
        core = core_config(config)
        if not self._is_checked and core.scheduler.max_inflight_steps == 1:
            core = replace(core, scheduler=replace(core.scheduler, max_leap_steps=MAX_LEAP_STEPS))
        worker = SimWorker(
            self.loop,
            transport,
            worker_id=worker_id,
            epoch=1,
            core=WorkerCore(
                core,
                worker_id=worker_id,
                epoch=1,
                role=role,
                layout=self._layout,
                num_blocks=self._num_kv_blocks,
                fingerprint=FINGERPRINT,
                max_model_len=self._max_model_len,
                prefill=prefill_policy(config),
                decode=config.decode,
            ),
            pool=pool,
            executor=SimExecutor(self.loop, model, steps.model, steps.noise_of(worker_id)),
            to_gateway=lambda _, message: self.gateway.receive(worker_id, message),
            tier=SimHostTier(self.loop, pool, Random(0)),
        )
        worker.after_turn = lambda event, commands: self._look(worker, event, commands)
        self.workers[worker_id] = self.gateway.workers[worker_id] = worker
        self._snapshot_s[worker_id] = -SNAPSHOT_IDLE_S
        self._reported[worker_id] = ReportedTimes(self._estimate_error, seed=self._seed, worker_id=worker_id)

    def _look(self, worker: SimWorker, event: WorkerEvent, commands: Sequence[WorkerCommand]) -> None:
        """What the worker's host would send the router after this turn."""
        for command in commands:
            if isinstance(command, PublishKvEvents):
                message = KvEvents(worker_id=worker.worker_id, epoch=1, events=command.events)
                self._tell_router(FromWorker(worker_id=worker.worker_id, epoch=1, message=message))
        if isinstance(event, StepDone):
            self._report(worker, SNAPSHOT_S)

    def _report(self, worker: SimWorker, interval_s: float) -> None:
        """A snapshot, unless there was one in this time."""
        if self.loop.now - self._snapshot_s[worker.worker_id] >= interval_s:
            self._snapshot_s[worker.worker_id] = self.loop.now
            frame = SnapshotFrame(snapshot=self._reported[worker.worker_id].told(worker.snapshot()))
            self._tell_router(FromWorker(worker_id=worker.worker_id, epoch=1, message=frame))

    def _tick(self) -> None:
        self._route(Tick())
        for worker in self.workers.values():
            self._report(worker, SNAPSHOT_S if worker.executor.num_steps_past else SNAPSHOT_IDLE_S)
        self.loop.call_later(TICK_S, self._tick)

    def _address(self, worker_id: str, role: Role) -> WorkerAddress:
        workers = self.config.workers
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
            num_kv_blocks=self._num_kv_blocks,
            max_model_len=self._max_model_len,
            max_num_seqs=workers.max_num_seqs,
            max_num_batched_tokens=workers.max_num_batched_tokens,
            kv_token_bytes=self._layout.token_bytes,
        )


def num_kv_blocks(config: ClusterConfig) -> int:
    """Of each worker: as given, or what its GPUs hold.

    Raises:
        ConfigError: neither is said. ModelDoesNotFit: the GPUs do not hold the model.
    """
    workers, pace = config.workers, config.paced
    if workers.num_kv_blocks is not None:
        return workers.num_kv_blocks
    if pace.gpu is None or pace.model is None:
        raise ConfigError("a simulated worker has no memory to look at; give workers.num_kv_blocks, or paced.gpu and paced.model")
    gpu, shape = find_gpu(pace.gpu), find_shape(pace.model)
    return kv_capacity_blocks(gpu, shape, tensor_parallel=pace.tensor_parallel, block_size_tokens=workers.block_size)
