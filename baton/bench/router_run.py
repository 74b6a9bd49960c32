"""Taking turns at deciding: our router and others', over fleets and prompts of one kind, a stage after the other.

    stage     what is loaded                                        figures
    index     two indexes alone, searched and walked                hash, match
    decide    two routers, with few and with many live requests     decide, life
    wide      a router over 1,024 workers                           match, decide
    socket    a router, a gateway and workers, a process each       socket

All subjects of a stage are loaded, and all but one stopped, as in baton/bench/transfer_run.py. In a round each does each of its figures
once; a turn's figure is the median of its repeats. Peers know some figures only; what a subject refuses is left out, with its reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from baton.bench.conversation import EngineLost, EngineProcess, Json, WorkUnsupported
from baton.bench.peers import OURS, SCRIPTS, SPOKEN, Contender, environment_of, parse_environment
from baton.bench.processor_time import others_between, processor_time
from protocol.errors import ConfigError

PEERS = ("dynamo",)
ANSWER_TIMEOUT_S = 600.0
WIDE_WORKERS = 1024

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    name: str
    figures: Mapping[str, int]  # with the repeats of a turn
    stands_still: bool = True  # a subject without processes of its own can be stopped by signal


STAGES = (
    Stage(name="index", figures={"hash/4k": 500, "match/4k/search": 1000, "match/4k/walk": 1000}),
    Stage(name="decide", figures={"decide/4k": 2000, "decide/4k/100k": 2000, "decide/32k": 300, "life/4k": 2000}),
    Stage(name="wide", figures={"match/4k": 500, "decide/4k": 300}),
    Stage(name="socket", figures={"socket/4k": 2000}, stands_still=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPlan:
    stages: tuple[Stage, ...]
    subjects: tuple[Contender, ...]  # ours first
    num_workers: int
    num_blocks: int
    num_live: int  # requests of the larger window
    num_rounds: int
    seed: int

    def workers_of(self, stage: Stage) -> int:
        return WIDE_WORKERS if stage.name == "wide" else self.num_workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One figure of one subject in one round."""

    seconds: tuple[float, ...]
    cpu_s: tuple[float, ...]  # of the thread; empty where others work for it


Cell = tuple[str, str, str]  # stage, figure, subject


@dataclass(slots=True, kw_only=True)
class Measured:
    """Everything seen."""

    turns: dict[Cell, list[Turn]] = field(default_factory=dict)
    others: dict[str, list[float]] = field(default_factory=dict)  # by stage: cores that others used, by round
    lost: dict[Cell, str] = field(default_factory=dict)  # why there are no figures
    subjects: dict[str, dict[str, Json]] = field(default_factory=dict)  # by stage: what each said when loaded


def find_subjects(environments: Sequence[str]) -> tuple[tuple[Contender, ...], dict[str, str]]:
    """Ours and the peers with a Python in `environments` ("dynamo=/path"); and why others are not there.

    Raises:
        ConfigError: a peer is unknown, or an environment has no Python.
    """
    pythons = dict(parse_environment(text, PEERS) for text in environments)
    subjects = [Contender(name=OURS, command=(sys.executable, "-P", "-m", "baton.bench.router_subject"))]
    absent: dict[str, str] = {}
    for name in PEERS:
        script = SCRIPTS / f"router_{name}.py"
        if name not in pythons:
            absent[name] = f"no environment: --peer-env {name}=/path/to/python"
        elif not script.exists():
            absent[name] = f"{script.name} is not there: peers are measured from a source tree, not from an installed wheel"
        else:
            subjects.append(Contender(name=name, command=(str(pythons[name]), "-P", str(script), str(SPOKEN))))
    return tuple(subjects), absent


def stages_of(asked: str) -> tuple[Stage, ...]:
    """ "index,decide" in the order of STAGES.

    Raises:
        ConfigError: there is no such stage.
    """
    names = [part.strip() for part in asked.split(",") if part.strip()]
    known = {stage.name: stage for stage in STAGES}
    for name in names:
        if name not in known:
            raise ConfigError(f"stage {name!r} is unknown; choose from {', '.join(known)}")
    return tuple(stage for stage in STAGES if stage.name in names)


def measure(plan: RouterPlan, scratch: Path, say: Say, on_round: Callable[[Measured], None] = lambda measured: None) -> Measured:
    """Each stage in turn; `on_round` sees what there is after each of their rounds."""
    measured = Measured()
    for stage in plan.stages:
        with ExitStack() as running:
            session = _Session(plan, stage, measured, say)
            session.load_all(running, scratch)
            for index in range(plan.num_rounds):
                session.play_round(index)
                on_round(measured)
    return measured


class _Session:
    """All subjects of one stage."""

    def __init__(self, plan: RouterPlan, stage: Stage, measured: Measured, say: Say) -> None:
        self._plan = plan
        self._stage = stage
        self._measured = measured
        self._say = say
        self._running: dict[str, EngineProcess] = {}

    def load_all(self, running: ExitStack, scratch: Path) -> None:
        plan, stage = self._plan, self._stage
        asked = {
            "verb": "load",
            "stage": stage.name,
            "num_workers": plan.workers_of(stage),
            "num_blocks": plan.num_blocks,
            "num_live": plan.num_live,
            "seed": plan.seed,
        }
        for contender in plan.subjects:
            name = contender.name
            self._say(f"{stage.name}: loading {name}")
            log = scratch / f"{name}-{stage.name}.log"
            process = running.enter_context(EngineProcess(name, contender.command, environment=environment_of(contender), log=log))
            try:
                self._measured.subjects.setdefault(stage.name, {})[name] = process.ask(asked, ANSWER_TIMEOUT_S)
            except (EngineLost, WorkUnsupported) as failure:
                self._lose(name, str(failure))
                continue
            self._running[name] = process
            if stage.stands_still:
                process.pause()

    def play_round(self, index: int) -> None:
        stage = self._stage
        turns = [(figure, name) for figure in stage.figures for name in self._running]
        Random(f"{self._plan.seed} {stage.name} {index} order").shuffle(turns)
        sessions = {process.session for process in self._running.values()}
        before = processor_time(sessions)
        for figure, name in turns:
            if name in self._running and (stage.name, figure, name) not in self._measured.lost:
                self._say(f"{stage.name}: round {index + 1}/{self._plan.num_rounds}, {figure}, {name}")
                self._take_turn(figure, name)
        self._measured.others.setdefault(stage.name, []).append(others_between(before, processor_time(sessions)))

    def _take_turn(self, figure: str, name: str) -> None:
        """One subject while the others stand still."""
        stage, process, cell = self._stage, self._running[name], (self._stage.name, figure, name)
        if stage.stands_still:
            process.resume()
        try:
            process.ask({"verb": "prepare", "figure": figure, "repeats": stage.figures[figure]}, ANSWER_TIMEOUT_S)
            answered = process.ask({"verb": "run"}, ANSWER_TIMEOUT_S)
        except WorkUnsupported as refusal:
            self._measured.lost[cell] = str(refusal)
            return
        except EngineLost as loss:
            process.close()
            del self._running[name]
            self._lose(name, str(loss))
            return
        finally:
            if stage.stands_still and name in self._running:
                process.pause()
        turn = Turn(seconds=tuple(answered["seconds"]), cpu_s=tuple(answered.get("cpu_s", ())))
        self._measured.turns.setdefault(cell, []).append(turn)

    def _lose(self, name: str, reason: str) -> None:
        self._say(f"{self._stage.name}: {name} is lost: {reason}")
        for figure in self._stage.figures:
            cell = (self._stage.name, figure, name)
            self._measured.lost[cell] = reason
            self._measured.turns.pop(cell, None)
