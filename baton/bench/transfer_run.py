"""Taking turns at moving blocks between two processes: ours, what bounds it, and others, over the same lists of blocks.

    for each chunk size: all subjects loaded, all but one stopped ─► for each round, for each total: each path once, in an order drawn anew

A *turn* is one path's `repeats` transfers of one total; its figure is their median. A path that fails loses its rows, with the reason.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from baton.bench.conversation import EngineLost, EngineProcess, Json, WorkUnsupported
from baton.bench.peers import OURS, SCRIPTS, SPOKEN, Contender, environment_of, parse_environment
from baton.bench.processor_time import others_between, processor_time
from baton.bench.report import TREE
from protocol.errors import ConfigError

PEERS = ("nixl", "nixl_tcp", "gloo", "ray", "ucxx")
OF_OURS = ("gloo", "ray")  # peers whose packages Baton needs itself
ALIKE = Path(__file__).with_name("transfer_spoken.py")
ANSWER_TIMEOUT_S = 300.0
OTHERS_MAX = 0.15  # cores that others use; a round with more says little
REPEATS = ((1 << 20, 40), (16 << 20, 12), (1 << 62, 4))  # (total of at most so many bytes, transfers in a turn)

OUR_PATHS = {  # by the name its rows have: what baton.bench.transfer_subject is asked for
    "copy": "copy",
    "shm": "shm/off",
    "shm_sampled": "shm/sampled",
    "shm_full": "shm/full",
    "socket": "socket",
    "tcp": "tcp/off",
    "tcp_full": "tcp/full",
}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What moves as one piece: a block of a size, or that of a model's pool (16 tokens over all layers)."""

    label: str  # "16KiB", "125m"
    size_bytes: int
    layout: str = ""  # a shape of baton.bench.models


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    label: str
    size_bytes: int

    @property
    def repeats(self) -> int:
        return next(repeats for most_bytes, repeats in REPEATS if self.size_bytes <= most_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A pair of processes that answers for some paths. `environment` comes on top of what its Python is given anyway."""

    contender: Contender
    paths: Mapping[str, str]  # by the name in rows
    environment: Mapping[str, str] = field(default_factory=dict)
    stands_still: bool = True  # stopped by signal while others have their turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One path, one total, one round."""

    seconds: tuple[float, ...]  # of each transfer
    offer_s: float | None = None  # of ours: what the source spent on an offer, digests included

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


Cell = tuple[str, str]  # labels of chunk and total


@dataclass(slots=True, kw_only=True)
class Measured:
    """Everything seen."""

    turns: dict[tuple[Cell, str], dict[int, Turn]] = field(default_factory=dict)  # (cell, path): by round
    others: dict[Cell, dict[int, float]] = field(default_factory=dict)  # cores that others used, by round
    lost: dict[tuple[Cell, str], str] = field(default_factory=dict)  # why there are no figures
    subjects: dict[str, Json] = field(default_factory=dict)  # what each said of itself
    moved_bytes: dict[Cell, int] = field(default_factory=dict)  # whole chunks: a little less than the total


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPlan:
    chunks: tuple[Chunk, ...]
    totals: tuple[Total, ...]
    subjects: tuple[Subject, ...]  # ours first
    pool_bytes: int
    num_rounds: int
    seed: int

    def totals_of(self, chunk: Chunk) -> list[Total]:
        """Those that are at least one chunk, and leave the pool much larger."""
        return [total for total in self.totals if chunk.size_bytes <= total.size_bytes <= self.pool_bytes // 4]


def find_subjects(asked: str, environments: Sequence[str]) -> tuple[tuple[Subject, ...], dict[str, str]]:
    """Ours and the peers of `asked` ("nixl,gloo"), with the Pythons of `environments` ("nixl=/path"); and why some are not there.

    gloo and Ray come with Baton; NIXL and ucxx need a Python each. Ours over ucx runs in ucxx's, which needs Baton's packages as well.

    Raises:
        ConfigError: a peer is unknown, or an environment has no Python.
    """
    pythons = {name: str(path) for name, path in (parse_environment(text, ("nixl", "ucxx")) for text in environments)}
    subjects = [Subject(contender=_ours(sys.executable), paths=OUR_PATHS)]
    absent: dict[str, str] = {}
    for name in filter(None, (part.strip() for part in asked.split(","))):
        if name not in PEERS:
            raise ConfigError(f"peer {name!r} is unknown; choose from {', '.join(PEERS)}")
        package = name.partition("_")[0]
        script = SCRIPTS / f"transfer_{package}.py"
        python = sys.executable if name in OF_OURS else pythons.get(package)
        if python is None:
            absent[name] = f"no environment: --peer-env {package}=/path/to/python"
        elif not script.exists():
            absent[name] = f"{script.name} is not there: peers are measured from a source tree, not from an installed wheel"
        else:
            subjects += _peer(name, python, script)
    return tuple(subjects), absent


def _peer(name: str, python: str, script: Path) -> list[Subject]:
    contender = Contender(name=name, command=(python, "-P", str(script), str(SPOKEN), str(ALIKE)))
    if name == "nixl_tcp":
        return [Subject(contender=contender, paths={name: ""}, environment={"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"})]
    if name == "ucxx":
        ours = Subject(contender=_ours(python, "baton_ucx"), paths={"ucx": "ucx/off"}, environment={"PYTHONPATH": str(TREE)})
        return [Subject(contender=contender, paths={name: ""}), ours]
    return [Subject(contender=contender, paths={name: ""}, stands_still=name != "ray")]  # Ray's daemons watch each other's pulse


def _ours(python: str, name: str = OURS) -> Contender:
    return Contender(name=name, command=(python, "-P", "-m", "baton.bench.transfer_subject"))


def measure(plan: TransferPlan, scratch: Path, say: Say, on_round: Callable[[Measured], None] = lambda measured: None) -> Measured:
    """Every chunk size in turn; `on_round` sees what there is after each of their rounds."""
    measured = Measured()
    for chunk in plan.chunks:
        if not plan.totals_of(chunk):
            continue
        with ExitStack() as running:
            session = _Session(plan, chunk, measured, say)
            session.load_all(running, scratch)
            for index in range(plan.num_rounds):
                session.play_round(index)
                on_round(measured)
    return measured


class _Session:
    """All subjects with pools of one chunk size."""

    def __init__(self, plan: TransferPlan, chunk: Chunk, measured: Measured, say: Say) -> None:
        self._plan = plan
        self._chunk = chunk
        self._measured = measured
        self._say = say
        self._running: dict[str, tuple[Subject, EngineProcess]] = {}  # by path

    def load_all(self, running: ExitStack, scratch: Path) -> None:
        asked = {"verb": "load", "chunk_bytes": self._chunk.size_bytes, "pool_bytes": self._plan.pool_bytes, "layout": self._chunk.layout}
        for subject in self._plan.subjects:
            name = subject.contender.name
            self._say(f"{self._chunk.label}: starting {name}")
            environment = {**environment_of(subject.contender), **subject.environment}
            log = scratch / f"{name}-{self._chunk.label}.log"
            process = running.enter_context(EngineProcess(name, subject.contender.command, environment=environment, log=log))
            try:
                self._measured.subjects[name] = process.ask(asked, ANSWER_TIMEOUT_S)
            except (EngineLost, WorkUnsupported) as failure:
                for path in subject.paths:
                    self._lose(path, str(failure))
                continue
            for path in subject.paths:
                self._running[path] = (subject, process)
            if subject.stands_still:
                process.pause()

    def play_round(self, index: int) -> None:
        for total in self._plan.totals_of(self._chunk):
            cell = (self._chunk.label, total.label)
            count = total.size_bytes // self._chunk.size_bytes
            self._measured.moved_bytes[cell] = count * self._chunk.size_bytes
            order = list(self._running)
            Random(f"{self._plan.seed} {cell} {index} order").shuffle(order)
            sessions = {process.session for _, process in self._running.values()}
            before = processor_time(sessions)
            for path in order:
                if (cell, path) not in self._measured.lost and path in self._running:
                    self._say(f"{self._chunk.label}: round {index + 1}/{self._plan.num_rounds}, {total.label}, {path}")
                    self._take_turn(path, total, index)
            self._measured.others.setdefault(cell, {})[index] = others_between(before, processor_time(sessions))

    def _take_turn(self, path: str, total: Total, index: int) -> None:
        """One path while the others stand still."""
        subject, process = self._running[path]
        cell = (self._chunk.label, total.label)
        asked = {
            "verb": "prepare",
            "path": subject.paths[path],
            "total_bytes": total.size_bytes,
            "seed": f"{self._plan.seed} {self._chunk.label} {total.label} {index}",  # the same blocks for every path
            "repeats": total.repeats,
        }
        if subject.stands_still:
            process.resume()
        try:
            process.ask(asked, ANSWER_TIMEOUT_S)
            answered = process.ask({"verb": "run"}, ANSWER_TIMEOUT_S)
        except WorkUnsupported as refusal:
            self._measured.lost[cell, path] = str(refusal)
            return
        except EngineLost as loss:
            self._lose_subject(subject, process, str(loss))
            return
        finally:
            if subject.stands_still:
                process.pause()
        turn = Turn(seconds=tuple(answered["seconds"]), offer_s=answered.get("offer_s"))
        self._measured.turns.setdefault((cell, path), {})[index] = turn

    def _lose_subject(self, subject: Subject, process: EngineProcess, reason: str) -> None:
        process.close()
        for path in subject.paths:
            self._running.pop(path, None)
            self._lose(path, reason)

    def _lose(self, path: str, reason: str) -> None:
        self._say(f"{self._chunk.label}: {path} is lost: {reason}")
        for total in self._plan.totals_of(self._chunk):
            cell = (self._chunk.label, total.label)
            self._measured.lost[cell, path] = reason
            self._measured.turns.pop((cell, path), None)
