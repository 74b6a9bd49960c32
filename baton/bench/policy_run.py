"""One paced cluster in which policies take turns: switch, empty caches, wait until nothing moves, send, and look at what it took."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from baton.bench.load import Endpoint, LoadRun, drive
from baton.bench.policy_rows import Cell, ttft_of
from baton.bench.policy_traffic import Traffic, cluster_config
from baton.bench.processor_time import ProcessorTime, processor_time
from baton.bench.serve import latencies_s
from baton.bench.servers import SERVED_NAME, ServerProcess, configured_server
from baton.bench.switched import POLL_S, STATUS_TIMEOUT_S, SwitchedCluster, lag_complaint, policy_complaints
from baton.connection import Json
from baton.operating import Operator
from control.run_files import read_run_files
from protocol.errors import ServiceError

NICENESS = 5  # of the cluster, so that arrivals are on time
BUSY_SHARE_MAX = 0.9  # of this machine's cores: beyond it processes wait for each other and not for the modelled workers


class PolicyCluster:
    """A running cluster and whoever switches it. Used from a thread without an event loop."""

    def __init__(self, server: ServerProcess, operator: Operator) -> None:
        self._process = server
        self._endpoint = Endpoint(url=server.command.url, model=SERVED_NAME)
        self._switched = SwitchedCluster(server.command.url, operator)

    def check(self, policy: str) -> None:
        """
        Raises:
            ConfigError: the router cannot load it.
        """
        self._switched.check(policy)

    def warm_up(self, workload: Traffic) -> None:
        """What processes do only for their first requests is over before anything is measured."""
        drive(self._endpoint, workload)

    def run(self, policy: str, workload: Traffic, *, repeat: int, on_progress: Callable[[LoadRun], None] | None = None) -> Cell:
        """One cell: this policy under this workload, from empty caches and with nothing learned."""
        before, began = self._switched.prepare(policy), processor_time([self._process.session])
        run = drive(self._endpoint, workload, on_progress=on_progress)
        ended = processor_time([self._process.session])
        after = self._switched.wait_quiet()
        return _cell(policy, workload, repeat, run, before, after, _Busy.between(began, ended))


@contextmanager
def policy_cluster(folder: Path, *, num_workers: int) -> Iterator[PolicyCluster]:
    """Pools of `num_workers` each, gone at the end. folder: new, for its log and its files."""
    command = configured_server(cluster_config(num_workers), folder, niceness=NICENESS)
    with ServerProcess(command, log=folder / "server.log") as server:
        server.wait_ready()
        yield PolicyCluster(server, operator_of(folder))


def operator_of(folder: Path) -> Operator:
    """Of the server that keeps its run file below `folder`, which is written a moment after the endpoint answers.

    Raises:
        ServiceError: there is none.
    """
    deadline_s = time.monotonic() + STATUS_TIMEOUT_S
    while not (runs := read_run_files({"XDG_RUNTIME_DIR": str(folder)})):
        if time.monotonic() > deadline_s:
            raise ServiceError(f"the server answers and wrote no run file below {folder}")
        time.sleep(POLL_S)
    return Operator.of(runs[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Busy:
    """Shares of this machine's cores."""

    of_all: float
    own: float  # by the cluster and us

    @classmethod
    def between(cls, began: ProcessorTime, ended: ProcessorTime) -> _Busy:
        core_s = (ended.wall_s - began.wall_s) * len(os.sched_getaffinity(0))
        return cls(of_all=(ended.busy_s - began.busy_s) / core_s, own=(ended.own_s - began.own_s) / core_s)


def _cell(policy: str, workload: Traffic, repeat: int, run: LoadRun, before: Json, after: Json, busy: _Busy) -> Cell:
    asked = sum(r.num_prompt_tokens for r in run.well)
    return Cell(
        policy=policy,
        workload=workload.shape.name,
        repeat=repeat,
        num_requests=len(run.requests),
        ttft=ttft_of(latencies_s((r.timeline for r in run.well), "ttft")),
        hit_share=1.0 - (_computed(after) - _computed(before)) / asked if asked else 0.0,
        lag_p99_s=run.lag_p99_s,
        busy_share=busy.of_all,
        own_share=busy.own,
        decision_p50_s=after["router"]["detail"]["decision_time"].get("p50_s"),
        invalid=tuple(_reasons(policy, run, before, after, busy_share=busy.of_all)),
    )


def _reasons(policy: str, run: LoadRun, before: Json, after: Json, *, busy_share: float) -> Iterator[str]:
    """Why a cell says nothing of its policy."""
    failed = [r for r in run.requests if r.error is not None]
    if failed:
        yield f"{len(failed)} of {len(run.requests)} requests failed, the first: {failed[0].error_text}"
    if (late := lag_complaint(run.lag_p99_s)) is not None:
        yield late
    if busy_share > BUSY_SHARE_MAX:
        yield f"the machine was busy for {busy_share:.0%}, the limit is {BUSY_SHARE_MAX:.0%}"
    yield from policy_complaints(policy, before, after)


def _computed(document: Json) -> int:
    """Prompt tokens, of all workers so far."""
    return sum(int(row["counters"].get("prompt_tokens_computed", 0)) for row in document["workers"])


__all__ = ["PolicyCluster", "operator_of", "policy_cluster"]
