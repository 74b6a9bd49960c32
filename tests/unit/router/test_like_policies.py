"""The policies after the peers' routers, each against the peer's formula worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocol.messages import Place
from protocol.request import AttemptKey
from router import policies
from router.policies.api import Booked, Finished, PlacementPolicy, Pool, Tick, WorkerLeft
from tests.unit.router.policy_view import Seen, scored, seconds, view, workers
from tests.unit.router.router_world import chain, place

pytestmark = pytest.mark.pure


def like(name: str) -> PlacementPolicy:
    return policies.load(f"examples.policies.{name}")


def book(policy: PlacementPolicy, request: Place, prefill: str, decode: str = "d", now: float = 100.0) -> None:
    policy.observe(Booked(request=request, prefill_worker=prefill, decode_worker=decode, cached_tokens=0), now)


# --- SGLang -----------------------------------------------------------------------------------------------------------

PREFIX = chain("prefix", 10)


def prompt(number: int, prefix: tuple[bytes, ...], num_blocks: int) -> Place:
    hashes = prefix + chain(("tail", number), num_blocks - len(prefix), parent=prefix[-1])
    return place(number, num_tokens=16 * num_blocks, block_hashes=hashes)


@pytest.mark.parametrize(("num_blocks", "priced"), [(33, {"b"}), (34, {"a", "b"})])
def test_sglang_follows_a_match_above_the_threshold(num_blocks: int, priced: set[str]) -> None:
    """10 blocks match: 10/33 = 0.303 is more than 0.3, 10/34 = 0.294 is not. Seen to fail with `<` for `<=`, at a threshold of 10/40."""
    policy = like("sglang_like:SglangLike")
    book(policy, prompt(1, PREFIX, 12), "b")
    assert scored(policy, view(workers("a", "b", num_prefills=3)), prompt(2, PREFIX, num_blocks)).keys() == priced
    exact = like("sglang_like:SglangLike:cache_threshold=0.25")
    book(exact, prompt(1, PREFIX, 12), "b")
    assert scored(exact, view(workers("a", "b")), prompt(2, PREFIX, 40)).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("loads", "priced"),
    [((0, 64), {"b"}), ((0, 65), {"a", "b"}), ((200, 290), {"b"}), ((200, 301), {"a", "b"})],
    ids=["64 more", "65 more", "90 more, 1.45 times", "101 more, 1.505 times"],
)
def test_sglang_takes_the_least_load_once_both_measures_are_uneven(loads: tuple[int, int], priced: set[str]) -> None:
    """b owns the prefix. Seen to fail with `or` for `and`."""
    policy = like("sglang_like:SglangLike")
    book(policy, prompt(1, PREFIX, 12), "b")
    seen = view([Seen(worker_id=n, num_prefills=load) for n, load in zip("ab", loads, strict=True)])
    assert scored(policy, seen, prompt(2, PREFIX, 12)).keys() == priced


def test_sglang_knows_one_owner_a_run_and_keeps_him_when_it_is_split() -> None:
    """b brought 20 blocks, then c 20 that begin alike: b owns what they share, c the rest. Seen to fail with the latest for an owner."""
    policy = like("sglang_like:SglangLike")
    book(policy, prompt(1, PREFIX, 20), "b")
    book(policy, prompt(2, PREFIX, 20), "c")
    seen = view(workers("a", "b", "c"))
    assert scored(policy, seen, prompt(3, PREFIX, 12)).keys() == {"b"}, "what they share was b's"
    assert scored(policy, seen, prompt(2, PREFIX, 20)).keys() == {"c"}
    assert scored(policy, view(workers("a", "b", "c"), Pool.DECODE), prompt(2, PREFIX, 20)).keys() == {"a", "b", "c"}, "d decodes all"
    policy.observe(WorkerLeft(worker_id="b"), 100.0)
    assert scored(policy, view(workers("a", "c")), prompt(3, PREFIX, 12)).keys() == {"a", "c"}


# --- Dynamo -----------------------------------------------------------------------------------------------------------


def test_dynamo_prices_prefill_in_blocks_less_what_overlaps() -> None:
    """A prompt of 640 tokens is 40 blocks.

    a: 320 tokens queue (20 blocks), 30 blocks cached in the device:                        20 + 40 - 30           = 30
    b: nothing queues, 8 blocks in the device and 8 more in the host at 0.75:                0 + 40 - 8 - 6         = 26
    c: nothing queues, everything cached and the credit doubled would be less than nothing:  max(0, 0 + 40 - 40)    = 0
    Seen to fail with the host's blocks at full credit.
    """
    seen = view(
        [Seen(worker_id="a", queued_prefill_tokens=320), Seen(worker_id="b"), Seen(worker_id="c")],
        cached_tokens={"a": 480, "b": 256, "c": 640},
        device_tokens={"a": 480, "b": 128, "c": 640},
    )
    request = place(1, num_tokens=640)
    assert seconds(like("dynamo_like:DynamoLike"), seen, request) == {"a": 30.0, "b": 26.0, "c": 0.0}
    generous = seconds(like("dynamo_like:DynamoLike:overlap_score_credit=2,prefill_load_scale=4"), seen, request)
    assert generous == {"a": 0.0, "b": 4 * (40 - 16 - 6.0), "c": 0.0}


def test_dynamo_gives_less_credit_where_more_waits() -> None:
    """Decay 1; a has 20 blocks more than the idlest, half the request's 40: 1 / (1 + 0.5) of 30 blocks is 20. 20 + 40 - 20 = 40."""
    seen = view([Seen(worker_id="a", queued_prefill_tokens=320), Seen(worker_id="b")], cached_tokens={"a": 480})
    found = seconds(like("dynamo_like:DynamoLike:overlap_score_credit_decay=1"), seen, place(1, num_tokens=640))
    assert found == pytest.approx({"a": 40.0, "b": 40.0})


def test_dynamo_counts_a_block_that_decoding_requests_share_once() -> None:
    """d decodes two requests over one prefix of 10 blocks, with 2 blocks each of their own: 14 active. e decodes nothing.

    One more of the family, 12 blocks and 5 tokens: 14 + 2 = 16 on d, 12 on e; what fills no block does not count. When one has ended:
    12 + 2 = 14. Seen to fail with blocks summed over requests.
    """
    policy = like("dynamo_like:DynamoLike")
    requests = [prompt(n, PREFIX, 12) for n in (1, 2)]
    for request in requests:
        book(policy, request, "p", "d")
    request = replace(prompt(3, PREFIX, 12), num_tokens=16 * 12 + 5)
    assert seconds(policy, view(workers("d", "e"), Pool.DECODE), request) == {"d": 16.0, "e": 12.0}
    policy.observe(Finished(key=AttemptKey(request_id=requests[0].request_id, attempt=0), num_output_tokens=9), 101.0)
    assert seconds(policy, view(workers("d", "e"), Pool.DECODE), request) == {"d": 14.0, "e": 12.0}
    policy.observe(Tick(), 100.0 + 300.0)
    assert seconds(policy, view(workers("d", "e"), Pool.DECODE), request) == {"d": 12.0, "e": 12.0}, "forgotten after 300 s"


# --- LMetric ----------------------------------------------------------------------------------------------------------


def test_lmetric_multiplies_what_is_new_by_the_load() -> None:
    """a: 100 new * (5 + 1) = 600     b: 500 new * (0 + 1) = 500     c: 250 new * (1 + 1) = 500: a tie that the load breaks for b.

    Seen to fail with the sum of the two, and without the tie-break.
    """
    loads = {"a": 5, "b": 0, "c": 1}
    seen = view([Seen(worker_id=n, num_prefills=load) for n, load in loads.items()], cached_tokens={"a": 400, "c": 250})
    found = seconds(like("lmetric_like:LMetricLike"), seen, place(1, num_tokens=500))
    assert found == pytest.approx({"a": 600.0, "b": 500.0, "c": 500.0}, abs=0.01) and found["b"] < found["c"]


# --- llm-d ------------------------------------------------------------------------------------------------------------


def test_llmd_adds_weighted_scores() -> None:
    """Of 2 * prefix + 1 * queue + 1 * kv what is missing to 4:

    a: 400 of 500 cached, 4 prompts wait (the most), half of the memory is in use:     2 * 0.2 + 1.0       + 0.5 = 1.9
    b: nothing cached, 2 wait, a quarter in use:                                       2 * 1.0 + (2-1)/3   + 0.25 = 2.583
    c: 250 cached, 1 waits (the least), 0.1 in use:                                    2 * 0.5 + 0         + 0.1 = 1.1
    Seen to fail with the queue not scaled to the shortest and longest.
    """
    capacity = 1000
    fleet = [
        Seen(worker_id=n, num_prefills=queue, kv_capacity_tokens=capacity, free_kv_tokens=free, reclaimable_kv_tokens=100)
        for n, queue, free in (("a", 4, 400), ("b", 2, 650), ("c", 1, 800))
    ]
    found = seconds(like("llmd_like:LlmdLike"), view(fleet, cached_tokens={"a": 400, "c": 250}), place(1, num_tokens=500))
    assert found == pytest.approx({"a": 1.9, "b": 2.25 + 1 / 3, "c": 1.1})


class Old(Seen):
    def signal_age_s(self, now: float) -> float:
        return 0.3


def test_llmd_leaves_out_the_saturated_unless_all_are() -> None:
    """Five wait, 0.8 of the memory is in use, or the signal is 0.3 s old. Seen to fail with `>` for `>=`, and with an empty answer."""
    policy, request = like("llmd_like:LlmdLike"), place(1, num_tokens=500)
    deep, full = Seen(worker_id="deep", num_prefills=5), Seen(worker_id="full", kv_capacity_tokens=1000, free_kv_tokens=200)
    old, fit = Old(worker_id="old"), Seen(worker_id="fit", num_prefills=4)
    assert scored(policy, view([deep, full, old, fit]), request).keys() == {"fit"}
    assert scored(policy, view([deep, full, old]), request).keys() == {"deep", "full", "old"}
    batches = view([replace(deep, num_prefills=0, num_sequences=50), replace(fit, num_sequences=40)], Pool.DECODE)
    assert len(scored(policy, batches, request)) == 2, "sequences that decode do not wait"
