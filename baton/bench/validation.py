"""`baton bench validation`: whether a simulation says beforehand what a live cluster does.

calibrate   one trace, one policy, live ─► two constants        (baton/bench/validation_model.py)
validate    another trace, three other policies, live in turns  |  the same on the virtual clock, with those constants
            order of policies, attainment, medians, tails; beside them what a null model says
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from baton.bench.report import Row, commit_of_tree, make_document
from baton.bench.screen import show
from baton.progress import say
from protocol.errors import ConfigError, ServiceError
from router.policies import label, split_list

if TYPE_CHECKING:
    from baton.bench.live_runs import LiveRun
    from baton.bench.validation_run import Subject, ValidationPlan

SCHEMA = "baton.bench.validation.v1"
CALIBRATION_POLICY = "round_robin"
POLICIES = "prefix_cost,least_work,random"
NUM_DRAWS = 3  # simulated runs of a trace: what a policy draws differs from run to run, live too


def bench_validation(
    executor: Annotated[str, typer.Option(help="paced: 8 + 8 workers of a model's pace; torch: 1 + 1 that compute.")] = "paced",
    policies: Annotated[str, typer.Option(help="Validated under these; a comma between.")] = POLICIES,
    calibration_policy: Annotated[str, typer.Option(help="Calibrated under this, which is none of them.")] = CALIBRATION_POLICY,
    seconds: Annotated[float, typer.Option(min=1.0, help="Of arrivals in each run.")] = 20.0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs under each policy, and of the calibration.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Paced prefill workers, and as many decode workers; rates grow with them.")] = 8,
    model: Annotated[str, typer.Option(help="That torch serves: demo, a shape (15m, 125m), or a directory.")] = "demo",
    rate: Annotated[float | None, typer.Option(min=0.01, help="Requests a second of both traces, in place of their own.")] = None,
    step_times: Annotated[
        Path | None, typer.Option(help="What `baton calibrate` measured of that model: sections of a cluster.yaml.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, prompts and turns.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON document to this file too; other clusters in it stay.")] = None,
) -> None:
    """Calibrate a simulation on one trace and policy, and hold it against a live cluster under another trace and other policies."""
    from baton.bench.validation_run import ValidationPlan, live, paced_subject, torch_subject

    plan = ValidationPlan(
        policies=tuple(split_list(policies)), calibration_policy=calibration_policy, seconds=seconds, num_repeats=repeats, seed=seed
    )
    if not plan.policies or calibration_policy in plan.policies:
        raise ConfigError(f"--policies {policies!r} must name some, and not {calibration_policy}, which calibrates")
    if executor not in ("paced", "torch"):
        raise ConfigError(f"--executor is {executor!r}; choose paced or torch")
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        folder = Path(scratch)
        subject = paced_subject(workers, rate) if executor == "paced" else torch_subject(model, folder, rate, step_times)
        say(f"starting {subject.name}")
        with live(subject, folder) as cluster:
            calibration = cluster.runs(plan, subject.calibrated_on, [calibration_policy], subject.objective)
            validation = cluster.runs(plan, subject.validated_on, plan.policies, subject.objective)
    rows, told = validated(subject, plan, calibration, validation)
    told |= {"commit": commit_of_tree(), "took_s": round(time.monotonic() - began_s, 1)}
    document = make_document(SCHEMA, seed=seed, rows=rows, sections={"clusters": {subject.name: told}})
    if output is not None:
        output.write_text(json.dumps(joined(output, document), indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(document))
    else:
        print_rows(rows)


def validated(
    subject: Subject, plan: ValidationPlan, calibration: Sequence[LiveRun], validation: Sequence[LiveRun]
) -> tuple[list[Row], dict[str, object]]:
    """What the simulation said and what was measured: rows, and the cluster's section of the document.

    Raises:
        ServiceError: no run of the calibration counts.
    """
    from baton.bench.validation_model import Pair, fitted, predicted, predicted_alone, rows_of
    from simulator.summary import summarise

    config, objective = subject.simulated, subject.objective
    counted = [run for run in calibration if not run.invalid]
    if not counted:
        raise ServiceError(f"no run of the calibration counts: {'; '.join(calibration[0].invalid)}")
    say("fitting what a live cluster takes beyond its steps")
    traces = [plan.trace(subject.calibrated_on, run.repeat) for run in counted]
    overhead = fitted([run.summary for run in counted], config, traces, plan.calibration_policy, objective)
    pairs = []
    for policy in plan.policies:
        say(f"simulating {label(policy)}")
        runs = [run for run in validation if run.policy == policy and not run.invalid]
        traces = [plan.trace(subject.validated_on, run.repeat) for run in runs]
        simulated = [predicted(config, trace, policy, overhead, seed=draw) for trace in traces for draw in range(NUM_DRAWS)]
        alone = [predicted_alone(config, trace, overhead) for trace in traces]
        pairs.append(
            Pair(
                policy=label(policy),
                live=tuple(run.summary for run in runs),
                simulated=tuple(summarise(served, objective) for served in simulated),
                alone=tuple(summarise(served, objective) for served in alone),
            )
        )
    say("")
    told: dict[str, object] = {
        "served": subject.served,
        "objective": asdict(objective),
        "seconds": plan.seconds,
        "calibration": {
            "policy": plan.calibration_policy,
            "trace": subject.calibrated_on.name,
            "rate_per_s": subject.calibrated_on.rate_per_s,
            **asdict(overhead),
            "runs": [run.record() for run in calibration],
        },
        "validation": {
            "trace": subject.validated_on.name,
            "rate_per_s": subject.validated_on.rate_per_s,
            "runs": [run.record() for run in validation],
            "simulated": {pair.policy: [asdict(summary) for summary in pair.simulated] for pair in pairs},
            "alone": {pair.policy: [asdict(summary) for summary in pair.alone] for pair in pairs},
        },
    }
    return rows_of(subject.name, pairs), told


def joined(path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with what the file at `path` tells of other clusters.

    Raises:
        ConfigError: the file is another benchmark's.
    """
    if not path.exists():
        return dict(document)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if before.get("schema") != SCHEMA:
        raise ConfigError(f"{path} has schema {before.get('schema')!r}, not {SCHEMA}; give another --output")
    new = document["clusters"]
    kept = [row for row in before["rows"] if row["name"].partition("/")[0] not in new]
    return {**document, "rows": kept + document["rows"], "clusters": before["clusters"] | new}


def print_rows(rows: Sequence[Row]) -> None:
    """A line of what was measured, what was said beforehand, and how far apart they are."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", "live", "predicted", "off by", "asked for", ""):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        told = row.details
        measured, said = (told.get(f"{who}_ms", told.get(who, "")) for who in ("live", "predicted" if "predicted" in told else "simulated"))
        if "live_ms" in told:
            measured, said = f"{told['live_ms']} ms", f"{told['predicted_ms']} ms"
        value = "-" if row.value is None else f"{row.value:g} {row.unit}"
        state = {True: "met", False: "missed", None: ""}[row.ok]
        table.add_row(row.name, _text(measured), _text(said), value, "" if row.target is None else str(row.target), state)
    show(table, {})


def _text(value: object) -> str:
    return " < ".join(map(str, value)) if isinstance(value, list) else str(value)


__all__ = ["bench_validation", "joined", "print_rows", "validated"]
