"""`baton bench start`: from a cluster's command to its first answer, what it holds then, and how long it takes to be gone."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from baton.bench.peers import OURS, find_peers
from baton.bench.report import Row, Target, make_document, paired_ratio
from protocol.errors import ServiceError
from simulator.verdict import Better

if TYPE_CHECKING:
    from baton.bench.servers import ServerCommand

SCHEMA = "baton.bench.start.v1"
DEMO = "demo"
PEER = "vllm"
PROMPT_TOKENS, ANSWER_TOKENS = 16, 1
PEER_CONTEXT_TOKENS = 2048
READY_TARGET = Target(relation="<=", bound=15.0)  # s, of the demo model's cluster of 1 + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One server's life, seconds each: command to ready, command to the first answer, SIGTERM to gone."""

    ready_s: float
    answered_s: float
    resident_bytes: int  # proportional set size of all its processes after the answer
    stop_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figure:
    name: str
    unit: str
    scale: float  # from the unit of the field

    def of(self, start: Start) -> float:
        return float(getattr(start, self.name)) * self.scale


FIGURES = (
    _Figure(name="ready_s", unit="s", scale=1.0),
    _Figure(name="answered_s", unit="s", scale=1.0),
    _Figure(name="resident_bytes", unit="MB", scale=1e-6),
    _Figure(name="stop_s", unit="s", scale=1.0),
)


def bench_start(
    model: Annotated[str, typer.Option(help="`demo`, a shape of `baton bench engine`, or a checkpoint's directory.")] = DEMO,
    rounds: Annotated[int, typer.Option(min=1, help="Times each server is started; a verdict needs 6.")] = 6,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of each of our workers.")] = 1,
    peer_env: Annotated[list[str] | None, typer.Option(help="vllm=PYTHON, the Python (or environment) vLLM is installed in.")] = None,
    peer_threads: Annotated[int, typer.Option(min=1, help="Compute threads of vLLM.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON document to this file too, anew after each round.")] = None,
) -> None:
    """Start `baton serve` with 1 + 1 workers again and again, alone or in turns with vLLM."""
    python = Path(find_peers(PEER, peer_env)[0].command[0]) if peer_env else None
    starts: dict[str, list[Start]] = {}
    document: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        commands = _commands(model, Path(scratch), threads, python, peer_threads)
        for number in range(rounds):
            for name in list(commands)[:: 1 if number % 2 else -1]:
                if sys.stderr.isatty():
                    sys.stderr.write(f"\r\x1b[Kround {number + 1} of {rounds}: {name}")
                    sys.stderr.flush()
                folder = Path(tempfile.mkdtemp(dir=scratch))
                starts.setdefault(name, []).append(measure_start(commands[name], log=folder / "server.log"))
            document = start_document(model, starts)
            if output is not None:
                output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    if as_json:
        print(json.dumps(document))
    else:
        _print(rows_of(model, starts))


def measure_start(command: ServerCommand, *, log: Path) -> Start:
    """From its command to its end.

    Raises:
        ServiceError: it did not come up, did not answer, or did not stop when told to.
    """
    from baton.bench.load import Endpoint, Workload, drive
    from baton.bench.processor_time import resident_bytes
    from baton.bench.servers import SERVED_NAME, ServerProcess

    began_s = time.monotonic()
    with ServerProcess(command, log=log) as server:
        server.wait_ready()
        asked = Workload(num_requests=1, request_rate=float("inf"), input_len=PROMPT_TOKENS, output_len=ANSWER_TOKENS)
        run = drive(Endpoint(url=command.url, model=SERVED_NAME), asked, num_warmups=0)
        answered_s = time.monotonic() - began_s
        if not run.well:
            raise ServiceError(f"{command.name} did not answer: {run.requests[0].error_text}")
        held_bytes = resident_bytes(server.session)
        told_s = time.monotonic()
        server.stop()
        assert server.start_s is not None
        return Start(ready_s=server.start_s, answered_s=answered_s, resident_bytes=held_bytes, stop_s=time.monotonic() - told_s)


def _commands(model: str, folder: Path, threads: int, python: Path | None, peer_threads: int) -> Mapping[str, ServerCommand]:
    from baton.bench.servers import checkpoint_to_serve, our_server, vllm_server

    model_dir = checkpoint_to_serve(model, folder)
    commands = {OURS: our_server(model_dir, folder, threads=threads)}
    if python is not None:
        commands[PEER] = vllm_server(
            python, model_dir, threads=peer_threads, max_model_len=PEER_CONTEXT_TOKENS, max_num_batched_tokens=None
        )
    return commands


# --- what came of it --------------------------------------------------------------------------------------------------


def start_document(model: str, starts: Mapping[str, Sequence[Start]]) -> dict[str, object]:
    """So far: after each round it is whole."""
    return make_document(SCHEMA, seed=0, rows=rows_of(model, starts), sections={"model": model, "rounds": len(starts[OURS])})


def rows_of(model: str, starts: Mapping[str, Sequence[Start]]) -> list[Row]:
    """Medians, then the ratio to the peer, round by round."""
    rows = []
    for name, of_server in starts.items():
        for figure in FIGURES:
            is_held = model == DEMO and name == OURS and figure.name == "ready_s"
            values = [figure.of(start) for start in of_server]
            rows.append(
                Row(
                    name=f"{model}/{figure.name.rpartition('_')[0]}/{name}",
                    value=float(f"{median(values):.5g}"),
                    unit=figure.unit,
                    target=READY_TARGET if is_held else None,
                    details={"rounds": [round(value, 3) for value in values]},
                )
            )
    for name, theirs in starts.items():
        if name == OURS:
            continue
        for figure in FIGURES:
            ratio = paired_ratio([figure.of(s) for s in starts[OURS]], [figure.of(s) for s in theirs], Better.LOWER)
            rows.append(
                Row(
                    name=f"{model}/{figure.name.rpartition('_')[0]}/vs_{name}",
                    value=float(f"{ratio.median:.5g}"),
                    unit="ratio",
                    details=ratio.record(),
                )
            )
    return rows


def _print(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("unit")
    table.add_column("verdict, target")
    for row in rows:
        held = "" if row.target is None else f"{row.target}: {'met' if row.ok else 'missed'}"
        table.add_row(row.name, f"{row.value:,.4g}", row.unit, str(row.details.get("verdict", held)))
    Console(highlight=False).print(table)


__all__ = ["Start", "bench_start", "measure_start", "rows_of", "start_document"]
