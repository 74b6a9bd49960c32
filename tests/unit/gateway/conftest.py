"""A small real cluster without torch or Ray: directory, router and workers that speak protocol.wire over sockets.

A fake worker computes nothing: the token at output position p of choice c is `token_at(num_prompt_tokens, c, p)`, so a stream
that lost, repeated or reordered a token shows at once, whichever workers it went through.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
from array import array
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import tokenizers
import uvicorn
from openai import AsyncOpenAI

from cluster.directory import Directory
from gateway.app import make_app
from gateway.config import GatewayConfig
from gateway.service import GatewayService
from protocol.kv import DigestMode, Endpoint, FirstToken, HandoffKind, HandoffShard, KVHandoff, KVLayout, Lease, ShardRectangle
from protocol.links import MembershipWatch
from protocol.messages import (
    Assigned,
    Assignment,
    AttemptFailed,
    Cancel,
    Done,
    ExplainRequest,
    HandoffDone,
    Offered,
    Ping,
    Place,
    PlaceAck,
    Pong,
    PrefillDone,
    PrefixSource,
    Refused,
    Register,
    RegisterService,
    ServiceAddress,
    SnapshotFrame,
    StatusReply,
    StatusRequest,
    StepOutput,
    Submit,
    Subscribe,
    TokenLogprobs,
    TokenRun,
    TransferFailed,
)
from protocol.peering import RouterReadiness
from protocol.request import Attempt, AttemptKey, FinishReason
from protocol.wire import Connection, Identity, Listener
from protocol.worker import Role, WorkerAddress, WorkerSnapshot, WorkerState
from router.explanations import Explanations, answer

SECRET = b"cluster secret of the tests"
FINGERPRINT = bytes(16)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
EOS = 1
epochs = itertools.count(1_000)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Token 5 + b is the byte b; 0..4 are special."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    name_of = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    assert set(name_of.values()) == set(alphabet)
    vocabulary = {name: i for i, name in enumerate(SPECIALS)} | {name_of[b]: 5 + b for b in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def token_of(character: str) -> int:
    (byte,) = character.encode("latin-1")
    return 5 + byte


def character_at(num_prompt_tokens: int, choice: int, position: int) -> str:
    return chr(ord("a") + (num_prompt_tokens + 3 * choice + 7 * position) % 26)


def expected_text(num_prompt_tokens: int, count: int, *, choice: int = 0) -> str:
    return "".join(character_at(num_prompt_tokens, choice, p) for p in range(count))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    directory.mkdir()
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS], "temperature": 0.7, "top_k": 20}))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return directory


@dataclass(slots=True)
class Task:
    submit: Submit
    connection: Connection
    positions: list[int]  # next output position of each choice
    done: list[bool]
    announced: bool = False  # the hand-off was pulled


@dataclass
class FakeWorker:
    """One worker process in miniature. `script` overrides the token of a position; `step_s` is the pause between steps."""

    worker_id: str
    role: Role
    directory_port: int
    step_s: float = 0.0005
    script: str | list[int] | None = None  # text or token ids, then EOS
    fail_pull: bool = False
    refuse: str | None = None  # answer every submit with AttemptFailed
    stop_before: int | None = None  # do not go past this output position: the test wants to catch it here
    paused: bool = False
    max_model_len: int = 256
    received: list[Any] = field(default_factory=list)
    cancelled: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.epoch = next(epochs)
        self.tasks: dict[tuple[str, int], Task] = {}
        self.steps = 0
        self.state = WorkerState.READY
        self.subscribers: list[Connection] = []

    async def start(self) -> None:
        identity = Identity(name=self.worker_id, kind="worker", epoch=self.epoch, fingerprint=FINGERPRINT)
        self.listener = Listener(identity, SECRET, self._accept)
        await self.listener.start()
        self.watch = MembershipWatch(identity, SECRET, host="127.0.0.1", port=self.directory_port, on_change=lambda _: None)
        self.watch.register(Register(address=self._address()))
        self.watch.start()
        self.runner = asyncio.create_task(self._run())

    async def kill(self) -> None:
        """The process dies: every socket ends at once."""
        self.runner.cancel()
        self.listener.close()
        await self.watch.close()

    def _address(self) -> WorkerAddress:
        return WorkerAddress(
            worker_id=self.worker_id, role=self.role, epoch=self.epoch, host="127.0.0.1", port=self.listener.port, pid=4242,
            hostname="here", kv_endpoint=Endpoint(), model_id="tiny", fingerprint=FINGERPRINT, block_size_tokens=16,
            num_kv_blocks=64, max_model_len=self.max_model_len, max_num_seqs=8, max_num_batched_tokens=64,
        )  # fmt: skip

    def snapshot(self) -> WorkerSnapshot:
        return WorkerSnapshot(
            worker_id=self.worker_id, epoch=self.epoch, role=self.role, state=self.state, age_s=0.0, step_count=self.steps,
            last_event_number=0, num_waiting=3, num_pulling=2, num_running=len(self.tasks),
            waiting_tokens=0, running_kv_tokens=16 * len(self.tasks),
            num_blocks_total=64, num_blocks_free=60, num_blocks_owned=2, num_blocks_leased=1, num_blocks_cached=1,
            num_preemptions=3, step_time_ewma_s=0.001, counters={"handoffs_out": 5},
        )  # fmt: skip

    def _accept(self, connection: Connection) -> None:
        connection.on_message = self._receive

    def _receive(self, connection: Connection, message: Any) -> None:
        self.received.append(message)
        if isinstance(message, Subscribe):
            self.subscribers.append(connection)
            connection.send(SnapshotFrame(snapshot=self.snapshot()))
        elif isinstance(message, Cancel):
            self.cancelled.append((message.request_id, message.attempt))
            self.tasks.pop((message.request_id, message.attempt), None)
        elif isinstance(message, Submit):
            attempt = message.attempt
            if self.refuse is not None:
                key = attempt.key
                connection.send(AttemptFailed(request_id=key.request_id, attempt=key.attempt, reason=self.refuse, retryable=True))
                return
            skip = 0 if message.handoff is None else 1
            positions = [len(d) + skip for d in attempt.delivered]
            task = Task(submit=message, connection=connection, positions=positions, done=list(attempt.finished))
            self.tasks[(attempt.request.request_id, attempt.number)] = task

    async def _run(self) -> None:
        last = 0.0
        while True:
            await asyncio.sleep(self.step_s)
            now = asyncio.get_running_loop().time()
            if now - last > 0.05:
                last = now
                for subscriber in self.subscribers:
                    subscriber.send(SnapshotFrame(snapshot=self.snapshot()))
            if not self.paused:
                self._step()

    def _step(self) -> None:
        if self.tasks:
            self.steps += 1
        for key, task in list(self.tasks.items()):
            handoff = task.submit.handoff
            if handoff is not None and not task.announced:
                task.announced = True
                request_id, number = key
                if self.fail_pull:
                    task.connection.send(TransferFailed(request_id=request_id, attempt=number, error="peer_lost", detail=""))
                else:
                    task.connection.send(HandoffDone(request_id=request_id, attempt=number, size_bytes=4096, duration_s=0.001, path="shm"))
            runs = [run for choice in range(len(task.done)) if (run := self._token(task, choice)) is not None]
            if runs:
                task.connection.send(StepOutput(worker_id=self.worker_id, epoch=self.epoch, step=self.steps, runs=tuple(runs)))
            if all(task.done):
                del self.tasks[key]
            elif task.submit.prefill_only:
                del self.tasks[key]
                task.connection.send(Offered(handoff=self._offer(task)))

    def _token(self, task: Task, choice: int) -> TokenRun | None:
        attempt, position = task.submit.attempt, task.positions[choice]
        if task.done[choice] or (self.stop_before is not None and position >= self.stop_before):
            return None
        token, reason = self._next(attempt, choice, position)
        task.positions[choice] += 1
        task.done[choice] = reason is not None
        k = attempt.request.sampling.num_logprobs
        logprobs: tuple[TokenLogprobs, ...] = ()
        if k is not None:
            others = [token, *range(5, 5 + k)][:k]
            logprobs = (
                TokenLogprobs(logprob=-0.5, rank=1, top_token_ids=array("I", others), top_logprobs=tuple(-0.5 - i for i in range(k))),
            )
        return TokenRun(
            request_id=attempt.request.request_id, attempt=attempt.number, choice=choice, position=position,
            token_ids=array("I", [token]), logprobs=logprobs, finish_reason=reason, num_cached_tokens=2,
        )  # fmt: skip

    def _next(self, attempt: Attempt, choice: int, position: int) -> tuple[int, FinishReason | None]:
        sampling = attempt.request.sampling
        if self.script is not None:
            tokens = [token_of(c) for c in self.script] if isinstance(self.script, str) else self.script
            if position >= len(tokens):
                return EOS, FinishReason.STOP
            token = tokens[position]
        else:
            token = token_of(character_at(attempt.request.num_prompt_tokens, choice, position))
        return token, FinishReason.LENGTH if position + 1 >= sampling.max_tokens else None

    def _offer(self, task: Task) -> KVHandoff:
        attempt = task.submit.attempt
        layout = KVLayout(block_size_tokens=16, groups=(), shard=ShardRectangle(first_head=0, last_head=1, first_layer=0, last_layer=1))
        shard = HandoffShard(
            worker_id=self.worker_id, rank=0, epoch=self.epoch, endpoint=Endpoint(), region_id=0, layout=layout,
            block_ids=array("I"), generations=array("Q"), digest_mode=DigestMode.OFF, digests=b"",
        )  # fmt: skip
        live = [c for c, done in enumerate(task.done) if not done]
        return KVHandoff(
            handoff_id="0" * 32, kind=HandoffKind.PREFILL, request_id=attempt.request.request_id, attempt=attempt.number,
            fingerprint=FINGERPRINT, token_ids=attempt.tokens(live[0]), layer_watermark=0,
            first_tokens=tuple(FirstToken(choice=c, token_id=0) for c in live), lease=Lease(duration_s=30.0), shards=(shard,),
        )  # fmt: skip


class FakeRouter:
    """Round robin over the workers it is told of; can be silent, refuse, or die. Remembers as the real one does."""

    def __init__(self, workers: list[FakeWorker], directory_port: int, *, name: str = "router-0", reason_not_ready: str = "") -> None:
        self.workers = workers
        self.name = name
        self.reason_not_ready = reason_not_ready
        self.silent = False  # takes no Place
        self.hung = False  # takes nothing
        self.assign = True  # False: leaves what it acknowledged in its queue
        self.refuse: tuple[int, str, float | None] | None = None
        self.prefix_source: PrefixSource | None = None  # said in every assignment
        self.cached_tokens = 0  # said in every assignment, and that the first token takes a millisecond
        self.explanations = Explanations(max_count=8)
        self.status: dict[str, Any] = {"policy": "fake"}
        self.places: list[Place] = []
        self.told: list[PrefillDone | Done] = []
        self._directory_port = directory_port
        self._turn = itertools.count()

    async def start(self) -> None:
        epoch = next(epochs)
        identity = Identity(name=self.name, kind="router", epoch=epoch)
        self.listener = Listener(identity, SECRET, self._accept)
        await self.listener.start()
        self.watch = MembershipWatch(identity, SECRET, host="127.0.0.1", port=self._directory_port, on_change=lambda _: None)
        service = ServiceAddress(name=self.name, kind="router", epoch=epoch, host="127.0.0.1", port=self.listener.port, pid=4343)
        self.watch.register(RegisterService(service=service))
        self.watch.start()

    async def kill(self) -> None:
        self.listener.close()
        await self.watch.close()

    def _accept(self, connection: Connection) -> None:
        connection.on_message = self._receive
        self.gateway = connection
        self.say(self.reason_not_ready)

    def say(self, reason_not_ready: str) -> None:
        self.reason_not_ready = reason_not_ready
        self.gateway.send(RouterReadiness(is_ready=not reason_not_ready, reason=reason_not_ready))

    def _receive(self, connection: Connection, message: Any) -> None:
        if self.hung:
            return
        if isinstance(message, Ping):
            connection.send(Pong(nonce=message.nonce))
        elif isinstance(message, StatusRequest):
            connection.send(StatusReply(reply_id=message.reply_id, json=json.dumps(self.status)))
        elif isinstance(message, ExplainRequest):
            found = answer(self.explanations, message.name, message.tenant, self._now(), by="router")
            connection.send(StatusReply(reply_id=message.reply_id, json=json.dumps(found)))
        elif isinstance(message, PrefillDone):
            self.told.append(message)
            if message.num_cached_tokens is not None:
                key = AttemptKey(request_id=message.request_id, attempt=message.attempt)
                self.explanations.first_token(key, self._now(), found_tokens=message.num_cached_tokens)
        elif isinstance(message, Done):
            self.told.append(message)
            self.explanations.ended(message, self._now())
        elif isinstance(message, Place) and not self.silent:
            self.places.append(message)
            connection.send(PlaceAck(request_id=message.request_id, attempt=message.attempt, queue_position=0))
            if self.assign:
                connection.send(said := self._place(message))
                if isinstance(said, Assigned):
                    self.explanations.placed(message, said.assignment, self._now())
                else:
                    self.explanations.refused(message, said, self._now())

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def _place(self, place: Place) -> Assigned | Refused:
        turn = next(self._turn)
        fresh = [w for w in self.workers if w.worker_id not in place.excluded]
        prefill = [w.worker_id for w in fresh if w.role.prefills]
        decode = [w.worker_id for w in fresh if w.role.decodes]
        status = self.refuse or (None if decode else (503, "no decode worker", 0.1))
        if status is not None:
            code, message, retry_after_s = status
            return Refused(request_id=place.request_id, attempt=place.attempt, status=code, message=message, retry_after_s=retry_after_s)
        target = decode[turn % len(decode)]
        source = target if place.local_only or not prefill else prefill[turn % len(prefill)]
        return Assigned(
            assignment=Assignment(
                request_id=place.request_id, attempt=place.attempt, prefill_worker=source, decode_worker=target,
                cached_tokens=self.cached_tokens, predicted_ttft_s=0.001, policy="fake", reason="round robin",
                prefill_scores=(), decode_scores=(), waited_s=0.0, prefix_source=self.prefix_source,
            )
        )  # fmt: skip


class FakeCluster:
    """Directory, router, two prefill and two decode workers, one gateway behind uvicorn, and clients of it."""

    def __init__(self, model_dir: Path, config: GatewayConfig) -> None:
        self.config = config
        self.model_dir = model_dir
        self.workers: dict[str, FakeWorker] = {}

    async def start(self) -> None:
        self.directory = Directory(secret=SECRET, epoch=next(epochs))
        await self.directory.start()
        for worker_id, role in (
            ("prefill-0", Role.PREFILL),
            ("prefill-1", Role.PREFILL),
            ("decode-0", Role.DECODE),
            ("decode-1", Role.DECODE),
        ):
            await self.add_worker(worker_id, role)
        self.router = FakeRouter(list(self.workers.values()), self.directory.port)
        await self.router.start()
        self.service = GatewayService(
            self.config, model_dir=self.model_dir, directory_host="127.0.0.1", directory_port=self.directory.port,
            secret=SECRET, salt=b"s" * 32, epoch=next(epochs), name="gateway-0",
        )  # fmt: skip
        uvicorn_config = uvicorn.Config(make_app(self.service), port=0, log_level="error", lifespan="on", timeout_graceful_shutdown=1)
        uvicorn_config.load()
        self.server = uvicorn.Server(uvicorn_config)  # without its main loop, which would sleep at start and end
        self.server.lifespan = uvicorn_config.lifespan_class(uvicorn_config)
        await self.server.startup()
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = aiohttp.ClientSession(self.url)
        await until(lambda: not self.service.reasons_not_ready and self.service.routers.is_up)

    @functools.cached_property
    def openai(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    async def add_worker(self, worker_id: str, role: Role) -> FakeWorker:
        worker = self.workers[worker_id] = FakeWorker(worker_id, role, self.directory.port)
        await worker.start()
        return worker

    async def close(self) -> None:
        if "openai" in self.__dict__:
            await self.openai.close()
        await self.http.close()
        for server in self.server.servers:
            server.close()
        await self.server.lifespan.shutdown()
        await self.router.kill()
        for worker in self.workers.values():
            await worker.kill()
        self.directory.close()

    def set(self, **fields: Any) -> None:
        """Of every worker."""
        for worker in self.workers.values():
            for name, value in fields.items():
                setattr(worker, name, value)

    @property
    def at_rest(self) -> bool:
        """No request at the gateway, no task on a worker, and every placed attempt was reported done to the router."""
        placed = {(p.request_id, p.attempt) for p in self.router.places}
        done = {(d.request_id, d.attempt) for d in self.router.told if isinstance(d, Done)}
        return not self.service.num_live and not any(w.tasks for w in self.workers.values()) and placed <= done


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    """Wait for a condition; the test fails when it does not come."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture
def gateway_config() -> GatewayConfig:
    return GatewayConfig(
        max_n=4, max_body_bytes=64 << 10, max_messages=32, max_logit_bias=8, link_wait_s=0.3, placement_wait_s=1.0, router_silent_s=0.4
    )


@pytest.fixture
async def cluster(model_dir: Path, gateway_config: GatewayConfig) -> AsyncIterator[FakeCluster]:
    fake = FakeCluster(model_dir, gateway_config)
    await fake.start()
    try:
        yield fake
    finally:
        await fake.close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield
