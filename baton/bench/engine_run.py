"""Measuring one model on every engine in turn: tokens checked in float32 first, then rounds in which each does each workload once.

    checkpoint ─► float32: ours, then each peer, alone ─► bfloat16: all loaded, all but one stopped ─► warm up ─► rounds ─► MeasuredModel

A round takes the workloads in order and, within each, the engines in an order drawn anew; so what is compared was measured side by side.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import psutil

from baton.bench.conversation import EngineLost, EngineProcess, Json, WorkUnsupported
from baton.bench.models import label_of, make_checkpoint, read_model, resident_weights_bytes
from baton.bench.peers import OURS, Contender, environment_of
from baton.bench.processor_time import others_between, processor_time
from baton.bench.workloads import AskedRequest, Workload
from engine.models.config import ModelConfig
from engine.models.tensors import weights_size_bytes
from kernels.native.library import NativeLibrary, choose_kernels, load_library

OTHERS_MAX = 0.15  # cores; spinning barriers lose many times over beside more than that
MEASURED_S = 1.0  # a run shorter than this is repeated with other prompts, and the median taken
REPEATS_MAX = 8
MAX_NUM_SEQS = 64
NUM_CHECKED_PROMPTS, NUM_CHECKED_PROMPT_TOKENS, NUM_CHECKED_TOKENS = 2, 64, 32
FREE_BYTES_MIN = 3 << 30  # beside the weights, before one more engine is loaded
STREAM_BYTES, STREAM_REPEATS = 256 << 20, 3
PEAK_ROUNDS, PEAK_REPEATS = 200, 5
ONE_STREAM = (OURS, "one_stream")
POOL_FILE = "memfd:baton-kv"  # as kvtransfer.region names it: the pool in a process's mappings

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPlan:
    """What is measured."""

    workloads: tuple[Workload, ...]
    contenders: tuple[Contender, ...]  # ours first
    num_threads: int
    num_rounds: int
    num_retries: int  # of a disturbed measurement
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One engine's figures of one workload in one round, in the order of the workload's measures."""

    values: tuple[float, ...]
    others: float  # cores used by others meanwhile
    num_tries: int

    @property
    def is_disturbed(self) -> bool:
        return self.others >= OTHERS_MAX


@dataclass(slots=True, kw_only=True)
class MeasuredModel:
    """Everything seen of one model."""

    label: str
    model: ModelConfig
    engines: dict[str, Json] = field(default_factory=dict)  # what each said of itself, and ready_s
    tokens: dict[str, str] = field(default_factory=dict)  # of each peer: "equal" or how they differ from ours in float32
    samples: dict[tuple[str, str], dict[int, Sample]] = field(default_factory=dict)  # (engine, workload): by round
    lost: dict[tuple[str, str], str] = field(default_factory=dict)  # (engine, workload): why there are no figures
    stream_bytes_per_s: list[float] = field(default_factory=list)
    stream_beside: dict[int, float] = field(default_factory=dict)  # by round: just before and after our one stream, on average
    peak_flops_per_s: list[float] = field(default_factory=list)
    memory_beyond_bytes: int | None = None  # of our engine: beside weights and KV pool

    def lose(self, name: str, workloads: Sequence[Workload], reason: str) -> None:
        for workload in workloads:
            self.lost.setdefault((name, workload.name), reason)
            self.samples.pop((name, workload.name), None)


def measure_model(plan: BenchPlan, model: str | Path, scratch: Path, say: Say) -> MeasuredModel:
    """One model on all engines; an engine that fails loses its rows, with the reason."""
    label = label_of(model)
    say(f"{label}: checkpoint")
    model_dir = make_checkpoint(model, scratch) if isinstance(model, str) else model
    measured = MeasuredModel(label=label, model=read_model(model_dir))
    for workload in plan.workloads:
        if workload.max_model_len > measured.model.max_model_len:
            reason = f"{workload.max_model_len:,} tokens exceed the {measured.model.max_model_len:,} the model can address"
            for contender in plan.contenders:
                measured.lose(contender.name, [workload], reason)
    session = _Session(plan, measured, model_dir, scratch, say)
    if len(plan.contenders) > 1:
        session.check_tokens()
    with ExitStack() as running:
        session.load_all(running)
        session.warm_up()
        for round_index in range(plan.num_rounds):
            session.play_round(round_index)
    return measured


class _Session:
    """The engines of one model while they are measured."""

    def __init__(self, plan: BenchPlan, measured: MeasuredModel, model_dir: Path, scratch: Path, say: Say) -> None:
        self._plan = plan
        self._measured = measured
        self._model_dir = model_dir
        self._scratch = scratch
        self._say = say
        self._running: dict[str, EngineProcess] = {}
        self._library = load_library()
        self._path = choose_kernels(dtype="bfloat16").name.encode()

    # --- float32 ---

    def check_tokens(self) -> None:
        """Greedy tokens of each peer against ours; a peer whose tokens differ is measured all the same, and the difference told."""
        rng = Random(f"{self._plan.seed} tokens")
        vocab_size = self._measured.model.vocab_size
        prompts = [tuple(rng.randrange(3, vocab_size) for _ in range(NUM_CHECKED_PROMPT_TOKENS)) for _ in range(NUM_CHECKED_PROMPTS)]
        asked = [AskedRequest(prompt=prompt, num_tokens=NUM_CHECKED_TOKENS) for prompt in prompts]
        ours: list[list[int]] | None = None
        for contender in self._plan.contenders:
            self._say(f"{self._measured.label}: tokens of {contender.name} in float32")
            try:
                theirs = self._float32_tokens(contender, asked)
            except (EngineLost, WorkUnsupported) as failure:
                self._measured.tokens[contender.name] = f"not compared: {failure}"
                continue
            if contender.name == OURS:
                ours = theirs
            elif ours is not None:
                self._measured.tokens[contender.name] = compare_tokens(ours, theirs)

    def _float32_tokens(self, contender: Contender, asked: Sequence[AskedRequest]) -> list[list[int]]:
        num_tokens = NUM_CHECKED_PROMPT_TOKENS + NUM_CHECKED_TOKENS
        with self._started(contender, "float32") as process:
            process.load(
                self._model_dir,
                dtype="float32",
                num_threads=self._plan.num_threads,
                max_model_len=2 * num_tokens,
                num_kv_tokens=8 * num_tokens,
                max_num_seqs=NUM_CHECKED_PROMPTS,
            )
            return process.generate(asked, is_streamed=False)[1]

    # --- loading ---

    def load_all(self, running: ExitStack) -> None:
        """Each engine in turn, stopped once it is ready."""
        for contender in self._plan.contenders:
            if not self._workloads_of(contender.name):
                continue
            weights_bytes = weights_size_bytes(self._measured.model)
            free_bytes = psutil.virtual_memory().available
            if free_bytes < FREE_BYTES_MIN + 2 * weights_bytes:
                self._lose(contender.name, f"{free_bytes >> 20:,} MiB are free, too few for one more engine; compare fewer at once")
                continue
            self._say(f"{self._measured.label}: loading {contender.name}")
            began_s = time.monotonic()
            process = running.enter_context(self._started(contender, "bfloat16"))
            try:
                told = self._load(process)
            except (EngineLost, WorkUnsupported) as failure:
                self._lose(contender.name, str(failure))
                continue
            ready_s = time.monotonic() - began_s - told.pop("excluded_s", 0.0)
            self._measured.engines[contender.name] = {**told, "ready_s": round(ready_s, 2)}
            self._running[contender.name] = process
            process.pause()

    def _load(self, process: EngineProcess) -> Json:
        workloads = self._workloads_of(process.name)
        return process.load(
            self._model_dir,
            dtype="bfloat16",
            num_threads=self._plan.num_threads,
            max_model_len=max(workload.max_model_len for workload in workloads),
            num_kv_tokens=max(workload.num_kv_tokens for workload in workloads) * 5 // 4,  # the last partial blocks, and some room
            max_num_seqs=MAX_NUM_SEQS,
        )

    def _started(self, contender: Contender, dtype: str) -> EngineProcess:
        log = self._scratch / f"{self._measured.label}-{contender.name}-{dtype}.log"
        return EngineProcess(contender.name, contender.command, environment=environment_of(contender), log=log)

    # --- rounds ---

    def warm_up(self) -> None:
        """Once each, unmeasured. Our engine's memory is looked at afterwards."""
        for workload in self._plan.workloads:
            requests = workload.warm_up(Random(f"{self._plan.seed} {workload.name} warm"), self._measured.model.vocab_size)
            for name in self._present(workload):
                self._say(f"{self._measured.label}: warming up {name} for {workload.name}")
                self._turn(name, workload, requests)
        if (ours := self._running.get(OURS)) is not None:
            held_bytes = ours.resident_bytes(without=POOL_FILE)
            self._measured.memory_beyond_bytes = held_bytes - resident_weights_bytes(self._measured.model)

    def play_round(self, index: int) -> None:
        """Every workload on every engine, and beside them what the machine can do."""
        if isinstance(self._library, NativeLibrary):
            calls, num_threads = self._library.calls, self._plan.num_threads
            self._measured.stream_bytes_per_s.append(self._stream_now(self._library))
            pairs = max(calls.baton_measure_peak(self._path, 1, num_threads, PEAK_ROUNDS) for _ in range(PEAK_REPEATS))
            self._measured.peak_flops_per_s.append(2 * pairs)
        for workload in self._plan.workloads:
            names = self._present(workload)
            Random(f"{self._plan.seed} {workload.name} {index} order").shuffle(names)
            for name in names:
                self._say(f"{self._measured.label}: round {index + 1}/{self._plan.num_rounds}, {workload.name}, {name}")
                sample = (
                    self._sample_beside_stream(index, workload)
                    if (name, workload.name) == ONE_STREAM
                    else self._sample(name, workload, index)
                )
                if sample is not None:
                    self._measured.samples.setdefault((name, workload.name), {})[index] = sample

    def _sample_beside_stream(self, index: int, workload: Workload) -> Sample | None:
        """On virtual machines the bandwidth moves by a half within seconds: what is set beside it is measured at its side."""
        if not isinstance(self._library, NativeLibrary):
            return self._sample(OURS, workload, index)
        before = self._stream_now(self._library)
        sample = self._sample(OURS, workload, index)
        self._measured.stream_beside[index] = (before + self._stream_now(self._library)) / 2
        return sample

    def _stream_now(self, library: NativeLibrary) -> float:
        return float(library.calls.baton_measure_stream(self._plan.num_threads, STREAM_BYTES, STREAM_REPEATS))

    def _sample(self, name: str, workload: Workload, index: int) -> Sample | None:
        """The least disturbed of up to 1 + num_retries measurements."""
        best: Sample | None = None
        for attempt in range(1 + self._plan.num_retries):
            rng = Random(f"{self._plan.seed} {workload.name} {index} {attempt}")  # the same for every engine
            taken = self._measure(name, workload, rng, attempt + 1)
            if taken is None:
                return None
            best = taken if best is None or taken.others < best.others else best
            if not best.is_disturbed:
                break
        return best

    def _measure(self, name: str, workload: Workload, rng: Random, num_tries: int) -> Sample | None:
        sessions = [process.session for process in self._running.values()]
        runs: list[tuple[float, ...]] = []
        spent_s = 0.0
        before = processor_time(sessions)
        while not runs or (spent_s < MEASURED_S and len(runs) < REPEATS_MAX):
            began_s = time.monotonic()
            values = self._turn(name, workload, workload.requests(rng, self._measured.model.vocab_size))
            if values is None:
                return None
            spent_s += time.monotonic() - began_s
            runs.append(values)
        others = others_between(before, processor_time(sessions))
        return Sample(
            values=tuple(statistics.median(of_measure) for of_measure in zip(*runs, strict=True)), others=others, num_tries=num_tries
        )

    def _turn(self, name: str, workload: Workload, requests: Sequence[AskedRequest]) -> tuple[float, ...] | None:
        """One run by one engine while the others stand still. None: it can no longer do this, and the reason is noted."""
        process = self._running[name]
        process.resume()
        try:
            timelines, _ = process.generate(requests, is_streamed=workload.is_streamed)
        except WorkUnsupported as refusal:
            self._measured.lose(name, [workload], str(refusal))
            return None
        except EngineLost as loss:
            self._lose(name, str(loss))
            del self._running[name]
            process.close()
            return None
        finally:
            process.pause()
        return tuple(measure.value(timelines) for measure in workload.measures)

    # --- who is there ---

    def _present(self, workload: Workload) -> list[str]:
        return [name for name in self._running if workload in self._workloads_of(name)]

    def _workloads_of(self, name: str) -> list[Workload]:
        contender = next(contender for contender in self._plan.contenders if contender.name == name)
        return [w for w in self._plan.workloads if contender.takes_part_in(w.name) and (name, w.name) not in self._measured.lost]

    def _lose(self, name: str, reason: str) -> None:
        self._say(f"{self._measured.label}: {name} is lost: {reason}")
        self._measured.lose(name, self._workloads_of(name), reason)


def compare_tokens(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> str:
    """ "equal", or where they part first."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if list(a) != list(b):
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            return f"differ: prompt {index + 1}, output token {at + 1} of {len(a)}: ours {a[at]}, theirs {b[at]}"
    return "equal"
