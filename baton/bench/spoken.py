"""The engine's side of the conversation a benchmark has with every engine, ours and others: one JSON object a line.

    load      {model, dtype, num_threads, max_model_len, num_kv_tokens, max_num_seqs}   ->  {engine, ...}
    prepare   {requests: [{prompt: [id, ...], num_tokens, at_s}], is_streamed}          ->  {}
    run       {}                              ->  {deliveries: [[[at_s, count], ...], ...], token_ids: [[id, ...], ...]}
    quit      {}                                                                          the process ends

`run` does what was prepared: every request arrives `at_s` seconds after the start, samples greedily and ends after `num_tokens`,
whatever they are. Its deliveries say when its tokens were there (seconds after the start) and how many; where nothing is streamed
one delivery at the end is enough. What an engine cannot do it answers with {unsupported: why}; anything else that goes wrong ends
the process, and its last line on stderr is the reason told.

Standard library only: peers, whose Pythons know nothing of Baton, load this file by its path.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any, Protocol

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Unsupported(Exception):
    """This engine does not do what was asked; the text says why in a clause."""


class Engine(Protocol):
    """What a subject of a benchmark implements."""

    def load(self, asked: dict[str, Any]) -> dict[str, Any]: ...

    def prepare(self, *_: Any, **asked: Any) -> None:
        """What is asked beside the verb: {requests, is_streamed} of an engine."""
        ...

    def run(self) -> dict[str, Any]: ...


def answer(engine: Engine) -> None:
    """Answer on what was stdout until told to quit; whatever else the process prints goes to stderr."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process would outlive whoever stopped it
    speech = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        asked = json.loads(line)
        verb = asked.pop("verb")
        if verb == "quit":
            return
        reply: dict[str, Any] = {}
        try:
            if verb == "load":
                reply = engine.load(asked)
            elif verb == "prepare":
                engine.prepare(**asked)
            else:
                assert verb == "run", f"no such verb: {verb}"
                reply = engine.run()
        except Unsupported as refusal:
            reply = {"unsupported": str(refusal)}
        speech.write(json.dumps(reply) + "\n")
        speech.flush()
