"""Tokens do not depend on how a worker schedules: batch, chunk, preemption, steps in flight, hand-off, cache, cancelled neighbours.

How: the same requests through cores of any shape on a virtual clock; each result is compared with the undisturbed run that other
code computes one token after the other, and the conservation law is asserted after every event.
Seen to fail with num_hit_tokens_max one larger, with the fork at the leader's own length, and without the copy of a shared block
(tests/simulation/test_sim_faults.py plants further bugs).
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.request import FinishReason, Request, token_buffer
from protocol.worker import Role
from tests.sim_cluster import EOS, VOCAB, SimCluster, cached_names, make_request, undisturbed

pytestmark = pytest.mark.pure

SHARED = [(7 * i) % (VOCAB - 3) + 3 for i in range(48)]


@st.composite
def requests(draw: st.DrawFn, *, may_stop: bool = True) -> list[Request]:
    made = []
    for number in range(draw(st.integers(1, 7))):
        prompt = SHARED[: draw(st.sampled_from([0, 15, 16, 17, 32, 48]))] + draw(
            st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=40)
        )
        sampling: dict[str, Any] = {
            "n": draw(st.sampled_from([1, 1, 2, 3])),
            "temperature": draw(st.sampled_from([0.0, 1.0])),
            "seed": draw(st.integers(0, 3)),
            "max_tokens": draw(st.integers(1, 25)),
        }
        if may_stop:
            sampling |= {"eos_token_ids": (EOS,), "min_tokens": draw(st.sampled_from([0, 4])), "ignore_eos": draw(st.booleans())}
        made.append(make_request(number, prompt, priority=draw(st.integers(0, 1)), **sampling))
    return made


SHAPES = st.fixed_dictionaries(
    {
        "num_blocks": st.sampled_from([9, 16, 64]),
        "block_size": st.sampled_from([16, 32]),
        "max_num_batched_tokens": st.sampled_from([1, 5, 16, 100]),
        "max_num_seqs": st.integers(3, 8),
        "max_inflight_steps": st.sampled_from([1, 2]),
        "enable_prefix_caching": st.booleans(),
        "force_preempt_every": st.sampled_from([0, 2, 5]),
        "step_time_budget_s": st.sampled_from([None, 0.012]),
    }
)
ROLES = st.sampled_from([{"b0": Role.BOTH}, {"p0": Role.PREFILL, "d0": Role.DECODE}, {"b0": Role.BOTH, "b1": Role.BOTH}])


@settings(max_examples=120, deadline=None)
@given(
    requests=requests(),
    shape=SHAPES,
    roles=ROLES,
    seed=st.integers(0, 99),
    cancelled=st.sets(st.integers(0, 6), max_size=2),
    spacing_s=st.sampled_from([0.003, 0.2]),
)
def test_tokens_do_not_depend_on_scheduling(
    requests: list[Request], shape: dict[str, Any], roles: dict[str, Role], seed: int, cancelled: set[int], spacing_s: float
) -> None:
    cluster = SimCluster(roles, seed=seed, eos_period=7, **shape)
    for number in cancelled & set(range(len(requests))):
        when_s = spacing_s * number + 0.02 + 0.01 * number
        cluster.loop.call_at(when_s, lambda number=number: cluster.gateway.cancel(requests[number].request_id))  # type: ignore[misc]
    cluster.run(requests, spacing_s=spacing_s)
    cluster.judge()
    cluster.rest()
    for worker in cluster.workers.values():
        assert cached_names(worker) == set(worker.core.kv_snapshot().hashes)


@settings(max_examples=60, deadline=None)
@given(request=requests(), shape=SHAPES, roles=ROLES, cut=st.integers(0, 12), data=st.data())
def test_a_retry_goes_on_from_what_was_delivered(
    request: list[Request], shape: dict[str, Any], roles: dict[str, Role], cut: int, data: st.DataObject
) -> None:
    """A later attempt with any prefix delivered, different for each choice, ends as the undisturbed run does."""
    (wanted, *_) = request
    tokens, ends = undisturbed(wanted, eos_period=7)
    delivered = [t[: data.draw(st.integers(0, min(cut, len(t))))] for t in tokens]
    finished = [len(d) == len(t) for d, t in zip(delivered, tokens, strict=True)]
    cluster = SimCluster(roles, eos_period=7, **shape)
    cluster.gateway.submit(wanted)
    ledger = cluster.gateway.ledgers[wanted.request_id]
    ledger.tokens = [token_buffer(d) for d in delivered]
    ledger.finish = [end if done else None for end, done in zip(ends, finished, strict=True)]
    if all(finished):
        return
    cluster.loop._timers.clear()
    cluster.gateway._begin(ledger)
    for worker in cluster.workers.values():
        worker._tick()
    assert cluster.loop.run(lambda: cluster.gateway.is_done, deadline_s=600.0)
    cluster.judge()
    cluster.rest()


@settings(max_examples=60, deadline=None)
@given(requests=requests(may_stop=False), shape=SHAPES, seed=st.integers(0, 99), split=st.booleans())
def test_leaping_and_stepping_give_the_same_ledgers(requests: list[Request], shape: dict[str, Any], seed: int, split: bool) -> None:
    """One plan for many equal steps, or one for each. Seen to fail with leapt tokens not counted as computed."""
    roles = {"p0": Role.PREFILL, "d0": Role.DECODE} if split else {"b0": Role.BOTH}
    shape = shape | {"max_inflight_steps": 1, "force_preempt_every": 0}
    journals, steps = [], []
    for leap in (1, 1000):
        cluster = SimCluster(roles, seed=seed, max_leap_steps=leap, **shape)
        cluster.run(requests)
        cluster.judge()
        cluster.rest()
        journals.append({k: ledger.journal() for k, ledger in cluster.gateway.ledgers.items()})
        steps.append([(c.worker.worker_id, c.worker.core.snapshot(0.0).counters["generated_tokens"]) for c in cluster.checkers])
    assert journals[0] == journals[1] and steps[0] == steps[1]


def test_leaps_are_taken() -> None:
    """Else the property above would compare stepping with stepping. A long decode takes few events."""
    cluster = SimCluster({"b0": Role.BOTH}, max_leap_steps=1000)
    plans = []
    worker = cluster.workers["b0"]
    submit = worker.executor.submit
    worker.executor.submit = lambda plan: (plans.append(plan), submit(plan))[1]  # type: ignore[method-assign, func-returns-value]
    cluster.run([make_request(1, SHARED, max_tokens=300, n=2)])
    cluster.judge()
    assert cluster.counters("b0")["steps"] == 301 and len(plans) < 80, len(plans)  # the loop's 50 ms tick ends a leap


def test_finish_reasons_are_covered() -> None:
    """Both ends occur in the examples' range."""
    ends = {undisturbed(make_request(1, [n], eos_token_ids=(EOS,), max_tokens=12), eos_period=7)[1][0] for n in range(3, 40)}
    assert ends == {FinishReason.STOP, FinishReason.LENGTH}
