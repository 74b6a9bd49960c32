"""`baton bench engine`: one aggregated engine measured alone, or beside the engines people have."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baton.bench.peers import OURS, find_peers, our_engine
from baton.bench.report import Row, make_document
from baton.bench.workloads import DEFAULT_WORKLOADS, KNOWN, parse_workloads
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from baton.bench.engine_run import MeasuredModel

DEFAULT_MODELS = "15m,125m,0.5b,moe"
TABLE_COLUMNS = 130


def engine(
    model: Annotated[str, typer.Option(help="Shapes with random weights, or checkpoint directories; a comma between.")] = DEFAULT_MODELS,
    workloads: Annotated[str, typer.Option(help=f"Of {KNOWN}; a comma between.")] = DEFAULT_WORKLOADS,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of every engine.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Times each engine does each workload; a verdict needs 6, the targets ask for 9.")] = 9,
    compare: Annotated[
        str, typer.Option(help="Peers to take turns with: vllm, transformers, llamacpp; NAME:WORKLOAD+WORKLOAD in these only.")
    ] = "",
    peer_env: Annotated[
        list[str] | None, typer.Option(help="NAME=PYTHON, the Python (or environment) a peer is installed in; repeatable.")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Measurements repeated while others use the processors.")] = 2,
    seed: Annotated[int, typer.Option(help="Of prompts, arrivals and turns.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON document here too, anew after each model.")] = None,
) -> None:
    """Measure the engine on this machine, alone or in turns with vLLM, transformers and llama.cpp."""
    chosen = parse_workloads(workloads)
    contenders = (our_engine(), *find_peers(compare, peer_env or []))
    from baton.bench.engine_rows import SCHEMA, engines_section, rows_of
    from baton.bench.engine_run import BenchPlan, measure_model
    from baton.bench.models import resolve_model

    models = [resolve_model(name.strip()) for name in model.split(",") if name.strip()]
    if not models:
        raise ConfigError(f"no model in {model!r}; choose from {DEFAULT_MODELS}, or name a directory")
    plan = BenchPlan(workloads=chosen, contenders=contenders, num_threads=threads, num_rounds=rounds, num_retries=retries, seed=seed)
    rows: list[Row] = []
    engines: dict[str, object] = {}
    measured: list[MeasuredModel] = []
    document: dict[str, object] = {}
    began_s = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the engines end with us
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch, _Progress() as progress:
        for one in models:
            measured.append(measure_model(plan, one, Path(scratch), progress.say))
            rows += rows_of(plan, measured[-1])
            engines[measured[-1].label] = engines_section(measured[-1])
            sections = {
                "threads": threads,
                "rounds": rounds,
                "workloads": [workload.name for workload in chosen],
                "engines": engines,
                "took_s": round(time.monotonic() - began_s, 1),
            }
            document = make_document(SCHEMA, seed=seed, rows=rows, sections=sections)
            if output is not None:
                output.write_text(json.dumps(document, indent=1) + "\n")
    if as_json:
        print(json.dumps(document, indent=1))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        console = console if console.is_terminal else Console(highlight=False, width=TABLE_COLUMNS)
        console.print(table_of(rows, engines))
    if any((OURS, workload.name) in one.lost for one in measured for workload in chosen):
        raise typer.Exit(1)


def table_of(rows: list[Row], engines: dict[str, object]) -> RenderableType:
    """A line a row; what is demanded and not reached in red, what could not be measured with its reason."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for name in ("unit", "95 % interval", "verdict", "target"):
        table.add_column(name, no_wrap=True)
    table.add_column("note")
    for row in rows:
        told = row.details
        interval = told.get("interval")
        table.add_row(
            row.name,
            "-" if row.value is None else f"{row.value:,.4g}" if row.value < 1000 else f"{row.value:,.0f}",
            row.unit,
            f"{interval[0]:.3f} .. {interval[1]:.3f}" if isinstance(interval, list) else "",
            str(told.get("verdict", "")),
            "" if row.target is None else str(row.target),
            Text(_note_of(row), style="yellow"),
            style="red" if row.ok is False else "green" if row.ok else None,
        )
    differing = [
        Text(f"{label}: float32 tokens of {name}: {told['tokens']}", style="yellow")
        for label, of_model in engines.items()
        if isinstance(of_model, dict)
        for name, told in of_model.items()
        if told["tokens"] not in (None, "equal")
    ]
    return Group(table, *differing)


def _note_of(row: Row) -> str:
    if "reason" in row.details:
        return str(row.details["reason"])
    disturbed = row.details.get("disturbed") or row.details.get("disturbed_pairs")
    return f"{disturbed} disturbed" if disturbed else ""


class _Progress:
    """What is being done now: one line that is written over on a terminal, elsewhere a line each."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._began_s = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            sys.stderr.write("\r\033[K")

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self._began_s:6.0f} s  {text}"
        sys.stderr.write(f"\r\033[K{line}" if self._is_terminal else f"{line}\n")
        sys.stderr.flush()
