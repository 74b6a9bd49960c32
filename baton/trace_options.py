"""The options that say which requests an experiment is made of, the same for every verb that runs one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baton.trace import traces_dir

if TYPE_CHECKING:
    from simulator.traces.source import Source

TraceName = Annotated[str, typer.Option("--trace", help="A file, or a name in the folder of traces (`baton trace list`).")]
Generator = Annotated[
    str,
    typer.Option(
        "--generate",
        help="In place of a trace: toolbench, toolbench_zipf, embodied, programming, video_qa, loogle, fan_out, unshared, sharegpt.",
    ),
]
Rate = Annotated[float | None, typer.Option("--rate", min=0.0, help="Requests a second; else the trace's own, or 10.")]
Cv = Annotated[float, typer.Option("--cv", min=0.0, help="Of a generator's gaps: 1 is a Poisson process.")]
Prefixes = Annotated[
    int | None, typer.Option("--prefixes", min=1, help="Of a generator: that prompts are drawn over; else by its workload's sharers.")
]
Burst = Annotated[int, typer.Option("--burst", min=1, help="Of a generator: so many arrive at once.")]
Spread = Annotated[float, typer.Option("--spread", min=0.0, help="Spread arrivals that the trace rounds down to steps of so many seconds.")]
TracesDir = Annotated[Path | None, typer.Option("--dir", help="Where traces lie.")]


def source_of(
    trace: str,
    generate: str,
    *,
    rate: float | None,
    requests: int | None,
    cv: float = 1.0,
    burst: int = 1,
    prefixes: int | None = None,
    spread: float = 0.0,
    folder: Path | None,
) -> Source:
    """What the options ask for.

    Raises:
        ConfigError: neither a trace nor a generator, or both; or no such trace.
    """
    from simulator.traces.catalog import find
    from simulator.traces.source import Source

    return Source(
        path=find(trace, traces_dir(folder)) if trace else None,
        generator=generate,
        rate_per_s=rate,
        num_requests=requests,
        cv=cv,
        burst_size=burst,
        num_prefixes=prefixes,
        spread_s=spread,
    )


def command_of(verb: str, options: Mapping[str, object]) -> str:
    """The command line that asks for the same. Keys are named as the verb's options; None and "" were not given."""
    words = ["baton", verb]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{flag}" if value else f"--no-{flag}"]
        elif value not in (None, ""):
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


__all__ = ["Burst", "Cv", "Generator", "Prefixes", "Rate", "Spread", "TraceName", "TracesDir", "command_of", "source_of"]
