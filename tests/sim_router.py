"""The cells of `baton bench policies` on the virtual clock (simulator/routed_cluster.py).

What that measures in an hour of real time, without processes and without the noise of a machine:

    python -m tests.sim_router --workloads fan_out --repeats 7        the same prompts, arrivals and table as the live bench's
"""

from __future__ import annotations

import sys

import typer

from baton.bench.policies import DEFAULT_POLICIES, DEFAULT_WORKLOADS, Plan, print_cells
from baton.bench.policy_rows import Cell, ttft_of
from baton.bench.policy_traffic import NUM_WORKERS, Traffic, cluster_config, traffic
from control.config import load_config
from protocol.request import Request, SamplingParams, token_buffer
from router.policies import label, split_list
from simulator.routed_cluster import MODEL_ID, RoutedCluster
from simulator.routed_gateway import Served

ROOT = b"r" * 16


def make_cluster(policy: str, *, num_workers: int = NUM_WORKERS) -> RoutedCluster:
    return RoutedCluster(load_config(cluster_config(num_workers)), policy=policy)


def run(cluster: RoutedCluster, asked: Traffic) -> list[Served]:
    """All of them, finished."""
    requests = [
        Request(
            request_id=f"{i:032x}",
            model_id=MODEL_ID,
            prompt_token_ids=token_buffer(prompt),
            sampling=SamplingParams(max_tokens=asked.output_len, temperature=0.0),
            cache_root=ROOT,
            arrival_s=0.0,
        )
        for i, prompt in enumerate(asked.prompts())
    ]
    served = cluster.run(zip(asked.arrivals_s(), requests, strict=True))
    assert all(one.terminal == "finished" for one in served), [one for one in served if one.terminal != "finished"][:3]
    return served


def simulated_cell(policy: str, asked: Traffic, *, repeat: int = 0, num_workers: int = NUM_WORKERS) -> Cell:
    """A cell of `baton bench policies` as it would come out on an endlessly fast machine."""
    cluster = make_cluster(policy, num_workers=num_workers)
    ttft_s = [one.ttft_s for one in run(cluster, asked) if one.ttft_s is not None]
    cluster.router.check()
    return Cell(
        policy=policy,
        workload=asked.shape.name,
        repeat=repeat,
        num_requests=len(ttft_s),
        ttft=ttft_of(ttft_s),
        hit_share=1.0 - cluster.num_computed_tokens / (asked.input_len * len(ttft_s)),
        lag_p99_s=0.0,
        busy_share=0.0,
        own_share=0.0,
        decision_p50_s=None,
        invalid=(),
    )


def main(
    policies: str = DEFAULT_POLICIES,
    workloads: str = DEFAULT_WORKLOADS,
    repeats: int = 7,
    seconds: float = 20.0,
    workers: int = NUM_WORKERS,
    seed: int = 0,
) -> None:
    plan = Plan(
        policies=tuple(split_list(policies)),
        workloads=tuple(split_list(workloads)),
        num_repeats=repeats,
        seconds=seconds,
        num_workers=workers,
        seed=seed,
    )
    cells: list[Cell] = []
    for repeat, workload, policy in plan.cells():
        sys.stderr.write(f"{len(cells) + 1} of {plan.num_cells}: {workload}, {label(policy)}, repeat {repeat + 1}\n")
        asked = traffic(workload, seconds=seconds, seed=plan.seed_of(repeat), num_workers=workers)
        cells.append(simulated_cell(policy, asked, repeat=repeat, num_workers=workers))
    print_cells(cells)


if __name__ == "__main__":
    typer.run(main)
