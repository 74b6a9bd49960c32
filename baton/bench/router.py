"""`baton bench router`: what a placement costs, from the prefix index to the answer over the socket, beside others' routers."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baton.bench.report import Row, make_document
from baton.bench.screen import sayer, show

if TYPE_CHECKING:
    from baton.bench.router_run import Measured, RouterPlan

DEFAULT_STAGES = "index,decide,wide,socket"


@dataclass(slots=True, kw_only=True)
class Report:
    """What there is so far, and where it goes."""

    plan: RouterPlan
    absent: Mapping[str, str]
    output: Path | None
    began_s: float = field(default_factory=time.monotonic)
    measured: Measured | None = None

    def rows(self) -> list[Row]:
        from baton.bench.router_rows import rows_of

        return [] if self.measured is None else rows_of(self.plan, self.measured)

    def document(self) -> dict[str, object]:
        from baton.bench.router_rows import SCHEMA

        sections = {
            "rounds": self.plan.num_rounds,
            "stages": [stage.name for stage in self.plan.stages],
            "num_workers": self.plan.num_workers,
            "num_blocks": self.plan.num_blocks,
            "num_live": self.plan.num_live,
            "subjects": {} if self.measured is None else self.measured.subjects,
            "absent": dict(self.absent),
            "took_s": round(time.monotonic() - self.began_s, 1),
        }
        return make_document(SCHEMA, seed=self.plan.seed, rows=self.rows(), sections=sections)

    def write(self) -> None:
        if self.output is not None:
            self.output.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")


def bench_router(
    stages: Annotated[str, typer.Option(help="What to measure; a comma between.")] = DEFAULT_STAGES,
    peer_env: Annotated[list[str] | None, typer.Option(help="dynamo=PYTHON, where ai-dynamo-runtime is installed.")] = None,
    workers: Annotated[int, typer.Option(min=2, help="Of the fleet, half of each role.")] = 64,
    blocks: Annotated[int, typer.Option(min=10_000, help="Different blocks that the index holds.")] = 1_000_000,
    window: Annotated[int, typer.Option(min=1_000, help="Live requests of the larger window.")] = 100_000,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; a figure is the median of them.")] = 5,
    seed: Annotated[int, typer.Option(help="Of fleets, prompts and turns.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON document to this file too, anew after each round.")] = None,
) -> None:
    """Measure a placement: hashing, matching, deciding and booking, the socket; beside Dynamo's router where it is installed."""
    from baton.bench.peers import OURS
    from baton.bench.router_run import RouterPlan, find_subjects, measure, stages_of

    subjects, absent = find_subjects(peer_env or [])
    plan = RouterPlan(
        stages=stages_of(stages),
        subjects=subjects,
        num_workers=workers,
        num_blocks=blocks,
        num_live=window,
        num_rounds=repeats,
        seed=seed,
    )
    report = Report(plan=plan, absent=absent, output=output)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the subjects end with us

    def keep(measured: Measured) -> None:
        report.measured = measured
        report.write()

    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        keep(measure(plan, Path(scratch), sayer(report.began_s), keep))
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
    if as_json:
        print(json.dumps(report.document(), indent=1))
    else:
        _print(report.rows(), absent)
    if report.measured is not None and any(subject == OURS for _, _, subject in report.measured.lost):
        raise typer.Exit(1)


def _print(rows: Sequence[Row], absent: Mapping[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for name in ("unit", "target", "thread CPU time"):
        table.add_column(name, no_wrap=True)
    table.add_column("note")
    for row in rows:
        cpu = next((row.details[name] for name in ("cpu_us", "cpu_ratio", "by_cpu_time") if name in row.details), "")
        table.add_row(
            row.name,
            "-" if row.value is None else f"{row.value:,.4g}" if row.value < 1000 else f"{row.value:,.0f}",
            row.unit,
            "" if row.target is None else str(row.target),
            str(cpu),
            Text(str(row.details.get("reason", "")), style="yellow"),
            style="red" if row.ok is False else "green" if row.ok else None,
        )
    show(table, absent)


__all__ = ["Report", "bench_router"]
