"""Our policies after SGLang and Dynamo against decisions recorded of the real routers (benchmarks/peers/record_*.py).

Each is shown what the real router had seen: the same prompts, what was in flight, and after each choice which worker it was. A decision is
reproduced when the recorded worker is among those our policy prices lowest; ties are told apart below.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from benchmarks.peers.decision_workload import Step, steps
from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS, block_hashes
from protocol.messages import Place
from protocol.request import AttemptKey, token_buffer
from router import policies
from router.policies.api import Booked, Finished, PlacementPolicy, Pool
from tests.unit.router.policy_view import Seen, view
from tests.unit.router.router_world import place

pytestmark = pytest.mark.pure

FOLDER = Path(__file__).with_name("decisions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    router: str
    seed: int
    workers: int
    block_tokens: int
    alphabet: int
    chosen: str  # a digit a decision
    balance_abs: int = 0
    balance_rel: float = 0.0

    def __iter__(self) -> Iterator[tuple[Step, Place, str]]:
        """Each step, its request, and the worker the real router chose."""
        workload = steps(len(self.chosen), seed=self.seed, block_tokens=self.block_tokens, alphabet=self.alphabet)
        for step, worker in zip(workload, self.chosen, strict=True):
            hashes = tuple(block_hashes(bytes(16), token_buffer(step.tokens)))
            yield step, place(step.number, num_tokens=len(step.tokens), block_hashes=hashes), f"w{worker}"

    @property
    def names(self) -> list[str]:
        return [f"w{index}" for index in range(self.workers)]


def recording(name: str) -> Recording:
    return Recording(**json.loads((FOLDER / f"{name}.json").read_text()))


@dataclass(slots=True)
class Agreement:
    decisions: int = 0
    reproduced: int = 0
    untied: int = 0
    reproduced_untied: int = 0

    def note(self, policy: PlacementPolicy, seen: list[Seen], cached: dict[str, int], request: Place, chosen: str) -> None:
        costs = policy.score(view(seen, Pool.WHOLE, cached_tokens=cached), request, 0.0, Random(0))
        least = min(cost.seconds for cost in costs.values())
        best = [name for name, cost in costs.items() if cost.seconds <= least + 1e-9]
        self.decisions += 1
        self.reproduced += chosen in best
        self.untied += len(best) == 1
        self.reproduced_untied += best == [chosen]
        policy.observe(Booked(request=request, prefill_worker=chosen, decode_worker=chosen, cached_tokens=0), 0.0)


def sglang(name: str) -> Agreement:
    real, found = recording(name), Agreement()
    spec = f"examples.policies.sglang_like:SglangLike:balance_abs={real.balance_abs},balance_rel={real.balance_rel}"
    policy, loads, where = policies.load(spec), Counter(dict.fromkeys(real.names, 0)), dict[int, str]()
    for step, request, chosen in real:
        loads.subtract(where.pop(number) for number in step.ended)
        # What is in flight is one number there; a worker that does both has two here, and their sum is taken.
        seen = [Seen(worker_id=worker, num_sequences=load) for worker, load in loads.items()]
        found.note(policy, seen, {}, request, chosen)
        loads[chosen] += 1
        where[step.number] = chosen
    return found


def dynamo(name: str) -> Agreement:
    real, found = recording(name), Agreement()
    policy = policies.load("examples.policies.dynamo_like:DynamoLike")
    held: dict[str, set[bytes]] = {worker: set() for worker in real.names}
    queued, waiting = Counter(dict.fromkeys(real.names, 0)), dict[int, tuple[str, int]]()
    for step, request, chosen in real:
        for number in step.prefilled:
            worker, tokens = waiting.pop(number)
            queued[worker] -= tokens
        for number in step.ended:
            policy.observe(Finished(key=AttemptKey(request_id=place(number).request_id, attempt=0), num_output_tokens=1), 0.0)
        cached = {worker: overlap(request, held[worker]) for worker in real.names}
        seen = [Seen(worker_id=worker, queued_prefill_tokens=tokens) for worker, tokens in queued.items()]
        found.note(policy, seen, cached, request, chosen)
        missed = request.num_tokens - cached[chosen]
        queued[chosen] += missed
        waiting[step.number] = (chosen, missed)
        held[chosen].update(request.block_hashes)
    return found


def overlap(request: Place, held: set[bytes]) -> int:
    hashes = request.block_hashes
    return HASH_BLOCK_SIZE_TOKENS * next((i for i, h in enumerate(hashes) if h not in held), len(hashes))


@pytest.mark.parametrize("name", ["dynamo-4", "dynamo-8"])
def test_decisions_of_dynamos_router_are_reproduced(name: str) -> None:
    """2,500 of ai-dynamo-runtime 1.6.1's SelectionService with KV events. Seen to fail with a block that is not full counted as active."""
    found = dynamo(name)
    assert found.decisions == found.reproduced == 2500 and found.untied == found.reproduced_untied > 2000


@pytest.mark.parametrize(
    ("name", "reproduced"), [("sglang-4", 2500), ("sglang-8", 2499), ("sglang-4-anywhere", 2491), ("sglang-4-letters", 2457)]
)
def test_decisions_of_sglangs_gateway_are_reproduced_but_for_what_lies_within_a_block(name: str, reproduced: int) -> None:
    """2,500 of sglang-router 0.3.2's cache_aware, whose tree is of characters: prompts that part at the ends of blocks, then anywhere, then

    anywhere over 26 letters, where different prompts begin alike by chance. Seen to fail with the owner of the upper part of a split
    run forgotten, and with `or` for `and` between the measures of load (sglang-8, whose threshold is 4 requests).
    """
    found = sglang(name)
    assert (found.decisions, found.reproduced) == (2500, reproduced) and found.untied > 1900
