"""DistServe's two algorithms choose what they should from goodputs made up by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from simulator.planner import Phases, algorithm_1, algorithm_2, best_rate, copies, mixed_within, units_within
from simulator.pools import Pool, Pools

pytestmark = pytest.mark.pure


def table(goodputs: Mapping[Pools, float]) -> Callable[[Pools], float]:
    return lambda pools: goodputs[pools]


def prefill(size: int) -> Pools:
    return Pools(prefill=Pool(1, size))


def decode(size: int) -> Pools:
    return Pools(decode=Pool(1, size))


def unit(num_prefill: int, prefill_size: int, num_decode: int, decode_size: int) -> Pools:
    return Pools(prefill=Pool(num_prefill, prefill_size), decode=Pool(num_decode, decode_size))


def test_algorithm_1_takes_each_phase_at_its_best_goodput_a_gpu() -> None:
    """TP4 prefills most, TP2 most a GPU. Seen to fail with the goodput not divided by GPUs, and with n and m rounded down."""
    goodput = table({prefill(1): 1.0, prefill(2): 3.0, prefill(4): 5.0, decode(1): 4.0, decode(2): 7.0, decode(4): 9.0})
    assert algorithm_1([1, 2, 4], goodput, 10.0) == Phases(
        prefill=Pool(4, 2),  # ceil(10 / 3)
        decode=Pool(3, 1),  # ceil(10 / 4)
        prefill_goodput_per_s=3.0,
        decode_goodput_per_s=4.0,
    )


def test_algorithm_1_takes_the_smaller_of_equals_whatever_the_order() -> None:
    """Seen to fail with >= for >."""
    goodput = table({prefill(1): 1.5, prefill(2): 3.0, prefill(4): 6.0, decode(1): 2.0, decode(2): 4.0, decode(4): 8.0})
    for sizes in ([1, 2, 4], [4, 2, 1]):
        found = algorithm_1(sizes, goodput, 6.0)
        assert found is not None and (found.prefill, found.decode) == (Pool(4, 1), Pool(3, 1))


def test_algorithm_1_has_no_answer_where_a_phase_has_none() -> None:
    assert algorithm_1([1, 2], table({prefill(1): 1.0, prefill(2): 2.0, decode(1): 0.0, decode(2): 0.0}), 1.0) is None


def test_algorithm_2_judges_both_phases_of_a_unit_together() -> None:
    """Seen to fail with the highest goodput, not that a GPU, taken for the best."""
    goodputs = {unit(1, 1, 1, 1): 2.0, unit(1, 2, 1, 1): 4.5, unit(1, 1, 1, 2): 3.0, unit(1, 2, 1, 2): 5.6}
    assert algorithm_2(goodputs, table(goodputs), 10.0) == (unit(1, 2, 1, 1), 3)  # ceil(10 / 4.5)
    assert algorithm_2(goodputs, table(goodputs), 9.0) == (unit(1, 2, 1, 1), 2)
    assert algorithm_2(goodputs, table(dict.fromkeys(goodputs, 0.0)), 9.0) is None


def test_algorithm_2_takes_fewer_gpus_of_equals_whatever_the_order() -> None:
    goodputs = {unit(1, 2, 1, 2): 4.0, unit(1, 1, 1, 1): 2.0, unit(1, 2, 1, 1): 3.0}
    assert algorithm_2(goodputs, table(goodputs), 4.0) == (unit(1, 1, 1, 1), 2)


def test_units_fill_a_machine_and_never_more() -> None:
    """Four GPUs: the paper's four units of one worker each; eleven with several. Seen to fail with the decode pool offered all GPUs."""
    units = list(units_within([1, 2, 4], 4))
    alone = {unit(1, 1, 1, 1), unit(1, 1, 1, 2), unit(1, 2, 1, 1), unit(1, 2, 1, 2)}
    assert len(units) == len(set(units)) == 11 and max(pools.num_gpus for pools in units) == 4
    assert {u for u in units if u.prefill is not None and u.decode is not None and u.prefill.count == u.decode.count == 1} == alone
    assert unit(2, 1, 2, 1) in units and unit(3, 1, 1, 1) in units and unit(1, 2, 2, 1) in units


def test_mixed_workers_take_as_many_gpus_as_they_are_held_against() -> None:
    assert [pools.mixed for pools in mixed_within([1, 2, 4], 6, [512])] == [Pool(6, 1), Pool(3, 2)]
    assert [(pools.mixed, pools.chunk_tokens) for pools in mixed_within([2], 2, [None, 512])] == [(Pool(1, 2), None), (Pool(1, 2), 512)]


def test_copies_round_up_and_a_whole_number_is_not_one_more() -> None:
    """Seen to fail with floor + 1."""
    assert [copies(rate, 1.5) for rate in (0.0, 1.0, 1.5, 3.0, 3.01)] == [1, 1, 1, 2, 3]
    assert copies(1.1, 0.1) == 11  # 1.1 / 0.1 is a little above 11


def test_bisection_asks_five_times_and_answers_what_it_saw_hold() -> None:
    """From 5 down to a width of 0.25, per GPU. Seen to fail with the upper end answered."""
    asked: list[float] = []

    def is_met(rate_per_s: float) -> bool:
        asked.append(rate_per_s)
        return rate_per_s <= 3 * 1.6

    assert best_rate(is_met, 3) == pytest.approx(3 * 1.5625)
    assert asked == pytest.approx([7.5, 3.75, 5.625, 4.6875, 5.15625])


def test_a_low_rate_is_found_to_a_quarter_of_itself_and_a_high_one_at_all() -> None:
    """Seen to fail with a width of 0.25 for all, and with a range that ends at 5."""
    for true in (0.07, 0.21, 4.9, 5.2, 17.0, 300.0):
        found = best_rate(lambda rate_per_s, true=true: rate_per_s <= 2 * true, 2) / 2  # type: ignore[misc]
        assert 0.0 <= true - found <= max(0.04, true / 4) and found <= true
        assert true < 5.0 or true - found <= true / 10
    assert best_rate(lambda rate_per_s: False, 3) == 0.0
    assert best_rate(lambda rate_per_s: True, 1) > 1000.0
