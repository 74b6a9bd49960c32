"""Readers of published trace formats. Each says what it leaves out and what it makes up.

    mooncake   JSON lines: timestamp (ms), input_length, output_length, hash_ids of blocks of 512 tokens, each naming all before it
    azure      CSV: TIMESTAMP, ContextTokens, GeneratedTokens; nothing is shared
    sessions   JSON, one agentic session a line or a file: block_size, requests with t (s), in, out, think_time and hash_ids that mean
               something within their session only
    ragpulse   JSON lines: timestamp (s), session_id, hash_ids of the components of a prompt, whose lengths stand in a second file

A file may be packed by gzip. A field that is missing or out of bounds is an error that names file and line.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from protocol.errors import ConfigError
from simulator.traces.trace import Run, Trace, TraceRequest

MOONCAKE_BLOCK_TOKENS = 512
RAGPULSE_COMPONENTS = ("sys_prompt", "passages_ids", "history", "web_search", "user_input")  # in the order taken for the prompt's
RAGPULSE_LENGTHS = "component_lengths"  # a part of the name of the file, or files, beside the trace
MAX_LINE_CHARS = 64 << 20

Row = Mapping[str, Any]


def load_trace(path: Path, *, format_name: str = "") -> Trace:
    """`format_name`: empty to tell it by the first row.

    Raises:
        ConfigError: no such file or format, or a row that is not of the format.
    """
    if not path.exists():
        raise ConfigError(f"there is no trace {path}")
    name = format_name or _format_of(path)
    reader = FORMATS.get(name)
    if reader is None:
        raise ConfigError(f"trace format {name!r} is unknown; choose from {', '.join(FORMATS)}")
    requests, notes = reader(path)
    if not requests:
        raise ConfigError(f"{path} has no requests of format {name}")
    return Trace(name=path.name.partition(".")[0], requests=tuple(sorted(requests, key=lambda r: r.at_s)), notes=tuple(notes))


def _format_of(path: Path) -> str:
    if path.is_dir():
        return "sessions"
    with _opened(path) as lines:
        head = next(lines, "")
    if head.startswith("TIMESTAMP,"):
        return "azure"
    try:
        fields = json.loads(head)
    except ValueError:
        raise ConfigError(f"{path} is neither JSON lines nor Azure's CSV; name its format: {', '.join(FORMATS)}") from None
    if isinstance(fields, dict) and "requests" in fields:
        return "sessions"
    if isinstance(fields, dict) and isinstance(fields.get("hash_ids"), dict):
        return "ragpulse"
    return "mooncake"


# --- formats ------------------------------------------------------------------------------------------------------------


def read_mooncake(path: Path) -> tuple[list[TraceRequest], list[str]]:
    """Of kvcache-ai/Mooncake (FAST'25) and whoever writes the same. A last block is as long as the prompt leaves it."""
    requests = []
    for where, row in _rows(path):
        num_tokens, ids = _count(row, "input_length", where), row.get("hash_ids", [])
        if (
            not isinstance(ids, list)
            or len(ids) * MOONCAKE_BLOCK_TOKENS < num_tokens
            or (len(ids) - 1) * MOONCAKE_BLOCK_TOKENS >= num_tokens > 0
        ):
            raise ConfigError(f"{where}: {len(ids)} hash_ids for {num_tokens} tokens; blocks of {MOONCAKE_BLOCK_TOKENS} are expected")
        sizes = [min(MOONCAKE_BLOCK_TOKENS, num_tokens - i * MOONCAKE_BLOCK_TOKENS) for i in range(len(ids))]
        requests.append(
            TraceRequest(
                at_s=_number(row, "timestamp", where) / 1000.0,
                runs=tuple(Run(str(i), size) for i, size in zip(ids, sizes, strict=True)),
                output_tokens=max(1, _count(row, "output_length", where)),
            )
        )
    return requests, []


def read_azure(path: Path) -> tuple[list[TraceRequest], list[str]]:
    """Of Azure/AzurePublicDataset, 2023 and 2024. Rows without tokens on a side are left out."""
    requests: list[TraceRequest] = []
    num_left_out = 0
    first: datetime | None = None
    with _opened(path) as lines:
        for number, row in enumerate(csv.DictReader(lines), 2):
            where = f"{path}:{number}"
            num_tokens, output_tokens = _count(row, "ContextTokens", where), _count(row, "GeneratedTokens", where)
            if not num_tokens or not output_tokens:
                num_left_out += 1
                continue
            text = row.get("TIMESTAMP") or ""
            try:
                at = datetime.fromisoformat(text[:26])  # hundreds of nanoseconds are more than it reads
            except ValueError:
                raise ConfigError(f"{where}: TIMESTAMP {text!r} is no time") from None
            first = first or at
            run = Run(f"row {number}", num_tokens)
            requests.append(TraceRequest(at_s=(at - first).total_seconds(), runs=(run,), output_tokens=output_tokens))
    return requests, [f"{num_left_out} rows without tokens left out"] if num_left_out else []


def read_sessions(path: Path) -> tuple[list[TraceRequest], list[str]]:
    """Of callanjfox/kv-cache-tester: a file of one session a line, or a folder of such files. Requests of sub-agents are part of it.

    Times count from the begin of each session, so all begin at once (`timing.begin_sessions`), and those of a sub-agent from its own: it
    is written down at its end where it says how long it took, else when it was sent off. What follows the last full block of a prompt is
    its own.
    """
    requests: list[TraceRequest] = []
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        for where, row in _rows(file):
            session, size = str(row.get("id", where)), _count(row, "block_size", where)
            if not size:
                raise ConfigError(f"{where}: block_size is 0")
            requests += _session(session, size, row.get("requests"), where, 0.0, {})
    return requests, ["times count from the begin of each session"]


def _session(session: str, size: int, rows: object, where: str, begin_s: float, blocks: dict[int, Run]) -> Iterator[TraceRequest]:
    """`blocks` by id: a turn has those of all turns before it, so each is kept once (3.7 GiB of 18,000 requests, else)."""
    if not isinstance(rows, list):
        raise ConfigError(f"{where}: a session without a list of requests")
    for number, row in enumerate(rows):
        here = f"{where}, request {number + 1}"
        at_s = begin_s + _number(row, "t", here)
        if "requests" in row:  # a sub-agent's
            took_s = _number(row, "duration_ms", here) / 1e3 if row.get("duration_ms") is not None else 0.0
            yield from _session(session, size, row["requests"], here, at_s - took_s, blocks)
            continue
        num_tokens, ids = _count(row, "in", here), row.get("hash_ids", [])
        if len(ids) * size > num_tokens:
            raise ConfigError(f"{here}: {len(ids)} blocks of {size} in a prompt of {num_tokens} tokens")
        for i in ids:
            if i not in blocks:
                blocks[i] = Run(f"{session} {i}", size)
        runs = [blocks[i] for i in ids]
        if num_tokens > len(ids) * size:
            runs.append(Run(f"{session} own {at_s} {number}", num_tokens - len(ids) * size))
        think_s = _number(row, "think_time", here) if row.get("think_time") is not None else None
        output_tokens = max(1, _count(row, "out", here))
        if runs:
            yield TraceRequest(at_s=at_s, runs=tuple(runs), output_tokens=output_tokens, session=session, think_s=think_s)


def read_ragpulse(path: Path) -> tuple[list[TraceRequest], list[str]]:
    """Of flashserve/RAGPulse, with the lengths of components in `*component_lengths*` beside it. Components stand in the order of
    RAGPULSE_COMPONENTS, which is taken and not told; a prompt longer than they are has a rest of its own, a shorter one ends early.
    """
    lengths = _component_lengths(path)
    requests, num_cut = [], 0
    for where, row in _rows(path):
        num_tokens, parts = _count(row, "input_length", where), row.get("hash_ids")
        if not isinstance(parts, dict):
            raise ConfigError(f"{where}: hash_ids by component are expected")
        runs, left = [], num_tokens
        for component in RAGPULSE_COMPONENTS:
            for i in parts.get(component) or ():
                length = lengths.get(i)
                if length is None:
                    raise ConfigError(
                        f"{where}: nobody says how long component {i} is; put the lengths beside the trace, *{RAGPULSE_LENGTHS}*"
                    )
                num_cut += length > left
                if min(length, left):
                    runs.append(Run(str(i), min(length, left)))
                left -= min(length, left)
        if left:
            runs.append(Run(f"own {where}", left))
        requests.append(
            TraceRequest(
                at_s=_number(row, "timestamp", where),
                runs=tuple(runs),
                output_tokens=max(1, _count(row, "output_length", where)),
                session=str(row.get("session_id", "")),
            )
        )
    return requests, [f"{num_cut} components were longer than their prompts and are cut"] if num_cut else []


def _component_lengths(path: Path) -> dict[int, int]:
    """By id; ids of all kinds are different numbers."""
    lengths: dict[int, int] = {}
    for file in sorted(path.parent.glob(f"*{RAGPULSE_LENGTHS}*")):
        for where, row in _rows(file):
            ids = [value for key, value in row.items() if key.endswith("_id")]
            if len(ids) != 1:
                raise ConfigError(f"{where}: one id and its token_length are expected")
            lengths[ids[0]] = _count(row, "token_length", where)
    return lengths


FORMATS: Mapping[str, Callable[[Path], tuple[list[TraceRequest], list[str]]]] = {
    "mooncake": read_mooncake,
    "azure": read_azure,
    "sessions": read_sessions,
    "ragpulse": read_ragpulse,
}


# --- rows ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[Iterator[str]]:
    """Lines of a text file, packed or not."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        yield _lines(path, file)


def _lines(path: Path, file: IO[str]) -> Iterator[str]:
    number = 0
    try:
        while line := file.readline(MAX_LINE_CHARS):
            number += 1
            if len(line) == MAX_LINE_CHARS:
                raise ConfigError(f"{path}:{number} is longer than {MAX_LINE_CHARS:,} characters")
            yield line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}:{number + 1} cannot be read: {error}") from error


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(where it stands, the row) of each line of JSON."""
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{where} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{where} is no object")
            yield where, row


def _number(row: Row, name: str, where: str) -> float:
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{where}: {name} is {row.get(name)!r}; a number is expected") from None
    if not 0.0 <= value < 1e15:
        raise ConfigError(f"{where}: {name} is {value}; a number from 0 on is expected")
    return value


def _count(row: Row, name: str, where: str) -> int:
    value = _number(row, name, where)
    if value != int(value):
        raise ConfigError(f"{where}: {name} is {value}; a whole number is expected")
    return int(value)
