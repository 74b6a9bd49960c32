"""One paced cluster in which policies take turns: switch, empty caches, wait until nothing moves, send, and look at what it took."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.bench.load import Endpoint, LoadRun, drive
from baton.bench.policy_rows import Cell, ttft_of
from baton.bench.policy_traffic import Traffic, cluster_config
from baton.bench.processor_time import ProcessorTime, processor_time
from baton.bench.report import percentile
from baton.bench.serve import latencies_s
from baton.bench.servers import SERVED_NAME, ServerProcess, configured_server
from baton.connection import Json, Server
from baton.operating import Operator
from control.run_files import read_run_files
from protocol.errors import ServiceError

QUIET_TIMEOUT_S = 90.0
POLL_S = 0.1
STATUS_TIMEOUT_S = 5.0
NICENESS = 5  # of the cluster, so that arrivals are on time
LAG_S_MAX = 0.005  # p99 of how late requests leave us: beyond it arrivals are not those that were drawn
BUSY_SHARE_MAX = 0.9  # of this machine's cores: beyond it processes wait for each other and not for the modelled workers


class PolicyCluster:
    """A running cluster and whoever switches it. Used from a thread without an event loop."""

    def __init__(self, server: ServerProcess, operator: Operator) -> None:
        self._process = server
        self._operator = operator
        self._http = Server(url=server.command.url, api_key=None, timeout_s=STATUS_TIMEOUT_S)

    def check(self, policy: str) -> None:
        """
        Raises:
            ConfigError: the router cannot load it.
        """
        self._operator.use_policy(policy, forget=True)

    def warm_up(self, workload: Traffic) -> None:
        """What processes do only for their first requests is over before anything is measured."""
        drive(Endpoint(url=self._http.url, model=SERVED_NAME), workload)

    def run(self, policy: str, workload: Traffic, *, repeat: int, on_progress: Callable[[LoadRun], None] | None = None) -> Cell:
        """One cell: this policy under this workload, from empty caches and with nothing learned."""
        self._prepare(policy)
        before, began = self._status(), processor_time([self._process.session])
        endpoint = Endpoint(url=self._http.url, model=SERVED_NAME)
        run = drive(endpoint, workload, on_progress=on_progress)
        ended = processor_time([self._process.session])
        after = self._wait_quiet()
        return _cell(policy, workload, repeat, run, before, after, _Busy.between(began, ended))

    def _prepare(self, policy: str) -> None:
        """
        Raises:
            ServiceError: blocks are held though nothing runs, or the router still believes in caches.
        """
        self._wait_quiet()
        self._operator.use_policy(policy, forget=True)
        deadline_s = time.monotonic() + QUIET_TIMEOUT_S
        while any(self._operator.reset_caches().values()) or self._status()["router"]["detail"]["index"]["entries"]:
            if time.monotonic() > deadline_s:
                raise ServiceError(f"caches are not empty {QUIET_TIMEOUT_S:g} s after their reset")
            time.sleep(POLL_S)

    def _wait_quiet(self) -> Json:
        """The status of the cluster once nothing waits, runs or is held.

        Raises:
            ServiceError: that takes longer than QUIET_TIMEOUT_S.
        """
        deadline_s = time.monotonic() + QUIET_TIMEOUT_S
        while not _is_quiet(document := self._status()):
            if time.monotonic() > deadline_s:
                raise ServiceError(f"requests are still under way {QUIET_TIMEOUT_S:g} s after the last was answered")
            time.sleep(POLL_S)
        return document

    def _status(self) -> Json:
        deadline_s = time.monotonic() + QUIET_TIMEOUT_S
        while (document := self._http.get("/status"))["router"]["detail"] is None:
            if time.monotonic() > deadline_s:
                raise ServiceError(f"the router has not answered for {QUIET_TIMEOUT_S:g} s")
            time.sleep(POLL_S)
        return document


@contextmanager
def policy_cluster(folder: Path, *, num_workers: int) -> Iterator[PolicyCluster]:
    """Pools of `num_workers` each, gone at the end. folder: new, for its log and its files."""
    command = configured_server(cluster_config(num_workers), folder, niceness=NICENESS)
    with ServerProcess(command, log=folder / "server.log") as server:
        server.wait_ready()
        yield PolicyCluster(server, _operator(folder))


def _operator(folder: Path) -> Operator:
    """The run file is written a moment after the endpoint answers."""
    deadline_s = time.monotonic() + STATUS_TIMEOUT_S
    while not (runs := read_run_files({"XDG_RUNTIME_DIR": str(folder)})):
        if time.monotonic() > deadline_s:
            raise ServiceError(f"the server answers and wrote no run file below {folder}")
        time.sleep(POLL_S)
    return Operator.of(runs[0])


def _is_quiet(document: Json) -> bool:
    for row in document["workers"]:
        queue, blocks = row["queue"], row["kv_blocks"]
        if queue is None or queue["waiting"] or queue["running"] or blocks["owned"] or blocks["leased"]:
            return False
    router = document["router"]["detail"]
    return not (router["bookings"] or router["stranded"] or any(queue["waiting"] for queue in router["queues"].values()))


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
    # Of the first of each burst: siblings leave one after the other, as fast as one client can write them.
    lag_s = percentile(run.lateness_s[:: workload.shape.burst_size], 0.99)
    detail = after["router"]["detail"]
    return Cell(
        policy=policy,
        workload=workload.shape.name,
        repeat=repeat,
        num_requests=len(run.requests),
        ttft=ttft_of(latencies_s((r.timeline for r in run.well), "ttft")),
        hit_share=1.0 - (_computed(after) - _computed(before)) / asked if asked else 0.0,
        lag_p99_s=lag_s,
        busy_share=busy.of_all,
        own_share=busy.own,
        decision_p50_s=detail["decision_time"].get("p50_s"),
        invalid=tuple(_reasons(policy, run, before, after, lag_s=lag_s, busy_share=busy.of_all)),
    )


def _reasons(policy: str, run: LoadRun, before: Json, after: Json, *, lag_s: float, busy_share: float) -> Iterator[str]:
    """Why a cell says nothing of its policy."""
    failed = [r for r in run.requests if r.error is not None]
    if failed:
        yield f"{len(failed)} of {len(run.requests)} requests failed, the first: {failed[0].error_text}"
    if lag_s > LAG_S_MAX:
        yield f"requests left late: p99 {lag_s * 1e3:.1f} ms, the limit is {LAG_S_MAX * 1e3:g} ms"
    if busy_share > BUSY_SHARE_MAX:
        yield f"the machine was busy for {busy_share:.0%}, the limit is {BUSY_SHARE_MAX:.0%}"
    told: dict[str, Any] = after["router"]["detail"]["policy"]
    if told["spec"] != policy:
        yield f"the router used {told['spec']} at the end: it was started anew"
    elif told["fallbacks"] > (before["router"]["detail"]["policy"]["fallbacks"]):
        yield f"least_work decided in its place: {told['failures']} failures, {told['overruns']} overruns"
    if after["fallbacks"].get("least_work", 0) > before["fallbacks"].get("least_work", 0):
        yield "the gateway placed requests itself: the router did not answer in time"


def _computed(document: Json) -> int:
    """Prompt tokens, of all workers so far."""
    return sum(int(row["counters"].get("prompt_tokens_computed", 0)) for row in document["workers"])


__all__ = ["PolicyCluster", "policy_cluster"]
