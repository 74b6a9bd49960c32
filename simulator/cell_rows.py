"""What is kept of a cell, request by request: a row of JSON each, packed so that the same rows are the same bytes.

Packed parts put one behind the other are packed rows again (RFC 1952, 2.2), so a file of them is written cell by cell.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from simulator.routed_gateway import Served

Row = Mapping[str, str | int | float | bool | None]
LEVEL = 6


def outcome_rows(policy: str, replicate: int, served: Sequence[Served], counted: Collection[str]) -> Iterator[Row]:
    """What came of each request. Times are seconds on the virtual clock; null: it did not come to that."""
    for one in served:
        yield {
            "policy": policy,
            "replicate": replicate,
            "request": one.request_id,
            "counted": one.request_id in counted,
            "arrived_s": one.arrived_s,
            "first_token_s": one.first_token_s,
            "end_s": one.end_s,
            "prompt_tokens": one.num_prompt_tokens,
            "output_tokens": one.num_output_tokens,
            "attempts": one.num_attempts,
            "terminal": one.terminal,
            "reason": one.reason,
        }


def decision_rows(policy: str, replicate: int, served: Sequence[Served]) -> Iterator[Row]:
    """Where each request was computed and decoded at last, and how many tokens of its prompt were found there."""
    for one in served:
        yield {
            "policy": policy,
            "replicate": replicate,
            "request": one.request_id,
            "prefill": one.prefill_worker,
            "decode": one.decode_worker,
            "cached_tokens": one.num_cached_tokens,
        }


def pack(rows: Iterable[Row]) -> bytes:
    """A gzip member without a name or time."""
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), LEVEL, mtime=0)


def unpack(path: Path) -> Iterator[str]:
    """The lines of a file of packed rows.

    Raises:
        OSError, EOFError, zlib.error: it is damaged.
    """
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from lines


__all__ = ["Row", "decision_rows", "outcome_rows", "pack", "unpack"]
