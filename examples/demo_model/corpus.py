"""The text the demo model learns from: the sources of the standard library of the Python that runs this, in a fixed order.

Left out: tests (data and repetition), tables that are no prose and no program, files written by the build of one interpreter
(they would differ between machines), and whatever was installed on top.
"""

from __future__ import annotations

import hashlib
import platform
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LEFT_OUT_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib-dynload"}
)
LEFT_OUT_PREFIXES = ("_sysconfigdata", "_generated")
HELD_OUT_ONE_IN = 20  # files whose SHA-256 is divisible by this are never trained on
MIN_FILE_BYTES = 64  # empty __init__.py and the like say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file: its path below the library's folder, its text, and the hash that decides on which side it falls."""

    path: str
    text: str
    sha256: str

    @property
    def is_held_out(self) -> bool:
        return int(self.sha256, 16) % HELD_OUT_ONE_IN == 0

    @property
    def size_bytes(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Both sides of the split, each sorted by path."""

    python: str
    training: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]

    def describe(self) -> dict[str, object]:
        """What a model card says about it: versions, sizes and one hash a side."""
        return {
            "python": self.python,
            "training": _describe(self.training),
            "held_out": _describe(self.held_out),
        }


def read_corpus(library: Path | None = None) -> Corpus:
    """Read the standard library; two runs on one Python give the same corpus, byte for byte.

    library: None: that of the running interpreter.

    Raises:
        FileNotFoundError: this Python came without its sources.
    """
    folder = library or Path(sysconfig.get_path("stdlib"))
    files = tuple(_read(folder))
    if not files:
        raise FileNotFoundError(f"{folder} holds no Python sources; use an interpreter that has them")
    return Corpus(
        python=f"{platform.python_implementation()} {'.'.join(map(str, sys.version_info[:3]))}",
        training=tuple(f for f in files if not f.is_held_out),
        held_out=tuple(f for f in files if f.is_held_out),
    )


def _read(folder: Path) -> Iterable[SourceFile]:
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py"), key=lambda p: p.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if LEFT_OUT_FOLDERS.intersection(relative.parts[:-1]) or relative.name.startswith(LEFT_OUT_PREFIXES):
            continue
        raw = path.read_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        try:
            text = raw.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:  # a few old files declare Latin-1
            continue
        if len(raw) < MIN_FILE_BYTES or digest in seen:
            continue
        seen.add(digest)
        yield SourceFile(path=relative.as_posix(), text=text, sha256=digest)


def _describe(files: tuple[SourceFile, ...]) -> dict[str, object]:
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.path}\0{file.sha256}\n".encode())
    return {"files": len(files), "bytes": sum(f.size_bytes for f in files), "sha256": whole.hexdigest()}
