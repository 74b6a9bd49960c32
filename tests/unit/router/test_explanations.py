"""What the router remembers of a decision, and what it learns when the worker says how it came out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from protocol.lifecycle import AttemptState
from protocol.messages import Done, HandoffDone
from protocol.worker import BlocksStored, Role
from router.events import FromGateway
from router.explanations import answer
from router.hindsight import NUM_OVERLAPS, WARNING_INTERVAL_S, Overlap, OverlapWatch, overlap
from router.policies import load
from tests.unit.router.router_world import World, address, chain, place, pools

pytestmark = pytest.mark.pure


def whole(world: World, number: int, *, found_tokens: int = 0, took_s: float = 0.1, prompt: tuple[bytes, ...] | None = None) -> None:
    """One request from placement to end."""
    request = place(number) if prompt is None else place(number, block_hashes=prompt)
    world.assign(request)
    world.now += took_s
    world.prefill_done(request, found_tokens=found_tokens)
    world.done(request, num_output_tokens=5)


def test_a_decision_is_told_with_its_prediction_and_how_it_came_out() -> None:
    """How: one request through a core, then the document. Seen to fail with `ttft_s` counted from the booking (waited_s left out)."""
    world = World(pools(1, 1), inbox_steps=0.1)
    other, request = place(1, 4096), place(2)
    world.assign(other)
    assert world.place(request) is None, "it waits for room"
    world.now += 0.5
    world.prefill_done(other)
    world.now += 0.25
    world.prefill_done(request, found_tokens=48)
    world.now += 1.0
    handoff = HandoffDone(request_id=request.request_id, attempt=0, size_bytes=4096, duration_s=0.01, path="shm")
    done = Done(request_id=request.request_id, attempt=0, num_output_tokens=9, state=AttemptState.CANCELLED, handoff=handoff)
    world.on(FromGateway(gateway="gateway-0", message=done))

    (found,) = json.loads(json.dumps(answer(world.core.explanations, request.request_id, None, world.now, by="router")))["attempts"]
    assert found["assignment"]["waited_s"] == 0.5 and found["assignment"]["prefill_worker"] == "prefill-0"
    assert found["assignment"]["prefill_scores"][0]["terms"].keys() >= {"queue", "prefill"}
    assert found["outcome"]["ttft_s"] == 0.75 and found["outcome"]["first_token_s"] == 0.25 and found["outcome"]["found_tokens"] == 48
    assert (found["outcome"]["state"], found["outcome"]["output_tokens"], found["outcome"]["duration_s"]) == ("cancelled", 9, 1.25)
    assert (found["outcome"]["handoff_path"], found["outcome"]["handoff_s"]) == ("shm", 0.01)
    assert (found["age_s"], found["by"]) == (1.25, "router")


@pytest.mark.parametrize("policy", ["round_robin", "least_work", "prefix_cost"])
def test_every_policy_predicts_queue_and_prefill_from_the_cost_model(policy: str) -> None:
    """Whatever the policy's own prices mean. How: by hand from the worker's fitted seconds. Seen to fail with queued_prefill_s left out."""
    world = World(pools(1, 1), policy=load(policy), disaggregate="always")
    first, second = (world.assign(place(n)) for n in (1, 2))
    cost = world.core.fleet.get("prefill-0").cost  # type: ignore[union-attr]
    alone_s = cost.prefill_s(512, 512)
    assert first.predicted_ttft_s == pytest.approx(alone_s)
    assert second.predicted_ttft_s == pytest.approx(2 * alone_s)
    assert first.predicted_handoff_s == pytest.approx(world.config.transfer_s_base + 512 * world.config.transfer_s_per_token)


def test_prediction_counts_what_is_cached_and_a_local_one_has_no_handoff() -> None:
    """How: a decode worker that holds the prompt. Seen to fail with the handoff priced for local placements."""
    world = World(pools(1, 1))
    request = place(1)
    world.hold("decode-0", request.block_hashes)
    found = world.assign(request)
    cost = world.core.fleet.get("decode-0").cost  # type: ignore[union-attr]
    assert found.prefill_worker == found.decode_worker == "decode-0"
    assert (found.cached_tokens, found.confirmed_tokens) == (511, 511)
    assert found.predicted_ttft_s == pytest.approx(cost.prefill_s(1, 512)) and found.predicted_handoff_s == 0.0


def test_predictions_are_judged_by_what_came() -> None:
    """How: first tokens at 1, 2 .. 10 times the prediction. Seen to fail with predicted over actual."""
    world = World(pools(1, 1), disaggregate="always")
    for number in range(1, 11):
        request = place(number)
        found = world.assign(request)
        assert found.predicted_ttft_s is not None
        world.now += number * found.predicted_ttft_s
        world.prefill_done(request)
        world.done(request)
    told = world.core.status(world.now)["ttft_prediction"]
    assert told == {"count": 10, "actual_over_predicted": {"p50": pytest.approx(6.0), "p90": pytest.approx(10.0)}}


def test_a_request_is_found_by_every_name_it_is_known_as_and_by_its_tenant_only() -> None:
    """How: two requests share a client's id. Seen to fail with `find` that looks at request ids, and with one that ignores the tenant."""
    world = World(pools(1, 1))
    mine, yours = place(1, tenant="a", known_as=("job",)), place(2, tenant="b", known_as=("job",))
    for request in (mine, yours):
        world.assign(request)
    world.assign(replace(mine, attempt=1))
    assert [(r.key.request_id, r.key.attempt) for r in world.core.explain("job", "a")] == [(mine.request_id, 0), (mine.request_id, 1)]
    assert len(world.core.explain("job")) == 3 and len(world.core.explain(yours.request_id, "b")) == 1
    assert world.core.explain(yours.request_id, "a") == () and world.core.explain("nobody") == ()


def test_the_oldest_explanation_goes_first_and_takes_its_names_with_it() -> None:
    """Seen to fail with `_named` left as it was in `_forget`."""
    world = World(pools(1, 1), num_explained=3)
    for number in range(5):
        world.assign(place(number, known_as=(f"job-{number}",)))
    world.core.check()
    assert [world.core.explain(f"job-{n}") != () for n in range(5)] == [False, False, True, True, True]
    kept = answer(world.core.explanations, "job-0", None, world.now, by="router")
    assert kept == {"attempts": [], "left_out": 0, "kept": 3, "limit": 3}


def test_nothing_is_kept_where_nothing_is_to_be_kept() -> None:
    world = World(pools(1, 1), num_explained=0)
    whole(world, 1)
    assert len(world.core.explanations) == 0 and world.core.status(world.now)["ttft_prediction"]["count"] == 1  # type: ignore[index]


def test_refusals_are_remembered_with_their_reason() -> None:
    """413 at the door, 503 after the wait. Seen to fail without `refused` in `_refuse`."""
    world = World([address("both-0", Role.BOTH, max_model_len=1024)], no_worker_wait_s=0.1)
    world.place(place(1, 4096))
    world.place(place(2, model_id="other"))
    world.tick(0.2)
    refusals = [world.core.explain(place(n).request_id)[0].decision for n in (1, 2)]
    assert [r.status for r in refusals] == [413, 503]  # type: ignore[union-attr]
    (told,) = answer(world.core.explanations, place(1).request_id, None, world.now, by="router")["attempts"]  # type: ignore[misc]
    assert told["refusal"]["message"].startswith("prompt of 4,096 tokens") and told["assignment"] is told["outcome"] is None


def test_a_fallback_is_told_as_the_policy_that_decided_and_the_one_that_did_not() -> None:
    """Seen to fail with the reason as placement gives it."""
    world = World(pools(1, 1), policy=load("tests.unit.router.test_router_policies:Constant:trouble=nan"), disaggregate="always")
    found = world.assign(place(1))
    assert (found.policy, found.reason.partition("; ")[2]) == ("least_work", "prefix_cost failed or was too slow")


def test_an_outcome_belongs_to_its_attempt_and_the_first_word_counts() -> None:
    """How: a second PrefillDone, one of another attempt, one after the end. Seen to fail without the check for an earlier word."""
    world = World(pools(1, 1))
    request = place(1)
    world.assign(request)
    world.now += 0.1
    world.prefill_done(replace(request, attempt=1), found_tokens=16)
    (record,) = world.core.explain(request.request_id)
    assert record.first_token_s is None
    world.prefill_done(request, found_tokens=32)
    world.now += 0.1
    world.prefill_done(request, found_tokens=64)
    world.done(request, num_output_tokens=7)
    world.done(request, num_output_tokens=99)
    assert (record.first_token_s, record.found_tokens, record.num_output_tokens) == (pytest.approx(0.1), 32, 7)
    assert world.core.status(world.now)["ttft_prediction"]["count"] == 1  # type: ignore[index]


def test_a_first_token_of_workers_the_router_did_not_choose_is_no_outcome() -> None:
    """A gateway that placed by itself says so by None. Seen to fail with None taken for 0 found tokens."""
    world = World(pools(1, 1))
    prompt = place(1).block_hashes
    world.hold("prefill-0", prompt)
    request = place(2, block_hashes=prompt)
    world.assign(request)
    world.prefill_done(request, found_tokens=None)
    (record,) = world.core.explain(request.request_id)
    assert record.first_token_s is None and not world.core.overlap.counts


# --- overlap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "found", "of", "verdict"),
    [
        (63, 0, 100, None),  # too little to say
        (64, 0, 640, Overlap.NONE),
        (64, 0, 641, None),  # less than a tenth
        (64, 31, 64, Overlap.SHORT),
        (64, 32, 64, Overlap.FOUND),
        (64, 640, 640, Overlap.FOUND),
    ],
)
def test_overlap_is_judged_by_what_was_expected(expected: int, found: int, of: int, verdict: Overlap | None) -> None:
    """Around each border. Seen to fail with `>` for `>=` in the half."""
    assert overlap(expected, found, of) is verdict


def test_a_worker_that_finds_nothing_of_a_confirmed_prefix_is_said_aloud_once_an_interval() -> None:
    """How: prefill-0 has told of a prefix and finds nothing of it, 20 times in 20 s. Seen to fail without `_warned_s`, and with
    a note that does not look at the time."""
    world = World(pools(1, 1), disaggregate="always")
    prompt = chain("shared", 32)
    world.hold("prefill-0", prompt)
    warnings = []
    for number in range(20):
        whole(world, number, prompt=prompt, took_s=1.0)
        warning = world.core.overlap.take_warning(world.now)
        warnings += [] if warning is None else [(number, warning)]
    assert [number for number, _ in warnings] == [0, int(WARNING_INTERVAL_S)]
    last = warnings[-1][1]
    assert (last.worker_id, last.expected_tokens, last.confirmed_tokens, last.found_tokens) == ("prefill-0", 511, 511, 0)
    assert last.num_missed == WARNING_INTERVAL_S
    document = world.core.status(world.now)
    assert document["overlap"] == {
        "expected": {"found": 0, "short": 0, "none": 20},
        "confirmed": {"found": 0, "short": 0, "none": 20},
    }
    (note,) = world.core.notes(world.now)
    assert "20 of the last 20 prompts" in note and "(100%), 20 of them on prefill-0" in note
    world.now += 61.0
    assert world.core.notes(world.now) == [], "it is over"


def test_what_is_found_is_no_reason_to_speak() -> None:
    world = World(pools(1, 1), disaggregate="always")
    prompt = chain("shared", 32)
    world.kv_events("prefill-0", BlocksStored(number=1, parent=b"", hashes=prompt))
    for number in range(20):
        whole(world, number, prompt=prompt, found_tokens=480)
    assert world.core.overlap.take_warning(world.now) is None and world.core.notes(world.now) == []
    assert world.core.overlap.counts["confirmed", Overlap.FOUND] == 20


def test_a_guess_that_fails_is_not_counted_as_the_workers_word() -> None:
    """How: a sibling is expected to find what the first booking will compute. Seen to fail with confirmed_tokens = cached_tokens."""
    world = World(pools(1, 1), disaggregate="always")
    prompt = chain("shared", 32)
    world.assign(place(1, block_hashes=prompt))
    found = world.assign(place(2, block_hashes=prompt))
    assert (found.cached_tokens, found.confirmed_tokens) == (511, 0)
    world.prefill_done(place(2), found_tokens=0)
    assert dict(world.core.overlap.counts) == {("expected", Overlap.NONE): 1}


def test_a_rare_miss_makes_no_note_and_what_is_kept_is_bounded() -> None:
    watch = OverlapWatch()
    found = World(pools(1, 1)).assign(place(1))
    expecting = replace(found, cached_tokens=480, confirmed_tokens=480)
    for number in range(4 * NUM_OVERLAPS):
        watch.observe(expecting, 0 if number % 6 == 0 else 480, 512, 1.0)
    assert watch.note(1.0) is None and len(watch._newest) == NUM_OVERLAPS
