"""How many requests a second the policy-only simulation places and serves, policy by policy, on one core.

python -m benchmarks.policy_only_speed --trace mooncake_conversation --spread 3 --policies least_work,round_robin,prefix_cost,e2
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import typer

from baton.bench.report import Row, Target, make_document
from baton.trace_options import Generator, Rate, Spread, TraceName, TracesDir, source_of
from control.config import load_config
from simulator.policy_only import prompts_of, run_policy_only
from simulator.token_accurate import DEFAULT_CLUSTER

SCHEMA = "baton.bench.policy_only.v1"
TARGET = Target(relation=">=", bound=20_000)


def main(
    config: Path | None = None,
    trace: TraceName = "",
    generate: Generator = "",
    policies: str = "least_work,round_robin,prefix_cost,e2",
    rate: Rate = None,
    requests: int | None = None,
    spread: Spread = 0.0,
    prefill: int = 4,
    decode: int = 4,
    repeats: int = 5,
    seed: int = 0,
    traces: TracesDir = None,
) -> None:
    """Print a document with the best of some repeats, in seconds of this process: others on the machine count less."""
    workers = DEFAULT_CLUSTER["workers"] | {"prefill_workers": prefill, "decode_workers": decode}
    cluster = load_config(file=config) if config is not None else load_config(DEFAULT_CLUSTER | {"workers": workers})
    asked = source_of(trace, generate, rate=rate, requests=requests, cv=1.0, burst=1, spread=spread, folder=traces).draw(seed=seed)
    count = len(asked.requests)
    began_s = time.process_time()
    prompts = prompts_of(asked, cluster)
    rows = [Row(name="prompt_tree", value=count / (time.process_time() - began_s), unit="requests/s")]
    for policy in policies.split(","):
        took_s = []
        for _ in range(repeats):
            began_s = time.process_time()
            run_policy_only(asked, cluster, policy=policy, seed=seed, prompts=prompts)
            took_s.append(time.process_time() - began_s)
        rows.append(Row(name=policy, value=count / min(took_s), unit="requests/s", target=TARGET))
    print(json.dumps(make_document(SCHEMA, seed=seed, rows=rows), indent=2))


if __name__ == "__main__":
    typer.run(main)
