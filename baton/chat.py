"""`baton chat`: a conversation with a running server, streamed as it is generated; one question when it comes as argument or by pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated, TextIO

import typer

from baton.connection import Json, Server, ServerRefused, ServerUnavailable, find_server

CONNECT_TIMEOUT_S = 3.0
TOKEN_TIMEOUT_S = 600.0  # a long prompt on a CPU; Ctrl-C is the way out before
INPUT_CHARS_MAX = 4 << 20

Message = dict[str, str]

# A model may say anything; what would steer the terminal is left out.
_UNPRINTABLE = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def chat(
    message: Annotated[str | None, typer.Argument(help="Ask this and end; from a pipe when left out.")] = None,
    url: Annotated[str | None, typer.Option(help="Server to talk to; the one running here when left out.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to name; the server's first when left out.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="0 always takes the most likely token.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="BATON_API_KEY", help="Key the server asks for.")] = None,
) -> None:
    """Talk to a running server. Ctrl-C stops an answer, Ctrl-D ends the conversation, /clear begins a new one."""
    server, _ = find_server(url, api_key, os.environ, timeout_s=CONNECT_TIMEOUT_S)
    conversation = Conversation(
        server=Server(url=server.url, api_key=api_key, timeout_s=TOKEN_TIMEOUT_S),
        model=model or first_model(server),
        options={key: value for key, value in (("max_tokens", max_tokens), ("temperature", temperature)) if value is not None},
        messages=[{"role": "system", "content": system}] if system else [],
    )
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read(INPUT_CHARS_MAX)
    if message is not None:
        _ask_once(conversation, message)
    else:
        _converse(conversation, sys.stdout)


def first_model(server: Server) -> str:
    """The first name in /v1/models."""
    rows = server.get("/v1/models").get("data")
    if not isinstance(rows, list) or not rows:
        raise ServerUnavailable(f"{server.url} serves no model; name one with --model")
    return str(rows[0]["id"])


@dataclass(slots=True, kw_only=True)
class Conversation:
    """The messages so far, and how the next answer is asked for."""

    server: Server
    model: str
    options: dict[str, object]
    messages: list[Message]
    usage: Json = field(default_factory=dict)

    def ask(self, text: str) -> Iterator[str]:
        """The pieces of the answer. It enters the conversation as far as it came, also when the caller stops early."""
        self.messages.append({"role": "user", "content": text})
        body = {"model": self.model, "messages": self.messages, "stream": True, "stream_options": {"include_usage": True}, **self.options}
        answer: list[str] = []
        failed = True
        try:
            with closing(self.server.stream("/v1/chat/completions", body)) as events:
                for event in events:
                    if isinstance(event.get("error"), dict):
                        raise ServerRefused(f"the server gave up: {event['error'].get('message', 'no reason given')}")
                    self.usage = event.get("usage") or self.usage
                    for piece in _pieces(event):
                        answer.append(piece)
                        yield piece
            failed = False
        finally:
            if answer or not failed:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
            else:
                self.messages.pop()  # unanswered: the next question takes its place

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [m for m in self.messages if m["role"] == "system"]


def _pieces(event: Json) -> Iterator[str]:
    for choice in event.get("choices") or []:
        piece = (choice.get("delta") or {}).get("content")
        if isinstance(piece, str) and piece:
            yield piece


def _ask_once(conversation: Conversation, text: str) -> None:
    if not text.strip():
        raise typer.BadParameter("the message is empty; say something")
    clean = _cleaner(sys.stdout)
    try:
        for piece in conversation.ask(text):
            sys.stdout.write(clean(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()


def _converse(conversation: Conversation, out: TextIO) -> None:
    """Question and answer until Ctrl-D. Ctrl-C stops the answer, at the prompt it clears the line."""
    import readline  # noqa: F401 - gives input() history and editing

    out.write(f"{conversation.model} at {conversation.server.url}; Ctrl-C stops an answer, /clear begins anew, Ctrl-D ends\n")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            out.write("\n")
            return
        except KeyboardInterrupt:
            out.write("\n")
            continue
        if text == "/clear":
            conversation.clear()
        elif text in ("/exit", "/quit"):
            return
        elif text:
            _answer(conversation, text, out)


def _answer(conversation: Conversation, text: str, out: TextIO) -> None:
    """One answer on the terminal, with its figures below; trouble is told and the conversation goes on."""
    clean = _cleaner(out)
    began_s = time.monotonic()
    first_s: float | None = None
    try:
        for piece in conversation.ask(text):
            first_s = first_s or time.monotonic()
            out.write(clean(piece))
            out.flush()
    except KeyboardInterrupt:
        out.write(" (stopped)")
    except (ServerRefused, ServerUnavailable) as error:
        out.write(f"{error}")
    out.write("\n")
    if first_s is not None and conversation.usage:
        out.write(figures(conversation.usage, first_s - began_s, time.monotonic() - first_s))


def figures(usage: Json, ttft_s: float, decode_s: float) -> str:
    """ "[12 + 34 tokens, first after 0.21 s, then 41.3 tokens/s]" in a dim colour."""
    num_output = int(usage.get("completion_tokens", 0))
    rate = f", then {(num_output - 1) / decode_s:.1f} tokens/s" if num_output > 1 and decode_s > 0 else ""
    return f"\x1b[2m[{usage.get('prompt_tokens', 0)} + {num_output} tokens, first after {ttft_s:.2f} s{rate}]\x1b[0m\n"


def _cleaner(out: TextIO) -> Callable[[str], str]:
    return (lambda piece: piece.translate(_UNPRINTABLE)) if out.isatty() else (lambda piece: piece)
