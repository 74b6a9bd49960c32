"""A cluster of worker cores on a virtual clock, with checkers that look at every turn; and what its tokens must be."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from engine.core.config import SchedulerConfig, WorkerCoreConfig
from engine.core.events import (
    Command,
    Event,
    LoadBlocks,
    LoadDone,
    OfferKv,
    OfferPrefix,
    PullDone,
    RaiseGenerations,
    RunStep,
    StartPull,
    StepDone,
)
from engine.core.worker_core import WorkerCore
from engine.hash_model import HashModel, next_token, prefix_words, read_of
from engine.step_time import LinearStepTime
from protocol.block_hash import block_hashes
from protocol.kv import KVLayout, LayerGroup, LayerKind, ShardRectangle
from protocol.request import Attempt, FinishReason, Request, SamplingParams, token_buffer
from protocol.worker import AllBlocksCleared, BlocksRemoved, BlocksStored, Role, Tier
from simulator.loop import VirtualLoop
from simulator.sim_executor import SimExecutor, SimPool
from simulator.sim_gateway import SimGateway
from simulator.sim_host_tier import SimHostTier
from simulator.sim_transport import NetworkFaults, SimTransport
from simulator.sim_worker import SimWorker

VOCAB = 211
EOS = 2
FINGERPRINT = b"f" * 16
ROOT = b"r" * 16
MAX_MODEL_LEN = 400


def layout(block_size_tokens: int = 16) -> KVLayout:
    group = LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=2, num_kv_heads=1, head_dim=4, dtype="float32")
    return KVLayout(
        block_size_tokens=block_size_tokens,
        groups=(group,),
        shard=ShardRectangle(first_head=0, last_head=1, first_layer=0, last_layer=2),
    )


def make_request(number: int, prompt: list[int], *, priority: int = 0, root: bytes = ROOT, **sampling: Any) -> Request:
    return Request(
        request_id=f"{number:032x}",
        model_id="m",
        prompt_token_ids=token_buffer(prompt),
        sampling=SamplingParams(**({"max_tokens": 8, "temperature": 0.0} | sampling)),
        cache_root=root,
        arrival_s=0.0,
        priority=priority,
    )


def undisturbed(request: Request, *, eos_period: int = 0, max_model_len: int = MAX_MODEL_LEN) -> tuple[list[list[int]], list[FinishReason]]:
    """Tokens and ends by choice, one token after the other; its stopping rules are written anew."""
    sampling = request.sampling
    outputs, ends = [], []
    for choice in range(sampling.n):
        tokens = array("I", request.prompt_token_ids)
        words = prefix_words(0, tokens)
        output: list[int] = []
        while True:
            position = len(output)
            token = next_token(
                read_of(words.tobytes()), sampling, choice=choice, position=position, vocab_size=VOCAB, eos_period=eos_period
            )
            output.append(token)
            tokens.append(token)
            words += prefix_words(words[-1], array("I", [token]))
            stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else sampling.eos_token_ids)}
            if token in stops and position >= sampling.min_tokens:
                ends.append(FinishReason.STOP)
                break
            if len(output) == sampling.max_tokens or len(tokens) == max_model_len:
                ends.append(FinishReason.LENGTH)
                break
        outputs.append(output)
    return outputs, ends


@dataclass
class Checker:
    """Looks at every turn of one worker: the conservation law, and that nobody writes into a block somebody still needs."""

    worker: SimWorker
    steps: dict[int, set[int]] = field(default_factory=dict)  # blocks named by each step in flight
    leases: dict[str, set[int]] = field(default_factory=dict)  # blocks of each offer that is still open
    pulls: dict[str, set[int]] = field(default_factory=dict)  # target blocks of each copy under way

    def __call__(self, event: Event, commands: list[Command]) -> None:
        self.worker.core.check()
        if isinstance(event, StepDone):
            del self.steps[event.result.step_id]
        if isinstance(event, PullDone):
            del self.pulls[event.handoff_id]
        if isinstance(event, LoadDone):
            del self.pulls[str(event.load_id)]
        still_open = self.worker.core._offers._open
        self.leases = {k: v for k, v in self.leases.items() if k in still_open}
        for command in commands:
            if isinstance(command, RaiseGenerations):
                raised = set(command.block_ids)
                for holders in (self.steps, self.leases, self.pulls):
                    for name, held in holders.items():
                        assert not raised & held, f"blocks {raised & held} are reused while {name} needs them"
        for command in commands:
            if isinstance(command, RunStep):
                named = {b for e in command.plan.entries for b in e.block_table} | {b for pair in command.plan.block_copies for b in pair}
                self.steps[command.plan.step_id] = named
            elif isinstance(command, (OfferKv, OfferPrefix)):
                self.leases[command.handoff.handoff_id] = set(command.handoff.shards[0].block_ids)
            elif isinstance(command, LoadBlocks):
                self.pulls[str(command.load_id)] = set(command.block_ids)
            elif isinstance(command, StartPull):
                self.pulls[command.handoff.handoff_id] = set(command.target_block_ids)


class SimCluster:
    """Workers by id, one gateway, one clock, one seed."""

    def __init__(
        self,
        workers: dict[str, Role],
        *,
        seed: int = 0,
        num_blocks: int = 64,
        block_size: int = 16,
        eos_period: int = 0,
        faults: NetworkFaults | None = None,
        place: Callable[[Attempt], tuple[str, str]] | None = None,
        core: dict[str, Any] | None = None,
        check: bool = True,
        load_fails: float = 0.0,
        **scheduler: Any,
    ) -> None:
        self.loop = VirtualLoop()
        self.rng = Random(seed)
        self.roles = workers
        self.transport = SimTransport(self.loop, Random(seed + 1), faults=faults or NetworkFaults())
        self.gateway = SimGateway(self.loop, place or self.place)
        self.workers: dict[str, SimWorker] = {}
        self.checkers: list[Checker] = []
        self._num_blocks = num_blocks
        self._eos_period = eos_period
        self._check = check
        self._load_fails = load_fails
        self._layout = layout(block_size)
        settings = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "block_size_tokens": block_size} | scheduler
        self._config = replace(WorkerCoreConfig(**(core or {})), scheduler=SchedulerConfig(**settings))
        for worker_id in workers:
            self.start(worker_id)

    def start(self, worker_id: str) -> SimWorker:
        """A worker, or its next incarnation: the same name, a later epoch, empty memory."""
        epoch = self.workers[worker_id].epoch + 1 if worker_id in self.workers else 1
        pool = SimPool(self._num_blocks, self._layout.block_size_tokens)
        model = HashModel(pool, vocab_size=VOCAB, eos_period=self._eos_period)
        step_time = LinearStepTime(prefill_token_s=0.001, decode_base_s=0.01, decode_sequence_s=0.001, decode_read_s=1e-6)
        worker = SimWorker(
            self.loop,
            self.transport,
            worker_id=worker_id,
            epoch=epoch,
            core=WorkerCore(
                self._config,
                worker_id=worker_id,
                epoch=epoch,
                role=self.roles[worker_id],
                layout=self._layout,
                num_blocks=self._num_blocks,
                fingerprint=FINGERPRINT,
                max_model_len=MAX_MODEL_LEN,
            ),
            pool=pool,
            executor=SimExecutor(self.loop, model, step_time),
            tier=SimHostTier(self.loop, pool, Random(epoch), fail=self._load_fails),
            to_gateway=lambda _, message: self.gateway.receive(worker_id, message),
        )
        if self._check:
            checker = Checker(worker)
            worker.after_turn = checker
            self.checkers.append(checker)
        self.workers[worker_id] = self.gateway.workers[worker_id] = worker
        return worker

    def place(self, attempt: Attempt) -> tuple[str, str]:
        """Any prefill worker, any decode worker; choices that already differ stay on one worker."""
        alive = [w for w, worker in self.workers.items() if worker.is_alive]
        decode = self.rng.choice([w for w in alive if self.roles[w].decodes])
        live = [attempt.delivered[c] for c in attempt.live_choices]
        if any(tokens != live[0] for tokens in live):
            return decode, decode
        return self.rng.choice([w for w in alive if self.roles[w].prefills]), decode

    def run(self, requests: list[Request], *, spacing_s: float = 0.003, deadline_s: float = 600.0) -> None:
        """Submit them one after the other and go on until all have ended."""
        for index, request in enumerate(requests):
            self.loop.call_at(self.loop.now + index * spacing_s, lambda request=request: self.gateway.submit(request))  # type: ignore[misc]
        num_before = len(self.gateway.ledgers)
        done = self.loop.run(
            lambda: len(self.gateway.ledgers) == num_before + len(requests) and self.gateway.is_done, deadline_s=self.loop.now + deadline_s
        )
        assert done, {k: (v.terminal, v.attempt) for k, v in self.gateway.ledgers.items() if not v.terminal}

    def rest(self, *, deadline_s: float = 300.0) -> None:
        """Go on until nothing is held by anybody, and judge what remains: I3 and I5."""
        at_rest = self.loop.run(
            lambda: all(w.core.is_at_rest for w in self.workers.values() if w.is_alive), deadline_s=self.loop.now + deadline_s
        )
        alive = [w for w in self.workers.values() if w.is_alive]
        assert at_rest, {w.worker_id: (list(w.core._attempts), len(w.core._offers), len(w.core._intake), len(w.core._loads)) for w in alive}
        for worker in alive:
            worker.core.check()
            snapshot = worker.core.snapshot(self.loop.now)
            assert snapshot.num_blocks_unaccounted == 0
            assert snapshot.num_blocks_free + snapshot.num_blocks_cached == snapshot.num_blocks_total
        for checker in self.checkers:
            assert checker.worker.executor.num_wrong_reads == 0

    def counters(self, worker_id: str) -> dict[str, int]:
        return self.workers[worker_id].core.snapshot(self.loop.now).counters

    def judge(self) -> None:
        """I1 and I2: every finished request has the tokens of the undisturbed run; a cancelled one a prefix of them."""
        for ledger in self.gateway.ledgers.values():
            assert ledger.terminal in ("finished", "cancelled"), ledger.reason
            tokens, ends = undisturbed(ledger.request, eos_period=self._eos_period)
            got = [list(t) for t in ledger.tokens]
            if ledger.terminal == "finished":
                assert got == tokens and ledger.finish == ends
            else:
                assert all(mine == right[: len(mine)] for mine, right in zip(got, tokens, strict=True))


def cached_names(worker: SimWorker, tier: Tier = Tier.DEVICE) -> set[bytes]:
    """Hash blocks the router believes the worker holds in a tier, from its events alone; checks that they are numbered on."""
    names: set[bytes] = set()
    for number, event in enumerate(worker.kv_events, 1):
        assert event.number == number
        if not isinstance(event, AllBlocksCleared) and event.tier is not tier:
            continue
        if isinstance(event, BlocksStored):
            assert not names & set(event.hashes), "announced twice"
            is_known = event.parent in names or event.parent == ROOT
            assert is_known or tier is Tier.HOST, "a block whose parent was never announced"
            names |= set(event.hashes)
        elif isinstance(event, BlocksRemoved):
            assert names >= set(event.hashes), "removed before it was stored"
            names -= set(event.hashes)
    return names


def names_of(tokens: list[int], root: bytes = ROOT) -> list[bytes]:
    return block_hashes(root, tokens)
