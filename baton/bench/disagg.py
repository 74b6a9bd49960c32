"""`baton bench disagg`: prefill and decode apart against prefill and decode in one engine, on the same cores, under the same arrivals.

What is bought and what it costs: a colocated engine prefills with every core but lets streams wait meanwhile; the longer a step it
allows (max-num-batched-tokens), the sooner first tokens come and the longer streams stand still. That trade is a curve, drawn
beside our one point.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from baton.bench.peers import find_peers
from baton.bench.processor_time import others_between, processor_time
from baton.bench.report import Row, Target, make_document, paired_ratio
from baton.bench.serve import STATISTICS, error_counts, latencies_s
from protocol.errors import ConfigError, ServiceError
from simulator.verdict import Better

if TYPE_CHECKING:
    from rich.console import RenderableType

    from baton.bench.load import LoadRun, Workload
    from baton.bench.servers import ServerProcess

SCHEMA = "baton.bench.disagg.v1"
DEFAULT_TOKEN_LIMITS = "128,512,default"  # noqa: S105 - numbers of tokens
OURS, COLOCATED = "baton", "vllm"  # `vllm` is the one with its default limit
CONTEXT_SPARE_TOKENS = 64
DISTURBED_CORES = 0.15  # used by others: a round with more says little
FIGURES = (("ttft", "p50"), ("ttft", "p90"), ("itl", "p50"), ("itl", "p99"), ("itl_worst", "p50"), ("itl_worst", "p90"), ("tpot", "p50"))
# A prefill holds up each stream once: it shows in ITL p99 only from about one arrival an answer on. Of each request the longest pause
# shows it at any rate.
DRAWN = (("itl", "p99", "ITL p99, ms"), ("itl_worst", "p90", "longest pause of a request, p90, ms"))

# Of issue 3. A paired ratio is theirs / ours: 4 means that our pauses are a quarter of vLLM's.
TARGETS = {("itl", "p99"): Target(relation=">=", bound=4.0), ("ttft", "p50"): Target(relation=">=", bound=round(1 / 2.3, 4))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured. `workload` is that of one round."""

    model: str
    workload: Workload
    num_rounds: int
    threads: int
    peer_threads: int
    python: Path | None  # of vLLM's environment; None: ours alone
    token_limits: tuple[int | None, ...]  # a colocated engine each; None: its default

    def round_workload(self, number: int) -> Workload:
        """Arrivals and prompts of a round: new in each, so that nothing is in a prefix cache, and the same for every server."""
        return replace(self.workload, seed=self.workload.seed * 1000 + number)


@dataclass(slots=True, kw_only=True)
class Measured:
    """One server's runs, a round each."""

    name: str
    start_s: float
    runs: list[LoadRun] = field(default_factory=list)
    others: list[float] = field(default_factory=list)  # cores that others used in each

    def figure_ms(self, latency: str, statistic: str) -> float:
        """Over the requests of all rounds."""
        return _figure_ms(self.runs, latency, statistic)

    def figures_ms(self, latency: str, statistic: str) -> list[float]:
        """Of each round."""
        return [_figure_ms([run], latency, statistic) for run in self.runs]


def bench_disagg(
    model: Annotated[str, typer.Option(help="A shape of `baton bench engine`, or a checkpoint's directory.")] = "125m",
    peer_env: Annotated[list[str] | None, typer.Option(help="vllm=PYTHON, the Python (or environment) vLLM is installed in.")] = None,
    max_num_batched_tokens: Annotated[str, typer.Option(help="vLLM's limits on a step; a comma between.")] = DEFAULT_TOKEN_LIMITS,
    rate: Annotated[float, typer.Option("--rate", "--request-rate", help="Requests a second (Poisson).")] = 0.4,
    num_requests: Annotated[int, typer.Option("--num-requests", "--num-prompts", min=1, help="In each round.")] = 8,
    input_len: Annotated[int, typer.Option("--input-len", "--random-input-len", min=1, help="Tokens of a prompt.")] = 1024,
    output_len: Annotated[int, typer.Option("--output-len", "--random-output-len", min=2, help="Tokens of an answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Times each server has its turn; a verdict needs 6.")] = 6,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of each of our workers.")] = 1,
    peer_threads: Annotated[int, typer.Option(min=1, help="Compute threads of a colocated engine.")] = 2,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts; each round has its own.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw TTFT against ITL into this SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON document to this file too, anew after each round.")] = None,
) -> None:
    """Measure `baton serve` with 1 + 1 workers beside vLLM with both in one engine, in turns."""
    from baton.bench.load import Workload

    if rate <= 0:
        raise ConfigError(f"--rate is {rate:g}; give requests a second, above 0")
    began_s = time.monotonic()
    plan = Plan(
        model=model,
        workload=Workload(num_requests=num_requests, request_rate=rate, input_len=input_len, output_len=output_len, seed=seed),
        num_rounds=rounds,
        threads=threads,
        peer_threads=peer_threads,
        python=Path(find_peers(COLOCATED, peer_env)[0].command[0]) if peer_env else None,
        token_limits=tuple(_limit(text.strip()) for text in max_num_batched_tokens.split(",")),
    )
    say = _say if sys.stderr.isatty() else _say_nothing
    document: dict[str, object] = {}
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch, ExitStack() as running:
        servers = _start_all(plan, Path(scratch), running, say)
        measured += [Measured(name=server.name, start_s=server.start_s or 0.0) for server in servers]
        for number in range(rounds):
            for index in _turns(len(servers), number):
                say(f"round {number + 1} of {rounds}: {servers[index].name}")
                _take_turn(servers[index], measured[index], plan.round_workload(number))
            document = disagg_document(plan, measured, took_s=time.monotonic() - began_s)
            if output is not None:
                output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    if plot is not None:
        plot.write_text(drawing(document), encoding="utf-8")
    if as_json:
        print(json.dumps(document))
    else:
        _print(measured)


# --- measuring --------------------------------------------------------------------------------------------------------


def _start_all(plan: Plan, folder: Path, running: ExitStack, say: Callable[[str], None]) -> list[ServerProcess]:
    """All servers, one after the other, each held still as soon as it has answered."""
    from baton.bench.servers import ServerProcess, checkpoint_to_serve, our_server, vllm_server

    model_dir = checkpoint_to_serve(plan.model, folder)
    max_model_len = plan.workload.input_len + plan.workload.output_len + CONTEXT_SPARE_TOKENS
    commands = [our_server(model_dir, folder, threads=plan.threads)]
    for limit in plan.token_limits if plan.python is not None else ():
        assert plan.python is not None
        commands.append(
            vllm_server(plan.python, model_dir, threads=plan.peer_threads, max_model_len=max_model_len, max_num_batched_tokens=limit)
        )
    servers = []
    for command in commands:
        say(f"starting {command.name}")
        server = running.enter_context(ServerProcess(command, log=folder / f"{command.name}.log"))
        server.wait_ready()
        server.pause()
        servers.append(server)
    return servers


def _take_turn(server: ServerProcess, measured: Measured, workload: Workload) -> None:
    """One run.

    Raises:
        ServiceError: a request did not end well; a latency over those that did would flatter.
    """
    from baton.bench.load import Endpoint, drive
    from baton.bench.servers import SERVED_NAME

    server.resume()
    sessions = [server.session]
    before = processor_time(sessions)
    endpoint = Endpoint(url=server.command.url, model=SERVED_NAME)
    run = drive(endpoint, workload, num_warmups=1)
    measured.others.append(others_between(before, processor_time(sessions)))
    measured.runs.append(run)
    server.pause()
    if len(run.well) < len(run.requests):
        first = next(r.error_text for r in run.requests if r.error is not None)
        raise ServiceError(f"{server.name} did not answer every request: {error_counts(run)}; first: {first}")


def _turns(num_servers: int, number: int) -> list[int]:
    """Another goes first each round, so that a drift of the machine hits nobody alone."""
    first = number % num_servers
    return [*range(first, num_servers), *range(first)]


def _limit(text: str) -> int | None:
    """
    Raises:
        ConfigError: neither a number nor "default".
    """
    if text == "default":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--max-num-batched-tokens has {text!r}; write numbers of tokens, or default")
    return int(text)


# --- what came of it --------------------------------------------------------------------------------------------------


def disagg_document(plan: Plan, measured: Sequence[Measured], *, took_s: float) -> dict[str, object]:
    """So far: after each round it is whole."""
    workload = plan.workload
    sections = {
        "model": plan.model,
        "workload": {
            "rate_requests_per_s": workload.request_rate,
            "num_requests": workload.num_requests,
            "input_len": workload.input_len,
            "output_len": workload.output_len,
        },
        "rounds": len(measured[0].runs),
        "threads": {"of_each_worker": plan.threads, "of_a_colocated_engine": plan.peer_threads},
        "servers": {m.name: _server_record(m) for m in measured},
        "took_s": round(took_s, 1),
    }
    return make_document(SCHEMA, seed=workload.seed, rows=rows_of(measured), sections=sections)


def rows_of(measured: Sequence[Measured]) -> list[Row]:
    """Every figure of every server, over all rounds; then ours against each other one, round by round."""
    rows = []
    for m in measured:
        for latency, statistic in FIGURES:
            rows.append(
                Row(
                    name=f"{latency}/{statistic}/{m.name}",
                    value=m.figure_ms(latency, statistic),
                    unit="ms",
                    details={"rounds": [round(value, 3) for value in m.figures_ms(latency, statistic)]},
                )
            )
    ours = next(m for m in measured if m.name == OURS)
    for m in measured:
        if m is not ours:
            rows += [_ratio_row(ours, m, latency, statistic) for latency, statistic in FIGURES]
    return rows


def _ratio_row(ours: Measured, theirs: Measured, latency: str, statistic: str) -> Row:
    ratio = paired_ratio(ours.figures_ms(latency, statistic), theirs.figures_ms(latency, statistic), Better.LOWER)
    return Row(
        name=f"{latency}/{statistic}/{ours.name}_vs_{theirs.name}",
        value=ratio.median,
        unit="theirs / ours",
        target=TARGETS.get((latency, statistic)) if theirs.name == COLOCATED else None,
        details=ratio.record(),
    )


def _server_record(m: Measured) -> dict[str, object]:
    return {
        "start_s": round(m.start_s, 1),
        "others": [round(cores, 3) for cores in m.others],
        "client_cpu_s": [round(run.cpu_s, 3) for run in m.runs],
        "lateness_s_max": [round(max(run.lateness_s), 4) for run in m.runs],
    }


def _figure_ms(runs: Sequence[LoadRun], latency: str, statistic: str) -> float:
    return STATISTICS[statistic](latencies_s((r.timeline for run in runs for r in run.well), latency)) * 1e3


def drawing(document: Mapping[str, Any]) -> str:
    """TTFT against either kind of pause, as SVG; a line joins what is the same engine with other limits.

    Args:
        document: of this benchmark, measured or read.
    """
    from baton.bench.pareto import Panel, Point, pareto_svg

    ms = {row["name"]: row["value"] for row in document["rows"]}
    servers = list(document["servers"])
    panels = [
        Panel(
            x_title="TTFT p50, ms",
            y_title=title,
            points=tuple(Point(name=name, x=ms[f"ttft/p50/{name}"], y=ms[f"{latency}/{statistic}/{name}"]) for name in servers),
            curve=tuple(name for name in servers if name != OURS),
        )
        for latency, statistic, title in DRAWN
    ]
    return pareto_svg(panels)


def _print(measured: Sequence[Measured]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(title="milliseconds, all rounds", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for latency, statistic in FIGURES:
        table.add_column(f"{latency.replace('_', ' ')} {statistic}", justify="right")
    table.add_column("others", justify="right")
    for m in measured:
        figures = (f"{m.figure_ms(latency, statistic):.1f}" for latency, statistic in FIGURES)
        table.add_row(m.name, *figures, f"{median(m.others):.2f}")
    parts: list[RenderableType] = [table]
    for row in rows_of(measured):
        if row.unit == "theirs / ours" and row.value is not None:
            interval, verdict = row.details["interval"], row.details["verdict"]
            target = "" if row.target is None else f", target {row.target}: {'met' if row.ok else 'missed'}"
            parts.append(f"{row.name}: {row.value:.2f} {interval}, {verdict}{target}")
    disturbed = sum(cores >= DISTURBED_CORES for m in measured for cores in m.others)
    if disturbed:
        parts.append(
            f"{disturbed} of {sum(len(m.others) for m in measured)} turns were disturbed: others used {DISTURBED_CORES} cores or more"
        )
    for part in parts:
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)


def _say(text: str) -> None:
    sys.stderr.write(f"\r\x1b[K{text}")
    sys.stderr.flush()


def _say_nothing(_: str) -> None:
    pass


__all__ = ["Measured", "Plan", "bench_disagg", "disagg_document", "drawing", "rows_of"]
