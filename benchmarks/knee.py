"""The rate at which a cluster begins to be late: where policies are compared (simulator/knee.py).

python -m benchmarks.knee --trace mooncake_conversation --spread 3 --config benchmarks/clusters/h200x8.yaml
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from baton.compare import WARM_UP_SHARE
from baton.progress import say_line
from baton.trace_options import Burst, Cv, Generator, Prefixes, Spread, TraceName, TracesDir, source_of
from control.config import load_config
from simulator.fidelity import Fidelity
from simulator.knee import TARGET, find_knee
from simulator.metrics import counted
from simulator.policy_only import run_policy_only
from simulator.replicates import Replicates
from simulator.summary import Objective, summarise
from simulator.token_accurate import run_token_accurate


def main(
    config: Annotated[Path, typer.Option(help="A cluster.yaml of paced workers.")],
    trace: TraceName = "",
    generate: Generator = "",
    policy: str = "round_robin",
    requests: int = 2000,
    replicates: int = 3,
    cv: Cv = 1.0,
    burst: Burst = 1,
    prefixes: Prefixes = None,
    spread: Spread = 0.0,
    fidelity: Fidelity = Fidelity.TOKEN_ACCURATE,
    slo_ttft: float = 2.0,
    slo_tpot: float = 0.05,
    target: Annotated[float, typer.Option(help="Share of requests in time.")] = TARGET,
    guess: Annotated[float, typer.Option(help="Requests a second to begin at.")] = 8.0,
    seed: int = 0,
    traces: TracesDir = None,
) -> None:
    """Print the highest rate at which `policy` serves a share of requests in time."""
    cluster, objective = load_config(file=config), Objective(ttft_s=slo_ttft, tpot_s=slo_tpot)
    source = source_of(trace, generate, rate=None, requests=requests, cv=cv, burst=burst, prefixes=prefixes, spread=spread, folder=traces)
    drawn = Replicates.of(source, num_requests=requests, seed=seed)

    def attainment(rate: float) -> float:
        timed = replace(drawn, source=replace(source, rate_per_s=rate))
        shares = [one(timed, index) for index in range(replicates)]
        say_line(f"{rate:.4g} requests/s: {fmean(shares):.1%} in time")
        return fmean(shares)

    def one(timed: Replicates, index: int) -> float:
        asked, its_seed = timed.make(index), timed.seed_of(index)
        if fidelity is Fidelity.POLICY_ONLY:
            served = run_policy_only(asked, cluster, policy=policy, seed=its_seed)
        else:
            served = run_token_accurate(asked, cluster, policy=policy, seed=its_seed)
        return summarise(counted(served, WARM_UP_SHARE * asked.duration_s), objective).attainment

    print(f"{find_knee(attainment, guess_per_s=guess, target=target):.4g} requests/s")


if __name__ == "__main__":
    typer.run(main)
