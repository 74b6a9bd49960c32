"""`baton compare`: a tournament of placement policies on the virtual clock, over replicates of a trace, with a verdict."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baton.progress import say, say_line
from baton.trace_options import Burst, Cv, Generator, Prefixes, Rate, Spread, TraceName, TracesDir, command_of, source_of
from protocol.errors import BatonError, ConfigError
from simulator.fidelity import Fidelity

if TYPE_CHECKING:
    from baton.bench.report import Row
    from control.config import ClusterConfig
    from simulator.comparison import Result
    from simulator.tournament import Cell, Outcome, Task, Tournament

SCHEMA = "baton.compare.v1"
MANIFEST_SCHEMA = "baton.compare.manifest.v1"
DEFAULT_POLICIES = "prefix_cost,e2,least_work,round_robin"
DEFAULT_REQUESTS, DEFAULT_REPLICATES = 2000, 20
DEFAULT_TTFT_S, DEFAULT_TPOT_S = 2.0, 0.05
WARM_UP_SHARE = 0.1  # of a replicate's time, where nobody says otherwise
PACKAGES = ("numpy", "xxhash")  # whose versions may change a result
# Of a configuration what a simulation reads; the rest may hold what nobody should find in a folder that is passed on.
SIMULATED = ("model", "workers", "prefill", "decode", "paced", "simulation", "router", "transport")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for, as the manifest has it. Names are those of the command's options."""

    policies: str
    trace: str = ""  # a path, or a name in the folder of traces
    generate: str = ""
    rate: float | None = None
    requests: int = DEFAULT_REQUESTS
    cv: float = 1.0
    burst: int = 1
    prefixes: int | None = None
    spread: float = 0.0
    replicates: int = DEFAULT_REPLICATES
    fidelity: str = Fidelity.TOKEN_ACCURATE.value
    slo_ttft: float = DEFAULT_TTFT_S
    slo_tpot: float = DEFAULT_TPOT_S
    warm_up: float | None = None
    explain: bool = True
    estimate_error: bool = False
    seed: int = 0
    config: str = ""

    @property
    def command(self) -> str:
        """That asks for the same."""
        return command_of("compare", asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A tournament that was run, or what of it was."""

    options: Options
    result: Result
    cells: tuple[Cell, ...]  # of whole replicates, in the order of the tournament
    num_tasks: int  # from the first on
    took_s: float
    num_processes: int

    def document(self) -> dict[str, object]:
        from baton.bench.report import make_document

        sections = {"command": self.options.command, **self.result.sections()}
        return make_document(SCHEMA, seed=self.options.seed, rows=rows_of(self.result), sections=sections)

    def manifest(self) -> dict[str, object]:
        """Of the run folder; what a second run needs, and what it may differ in."""
        from importlib.metadata import version

        tournament = self.result.tournament
        replicates = tournament.replicates
        return {
            "schema": MANIFEST_SCHEMA,
            "command": self.options.command,
            "options": asdict(self.options),
            "cluster": {name: plain(section) for name, section in asdict(tournament.config).items() if name in SIMULATED},
            "trace_sha256": replicates.sha256,
            "seeds": [replicates.seed_of(index) for index in range(self.result.num_replicates)],
            "tasks": self.num_tasks,
            "packages": {name: version(name) for name in PACKAGES},
            "took_s": round(self.took_s, 3),
            "processes": self.num_processes,
        }


def rows_of(result: Result) -> list[Row]:
    """A figure of each metric and policy, the median over replicates, and the share it finds of what a cache without end would."""
    from statistics import median

    from baton.bench.report import Row

    rows = []
    for metric in result.metrics.values():
        for label, values in metric.values.items():
            told = [value for value in values if value is not None]
            why = {} if told else {"reason": "no request had the figure"}
            rows.append(
                Row(name=f"{label}/{metric.metric.name}", value=median(told) if told else None, unit=metric.metric.unit, details=why)
            )
    for label, shares in result.shares_of_ceiling.items():
        rows.append(Row(name=f"{label}/share_of_ceiling", value=median(shares), unit="share of the hits of a cache without end"))
    return rows


def compare(
    policies: Annotated[
        str, typer.Option(help="NAME[:k=v,...] or module:Class[:k=v,...], a comma between; oracle_NAME is told output lengths.")
    ] = DEFAULT_POLICIES,
    trace: TraceName = "",
    generate: Generator = "",
    rate: Rate = None,
    requests: Annotated[int, typer.Option(min=1, help="In each replicate.")] = DEFAULT_REQUESTS,
    cv: Cv = 1.0,
    burst: Burst = 1,
    prefixes: Prefixes = None,
    spread: Spread = 0.0,
    replicates: Annotated[int, typer.Option(min=1, help="Traces each policy meets; fewer than 20 explore.")] = DEFAULT_REPLICATES,
    fidelity: Annotated[Fidelity, typer.Option(help="Every step and token, or placements over modelled queues.")] = (
        Fidelity.TOKEN_ACCURATE
    ),
    slo_ttft: Annotated[float, typer.Option(min=0.0, help="Seconds to the first token that count as served in time.")] = DEFAULT_TTFT_S,
    slo_tpot: Annotated[float, typer.Option(min=0.0, help="Seconds a token that count as served in time.")] = DEFAULT_TPOT_S,
    warm_up: Annotated[
        float | None, typer.Option(min=0.0, help="Requests of the first so many seconds are not counted; else of a tenth of the time.")
    ] = None,
    explain: Annotated[
        bool | None,
        typer.Option("--explain/--no-explain", help="Bounds, where reuse is lost, what decisions cost; else of token-accurate runs only."),
    ] = None,
    estimate_error: Annotated[
        bool,
        typer.Option(
            "--estimate-error/--no-estimate-error",
            help="Also where workers report times wrong: x0.5, 1, 2 and sigma 0, 0.3, 0.6; nine times the work.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of whatever is drawn. The same seed is the same tournament.")] = 0,
    config: Annotated[Path | None, typer.Option(help="A cluster.yaml of paced workers; else 8 + 8 of them.")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: one for each core.")] = 0,
    traces: TracesDir = None,
    out: Annotated[Path | None, typer.Option(help="A folder for the run: manifest, summary, requests, decisions, report.")] = None,
    from_folder: Annotated[Path | None, typer.Option("--from", help="Show this folder's run, draw its report anew.")] = None,
    verify: Annotated[Path | None, typer.Option(help="Run what this folder holds once more and compare byte for byte.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """Compare placement policies on a virtual clock, with a verdict. Ctrl-C ends it with the replicates that are whole."""
    from control.config import load_config
    from router.policies.user_path import import_last_from
    from simulator.run_folder import read_document, write_report, write_run
    from simulator.token_accurate import DEFAULT_CLUSTER

    import_last_from(str(Path.cwd()))
    num_processes = jobs or len(os.sched_getaffinity(0))
    if verify is not None:
        verify_run(verify, num_processes=num_processes, traces=traces)
        return
    if from_folder is not None:
        document = read_document(from_folder)
        write_report(from_folder, document)
    else:
        options = Options(
            policies=policies,
            trace=trace,
            generate=generate,
            rate=rate,
            requests=requests,
            cv=cv,
            burst=burst,
            prefixes=prefixes,
            spread=spread,
            replicates=replicates,
            fidelity=fidelity.value,
            slo_ttft=slo_ttft,
            slo_tpot=slo_tpot,
            warm_up=warm_up,
            explain=fidelity is Fidelity.TOKEN_ACCURATE if explain is None else explain,  # beside these it costs little
            estimate_error=estimate_error,
            seed=seed,
            config=str(config or ""),
        )
        cluster = load_config(file=config) if config is not None else load_config(DEFAULT_CLUSTER)
        run = run_tournament(options, tournament_of(options, cluster, traces), num_processes=num_processes)
        document = run.document()
        if out is not None:
            write_run(out, document, run.cells, run.manifest())
            write_report(out, document)
            say_line(f"{out} holds the run")
    if as_json:
        print(json.dumps(document))
    else:
        from baton.compare_table import print_comparison
        from simulator.report.document import read_document as read_report

        print_comparison(read_report(document))


# --- running ------------------------------------------------------------------------------------------------------------


def tournament_of(options: Options, config: ClusterConfig, traces: Path | None = None) -> Tournament:
    """traces: where a trace that is named lies; None: as `baton trace` has it.

    Raises:
        ConfigError: something that does not exist, or does not go together.
    """
    from router.policies import split_list
    from simulator.estimate_error import ERROR_GRID
    from simulator.replicates import Replicates
    from simulator.summary import Objective
    from simulator.tournament import Entrant, Tournament

    source = source_of(
        options.trace,
        options.generate,
        rate=options.rate,
        requests=options.requests,
        cv=options.cv,
        burst=options.burst,
        prefixes=options.prefixes,
        spread=options.spread,
        folder=traces,
    )
    replicates = Replicates.of(source, num_requests=options.requests, seed=options.seed)
    warm_up_s = WARM_UP_SHARE * options.requests / replicates.rate_per_s if options.warm_up is None else options.warm_up
    return Tournament(
        entrants=tuple(map(Entrant.of, split_list(options.policies))),
        replicates=replicates,
        num_replicates=options.replicates,
        config=config,
        fidelity=Fidelity(options.fidelity),
        objective=Objective(ttft_s=options.slo_ttft, tpot_s=options.slo_tpot),
        warm_up_s=warm_up_s,
        is_explained=options.explain,
        errors=tuple(error for error in ERROR_GRID if not error.is_none) if options.estimate_error else (),
    )


def run_tournament(options: Options, tournament: Tournament, *, num_processes: int, num_tasks: int | None = None) -> Run:
    """All of it, the first `num_tasks` of it, or what was whole when it was interrupted.

    Raises:
        ConfigError: it cannot be run as asked.
        KeyboardInterrupt: before any replicate was whole.
    """
    from simulator.comparison import num_whole, result_of
    from simulator.crew import run_tasks
    from simulator.tournament import Cell

    tasks, began_s = tournament.tasks[:num_tasks], time.monotonic()
    done: dict[Task, Outcome] = {}
    say(f"{len(tasks)} runs of {len(tournament.entrants)} policies under {tournament.num_replicates} replicates; starting")
    try:
        with closing(run_tasks(tournament, tasks, num_processes=num_processes, user_path=str(Path.cwd()))) as running:
            for number, (task, outcome) in enumerate(running, 1):
                done[task] = outcome
                left_s = (time.monotonic() - began_s) / number * (len(tasks) - number)
                say(f"{number} of {len(tasks)}: {task}; {left_s:.0f} s left")
    except KeyboardInterrupt:
        if not num_whole(tournament, done):
            raise
        say_line(f"interrupted: {num_whole(tournament, done)} of {tournament.num_replicates} replicates are whole")
    say("")
    whole = list(takewhile(done.__contains__, tasks))  # what a second run can stop behind
    result = result_of(tournament, {task: done[task] for task in whole})
    return Run(
        options=options,
        result=result,
        cells=tuple(
            cell for task in whole if isinstance(cell := done[task], Cell) and cell.outcomes and cell.key.replicate < result.num_replicates
        ),
        num_tasks=len(whole),
        took_s=time.monotonic() - began_s,
        num_processes=num_processes,
    )


# --- the folder of a run ------------------------------------------------------------------------------------------------


def verify_run(folder: Path, *, num_processes: int, traces: Path | None = None) -> None:
    """Run the folder's tournament again, from its own configuration.

    Raises:
        ConfigError: no run, or one of another trace.
        Differs: the bytes are not the same.
    """
    from control.config import load_config
    from simulator.run_folder import first_difference, read_manifest, write_run

    manifest = read_manifest(folder)
    if manifest.get("schema") != MANIFEST_SCHEMA:
        raise ConfigError(
            f"the manifest of {folder} is {manifest.get('schema')!r}, {MANIFEST_SCHEMA!r} is read here; run it by its command"
        )
    options, cluster = Options(**manifest["options"]), load_config(manifest["cluster"])  # type: ignore[arg-type]
    tournament = tournament_of(options, cluster, traces)
    if manifest["trace_sha256"] != tournament.replicates.sha256:
        raise ConfigError(f"{options.trace} is another trace than the one of {folder}: its sha256 differs")
    run = run_tournament(options, tournament, num_processes=num_processes, num_tasks=manifest["tasks"])  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="baton-compare-") as scratch:
        write_run(Path(scratch), run.document(), run.cells, run.manifest())
        difference = first_difference(folder, Path(scratch))
    if difference is not None:
        raise Differs(f"{folder} and a second run of it differ in {difference}")
    say_line(f"{folder}: a second run made the same bytes")


class Differs(BatonError):
    """A run that was repeated came out otherwise."""


def plain(value: object) -> object:
    """As JSON has it."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value.value if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value


__all__ = ["Differs", "Options", "Run", "compare", "run_tournament", "tournament_of", "verify_run"]
