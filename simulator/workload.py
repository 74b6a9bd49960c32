"""From a trace to what a simulated cluster is sent."""

from __future__ import annotations

from collections.abc import Iterator

from protocol.request import Request, SamplingParams
from simulator.traces.content import Contents
from simulator.traces.trace import Trace

CACHE_ROOT = b"baton simulation"


def requests_of(trace: Trace, *, model_id: str, vocab_size: int, seed: int = 0) -> Iterator[tuple[float, Request]]:
    """(when, what), in order, times from the first arrival. A request ends when it has the trace's number of tokens.

    Its tokens are drawn when it is taken from here: a long trace is never in memory whole.
    """
    contents = Contents(vocab_size=vocab_size, seed=seed)
    first_s = trace.requests[0].at_s if trace.requests else 0.0
    for number, asked in enumerate(trace.requests):
        yield (
            asked.at_s - first_s,
            Request(
                request_id=f"{number:032x}",
                model_id=model_id,
                prompt_token_ids=contents.tokens(asked.runs),
                sampling=SamplingParams(max_tokens=asked.output_tokens, temperature=0.0, ignore_eos=True),
                cache_root=CACHE_ROOT,
                arrival_s=0.0,
            ),
        )
