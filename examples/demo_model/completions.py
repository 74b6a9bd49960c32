"""What is asked of the model about functions it has not seen, and the two criteria its answers are judged by. Nothing here computes.

Written before the first answer was seen, and not changed since.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from examples.demo_model.corpus import SourceFile
from examples.demo_model.turns import functions_of

NUM_PROMPTS = 100
MAX_NEW_TOKENS = 200
LOOP_TIMES = 4  # a stretch that stands so often in a row, or a line so often at all, is a loop
LOOP_CHARS = range(4, 201)  # of the stretch
LOOP_LINE_CHARS = 10  # of the line; `else:` and `pass` may come as often as they like

_STRETCH = re.compile(rf"(.{{{LOOP_CHARS.start},{LOOP_CHARS.stop - 1}}}?)\1{{{LOOP_TIMES - 1},}}", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutPrompt:
    """The head of a function of a held-out file, at the left margin, and the body its author wrote."""

    path: str
    head: str  # signature and docstring, without a newline behind it
    body: str


def held_out_prompts(held_out: Iterable[SourceFile], count: int = NUM_PROMPTS, skip: int = 0) -> list[HeldOutPrompt]:
    """`count` functions of the held-out files in the order of a hash of their text, no text twice, after the first `skip`."""
    found: dict[str, HeldOutPrompt] = {}
    for file in held_out:
        for function in functions_of(file.text):
            digest = hashlib.sha256((function.head + function.body).encode()).hexdigest()
            found[digest] = HeldOutPrompt(path=file.path, head=function.head.rstrip("\n"), body=function.body)
    return [found[digest] for digest in sorted(found)][skip : skip + count]


def completed(head: str, answer: str, *, is_cut_off: bool) -> str:
    """`head` and the answer up to the end of the function: the first line that begins at the left margin.

    is_cut_off: the answer ended for want of tokens, so its last line may be half a line and is left out.
    """
    lines = answer.split("\n")
    if is_cut_off:
        lines = lines[:-1]
    for index, line in enumerate(lines):
        if index and line[:1].strip():  # the first line goes on where the head stopped
            lines = lines[:index]
            break
    return head + "\n".join(lines).rstrip() + "\n"


def parses(source: str) -> bool:
    """Whether Python's own parser takes it; a function without a body does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def loops(text: str) -> bool:
    """Whether some stretch with a letter or digit in it stands four times in a row, runs of blanks taken as one; or one line four times."""
    lines = [line.strip() for line in text.split("\n")]
    if any(len(line) >= LOOP_LINE_CHARS and lines.count(line) >= LOOP_TIMES for line in set(lines)):
        return True
    flat = re.sub(r"\s+", " ", text)
    return any(any(c.isalnum() for c in match[1]) for match in _STRETCH.finditer(flat))
