"""A running cluster whose placement policy is switched between runs: from empty caches, with nothing learned and nothing under way.

`baton bench policies` and `baton replay --policies` measure in it; so does whoever holds a simulation against it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from random import Random

from baton.connection import Json, Server
from baton.operating import Operator
from protocol.errors import ServiceError

QUIET_TIMEOUT_S = 90.0
POLL_S = 0.1
STATUS_TIMEOUT_S = 5.0
LAG_S_MAX = 0.005  # p99 of how late requests leave us: beyond it arrivals are not those that were drawn


class SwitchedCluster:
    """Whoever switches it and looks at it. Used from a thread without an event loop."""

    def __init__(self, url: str, operator: Operator, *, api_key: str | None = None) -> None:
        self._operator = operator
        self._http = Server(url=url, api_key=api_key, timeout_s=STATUS_TIMEOUT_S)

    def check(self, policy: str) -> None:
        """
        Raises:
            ConfigError: the router cannot load it.
        """
        self._operator.use_policy(policy, forget=True)

    def prepare(self, policy: str) -> Json:
        """Place by `policy` as a cluster just started would; the status it begins with.

        Raises:
            ServiceError: blocks are held though nothing runs, or the router still believes in caches.
        """
        self.wait_quiet()
        self._operator.use_policy(policy, forget=True)
        deadline_s = time.monotonic() + QUIET_TIMEOUT_S
        while any(self._operator.reset_caches().values()) or (document := self.status())["router"]["detail"]["index"]["entries"]:
            if time.monotonic() > deadline_s:
                raise ServiceError(f"caches are not empty {QUIET_TIMEOUT_S:g} s after their reset")
            time.sleep(POLL_S)
        return document

    def wait_quiet(self) -> Json:
        """The status of the cluster once nothing waits, runs or is held.

        Raises:
            ServiceError: that takes longer than QUIET_TIMEOUT_S.
        """
        deadline_s = time.monotonic() + QUIET_TIMEOUT_S
        while not _is_quiet(document := self.status()):
            if time.monotonic() > deadline_s:
                raise ServiceError(f"requests are still under way {QUIET_TIMEOUT_S:g} s after the last was answered")
            time.sleep(POLL_S)
        return document

    def status(self) -> Json:
        """
        Raises:
            ServiceError: its router says nothing for QUIET_TIMEOUT_S.
        """
        deadline_s = time.monotonic() + QUIET_TIMEOUT_S
        while (document := self._http.get("/status"))["router"]["detail"] is None:
            if time.monotonic() > deadline_s:
                raise ServiceError(f"the router has not answered for {QUIET_TIMEOUT_S:g} s")
            time.sleep(POLL_S)
        return document


def turns(policies: Sequence[str], what: str) -> list[str]:
    """The policies in an order drawn anew for each `what`, such as a seed and a repeat."""
    order = list(policies)
    Random(f"turns {what}").shuffle(order)
    return order


def lag_complaint(lag_p99_s: float) -> str | None:
    """Why a run whose requests left so late says nothing; None where it does not."""
    if lag_p99_s <= LAG_S_MAX:
        return None
    return f"requests left late: p99 {lag_p99_s * 1e3:.1f} ms, the limit is {LAG_S_MAX * 1e3:g} ms"


def policy_complaints(policy: str, before: Json, after: Json) -> Iterator[str]:
    """Why what happened between two statuses says nothing of `policy`."""
    told = after["router"]["detail"]["policy"]
    if told["spec"] != policy:
        yield f"the router used {told['spec']} at the end: it was started anew"
    elif told["fallbacks"] > before["router"]["detail"]["policy"]["fallbacks"]:
        yield f"least_work decided in its place: {told['failures']} failures, {told['overruns']} overruns"
    if after["fallbacks"].get("least_work", 0) > before["fallbacks"].get("least_work", 0):
        yield "the gateway placed requests itself: the router did not answer in time"


def _is_quiet(document: Json) -> bool:
    for row in document["workers"]:
        queue, blocks = row["queue"], row["kv_blocks"]
        if queue is None or queue["waiting"] or queue["running"] or blocks["owned"] or blocks["leased"]:
            return False
    router = document["router"]["detail"]
    return not (router["bookings"] or router["stranded"] or any(queue["waiting"] for queue in router["queues"].values()))


__all__ = ["LAG_S_MAX", "POLL_S", "STATUS_TIMEOUT_S", "SwitchedCluster", "lag_complaint", "policy_complaints", "turns"]
