"""The model card's figures, written from results.json between two marks; a test fails when card and results differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CARD = HERE / "README.md"
RESULTS = HERE / "results.json"
BEGIN, END = "<!-- figures of results.json -->", "<!-- end of figures -->"
NUM_SAMPLES = 3


def with_figures(page: str, document: Mapping[str, Any]) -> str:
    """The page with what stands between the marks made anew.

    Raises:
        ValueError: the page lacks a mark.
    """
    before, after = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:before]}\n\n{figures(document)}\n\n{page[after:]}"


def figures(document: Mapping[str, Any]) -> str:
    """Figures, samples and hashes of results.json as Markdown."""
    return "\n\n".join([_rows(document["rows"]), _samples(document["samples"]), _corpus(document["corpus"]), _files(document["model"])])


def describe(model_dir: Path) -> dict[str, object]:
    """Size and SHA-256 of every file of the checkpoint."""
    files = {path.name: path.read_bytes() for path in sorted(model_dir.iterdir()) if path.is_file()}
    return {
        "bytes": sum(map(len, files.values())),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }


def _rows(rows: list[Mapping[str, Any]]) -> str:
    table = ["| figure | value | asked for |", "|---|---|---|"]
    for row in rows:
        asked = "" if row["target"] is None else f"{row['target']}: {'met' if row['ok'] else 'missed'}"
        table.append(f"| {row['name'].replace('/', ': ')} | {row['value']:g} {row['unit']} | {asked} |")
    return "\n".join(table)


def _samples(samples: list[Mapping[str, str]]) -> str:
    shown = [f"Sample {number}:\n\n```text\n{_marked(sample)}\n```" for number, sample in enumerate(samples[:NUM_SAMPLES], start=1)]
    return "\n\n".join(shown)


def _marked(sample: Mapping[str, str]) -> str:
    """The prompt's lines with a bar before them, then what the model made of it."""
    prompt, completion = sample["prompt"], sample["completion"]
    lines = f"{prompt}{completion}".rstrip().split("\n")
    num_given = prompt.count("\n") + 1
    return "\n".join(("| " if index < num_given else "  ") + line for index, line in enumerate(lines)).replace("```", "'''")


def _corpus(corpus: Mapping[str, Any]) -> str:
    table = [f"Corpus: the standard library of {corpus['python']}.", "", "| side | files | bytes | SHA-256 |", "|---|---|---|---|"]
    for side in ("training", "held_out"):
        told = corpus[side]
        table.append(f"| {side.replace('_', '-')} | {told['files']:,} | {told['bytes']:,} | `{told['sha256']}` |")
    return "\n".join(table)


def _files(model: Mapping[str, Any]) -> str:
    table = [f"Checkpoint: {model['bytes']:,} bytes.", "", "| file | SHA-256 |", "|---|---|"]
    table += [f"| {name} | `{digest}` |" for name, digest in model["sha256"].items()]
    return "\n".join(table)
