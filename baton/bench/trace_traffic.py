"""A trace as load on a live endpoint, and what came of it in the words in which a simulated run is summed up (simulator/summary.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.bench.load import ErrorKind, LoadRun, SentRequest, Workload
from simulator.traces.content import Contents
from simulator.traces.trace import Trace

ENDS = {ErrorKind.REFUSED: "refused"}  # what else goes wrong is "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceWorkload(Workload):
    """The first `num_requests` of a trace, at its times from the first arrival on; prompts are token ids drawn from the seed."""

    trace: Trace

    @classmethod
    def of(cls, trace: Trace, *, vocab_size: int, seed: int) -> TraceWorkload:
        """All of it. Lengths are the trace's own; `input_len` and `output_len` tell the longest."""
        return cls(
            num_requests=len(trace.requests),
            request_rate=trace.rate_per_s,
            input_len=max((r.num_prompt_tokens for r in trace.requests), default=0),
            output_len=max((r.output_tokens for r in trace.requests), default=0),
            vocab_size=vocab_size,
            seed=seed,
            trace=trace,
        )

    def arrivals_s(self) -> list[float]:
        requests = self.trace.requests[: self.num_requests]
        return [r.at_s - requests[0].at_s for r in requests]

    def prompts(self) -> list[list[int]]:
        contents = Contents(vocab_size=self.vocab_size, seed=self.seed)
        return [contents.tokens(r.runs).tolist() for r in self.trace.requests[: self.num_requests]]

    def output_lens(self) -> list[int]:
        return [r.output_tokens for r in self.trace.requests[: self.num_requests]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One request that was sent, as `simulator.summary.Outcome`. Seconds from the start of its run."""

    request_id: str
    arrived_s: float
    end_s: float | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int  # 0 also where the server does not say
    ttft_s: float | None
    tpot_s: float | None
    terminal: str  # "finished" | "failed" | "refused"
    reason: str
    num_attempts: int = 1  # as the client sees it


def answered(run: LoadRun) -> list[Answered]:
    """Every request of a run, in the order of their arrival; latencies by protocol/timeline.py."""
    return [_answered(run, request) for request in run.requests]


def tells_cached(requests: Sequence[SentRequest]) -> bool:
    """Whether the server says how much of a prompt it found in a cache."""
    return any(request.num_cached_tokens is not None for request in requests)


def _answered(run: LoadRun, request: SentRequest) -> Answered:
    timeline = request.timeline
    return Answered(
        request_id=f"{request.index:032x}",
        arrived_s=timeline.arrival_s - run.started_s,
        end_s=None if timeline.end_s is None else timeline.end_s - run.started_s,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=timeline.num_tokens,
        num_cached_tokens=request.num_cached_tokens or 0,
        ttft_s=timeline.ttft_s,
        tpot_s=timeline.tpot_s,
        terminal="finished" if request.error is None else ENDS.get(request.error, "failed"),
        reason=request.error_text,
    )


__all__ = ["Answered", "TraceWorkload", "answered", "tells_cached"]
