"""Whether a prompt is computed where it decodes: numbers worked by hand from the cost of a step, on both sides of the line.

The cost model is the prior without its lean: a step 6 ms, a prompt token 60 us, a pair of tokens 2 ns, a decoding sequence 50 us, a
token of its KV 20 ns. A prompt of 1,024 tokens, of which decode-0 holds 896 and prefill-0 nothing:

    through prefill-0    P = 6 + 1024 * 0.06 + 1024 * 1024 * 2e-6 = 69.54 ms;  hand-off 2 + 1024 * 0.002 = 4.05 ms         73.59 ms
    on decode-0          P = 6 + 128 * 0.06 + 128 * 1024 * 2e-6   = 13.94 ms, and its step carries the batch: n * 0.05 + KV * 2e-5
                         stall: each of n sequences waits for the prompt's part of the step, 7.94 ms
        n = 6, KV 6,000:   13.94 + 0.42 + 6 * 7.94 =  62.02 ms     less: there
        n = 8, KV 8,000:   13.94 + 0.56 + 8 * 7.94 =  78.03 ms     more: through prefill-0
"""

from __future__ import annotations

from typing import Any

import pytest

from protocol.messages import Assignment
from protocol.worker import Role
from tests.unit.router.router_world import World, address, place, pools

pytestmark = pytest.mark.pure

PROMPT = place(1, num_tokens=1024)


def choose(num_running: int, *, held_blocks: int = 56, queued_tokens: int = 0, **config: Any) -> Assignment:
    world = World(pools(1, 1), estimate_bias=1.0, prefix_pull=False, **config)
    world.hold("decode-0", PROMPT.block_hashes[:held_blocks])
    world.report("decode-0", num_running=num_running, running_kv_tokens=1000 * num_running)
    world.report("prefill-0", waiting_tokens=queued_tokens)
    return world.assign(PROMPT)


def test_a_prompt_stays_where_it_decodes_while_the_stall_is_less_than_what_it_saves() -> None:
    """Seen to fail with a factor on its own time for the stall: eight sequences did not matter."""
    there, away = choose(6), choose(8)
    assert there.prefill_worker == "decode-0"
    assert there.reason == "128 of 1024 tokens are missing on decode-0: 0.0620 s there, 0.0736 s through prefill-0"
    assert away.prefill_worker == "prefill-0"


def test_the_price_of_a_stalled_second_moves_the_line() -> None:
    """At half the price eight sequences are 13.94 + 0.56 + 4 * 7.94 = 46.26 ms; at twice, six are 109.7."""
    assert choose(8, local_prefill_interference=0.5).prefill_worker == "decode-0"
    assert "0.0463 s there" in choose(8, local_prefill_interference=0.5).reason
    assert choose(6, local_prefill_interference=2.0).prefill_worker == "prefill-0"


def test_a_queue_at_the_prefill_worker_counts_on_its_side() -> None:
    """200 tokens wait: 6 + 200 * (0.06 + 512 * 2e-6) = 18.2 ms more, 91.8 in all. Seen to fail with Q left out of `split_s`."""
    found = choose(8, queued_tokens=200)
    assert found.prefill_worker == "decode-0" and found.reason.endswith("0.0780 s there, 0.0918 s through prefill-0")


@pytest.mark.parametrize(("held_blocks", "worker"), [(20, "decode-0"), (19, "prefill-0")])
def test_what_is_mostly_missing_is_never_kept(held_blocks: int, worker: str) -> None:
    """Nobody decodes there, so only the share decides: 704 of 1,024 missing is 69 %, 720 is 70.3 %."""
    assert choose(0, held_blocks=held_blocks).prefill_worker == worker


@pytest.mark.parametrize(("num_running", "shape"), [(3, "whole"), (4, "split")])
def test_a_worker_of_both_roles_is_weighed_against_a_pair_by_the_same_stall(num_running: int, shape: str) -> None:
    """A prompt of 256 tokens, nothing cached; 64 output tokens follow. decode-0 idles, both-0 has n sequences of 1,000 tokens.

        pair    6 + 256 * 0.06 + 0.13 = 21.49 ms, hand-off 2.51;  64 steps of 6.056 ms: 411.6 ms in all
        whole   21.49 + n * 0.07 + n * 15.49;  64 steps of 6.056 + n * 0.07 ms
        n = 0: 409.1; even the first sequence costs 20.0 ms more

    prefill-0 has work waiting, 60 ms for n = 3: 471.6 against 469.2; for n = 4: 471.6 against 489.2.
    """
    world = World([*(address(w, r) for w, r in pools(1, 1).items()), address("both-0", Role.BOTH)], estimate_bias=1.0)
    world.report("both-0", num_running=num_running, running_kv_tokens=1000 * num_running)
    world.report("prefill-0", waiting_tokens=885)
    found = world.assign(place(2, num_tokens=256))
    assert ("whole" if found.prefill_worker == "both-0" else "split") == shape
