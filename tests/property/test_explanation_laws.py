"""Laws of what the router remembers, under any order of decisions and outcomes: bounded, by name, and each outcome of its own attempt."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.lifecycle import AttemptState
from protocol.messages import Assignment, Done, Place, Refused
from protocol.request import AttemptKey
from router.explanations import Explanations
from tests.unit.router.router_world import place

pytestmark = pytest.mark.pure

TENANTS = ("a", "b")
operations = st.lists(
    st.tuples(st.sampled_from(("place", "place", "refuse", "first", "first", "end")), st.integers(0, 4), st.integers(0, 1)),
    min_size=20,
    max_size=80,
)


def request(number: int, attempt: int) -> Place:
    return place(number, 16, attempt=attempt, tenant=TENANTS[number % 2], known_as=(f"job-{number % 3}",) if number % 4 else ())


def assigned(place: Place) -> Assignment:
    return Assignment(
        request_id=place.request_id, attempt=place.attempt, prefill_worker="p", decode_worker="d", cached_tokens=0, policy="x", reason="",
        prefill_scores=(), decode_scores=(), waited_s=0.0,
    )  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(operations, st.integers(0, 5))
def test_explanations_never_outlive_their_bound_and_outcomes_are_of_their_own_attempt(
    steps: list[tuple[str, int, int]], max_count: int
) -> None:
    """Against a list that keeps the newest. Each outcome carries the number of the step that told it, so that a foreign one shows.

    Seen to fail with the newest forgotten in place of the oldest, a record placed anew left where it was, a second first token taken, and
    an end told to a refusal.
    """
    kept = Explanations(max_count=max_count)
    naive: list[AttemptKey] = []
    placed: dict[AttemptKey, bool] = {}
    first: dict[AttemptKey, int] = {}
    ended: dict[AttemptKey, int] = {}
    for step, (operation, number, attempt) in enumerate(steps):
        mentioned = request(number, attempt)
        key = AttemptKey(request_id=mentioned.request_id, attempt=attempt)
        if operation in ("place", "refuse"):
            naive = [k for k in naive if k != key] + [key]
            naive = naive[len(naive) - min(len(naive), max_count) :]
            first.pop(key, None)
            ended.pop(key, None)
            placed[key] = operation == "place"
            if placed[key]:
                kept.placed(mentioned, assigned(mentioned), float(step))
            else:
                refusal = Refused(request_id=key.request_id, attempt=attempt, status=429, message="", retry_after_s=None)
                kept.refused(mentioned, refusal, float(step))
        elif operation == "first":
            kept.first_token(key, float(step), found_tokens=step)
            if key in naive and placed[key] and key not in ended:
                first.setdefault(key, step)
        else:
            kept.ended(Done(request_id=key.request_id, attempt=attempt, num_output_tokens=step, state=AttemptState.LOST), float(step))
            if key in naive and placed[key]:
                ended.setdefault(key, step)
        kept.check()
        assert [record.key for record in kept] == naive
        for record in kept:
            assert (record.found_tokens, record.num_output_tokens) == (first.get(record.key), ended.get(record.key))
    for number in range(5):
        for tenant in (None, *TENANTS):
            of_tenant = [k for k in naive if tenant is None or TENANTS[int(k.request_id, 16) % 2] == tenant]
            by_id = [k for k in of_tenant if k.request_id == request(number, 0).request_id]
            assert [r.key for r in kept.find(request(number, 0).request_id, tenant)] == by_id
            by_name = [k for k in of_tenant if request(int(k.request_id, 16), 0).known_as == (f"job-{number}",)]
            assert [r.key for r in kept.find(f"job-{number}", tenant)] == by_name
    assert kept.newest(2) == list(kept)[-2:]
