"""The planner's simulation does what can be worked out by hand, waits as closed forms say, and agrees with the cluster's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean, stdev

import pytest

from control.config import load_config
from engine.step_time import LinearStepTime
from simulator.phases import Outcome, _Worker, run_phases
from simulator.pools import Link, Pool, Pools, WorkerModel
from simulator.queueing import ttft_replicas_s, ttft_single_s
from simulator.routed_gateway import Served
from simulator.token_accurate import run_token_accurate
from simulator.traces.generators import Arrivals, generate
from simulator.traces.trace import Run, Trace, TraceRequest

pytestmark = pytest.mark.pure

STEP = LinearStepTime(prefill_base_s=0.01, prefill_token_s=1e-4, decode_base_s=0.02, decode_sequence_s=1e-3)
LINK = Link(latency_s=0.002, bytes_per_s=1e9)
APART = Pools(prefill=Pool(1, 1), decode=Pool(1, 1))
MIXED = Pools(mixed=Pool(1, 1))


def request(at_s: float, num_prompt_tokens: int, output_tokens: int = 1) -> TraceRequest:
    return TraceRequest(at_s=at_s, runs=(Run(f"own {at_s} {num_prompt_tokens}", num_prompt_tokens),), output_tokens=output_tokens)


def run(
    requests: Iterable[TraceRequest],
    pools: Pools,
    *,
    kv_tokens: int = 10_000,
    batch_tokens: int = 512,
    link: Link = LINK,
    rng: Random | None = None,
    step_time: LinearStepTime = STEP,
) -> list[Outcome]:
    models = {1: WorkerModel(num_gpus=1, step_time=step_time, kv_tokens=kv_tokens, kv_token_bytes=10_000)}
    served = run_phases(list(requests), pools, models, link=link, batch_tokens=batch_tokens, rng=rng)
    assert all(one.terminal in ("finished", "refused") for one in served)
    return served


def ttfts(served: Sequence[Served]) -> list[float]:
    return [one.ttft_s for one in served if one.ttft_s is not None]


# --- by hand --------------------------------------------------------------------------------------------------------------


def test_a_lone_request_takes_its_steps_and_its_transfer() -> None:
    """Seen to fail with the transfer left out, and with one decode step too many."""
    (one,) = run([request(1.0, 500, 11)], APART)
    assert one.ttft_s == pytest.approx(0.01 + 0.05)
    assert one.end_s == pytest.approx(1.0 + 0.06 + 500 * 1e4 / 1e9 + 0.002 + 10 * 0.021)
    assert one.tpot_s == pytest.approx((0.007 + 0.21) / 10)


def test_short_prompts_share_a_batch_up_to_l_m_and_a_longer_one_is_alone() -> None:
    """The first goes alone, since nobody else is there. Seen to fail with L_m as the least size of a batch, not the most."""
    served = run([request(0.0, 100), request(0.001, 200), request(0.002, 300), request(0.003, 100), request(0.004, 900)], APART)
    first = 0.02
    together = first + 0.01 + 0.05
    assert ttfts(served) == pytest.approx([first, together - 0.001, together - 0.002, together + 0.02 - 0.003, together + 0.12 - 0.004])


def test_a_prompt_keeps_its_kv_until_it_is_pulled() -> None:
    """Room for one prompt: the second waits for the first one's transfer. Seen to fail with KV let go at the first token."""
    slow = Link(latency_s=1.0, bytes_per_s=1e12)
    served = run([request(0.0, 600, 2), request(0.0, 600, 2)], APART, kv_tokens=1000, link=slow)
    assert ttfts(served) == pytest.approx([0.07, 0.07 + 1.0 + 0.07], abs=1e-4)


def test_transfers_of_one_source_follow_each_other() -> None:
    """Two prompts of one batch, 1 s of the link each. Seen to fail with a link that carries any number at once."""
    served = run([request(0.0, 1), request(0.0, 100, 2), request(0.0, 100, 2)], APART, link=Link(latency_s=0.0, bytes_per_s=1e6))
    ends = [one.end_s for one in served[1:] if one.end_s is not None]
    assert ends[1] - ends[0] == pytest.approx(1.0)


def test_decodes_wait_for_room_and_go_in_order() -> None:
    """Seen to fail with decodes admitted whatever is held."""
    served = run([request(0.0, 300, 20) for _ in range(3)], Pools(decode=Pool(1, 1)), kv_tokens=700)
    ends = [one.end_s for one in served if one.end_s is not None]
    first_s = 0.021 + 18 * 0.022  # the second comes when the first step has begun
    assert ends == pytest.approx([first_s, first_s + 0.022, first_s + 0.022 + 18 * 0.021])


def test_who_has_no_room_to_grow_is_computed_anew() -> None:
    """Two grow beyond what there is: the later leaves, and comes back at the price of a prompt. All tokens come. Seen to fail with the
    prompt alone computed anew, and with all its tokens still to come."""
    served = run([request(0.0, 400, 150), request(0.0, 400, 150)], Pools(decode=Pool(1, 1)), kv_tokens=1000)
    first, second = served
    together = (1000 - 402 - 401) // 2  # steps, after one of the first alone
    alone = 149 - 1 - together
    assert first.end_s == pytest.approx((1 + alone) * 0.021 + together * 0.022)
    recomputed_s = 0.01 + 1e-4 * (401 + together)  # and a token with it
    assert second.end_s == pytest.approx((first.end_s or 0.0) + recomputed_s + (149 - together - 1) * 0.021)


def test_whole_prompts_pause_decodes_and_chunks_do_not() -> None:
    """A long prompt among ten decodes. Seen to fail with chunks that leave decodes out."""
    requests = [*(request(0.0, 10, 50) for _ in range(10)), request(0.3, 2000, 2)]
    whole, chunked = (run(requests, Pools(mixed=Pool(1, 1), chunk_tokens=tokens)) for tokens in (None, 210))
    assert (whole[10].ttft_s or 0) == pytest.approx(0.21, abs=0.03)  # at once, as soon as the step is over
    assert (chunked[10].ttft_s or 0) == pytest.approx(10 * (0.01 + 0.02 + 0.03), abs=0.04)  # ten chunks of 200 beside ten decodes
    steps = 49 * 0.03
    assert (whole[0].end_s or 0) == pytest.approx(0.02 + steps + 0.21, abs=0.03)
    assert (chunked[0].end_s or 0) == pytest.approx(0.02 + steps + 10 * 0.03, abs=0.04)


def test_a_pause_is_the_longest_time_between_two_tokens() -> None:
    """The transfer of a lone request; the prompts that others bring; being computed anew. Seen to fail with the first gap of those who
    join left out, with steps that are taken together counted as one, and with the time out of the batch forgotten."""
    (lone,) = run([request(1.0, 500, 11)], APART)
    assert lone.pause_s == pytest.approx(0.007 + 0.021)
    requests = [*(request(0.0, 10, 50) for _ in range(10)), request(0.3, 2000, 2)]
    whole, chunked = (run(requests, Pools(mixed=Pool(1, 1), chunk_tokens=tokens)) for tokens in (None, 210))
    assert whole[1].pause_s == pytest.approx(0.21 + 0.03, abs=0.002) and whole[10].pause_s == pytest.approx(0.03, abs=0.002)
    assert chunked[1].pause_s == pytest.approx(0.01 + 0.02 + 0.03, abs=0.002)
    first, second = run([request(0.0, 400, 150), request(0.0, 400, 150)], Pools(decode=Pool(1, 1)), kv_tokens=1000)
    assert first.pause_s == pytest.approx(0.022, abs=0.001)
    assert second.pause_s == pytest.approx(50 * 0.021 + 0.0599, abs=0.03)  # while the first ends, and its own prompt


def test_a_request_no_worker_holds_is_refused() -> None:
    served = run([request(0.0, 900, 200), request(0.0, 500, 20)], APART, kv_tokens=1000)
    assert [one.terminal for one in served] == ["refused", "finished"]
    assert served[0].reason == "1,100 tokens; a worker holds 1,000"


def test_the_worker_with_the_least_to_do_is_taken() -> None:
    """Seen to fail with the first worker for everybody."""
    served = run([request(0.0, 500, 5) for _ in range(4)], Pools(prefill=Pool(4, 1), decode=Pool(4, 1)))
    assert len({(one.ttft_s, one.end_s) for one in served}) == 1 and served[0].ttft_s == pytest.approx(0.06)


@pytest.mark.parametrize(
    "pools",
    [
        Pools(prefill=Pool(2, 1), decode=Pool(1, 1)),
        Pools(prefill=Pool(1, 1), decode=Pool(3, 1)),
        Pools(mixed=Pool(3, 1)),
        Pools(mixed=Pool(2, 1), chunk_tokens=256),
        Pools(decode=Pool(2, 1)),
    ],
    ids=str,
)
def test_leaps_and_single_steps_come_to_the_same(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory so short that sequences are computed anew. Seen to fail with each step of a leap reading what the first did, with
    leaps that go on after an arrival, and with the room they take counted at their end."""
    requests = generate("sharegpt", Arrivals(rate_per_s=4.0), num_requests=150, seed=1).requests
    reading = replace(STEP, decode_read_s=1e-6)
    leaping = run(requests, pools, kv_tokens=4000, step_time=reading)
    monkeypatch.setattr(_Worker, "_next_end", lambda self: self._step + 1)
    stepping = run(requests, pools, kv_tokens=4000, step_time=reading)
    for one, other in zip(leaping, stepping, strict=True):
        assert (one.first_token_s, one.end_s) == pytest.approx((other.first_token_s, other.end_s), abs=1e-6)
        assert one.pause_s == pytest.approx(other.pause_s, abs=1e-3)


# --- closed forms ---------------------------------------------------------------------------------------------------------


def pooled(of_seed: Callable[[int], float]) -> tuple[float, float]:
    """Mean over 10 seeds, and its standard error by how they differ: requests of one run wait for each other."""
    means = [of_seed(seed) for seed in range(10)]
    return fmean(means), stdev(means) / len(means) ** 0.5


@pytest.mark.parametrize(("num_workers", "load"), [(1, 0.3), (1, 0.7), (3, 0.5), (3, 0.7)])
def test_prompts_of_one_length_wait_as_closed_forms_say(num_workers: int, load: float) -> None:
    """Poisson, nothing batched, workers drawn evenly. Seen to fail with prompts in batches of two, and with the least loaded taken."""
    service_s = 0.01 + 1e-4 * 400
    rate_per_s = num_workers * load / service_s

    def mean_ttft_s(seed: int) -> float:
        moments = Arrivals(rate_per_s=rate_per_s).moments_s(Random(seed))
        requests = [request(next(moments), 400) for _ in range(4000)]
        served = run(requests, Pools(prefill=Pool(num_workers, 1)), batch_tokens=400, rng=Random(seed))
        return fmean(ttfts(served)[200:])  # the first find nobody before them

    mean_s, error_s = pooled(mean_ttft_s)
    expected_s = ttft_replicas_s(rate_per_s, service_s, num_workers)
    assert error_s < 0.05 * expected_s, "too few requests to tell"
    assert abs(mean_s - expected_s) < 4 * error_s


@dataclass(frozen=True, slots=True)
class OnePrompt:
    num_tokens: int = 64
    service_s: float = 0.01


def token_accurate(num_workers: int, load: float, seed: int, *, num_requests: int) -> list[float]:
    """TTFTs on the cluster's own code: prefill workers with one prompt a step, one token asked for, nothing kept in caches, everything
    in the inbox of its worker at once."""
    prompt = OnePrompt()
    config = load_config(
        {
            "workers": {
                "executor": "paced",
                "prefill_workers": num_workers,
                "num_kv_blocks": 4096,
                "max_num_batched_tokens": prompt.num_tokens,
                "max_num_seqs": 1024,
                "max_waiting": 4096,
                "enable_prefix_caching": False,
            },
            "router": {"disaggregate": "always", "inbox_steps": 1e6, "prefix_pull": False, "decode_overcommit": 64.0},
            "paced": {"prefill_base_s": prompt.service_s, "prefill_token_s": 0.0},
        }
    )
    moments = Arrivals(rate_per_s=num_workers * load / prompt.service_s).moments_s(Random(seed))
    requests = tuple(
        TraceRequest(at_s=next(moments), runs=(Run(f"own {i}", prompt.num_tokens),), output_tokens=1) for i in range(num_requests)
    )
    served = run_token_accurate(Trace(name="one length", requests=requests), config, policy="random", seed=seed)
    assert all(one.terminal == "finished" for one in served)
    return ttfts(served)


def constant_s() -> float:
    """What messages to the router and back, to the worker and back add to everybody's TTFT: seen of one who waits for nobody."""
    (lone_s,) = token_accurate(1, 0.1, 0, num_requests=1)
    return lone_s - OnePrompt().service_s


def test_messages_take_a_constant_of_a_few_milliseconds_at_most() -> None:
    assert 0.0 < constant_s() < 0.003
    assert token_accurate(1, 1e-6, 0, num_requests=4) == pytest.approx([OnePrompt().service_s + constant_s()] * 4)


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "load"), [(1, 0.4), (1, 0.7), (3, 0.7)])
def test_the_cluster_itself_waits_as_closed_forms_say(num_workers: int, load: float) -> None:
    """Token-accurate, less the constant that messages take. Seen to fail with the constant left in at a load of 0.4."""
    service_s = OnePrompt().service_s
    messages_s = constant_s()
    mean_s, error_s = pooled(lambda seed: fmean(token_accurate(num_workers, load, seed, num_requests=600)[30:]) - messages_s)
    expected_s = ttft_replicas_s(num_workers * load / service_s, service_s, num_workers)
    assert error_s < 0.1 * expected_s, "too few requests to tell"
    assert abs(mean_s - expected_s) < 4 * error_s
    assert num_workers > 1 or expected_s == ttft_single_s(load / service_s, service_s)
