"""The abort campaign as a whole: rounds inside this process, episodes with processes that are killed; what it prints."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from baton.bench.report import Row, Target
from tests.kv_campaign.abort_gateway import DEADLINE_S
from tests.kv_campaign.aborts_inside import SLACK_S, Act, Phase, Report, run_inside
from tests.kv_campaign.aborts_processes import ProcessReport, run_processes

TRANSPORTS = ("shm", "tcp")
_ROUNDS_A_WORLD = 90  # then its workers are closed, and what they leave behind is looked at


def run(total: int, seed: int, *, on_progress: Callable[[int], None] = lambda done: None) -> tuple[list[Row], dict[str, object]]:
    """One in ten is an episode with a kill or a stop, which strikes six hand-offs at once. Raises AssertionError where a law is broken."""
    logging.disable(logging.CRITICAL)  # workers tell of every gateway that was lost
    num_episodes = total // 10
    inside, processes = Report(), ProcessReport()
    done = 0
    for index, transport in enumerate(TRANSPORTS):
        left = _share(total - num_episodes, index)
        while left:
            now = min(left, _ROUNDS_A_WORLD)
            run_inside(now, seed + done, transport, inside, offer_early=done // _ROUNDS_A_WORLD % 2 == 0)
            left -= now
            done += now
            on_progress(done)
        for turn, offer_early in enumerate((True, False)):
            now = (_share(num_episodes, index) + 1 - turn) // 2
            run_processes(now, seed + done, transport, processes, offer_early=offer_early)
            done += now
            on_progress(done)
    logging.disable(logging.NOTSET)
    return _rows(inside, processes), _sections(inside, processes)


def _share(total: int, index: int) -> int:
    return total // len(TRANSPORTS) + (index < total % len(TRANSPORTS))


def _rows(inside: Report, processes: ProcessReport) -> list[Row]:
    limit_ms = 1000 * (DEADLINE_S + SLACK_S)
    kills = sum(n for blow, n in processes.episodes.items() if blow.kills)
    fresh = processes.fresh_handoffs
    left_over = inside.left_over + processes.left_over
    return [
        Row(name="aborts/rounds", value=sum(inside.rounds.values()), unit="hand-offs"),
        Row(name="aborts/kills", value=kills, unit="processes"),
        Row(name="aborts/stops", value=sum(processes.episodes.values()) - kills, unit="processes"),
        Row(name="aborts/struck", value=sum(processes.struck.values()), unit="hand-offs"),
        Row(name="aborts/completed", value=inside.completed + processes.completed, unit="requests"),
        Row(name="aborts/good_pulls", value=inside.good_pulls + processes.good_pulls, unit="pulls"),
        _none("aborts/leaked_blocks", inside.held_blocks + processes.held_blocks, "blocks"),
        _none("aborts/wrong_blocks", inside.wrong_blocks + processes.wrong_blocks, "blocks"),
        _none("aborts/left_over", len(left_over), "things", {"things": left_over}),
        Row(
            name="aborts/slowest_pull",
            value=max(inside.slowest_pull_ms, processes.slowest_pull_ms),
            unit="ms",
            target=Target(relation="<=", bound=limit_ms),
            details={"deadline_ms": 1000 * DEADLINE_S},
        ),
        Row(
            name="aborts/slowest_recovery",
            value=round(processes.slowest_recovery_s, 3),
            unit="s",
            details={"from": "the new process registers", "to": "two hand-offs with it have ended"},
        ),
        Row(
            name="aborts/next_handoffs",
            value=fresh[True] / fresh.total() if fresh else None,
            unit="share",
            target=Target(relation=">=", bound=1),
            details={
                "count": fresh[True],
                "of": fresh.total(),
                "what": "by KV over the same path, right after a kill or a stop of one side",
            },
        ),
    ]


def _none(name: str, count: int, unit: str, details: dict[str, object] | None = None) -> Row:
    return Row(name=name, value=count, unit=unit, target=Target(relation="<=", bound=0), details=details or {})


def _sections(inside: Report, processes: ProcessReport) -> dict[str, object]:
    return {
        "rounds": [
            {"act": act.value, "state": phase.value, "count": inside.rounds[act, phase]}
            for act in Act
            for phase in Phase
            if inside.rounds[act, phase]
        ],
        "struck": [
            {"blow": blow.value, "state": state, "count": count}
            for (blow, state), count in sorted(processes.struck.items(), key=lambda item: (item[0][0].value, item[0][1]))
        ],
        "episodes": {blow.value: count for blow, count in processes.episodes.items()},
        "transfer_errors": dict(Counter(inside.errors) + Counter(processes.errors)),
        "old_offers_refused": dict(processes.old_offers),
        "leases_expired": inside.leases_expired,
    }
