"""Every published figure made anew: what ran on the virtual clock runs again and must come to the same, the rest is drawn again.

    results/*.json ──► of a tournament or a plan: its own command again, every member compared but machine and commit
                   ──► of anything that times real processes: left as measured, and named with what it takes
                   ──► drawings beside them, tables of README and docs

make reproduce [ARGS="--only compare-toolbench"]
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from baton.compare import SCHEMA as COMPARE
from baton.plan_told import SCHEMA as PLAN
from benchmarks.figures import RESULTS, drawings, pages

ROOT = Path(__file__).resolve().parents[1]
VIRTUAL = (COMPARE, PLAN)  # schemas of what runs on the virtual clock
OF_THE_MACHINE = ("machine", "commit")  # members that another machine or a later commit may have otherwise

Document = Mapping[str, Any]


def main(
    only: Annotated[list[str] | None, typer.Option(help="Run this document's command again, `compare-toolbench`; may be repeated.")] = None,
    results: Annotated[Path, typer.Option(help="Where documents lie.")] = RESULTS,
) -> None:
    """Run published tournaments and plans again, draw figures and tables anew; ends with 1 where something is not as it was published."""
    documents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
    again = [name for name, document in documents.items() if document["schema"] in VIRTUAL and (not only or name in only)]
    unknown = sorted(set(only or ()) - set(again))
    faults = [f"{name}: no tournament or plan of that name in {results}" for name in unknown]
    for name in again:
        began_s = time.monotonic()
        fault = not_as_published(documents[name])
        print(f"{name}: {fault or 'the same'} ({time.monotonic() - began_s:.0f} s)", flush=True)
        faults += [f"{name}: {fault}"] if fault is not None else []
    for path, text in [*drawings().items(), *pages().items()]:
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            faults.append(f"{path.relative_to(ROOT)} was not what the documents say; written anew")
    print("drawings and tables: drawn from their documents")
    for line in left_as_measured(documents):
        print(line)
    for fault in faults:
        print(fault, file=sys.stderr)
    raise typer.Exit(1 if faults else 0)


def not_as_published(document: Document) -> str | None:
    """Run its command; where the outcome first differs, or why there is none. None: it is the same."""
    command = [sys.executable, "-P", "-m", "baton", *shlex.split(document["command"])[1:], "--json"]
    outcome = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if outcome.returncode:
        return f"`{document['command']}` ends with {outcome.returncode}"
    return first_difference(without_machine(document), without_machine(json.loads(outcome.stdout)))


def without_machine(document: Document) -> dict[str, object]:
    return {name: value for name, value in document.items() if name not in OF_THE_MACHINE}


def first_difference(published: object, again: object, at: str = "") -> str | None:
    """In words; None: they are equal, whatever the order of members."""
    if isinstance(published, dict) and isinstance(again, dict):
        pairs = [(f"{at}.{key}".lstrip("."), published.get(key), again.get(key)) for key in {**published, **again}]
    elif isinstance(published, list) and isinstance(again, list) and len(published) == len(again):
        pairs = [(f"{at}[{index}]", a, b) for index, (a, b) in enumerate(zip(published, again, strict=True))]
    else:
        return None if published == again else f"{at} was {shown(published)} and is {shown(again)}"
    return next((found for name, a, b in pairs if (found := first_difference(a, b, name)) is not None), None)


def left_as_measured(documents: Mapping[str, Document]) -> Iterator[str]:
    """What this machine could not give the same figures for, however long it ran."""
    for name, document in documents.items():
        if document["schema"] not in VIRTUAL:
            took = f", {document['took_s'] / 60:.0f} minutes" if document.get("took_s") else ""
            machine = document["machine"]
            yield f"{name}: left as measured, on {machine['cpu']} ({machine['num_cores']} cores){took}; benchmarks/README.md says how"


def shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


if __name__ == "__main__":
    typer.run(main)
