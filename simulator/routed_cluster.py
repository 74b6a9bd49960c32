"""A whole cluster on the virtual clock: worker cores, a router core and a gateway, wired as the live ones are. A seed is a run.

Snapshots, KV events and answers are as late as they are over loopback. Workers take the paced executor's time for a step, or that of a
model of another form (true_steps.py). What decides is told no time but those that workers report: the router by snapshots, a worker's
scheduler by the steps it saw end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from random import Random

from control.compose import core_config, pool_sizes, prefill_policy
from control.config import ClusterConfig
from engine.core.worker_core import WorkerCore
from engine.hardware import find_gpu
from engine.hash_model import HashModel
from engine.models.shapes import find_shape
from engine.roofline import kv_capacity_blocks
from engine.step_time import StepTimeModel
from protocol.errors import ConfigError
from protocol.kv import Endpoint
from protocol.messages import Membership, ServiceAddress
from protocol.request import Request
from protocol.worker import Role, WorkerAddress
from router import policies
from router.core import RouterCore
from simulator.estimate_error import EXACT, EstimateError, ReportedTimes
from simulator.loop import VirtualLoop
from simulator.prompt_tokens import PromptTokens
from simulator.routed_gateway import RoutedGateway, Served
from simulator.sim_executor import SimExecutor, SimPool
from simulator.sim_host_tier import SimHostTier
from simulator.sim_network import SimNetwork
from simulator.sim_processes import SNAPSHOT_IDLE_S, SNAPSHOT_S, SimRouterProcess, SimWorkerProcess
from simulator.sim_transport import NetworkFaults, SimTransport
from simulator.sim_worker import SimWorker
from simulator.true_steps import TrueSteps, plain_steps

GATEWAY, MODEL_ID = "gateway-0", "simulated"
FINGERPRINT = b"simulated model."
VOCAB_SIZE = 1000
LINK_S = 0.0003  # from one process to another
TICK_S = 0.05
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
        self._policy = policy or config.router.policy
        self._router_epoch = self._membership_version = 0
        self.loop = VirtualLoop()
        self.network = SimNetwork(self.loop, latency_s=LINK_S)
        self.workers: dict[str, SimWorker] = {}
        self.processes: dict[str, SimWorkerProcess] = {}
        links = config.simulation
        self.transport = SimTransport(
            self.loop, Random(seed), faults=NetworkFaults(), latency_s=links.link_latency_s, bytes_per_s=links.link_bytes_per_s
        )
        for role, count in pool_sizes(config).items():
            for i in range(count):
                self._start(f"{role.value}-{i}", role, epoch=1)
        self.router_process = self._start_router()
        self.gateway = RoutedGateway(self.loop, self.network, config.gateway, name=GATEWAY, max_tokens=max_tokens)
        self.router_process.follow(self.membership())
        self.loop.call_later(SNAPSHOT_IDLE_S, lambda: self.gateway.follow(self.membership()))  # the router knows all of them then
        self._tick()

    @property
    def router(self) -> RouterCore:
        return self.router_process.core

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

    def membership(self) -> Membership:
        """What the directory would say now."""
        self._membership_version += 1
        router = self.router_process.identity
        service = ServiceAddress(name=router.name, kind="router", epoch=router.epoch, host="127.0.0.1", port=1, pid=1)
        return Membership(
            version=self._membership_version,
            workers=tuple(process.address for process in self.processes.values() if process.worker.is_alive),
            services=(service,) if self.router_process.is_alive else (),
        )

    def _start_router(self) -> SimRouterProcess:
        config, policy = self.config.router, self._policy
        self._router_epoch += 1
        core = RouterCore(
            replace(config, policy=policy),
            policy=policies.load(policy),
            decode_policy=policies.load(config.decode_policy) if config.decode_policy else None,
            rng=Random(self._seed),
        )
        return SimRouterProcess(self.loop, self.network, core, epoch=self._router_epoch)

    def _start(self, worker_id: str, role: Role, *, epoch: int) -> None:
        config, steps = self.config, self._steps
        pool = SimPool(self._num_kv_blocks, config.workers.block_size, holds_words=self._is_checked)
        model = HashModel(pool, vocab_size=VOCAB_SIZE) if self._is_checked else PromptTokens(vocab_size=VOCAB_SIZE)
        core = core_config(config)
        if not self._is_checked and core.scheduler.max_inflight_steps == 1:
            core = replace(core, scheduler=replace(core.scheduler, max_leap_steps=MAX_LEAP_STEPS))
        process = self._process(self._address(worker_id, role, epoch))
        worker = SimWorker(
            self.loop,
            self.transport,
            worker_id=worker_id,
            epoch=epoch,
            core=WorkerCore(
                core,
                worker_id=worker_id,
                epoch=epoch,
                role=role,
                layout=self._layout,
                num_blocks=self._num_kv_blocks,
                fingerprint=FINGERPRINT,
                max_model_len=self._max_model_len,
                prefill=prefill_policy(config),
                decode=config.decode,
            ),
            pool=pool,
            executor=SimExecutor(self.loop, model, self._step_time(worker_id), steps.noise_of(worker_id)),
            to_gateway=process.send,
            tier=SimHostTier(self.loop, pool, Random(0)),
        )
        process.start(worker)
        self.workers[worker_id], self.processes[worker_id] = worker, process
        self._started(process)

    # What faults replace (simulator/faulty_cluster.py).

    def _process(self, address: WorkerAddress) -> SimWorkerProcess:
        reported = ReportedTimes(self._estimate_error, seed=self._seed, worker_id=address.worker_id)
        return SimWorkerProcess(self.loop, self.network, address, reported=reported)

    def _step_time(self, worker_id: str) -> StepTimeModel:
        return self._steps.model

    def _started(self, process: SimWorkerProcess) -> None:
        """For whoever wants to look at it."""

    def _tick(self) -> None:
        self.router_process.tick()
        for process in self.processes.values():
            process.report(SNAPSHOT_S if process.worker.executor.num_steps_past else SNAPSHOT_IDLE_S)
        self.gateway.tick()
        self.loop.call_later(TICK_S, self._tick)

    def _address(self, worker_id: str, role: Role, epoch: int) -> WorkerAddress:
        workers = self.config.workers
        return WorkerAddress(
            worker_id=worker_id,
            role=role,
            epoch=epoch,
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
