"""What a step costs the worker core: all that `WorkerCore.on(StepDone)` does, from the result of one step to the plan of the next.

    python -m tests.step_cost --running 1,8,32,64,256 --waiting 0,1000

That is: blocks unpinned, tokens appended, ends found, outputs made, full blocks named and KV events gathered, room looked for in the
inbox, the next step planned, generations raised. Not in it: making the result (the executor), encoding and sending (the host). CPU time of
the calling thread; every sequence decodes at its own phase of a block, has an EOS to look for and one gateway to tell.
Target: 60 us + 1 us a running sequence, whatever waits (issue 3).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from array import array
from collections.abc import Iterator
from typing import Any

from engine.core.events import RunStep, StepDone
from engine.core.executor import BatchPlan, Sampled, StepResult
from tests.core_bench import Bench, prompt
from tests.sim_cluster import EOS, make_request

TOKEN = 7


def steady_bench(num_running: int, num_waiting: int, num_steps: int, **bench: Any) -> Bench:
    """`num_running` sequences that decode for `num_steps` steps more, and attempts behind them for which there is no place."""
    made = Bench(
        **{"num_blocks": num_running * (40 + num_steps // 16) + 100, "max_model_len": 4000}
        | {"max_num_seqs": num_running, "max_num_batched_tokens": 100_000, "core": {"max_waiting": 2000}}
        | bench
    )
    made.core.check = lambda: None  # type: ignore[method-assign]  # linear in the pool
    for number in range(num_running):
        made.submit(make_request(number, prompt(300 + number % 16, number), max_tokens=num_steps + 50, eos_token_ids=(EOS,)))
    for number in range(num_running, num_running + num_waiting):
        made.submit(make_request(number, prompt(100, number)))
    while made.steps[0].num_tokens != num_running:
        made.finish_step(TOKEN)
    return made


def step_done(plan: BatchPlan) -> StepDone:
    token_ids = array("I", [TOKEN]) * len(plan.samples)
    sampled = Sampled(sequence_ids=plan.samples.sequence_ids, token_ids=token_ids)
    return StepDone(result=StepResult(step_id=plan.step_id, sampled=sampled, duration_s=0.01))


def step_costs(bench: Bench, num_steps: int) -> Iterator[float]:
    """CPU seconds of each of `num_steps` turns."""
    for _ in range(num_steps):
        event = step_done(bench.steps.pop(0))
        began = time.thread_time_ns()
        commands = bench.core.on(event, 0.0)
        yield (time.thread_time_ns() - began) / 1e9
        bench.steps += [command.plan for command in commands if isinstance(command, RunStep)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--running", default="1,8,32,64,256")
    parser.add_argument("--waiting", default="0,1000")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", action="store_true", help="one document on one line")
    arguments = parser.parse_args()
    rows = []
    for num_running in map(int, arguments.running.split(",")):
        for num_waiting in map(int, arguments.waiting.split(",")):
            gc.collect()
            costs = list(step_costs(steady_bench(num_running, num_waiting, arguments.steps), arguments.steps))
            row = {"running": num_running, "waiting": num_waiting, "target_us": 60 + num_running}
            row |= {"min_us": round(min(costs) * 1e6, 1), "median_us": round(statistics.median(costs) * 1e6, 1)}
            rows.append(row)
            if not arguments.json:
                print("{running:4d} running {waiting:5d} waiting".format(**row), end="  ")
                print("min {min_us:.1f} us  median {median_us:.1f} us  target {target_us} us".format(**row), flush=True)
    if arguments.json:
        print(json.dumps({"load": os.getloadavg()[0], "rows": rows}))


if __name__ == "__main__":
    main()
