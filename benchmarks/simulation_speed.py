"""How many requests a second a simulation places and serves, policy by policy, on one core, and what memory it takes.

python -m benchmarks.simulation_speed --trace mooncake_conversation --spread 3 --config benchmarks/clusters/h200x8.yaml --rate 7
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from statistics import median

import typer

from baton.bench.report import Row, Target, make_document
from baton.trace_options import Generator, Rate, Spread, TraceName, TracesDir, source_of
from control.config import load_config
from router.policies import label, split_list
from simulator.fidelity import Fidelity
from simulator.policy_only import prompts_of, run_policy_only
from simulator.token_accurate import DEFAULT_CLUSTER, run_token_accurate
from simulator.true_steps import true_steps

SCHEMA = "baton.bench.simulation.v1"
TARGETS = {Fidelity.POLICY_ONLY: Target(relation=">=", bound=20_000), Fidelity.TOKEN_ACCURATE: Target(relation=">=", bound=1_000)}


def main(
    config: Path | None = None,
    trace: TraceName = "",
    generate: Generator = "",
    policies: str = "least_work,round_robin,prefix_cost,e2",
    fidelity: Fidelity = Fidelity.POLICY_ONLY,
    rate: Rate = None,
    requests: int | None = None,
    spread: Spread = 0.0,
    prefill: int = 4,
    decode: int = 4,
    repeats: int = 5,
    seed: int = 0,
    traces: TracesDir = None,
) -> None:
    """Print a document with medians of some repeats, in seconds of this process: others on the machine count less."""
    workers = DEFAULT_CLUSTER["workers"] | {"prefill_workers": prefill, "decode_workers": decode}
    cluster = load_config(file=config) if config is not None else load_config(DEFAULT_CLUSTER | {"workers": workers})
    asked = source_of(trace, generate, rate=rate, requests=requests, spread=spread, folder=traces).draw(seed=seed)
    count, rows, prompts, steps = len(asked.requests), [], None, true_steps(cluster, seed=seed)
    if fidelity is Fidelity.POLICY_ONLY:
        began_s = time.process_time()
        prompts = prompts_of(asked, cluster)
        rows.append(Row(name="prompt_tree", value=count / (time.process_time() - began_s), unit="requests/s"))
    for policy in split_list(policies):
        took_s = []
        for _ in range(repeats):
            began_s = time.process_time()
            if fidelity is Fidelity.POLICY_ONLY:
                run_policy_only(asked, cluster, policy=policy, seed=seed, prompts=prompts, steps=steps)
            else:
                run_token_accurate(asked, cluster, policy=policy, seed=seed, steps=steps)
            took_s.append(time.process_time() - began_s)
        rows.append(Row(name=label(policy), value=count / median(took_s), unit="requests/s", target=TARGETS[fidelity]))
    rows.append(Row(name="memory", value=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, unit="MiB"))
    of_cluster = {"config": str(config)} if config is not None else {"prefill": prefill, "decode": decode}
    sections = {"fidelity": fidelity.value, "trace": asked.name, "requests": count, "repeats": repeats, **of_cluster}
    print(json.dumps(make_document(SCHEMA, seed=seed, rows=rows, sections=sections), indent=2))


if __name__ == "__main__":
    typer.run(main)
