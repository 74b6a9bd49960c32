"""`baton bench transfer`: KV blocks from process to process, beside what the machine can do and what others do; then the whole hand-off."""

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
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from baton.bench.transfer_handoff import HandoffRun
    from baton.bench.transfer_run import Chunk, Measured, Total, TransferPlan

DEFAULT_CHUNKS = "4KiB,16KiB,64KiB,15m,125m"
DEFAULT_TOTALS = "256KiB,4MiB,64MiB"
DEFAULT_PEERS = "nixl,nixl_tcp,ucxx,gloo,ray"
DEFAULT_PROMPTS = "1024,8192"
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
HANDOFF_MODEL = "125m"


@dataclass(slots=True, kw_only=True)
class Report:
    """What there is so far, and where it goes."""

    plan: TransferPlan
    absent: Mapping[str, str]
    output: Path | None
    began_s: float = field(default_factory=time.monotonic)
    measured: Measured | None = None
    handoffs: list[HandoffRun] = field(default_factory=list)

    def rows(self) -> list[Row]:
        from baton.bench.transfer_handoff import handoff_rows
        from baton.bench.transfer_rows import rows_of

        transfers = [] if self.measured is None else rows_of(self.plan, self.measured)
        return [*transfers, *(row for run in self.handoffs for row in handoff_rows(run))]

    def document(self) -> dict[str, object]:
        from baton.bench.transfer_rows import SCHEMA

        sections = {
            "rounds": self.plan.num_rounds,
            "pool_bytes": self.plan.pool_bytes,
            "chunks": {chunk.label: chunk.size_bytes for chunk in self.plan.chunks},
            "totals": {total.label: total.size_bytes for total in self.plan.totals},
            "subjects": {} if self.measured is None else self.measured.subjects,
            "absent": dict(self.absent),
            "took_s": round(time.monotonic() - self.began_s, 1),
        }
        return make_document(SCHEMA, seed=self.plan.seed, rows=self.rows(), sections=sections)

    def write(self) -> None:
        if self.output is not None:
            self.output.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")


def bench_transfer(
    chunks: Annotated[
        str, typer.Option("--chunks", help="Sizes, or shapes of `baton bench engine` (a block of 16 tokens).")
    ] = DEFAULT_CHUNKS,
    totals: Annotated[str, typer.Option("--totals", help="Bytes of one transfer; a comma between.")] = DEFAULT_TOTALS,
    compare: Annotated[str, typer.Option(help="Peers to take turns with; a comma between.")] = DEFAULT_PEERS,
    peer_env: Annotated[list[str] | None, typer.Option(help="nixl=PYTHON or ucxx=PYTHON, where it is installed; repeatable.")] = None,
    pool: Annotated[str, typer.Option(help="Size of the pools that blocks are scattered over.")] = "512MiB",
    rounds: Annotated[int, typer.Option(min=1, help="Times each path does each total; a verdict needs 6.")] = 9,
    prompts: Annotated[
        str, typer.Option(help="Tokens of the prompts whose hand-off is timed in a cluster; empty: none.")
    ] = DEFAULT_PROMPTS,
    model: Annotated[
        str, typer.Option(help="Of that cluster: a shape of `baton bench engine`, or a checkpoint's directory.")
    ] = HANDOFF_MODEL,
    seed: Annotated[int, typer.Option(help="Of blocks, prompts and turns.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON document to this file too, anew after each round.")] = None,
) -> None:
    """Measure KV transfers between two processes beside memcpy, sockets, NIXL, UCX, gloo and Ray; and the hand-off in a cluster."""
    from baton.bench.transfer_handoff import measure_handoff
    from baton.bench.transfer_run import OUR_PATHS, TransferPlan, find_subjects, measure

    pool_bytes = size_of(pool)
    sizes = tuple(total_of(text) for text in _parts(totals))
    lengths = [length_of(text) for text in _parts(prompts)]
    subjects, absent = find_subjects(compare, peer_env or [])
    plan = TransferPlan(
        chunks=tuple(chunk_of(text) for text in _parts(chunks)),
        totals=sizes,
        subjects=subjects,
        pool_bytes=pool_bytes,
        num_rounds=rounds,
        seed=seed,
    )
    too_large = [total.label for total in sizes if total.size_bytes > pool_bytes // 4]
    if too_large:
        raise ConfigError(f"a total of {too_large[0]} is more than a quarter of a pool of {pool}; give a larger --pool")
    report = Report(plan=plan, absent=absent, output=output)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the subjects end with us

    def keep(measured: Measured) -> None:
        report.measured = measured
        report.write()

    with tempfile.TemporaryDirectory(prefix="baton-bench-") as scratch:
        say = sayer(report.began_s)
        keep(measure(plan, Path(scratch), say, keep))
        if lengths:
            for run in measure_handoff(model, lengths, num_rounds=rounds, seed=seed, scratch=Path(scratch), say=say):
                report.handoffs.append(run)
                report.write()
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
    if as_json:
        print(json.dumps(report.document(), indent=1))
    else:
        _print(report.rows(), absent)
    if report.measured is not None and any(path in OUR_PATHS for _, path in report.measured.lost):
        raise typer.Exit(1)


# --- what was asked for -----------------------------------------------------------------------------------------------


def size_of(text: str) -> int:
    """Bytes of "16KiB", "4MiB".

    Raises:
        ConfigError: it is no size.
    """
    number, unit = text.rstrip("KMGiB"), text[len(text.rstrip("KMGiB")) :]
    if not number.isdecimal() or not int(number) or unit not in UNITS:
        raise ConfigError(f"{text!r} is no size; write 16KiB, 4MiB or 1GiB")
    return int(number) * UNITS[unit]


def total_of(text: str) -> Total:
    from baton.bench.transfer_run import Total

    return Total(label=text, size_bytes=size_of(text))


def chunk_of(text: str) -> Chunk:
    """A size, or a block of a model's pool.

    Raises:
        ConfigError: it is neither, or a size of which blocks cannot be made.
    """
    from baton.bench.models import MODELS
    from baton.bench.transfer_run import Chunk

    if text in MODELS:
        from baton.bench.transfer_source import BLOCK_TOKENS
        from engine.models.config import parse_model_config

        return Chunk(label=text, size_bytes=parse_model_config(MODELS[text], {}).kv_layout(BLOCK_TOKENS).block_bytes, layout=text)
    from baton.bench.transfer_source import LAYER_BYTES

    size_bytes = size_of(text)
    if size_bytes % LAYER_BYTES:
        raise ConfigError(f"a chunk of {text} is not a multiple of {LAYER_BYTES >> 10} KiB, which is a layer of one head of 64 in bfloat16")
    return Chunk(label=text, size_bytes=size_bytes)


def length_of(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"--prompts has {text!r}; write numbers of tokens, a comma between")
    return int(text)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


# --- what is told -----------------------------------------------------------------------------------------------------


def _print(rows: Sequence[Row], absent: Mapping[str, str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("total/chunk/path", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for name in ("unit", "95 % interval", "target", "digest ms/GB: sampled, full"):
        table.add_column(name, no_wrap=True)
    table.add_column("note")
    for row in rows:
        interval = row.details.get("interval")
        table.add_row(
            row.name,
            "-" if row.value is None else f"{row.value:,.4g}",
            row.unit,
            f"{interval[0]:.3f} .. {interval[1]:.3f}" if isinstance(interval, list) else "",
            "" if row.target is None else str(row.target),
            digest_words(row.details.get("digest_ms_per_gb")),
            Text(str(row.details.get("reason", "")), style="yellow"),
            style="red" if row.ok is False else "green" if row.ok else None,
        )
    show(table, absent)


def digest_words(costs: object) -> str:
    """ "6.1 + 5.0, 90 + 88": at the target and at the source, of either mode."""
    if not isinstance(costs, dict) or not costs:
        return ""
    return ", ".join(f"{cost['pull']:.3g} + {cost['offer']:.3g}" if "offer" in cost else f"{cost['pull']:.3g}" for cost in costs.values())


__all__ = ["Report", "bench_transfer", "chunk_of", "size_of"]
