"""`baton bench policies`: placement policies beside each other in one live cluster of paced workers, under the same arrivals, in turns.

    for each repeat, for each workload: every policy in an order drawn anew ─► switch, empty caches, wait until nothing moves, send

Workers are real processes that sleep for a model's time (engine/paced.py), so that two cores carry 16 of them and what makes a first
token late is the queue of a modelled worker. A cell in which our own cores were the limit does not count.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baton.bench.policy_rows import OURS, STATISTICS, Cell, CellKey, rows_of
from baton.bench.report import Row, make_document
from baton.bench.switched import turns
from baton.progress import say, say_line
from protocol.errors import ConfigError, ServiceError
from router.policies import label, split_list

if TYPE_CHECKING:
    from baton.bench.load import LoadRun
    from baton.bench.policy_run import PolicyCluster

SCHEMA = "baton.bench.policies.v1"
DEFAULT_POLICIES = "prefix_cost,e2,least_work,round_robin,examples.policies.sglang_like:SglangLike,examples.policies.dynamo_like:DynamoLike"
DEFAULT_WORKLOADS = "shared_prefixes,fan_out,unshared,hot_prefix"
WARM_UP_S = 5.0
PAUSE_S = 2.0  # guessed for what lies between two cells, until some were measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured."""

    policies: tuple[str, ...]
    workloads: tuple[str, ...]
    num_repeats: int
    seconds: float  # of arrivals in a cell
    num_workers: int  # of each pool
    seed: int

    @property
    def num_cells(self) -> int:
        return self.num_repeats * len(self.workloads) * len(self.policies)

    def cells(self) -> Iterator[tuple[int, str, str]]:
        """(repeat, workload, policy) in the order they are measured: the policies of a repeat and workload follow each other."""
        for repeat in range(self.num_repeats):
            for workload in self.workloads:
                turn = turns(self.policies, f"{self.seed} {repeat} {workload}")
                yield from ((repeat, workload, policy) for policy in turn)

    def seed_of(self, repeat: int) -> int:
        """Of arrivals and prompts: new in each repeat, the same for every policy."""
        return self.seed * 1000 + repeat


def bench_policies(
    policies: Annotated[str, typer.Option(help="NAME[:k=v,...] or module:Class[:k=v,...]; a comma between.")] = DEFAULT_POLICIES,
    workloads: Annotated[str, typer.Option(help="Which; a comma between.")] = DEFAULT_WORKLOADS,
    repeats: Annotated[int, typer.Option(min=1, help="Times each policy has its turn; a verdict needs 6.")] = 7,
    seconds: Annotated[float, typer.Option(min=1.0, help="Of arrivals in each turn.")] = 20.0,
    workers: Annotated[int, typer.Option(min=1, help="Prefill workers, and as many decode workers; rates grow with them.")] = 8,
    seed: Annotated[int, typer.Option(help="Of arrivals, prompts and turns; each repeat has its own.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios with their intervals into this SVG file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON document to this file too, anew after each repeat.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="A document of this bench: measure only what it lacks, or what did not count.")
    ] = None,
    retakes: Annotated[int, typer.Option(min=0, help="Times that turns that did not count are taken again, at the end.")] = 1,
) -> None:
    """Compare placement policies in one live cluster of paced workers. Ctrl-C ends it with what was measured."""
    from baton.bench.policy_run import policy_cluster
    from baton.bench.policy_traffic import traffic

    plan = Plan(
        policies=tuple(split_list(policies)),
        workloads=tuple(dict.fromkeys(name.strip() for name in workloads.split(",") if name.strip())),
        num_repeats=repeats,
        seconds=seconds,
        num_workers=workers,
        seed=seed,
    )
    if not plan.policies or not plan.workloads:
        raise ConfigError("nothing to measure; name a policy and a workload or more")
    for workload in plan.workloads:
        traffic(workload, seconds=seconds, seed=seed)
    taken = Taken(plan) if resume is None else read_taken(plan, resume)
    began_s = time.monotonic() - taken.took_s
    try:
        with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
            say(f"starting {workers} + {workers} paced workers")
            with policy_cluster(Path(scratch), num_workers=workers) as cluster:
                for policy in plan.policies:
                    cluster.check(policy)
                say("warming up")
                cluster.warm_up(traffic(plan.workloads[0], seconds=WARM_UP_S, seed=plan.seed_of(-1), num_workers=workers))
                num_taken = 0
                for _ in range(1 + retakes):
                    for cell in measure(plan, cluster, taken.missing):
                        taken.add(cell)
                        num_taken += 1
                        if output is not None and num_taken % (len(plan.policies) * len(plan.workloads)) == 0:
                            taken.took_s = time.monotonic() - began_s
                            _write(output, policies_document(taken))
    except (KeyboardInterrupt, ServiceError) as end:  # an hour's rows are not thrown away
        if not taken.cells:
            raise
        say_line(f"ended early ({str(end) or 'interrupted'}): {len(taken.cells)} of {plan.num_cells} cells were measured")
    taken.took_s = time.monotonic() - began_s
    document, cells = policies_document(taken), taken.cells
    if output is not None:
        _write(output, document)
    if plot is not None:
        from baton.bench.policy_figure import policies_svg

        plot.write_text(policies_svg(cells), encoding="utf-8")
    if as_json:
        print(json.dumps(document))
    else:
        print_cells(cells)


def measure(plan: Plan, cluster: PolicyCluster, keys: Sequence[CellKey]) -> Iterator[Cell]:
    """Cell after cell, with a line of progress on stderr."""
    from baton.bench.policy_traffic import traffic

    began_s = time.monotonic()
    for index, (repeat, workload, policy) in enumerate(keys):
        left_s = (len(keys) - index) * ((time.monotonic() - began_s) / index if index else plan.seconds + PAUSE_S)
        what = f"{index + 1} of {len(keys)}: {workload}, {label(policy)}, repeat {repeat + 1}; {left_s / 60:.1f} min left"
        say(what)

        def on_progress(run: LoadRun, what: str = what) -> None:
            say(f"{what}; {len(run.requests)} of {run.workload.num_requests} sent, {run.num_in_flight} under way")

        asked = traffic(workload, seconds=plan.seconds, seed=plan.seed_of(repeat), num_workers=plan.num_workers)
        cell = cluster.run(policy, asked, repeat=repeat, on_progress=on_progress if sys.stderr.isatty() else None)
        if cell.invalid:
            say_line(f"does not count: {workload}, {label(policy)}, repeat {repeat + 1}: {'; '.join(cell.invalid)}")
        yield cell
    say("")


class Taken:
    """The cells of a plan that were measured so far. One that did not count may be taken again: then the earlier stands in `rejected`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rejected: list[Cell] = []
        self.took_s = 0.0
        self._cells: dict[CellKey, Cell] = {}

    @property
    def cells(self) -> list[Cell]:
        """In the order of the plan."""
        return [self._cells[key] for key in self.plan.cells() if key in self._cells]

    @property
    def missing(self) -> list[CellKey]:
        """Never measured, or not so that it counts."""
        return [key for key in self.plan.cells() if key not in self._cells or not self._cells[key].is_valid]

    def add(self, cell: Cell) -> None:
        if cell.key in self._cells:
            self.rejected.append(self._cells[cell.key])
        self._cells[cell.key] = cell


def read_taken(plan: Plan, path: Path) -> Taken:
    """What a document of this bench holds of `plan`.

    Raises:
        ConfigError: it is none, or one of other arrivals or another cluster.
    """
    from baton.bench.policy_traffic import cluster_config

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    told = {name: document.get(name) for name in ("schema", "seed", "seconds", "cluster")}
    wanted = {"schema": SCHEMA, "seed": plan.seed, "seconds": plan.seconds, "cluster": cluster_config(plan.num_workers)}
    for name, value in wanted.items():
        if told[name] != value:
            raise ConfigError(f"{path} has {name} {told[name]!r}, this run {value!r}; go on with the same, or start anew")
    taken = Taken(plan)
    taken.took_s = document["took_s"]
    for record in (*document.get("rejected", ()), *document["cells"]):
        cell = Cell.from_record(record)
        taken.add(replace(cell, commit=cell.commit or document["commit"]))
    return taken


def policies_document(taken: Taken) -> dict[str, object]:
    """So far: after each cell it is whole."""
    from baton.bench.policy_traffic import SHAPES, cluster_config

    plan, cells = taken.plan, taken.cells
    sections: dict[str, object] = {
        "policies": {label(policy): policy for policy in plan.policies},
        "workloads": {name: {"rate_per_s": SHAPES[name].rate_per_s, "burst_size": SHAPES[name].burst_size} for name in plan.workloads},
        "repeats": plan.num_repeats,
        "seconds": plan.seconds,
        "cluster": cluster_config(plan.num_workers),
        "cells": [cell.record() for cell in cells],
        "rejected": [cell.record() for cell in taken.rejected],
        "took_s": round(taken.took_s, 1),
    }
    return make_document(SCHEMA, seed=plan.seed, rows=rows_of(cells), sections=sections)


# --- showing ----------------------------------------------------------------------------------------------------------


def print_cells(cells: Sequence[Cell]) -> None:
    """A table a workload, what was asked for and whether it was met, and what did not count."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    rows = {row.name: row for row in rows_of(cells)}
    for workload in dict.fromkeys(c.workload for c in cells):
        table = Table(title=workload, title_justify="left", box=None, pad_edge=False)
        for name in ("", "mean ms", "p99 ms", "hit share", *(f"{s} / {OURS}" for s in STATISTICS), "counted"):
            table.add_column(name, justify="left" if not name else "right")
        for policy in dict.fromkeys(c.policy for c in cells if c.workload == workload):
            name = label(policy)
            figures = [rows[f"{workload}/ttft_{s}/{name}"] for s in STATISTICS]
            hits = rows[f"{workload}/hit_share/{name}"].value
            table.add_row(
                name,
                *("-" if row.value is None else f"{row.value:.1f}" for row in figures),
                "-" if hits is None else f"{hits:.3f}",
                *(_ratio_text(rows, f"{workload}/ttft_{s}/{OURS}_vs_{name}") for s in STATISTICS),
                f"{figures[0].details['repeats']}",
            )
        console.print(table)
        for row in rows.values():
            if row.name.startswith(f"{workload}/") and row.target is not None:
                state = {True: "met", False: "missed", None: "undecided"}[row.ok]
                lost = row.details.get("loses_to")
                console.print(f"{row.name}: {state}{f', loses to {lost}' if lost else ''}", markup=False)
    for cell in cells:
        if cell.invalid:
            console.print(
                f"{cell.workload}, {label(cell.policy)}, repeat {cell.repeat + 1} does not count: {'; '.join(cell.invalid)}", markup=False
            )


def _ratio_text(rows: Mapping[str, Row], name: str) -> str:
    row = rows.get(name)
    if row is None or row.value is None:
        return ""
    return f"{row.value:.2f} {row.details['interval']} {row.details['verdict']}"


def _write(path: Path, document: dict[str, object]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


__all__ = [
    "DEFAULT_POLICIES",
    "DEFAULT_WORKLOADS",
    "Plan",
    "Taken",
    "bench_policies",
    "measure",
    "policies_document",
    "print_cells",
    "read_taken",
]
