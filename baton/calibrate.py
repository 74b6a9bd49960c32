"""`baton calibrate`: the pace of an engine on this machine, from single steps, as paced workers and simulations take it."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated

import typer

from baton.progress import say, say_line

if TYPE_CHECKING:
    from baton.bench.calibration import Calibration, StepBench
    from control.compose import WorkerPlan

KV_BYTES = 1 << 30


def calibrate(
    model: Annotated[str, typer.Option(help="A shape with random weights (15m, 125m, 0.5b, moe), or a checkpoint's directory.")] = "125m",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, or auto: the checkpoint's own.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Compute threads.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Times each size is measured, in an order drawn anew.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=64, help="Most tokens of a sequence.")] = 2048,
    max_batch: Annotated[int, typer.Option(min=1, help="Most sequences that decode together.")] = 64,
    kv_bytes: Annotated[int, typer.Option(min=1 << 20, help="Memory for KV; sizes that need more are left out.")] = KV_BYTES,
    seed: Annotated[int, typer.Option(help="Of tokens and of the order.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the pace here, as YAML that `--config` takes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """Measure what steps of an engine take on this machine, and fit the pace of paced workers to them."""
    from baton.bench import calibration
    from baton.bench.engine_run import OTHERS_MAX
    from baton.bench.models import label_of, make_checkpoint, resolve_model
    from baton.bench.processor_time import others_between, processor_time
    from baton.bench.report import make_document

    named = resolve_model(model)
    label, began_s = label_of(named), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="baton-calibrate-") as scratch:
        say(f"{label}: loading")
        model_dir = make_checkpoint(named, Path(scratch)) if isinstance(named, str) else named
        plan = _plan(model_dir, dtype=dtype, num_threads=threads, kv_bytes=kv_bytes)
        points = calibration.grid(
            max_tokens=min(max_tokens, plan.max_model_len),
            max_batch=max_batch,
            max_kv_tokens=plan.num_kv_blocks * plan.layout.block_size_tokens,
        )
        with _engine(model_dir, plan, seed) as bench:
            before = processor_time(())
            found = calibration.calibrate(bench, points, num_rounds=rounds, rng=Random(f"{seed} order"), say=say)
            others = others_between(before, processor_time(()))
    say("")
    if others >= OTHERS_MAX:
        say_line(f"others used {others:.2f} cores meanwhile, more than {OTHERS_MAX:.2f} disturb; measure again where it is quiet")
    if output is not None:
        output.write_text(as_yaml(found, label, plan.num_kv_blocks), encoding="utf-8")
    if as_json:
        sections = {
            "model": label,
            "threads": threads,
            "rounds": rounds,
            "kernels": plan.kernels.name,
            "others": round(others, 3),
            "paced": asdict(found.pace),
            "steps": calibration.told_steps(found.points),
            "took_s": round(time.monotonic() - began_s, 1),
        }
        print(json.dumps(make_document(calibration.SCHEMA, seed=seed, rows=calibration.rows_of(label, found), sections=sections)))
    else:
        _print(found, label)


def as_yaml(found: Calibration, label: str, num_kv_blocks: int) -> str:
    """A configuration of paced workers at this pace."""
    lines = [
        f"# Fitted by `baton calibrate` to single steps of {label}; see there how far off it is.",
        f"workers: {{executor: paced, num_kv_blocks: {num_kv_blocks}}}",
        "paced:",
        *(f"  {name}: {value:.9g}" for name, value in asdict(found.pace).items()),
    ]
    return "\n".join(lines) + "\n"


def _plan(model_dir: Path, *, dtype: str, num_threads: int, kv_bytes: int) -> WorkerPlan:
    """What `baton serve --threads N` would compose of one worker."""
    from control.compose import compose_worker
    from control.config import load_config

    tree = {
        "model": {"path": str(model_dir), "dtype": dtype, "numerics": "fast"},
        "workers": {"threads": num_threads, "kv_cache_memory_bytes": kv_bytes},
    }
    return compose_worker(load_config(tree), model_dir)


@contextmanager
def _engine(model_dir: Path, plan: WorkerPlan, seed: int) -> Iterator[StepBench]:
    """The executor of such a worker, without the rest of it."""
    from baton.bench.calibration import StepBench
    from engine.runner.torch_executor import TorchExecutor
    from kvtransfer.region import PoolMemory

    pool = PoolMemory.create(plan.layout, plan.num_kv_blocks)
    try:
        executor = TorchExecutor(model_dir, plan.runner, pool.region)
        block_size, vocab_size = plan.layout.block_size_tokens, plan.model.vocab_size
        with StepBench(executor, block_size_tokens=block_size, vocab_size=vocab_size, rng=Random(f"{seed} tokens")) as bench:
            yield bench
    finally:
        pool.close()


def _print(found: Calibration, label: str) -> None:
    from baton.bench.calibration import Regime

    print(f"{label}: {len(found.points)} sizes of step")
    for name, value in asdict(found.pace).items():
        print(f"  {name:<18} {value:.4g}")
    print(f"  {'relative error of':<18} {'fitted: median':>15} {'p90':>7} {'sizes':>6}   {'held out: median':>16} {'p90':>7} {'sizes':>6}")
    for regime in Regime:
        fitted, held_out = (_told(found.errors(regime, is_held_out=is_held_out)) for is_held_out in (False, True))
        print(f"  {regime.value:<18} {fitted[0]:>15} {fitted[1]:>7} {fitted[2]:>6}   {held_out[0]:>16} {held_out[1]:>7} {held_out[2]:>6}")


def _told(errors: list[float]) -> tuple[str, str, str]:
    """Median, p90 and how many."""
    from baton.bench.report import percentile

    return (f"{statistics.median(errors):.1%}", f"{percentile(errors, 0.9):.1%}", str(len(errors))) if errors else ("-", "-", "0")
