"""What a run left on the machine, against a baseline taken before it: processes, ports, Unix sockets, shared memory, files.

    python -m cluster.leftovers --save before.json
    ... start, use and stop Baton ...
    python -m cluster.leftovers --against before.json        (lists what is left; exit status 1 if anything is)

Ours is what works in, is named after, or was made below our run directories, and shared memory of this user that is new. Runs whose
own process still lives are nobody's leftovers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.processes import ProcessId, all_processes, listeners, process_id, working_under
from cluster.run_directory import default_root, live_runs
from control.run_files import runtime_dir

SCHEMA = "baton.leftovers.v1"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - listed, not written


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """What of ours there is at a moment, each as a line for a person to read; `processes` as "pid start_ticks title"."""

    processes: tuple[str, ...]
    ports: tuple[str, ...]
    unix_sockets: tuple[str, ...]
    shared_memory: tuple[str, ...]
    files: tuple[str, ...]

    def since(self, before: Traces) -> list[str]:
        """What is here now and was not then, worded; empty is what a stopped run promises."""
        found = []
        for kind in self.__dataclass_fields__:
            known = set(getattr(before, kind))
            found += [f"{kind.replace('_', ' ')}: {item}" for item in getattr(self, kind) if item not in known]
        return found


def take(environ: Mapping[str, str] = os.environ) -> Traces:
    """The traces of every run of this user on this machine."""
    roots = tuple(dict.fromkeys([default_root(), runtime_dir(environ)]))
    alive = [str(run) for root in roots for run in live_runs(root)]
    living = {int(path.stem) for root in roots for path in root.glob("*.json") if path.stem.isdigit() and process_id(int(path.stem))}
    processes = our_processes(roots, but_not=alive)
    pids = {p.pid for p in processes}
    files = [path for path in _files(roots) if path not in alive and not _is_of(path, living)]
    return Traces(
        processes=tuple(f"{p.pid} {p.start_ticks} {p.title[:120]}" for p in processes),
        ports=tuple(sorted(f"{s.host}:{s.port} of {s.pids}" for s in listeners(pids) if pids)),
        unix_sockets=tuple(sorted({path for path in _unix_socket_paths() if _is_below(path, roots) and not _is_below(path, alive)})),
        shared_memory=tuple(sorted(_shared_memory())),
        files=tuple(sorted(files)),
    )


def our_processes(roots: tuple[Path, ...], *, but_not: Sequence[str] = ()) -> list[ProcessId]:
    """Processes that work below a root (also a removed one) or name one in their command line; not those above this one."""
    found = {p for root in roots for p in working_under(root)}
    found.update(p for p in all_processes() if any(f"{root}/" in p.title for root in roots) and p.is_alive)
    for run in but_not:
        found.difference_update(working_under(Path(run)), {p for p in found if run in p.title})
    return sorted(found - _ancestry())


def _is_of(path: str, living: set[int]) -> bool:
    """A run file, or the lock of a port, of a process that lives."""
    name = Path(path)
    if name.suffix == ".json":
        return name.stem.isdigit() and int(name.stem) in living
    if name.suffix == ".lock":
        try:
            return process_id(int(name.read_text())) is not None
        except (OSError, ValueError):
            return False
    return False


def _ancestry() -> set[ProcessId]:
    """This process and its parents: a shell whose command line names our files is no leftover."""
    found, pid = set(), os.getpid()
    while pid > 0 and (process := process_id(pid)) is not None:
        found.add(process)
        pid = _parent(pid)
    return found


def _parent(pid: int) -> int:
    try:
        raw = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(raw[raw.rindex(")") + 2 :].split()[1])


def _unix_socket_paths() -> list[str]:
    try:
        lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    except OSError:
        return []
    return [words[7] for line in lines if len(words := line.split(maxsplit=7)) == 8]


def _shared_memory() -> list[str]:
    if not _SHARED_MEMORY.is_dir():
        return []
    found = []
    for path in _SHARED_MEMORY.iterdir():
        try:
            if path.lstat().st_uid == os.getuid():
                found.append(str(path))
        except FileNotFoundError:
            continue
    return found


def _files(roots: tuple[Path, ...]) -> list[str]:
    """Files and directories directly below our roots: a run has one directory, one lock and one run file."""
    return [str(path) for root in roots if root.is_dir() for path in root.iterdir()]


def _is_below(path: str, roots: Sequence[Path | str]) -> bool:
    return any(path.startswith(f"{root}/") for root in roots)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.leftovers", description="What runs of Baton left on this machine.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--save", type=Path, metavar="FILE", help="write what there is now")
    what.add_argument("--against", type=Path, metavar="FILE", help="list what is new since then")
    arguments = parser.parse_args()
    now = take()
    if arguments.save is not None:
        arguments.save.write_text(json.dumps({"schema": SCHEMA, **asdict(now)}))
        return 0
    document = json.loads(arguments.against.read_text())
    if document.pop("schema", None) != SCHEMA:
        print(f"{arguments.against} is not a {SCHEMA} document", file=sys.stderr)  # noqa: T201
        return 2
    left = now.since(Traces(**{kind: tuple(items) for kind, items in document.items()}))
    for line in left:
        print(f"left behind: {line}")  # noqa: T201
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
