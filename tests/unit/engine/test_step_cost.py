"""What a step costs the core does not grow with what waits, and grows by little with what runs.

How: bytecodes executed in a turn are counted, not timed, so that a busy machine changes nothing (`python -m tests.step_cost` times it).
Seen to fail with the tokens that wait summed in each turn, with `_may_offer` asked of each waiting prompt, with an offer's room looked
for behind all that wait, and (the second) with a TokenRun made of each token.
"""

from __future__ import annotations

import statistics
import sys
from types import FrameType
from typing import Any

import pytest

from engine.core.events import RunStep
from protocol.kv import KVHandoff
from tests.core_bench import Bench, offer, prompt
from tests.sim_cluster import make_request
from tests.step_cost import steady_bench, step_done

pytestmark = pytest.mark.pure

NUM_STEPS = 33  # two blocks and a step: every sequence crosses a block boundary at least twice


def bytecodes(bench: Bench) -> int:
    """Executed in a turn: the median over NUM_STEPS steps."""
    counts = []
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    for _ in range(NUM_STEPS):
        event = step_done(bench.steps.pop(0))
        count, before = 0, sys.gettrace()
        sys.settrace(trace)
        try:
            commands = bench.core.on(event, 0.0)
        finally:
            sys.settrace(before)
        counts.append(count)
        bench.steps += [c.plan for c in commands if isinstance(c, RunStep)]
    return int(statistics.median(counts))


def waits_for_a_place(num_waiting: int) -> Bench:
    return steady_bench(8, num_waiting, NUM_STEPS)


def waits_for_blocks(num_waiting: int) -> Bench:
    """Places are free; a long prompt at the head of the inbox finds no blocks, and those behind it wait their turn."""
    bench = steady_bench(8, 0, NUM_STEPS, num_blocks=210, max_num_seqs=64)
    for number in range(100, 100 + num_waiting):
        bench.submit(make_request(number, prompt(900, number)))
    return bench


def waits_for_its_offer(num_waiting: int) -> Bench:
    """Prompts for other workers, of which no more may be on offer: one is already."""
    bench = steady_bench(8, 0, NUM_STEPS, max_num_seqs=64, core={"max_waiting": 2000, "max_offered_bytes": 1})
    bench.submit(make_request(99, prompt(20)), prefill_only=True)
    bench.finish_step()
    for number in range(100, 100 + num_waiting):
        bench.submit(make_request(number, prompt(20, number)), prefill_only=True)
    return bench


def waits_for_a_pull(num_waiting: int) -> Bench:
    """KV on offer from another worker, for which there is no place here."""
    bench = steady_bench(8, 0, NUM_STEPS)
    source = Bench(num_blocks=2000, max_num_seqs=2000, core={"max_waiting": 2000})
    source.core.check = lambda: None  # type: ignore[method-assign]
    for number in range(100, 100 + num_waiting):
        request = make_request(number, prompt(20, number))
        handoff: KVHandoff = offer(source, request)
        bench.submit(request, handoff=handoff)
    return bench


@pytest.mark.parametrize("waits", [waits_for_a_place, waits_for_blocks, waits_for_its_offer, waits_for_a_pull])
def test_a_step_costs_the_same_however_many_wait(waits: Any) -> None:
    few, many = bytecodes(waits(2)), bytecodes(waits(400))
    assert waits(400).core.snapshot(0.0).num_waiting >= 399, "they wait indeed"
    assert many <= few * 1.02 + 20, f"{few} bytecodes with 2 waiting, {many} with 400"


def test_a_step_costs_little_more_for_each_sequence_that_runs() -> None:
    """About 150 bytecodes take a microsecond; naming a full block and taking the next, every sixteenth step, are half of them."""
    of_32, of_64 = bytecodes(steady_bench(32, 0, NUM_STEPS)), bytecodes(steady_bench(64, 0, NUM_STEPS))
    print(f"\nbytecodes of a turn: {of_32} for 32 running, {of_64} for 64")
    assert (of_64 - of_32) / 32 < 190
