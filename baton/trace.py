"""`baton trace`: traces of production by name, and what is in them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baton.progress import say, say_line
from protocol.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from simulator.traces.catalog import SourceFile
    from simulator.traces.trace import Trace

SCHEMA = "baton.trace.v1"
FOLDER_VARIABLE = "BATON_TRACES_DIR"
MAX_FILE_BYTES = 1 << 30
CHUNK_BYTES = 1 << 16
TIMEOUT_S = 60.0  # without a byte

Folder = Annotated[Path | None, typer.Option("--dir", help=f"Where traces lie; else ${FOLDER_VARIABLE}, else ~/.cache/baton/traces.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]

trace_app = typer.Typer(name="trace", help="Traces of production: list, fetch, describe.", no_args_is_help=True, rich_markup_mode=None)


def traces_dir(given: Path | None) -> Path:
    if given is not None:
        return given
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "baton" / "traces"


@trace_app.command("list")
def list_traces(folder: Folder = None, as_json: AsJson = False) -> None:
    """Traces known by name: what they are, their licence, whom to cite."""
    from simulator.traces.catalog import KNOWN, find

    at = traces_dir(folder)

    def is_here(name: str) -> bool:
        try:
            return bool(find(name, at))
        except ConfigError:
            return False

    told = [{**asdict(trace), "is_here": is_here(name)} for name, trace in KNOWN.items()]
    if as_json:
        print(json.dumps({"schema": SCHEMA, "dir": str(at), "traces": told}))
        return
    for trace in told:
        print(f"{trace['name']}{'  (here)' if trace['is_here'] else ''}\n    {trace['about']}")
        print(f"    {trace['licence']}; {trace['citation']}\n    {trace['home']}")


@trace_app.command("fetch")
def fetch(name: Annotated[str, typer.Argument(help="One of `baton trace list`.")], folder: Folder = None) -> None:
    """Get a trace from its publisher, whole or not at all. What is there already and hashes right is not asked for again."""
    from simulator.traces.catalog import KNOWN

    trace = KNOWN.get(name)
    if trace is None:
        raise ConfigError(f"no trace is known as {name!r}; choose from {', '.join(KNOWN)}")
    if not trace.files:
        raise ConfigError(f"{name} has too many files to fetch one by one: {trace.about} ({trace.home})")
    at = traces_dir(folder)
    at.mkdir(parents=True, exist_ok=True)
    for file in trace.files:
        size, found = asyncio.run(fetch_file(file, at / file.saved_as, on_progress=say))
        checked = "sha256 as published" if file.sha256 else "its publisher's sha256 is not known here"
        say_line(f"{at / file.saved_as}: {size:,} bytes, sha256 {found} ({checked})")
    say_line(f"{trace.licence}; cite {trace.citation}")


async def fetch_file(file: SourceFile, path: Path, *, on_progress: Callable[[str], None] = lambda text: None) -> tuple[int, str]:
    """Size in bytes and SHA-256 of what lies at `path` now.

    Raises:
        ServiceError: the server does not have it, breaks off, or has another file under that name; nothing is left behind.
    """
    import aiohttp

    if path.exists() and (file.sha256 is None or _sha256(path) == file.sha256):
        return path.stat().st_size, _sha256(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    digest, size = hashlib.sha256(), 0
    try:
        timeout = aiohttp.ClientTimeout(total=None, connect=TIMEOUT_S, sock_read=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=True) as session, session.get(file.url) as response:
            if response.status != 200:
                raise ServiceError(f"{file.url} answers {response.status}; the trace may have moved, see `baton trace list`")
            with part.open("wb") as out:
                async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                    size += len(chunk)
                    if size > MAX_FILE_BYTES:
                        raise ServiceError(f"{file.url} is larger than {MAX_FILE_BYTES:,} bytes")
                    digest.update(chunk)
                    out.write(chunk)
                    on_progress(f"{path.name}: {size / 1e6:.1f} of {(response.content_length or size) / 1e6:.1f} MB")
        if file.sha256 is not None and digest.hexdigest() != file.sha256:
            raise ServiceError(f"{file.url} hashes to {digest.hexdigest()}, {file.sha256} is expected: another file, or a damaged one")
        part.replace(path)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ServiceError(f"{file.url} was not got: {type(error).__name__} {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return size, digest.hexdigest()


@trace_app.command("describe")
def describe(
    name: Annotated[str, typer.Argument(help="A file, a folder of sessions, or a name in the folder of traces.")],
    format_name: Annotated[str, typer.Option("--format", help="mooncake, azure, sessions or ragpulse; else told by its first row.")] = "",
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """How many ask, when, for how much, and what a cache could find again."""
    from simulator.traces.trace import facts_of

    facts = facts_of(read_trace(name, folder, format_name=format_name))
    if as_json:
        print(json.dumps({"schema": SCHEMA} | asdict(facts)))
        return
    lines = {
        "requests": f"{facts.num_requests:,}" + (f" in {facts.num_sessions:,} sessions" if facts.num_sessions else ""),
        "time": f"{facts.duration_s:,.0f} s, {facts.rate_per_s:.4g} requests/s, gaps with a cv of {facts.interarrival_cv:.2f}",
        "at one moment": f"{facts.same_moment_share:.0%} of requests arrive with another one",
        "prompt tokens": "{:,} / {:,} / {:,} (p50 / p90 / p99)".format(*facts.input_tokens),
        "output tokens": "{:,} / {:,} / {:,}".format(*facts.output_tokens),
        "reuse": f"{facts.reuse_share:.1%} of prompt tokens begin an earlier prompt too",
    }
    width = max(map(len, lines))
    print(facts.name)
    for title, text in lines.items():
        print(f"  {title:<{width}}  {text}")
    for note in facts.notes:
        print(f"  note: {note}")


def read_trace(name: str, folder: Path | None, *, format_name: str = "") -> Trace:
    """
    Raises:
        ConfigError: no such trace, or one that cannot be read.
    """
    from simulator.traces import load_trace
    from simulator.traces.catalog import find

    return load_trace(find(name, traces_dir(folder)), format_name=format_name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
