"""Functions of a source file as turns of a conversation, so that the chat template has something to mean.

Two kinds of turn, both cut from the file as it stands and moved to the left margin:

    user: the signature and docstring of a function      assistant: its body
    user: the first line of a docstring                  assistant: the function
"""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

MAX_FUNCTION_CHARS = 1500  # a longer answer would not end within a reader's patience
MIN_BODY_CHARS = 20
ONE_IN = 3  # functions of a file that become turns; the plain text of the file is trained on anyway


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function of a file at the left margin. `head` ends with a newline and holds signature and docstring; `body` the rest."""

    name: str
    head: str
    body: str
    summary: str | None  # first line of the docstring; None: there is none


def functions_of(text: str) -> Iterator[Function]:
    """The functions of a module, methods included, in the order of their lines; nothing for a file that does not parse."""
    lines = text.splitlines(keepends=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in old files
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in sorted(nodes, key=lambda n: (n.lineno, n.col_offset)):
        documented = ast.get_docstring(node) is not None
        if len(node.body) == documented:  # a docstring and nothing else
            continue
        first = node.body[documented]
        start = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))]) - 1
        if start <= node.lineno - 1:  # all on one line
            continue
        source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        at = sum(len(line) for line in source.splitlines(keepends=True)[: start - node.lineno + 1])
        head, body = source[:at], source[at:].rstrip() + "\n"
        if not source.startswith(("def ", "async def ")) or len(body) < MIN_BODY_CHARS or len(source) > MAX_FUNCTION_CHARS:
            continue
        summary = (ast.get_docstring(node) or "").strip().split("\n")[0].strip() or None
        yield Function(name=node.name, head=head, body=body, summary=summary)


def conversation_of(text: str) -> list[tuple[str, str]]:
    """(user, assistant) turns from every third function of a file, the two kinds by turns where the docstring allows."""
    turns: list[tuple[str, str]] = []
    for index, function in enumerate(functions_of(text)):
        if index % ONE_IN:
            continue
        if function.summary is not None and len(turns) % 2:
            turns.append((function.summary, function.head + function.body))
        else:
            turns.append((function.head.rstrip("\n"), function.body))
    return turns
