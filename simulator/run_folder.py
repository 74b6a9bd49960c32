"""A folder that holds a tournament: what was run, what came of every request, what it says, and whether another run says the same.

    manifest.json        commit, resolved configuration, seeds, hash of the trace, packages, command; machine and time: not compared
    summary.json         the document of `baton compare`, without commit and machine
    requests.jsonl.gz    a row for each request of each cell (cell_rows.py)
    decisions.jsonl.gz   where each was placed
    report.html          drawn from the document

The same command at the same commit makes the same bytes of COMPARED, whatever the machine and the number of processes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from protocol.errors import ConfigError
from simulator.cell_rows import unpack
from simulator.report import render
from simulator.tournament import Cell

MANIFEST, SUMMARY, REPORT = "manifest.json", "summary.json", "report.html"
REQUESTS, DECISIONS = "requests.jsonl.gz", "decisions.jsonl.gz"
COMPARED = (SUMMARY, REQUESTS, DECISIONS)
NOT_COMPARED = ("machine", "commit")  # members of the document that stand in the manifest
MAX_SHOWN_CHARS = 160

Document = Mapping[str, object]


def write_run(folder: Path, document: Document, cells: Sequence[Cell], manifest: Mapping[str, object]) -> None:
    """cells: in the order of the tournament, those of whole replicates."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / MANIFEST, {**manifest, **{name: document[name] for name in NOT_COMPARED}})
    _write_json(folder / SUMMARY, {name: value for name, value in document.items() if name not in NOT_COMPARED})
    (folder / REQUESTS).write_bytes(b"".join(cell.outcomes for cell in cells))
    (folder / DECISIONS).write_bytes(b"".join(cell.decisions for cell in cells))


def write_report(folder: Path, document: Document) -> None:
    """
    Raises:
        ConfigError: a document of another kind.
    """
    (folder / REPORT).write_text(render(document), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, object]:
    """
    Raises:
        ConfigError: there is none.
    """
    return _read_json(folder / MANIFEST)


def read_document(folder: Path) -> dict[str, object]:
    """As it was printed.

    Raises:
        ConfigError: the folder holds no run.
    """
    summary, manifest = _read_json(folder / SUMMARY), read_manifest(folder)
    head = {name: manifest.get(name) for name in NOT_COMPARED}
    return {"schema": summary.get("schema"), **head, **summary}


def first_difference(folder: Path, other: Path) -> str | None:
    """Where the first file of COMPARED differs, for a reader; None: they are the same bytes."""
    for name in COMPARED:
        mine, theirs = folder / name, other / name
        for path in (mine, theirs):
            if not path.exists():
                return f"{name}: there is none in {path.parent}"
        if mine.read_bytes() == theirs.read_bytes():
            continue
        try:
            for number, (a, b) in enumerate(zip_longest(_lines(mine), _lines(theirs)), 1):
                if a != b:
                    return f"{name}, line {number}:\n  {_shown(a)}\n  {_shown(b)}"
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            return f"{name} is damaged: {error}"
        return f"{name}: the same lines, packed otherwise"
    return None


def _lines(path: Path) -> Iterator[str]:
    if path.suffix == ".gz":
        yield from unpack(path)
    else:
        with path.open(encoding="utf-8") as lines:
            yield from lines


def _shown(line: str | None) -> str:
    if line is None:
        return "(the file ends before)"
    return line.rstrip("\n") if len(line) <= MAX_SHOWN_CHARS else line[:MAX_SHOWN_CHARS] + "..."


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.parent} holds no run of `baton compare`: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is no object; a run of `baton compare --out` is expected in {path.parent}")
    return value


__all__ = ["COMPARED", "MANIFEST", "first_difference", "read_document", "read_manifest", "write_report", "write_run"]
