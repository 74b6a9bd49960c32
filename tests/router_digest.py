"""One digest of everything a router says in a long seeded run: equal before and after a change that must not change decisions.

    python -m tests.router_digest            a line for each fleet and policy; run it on both trees and compare

Byte for byte what gateways would receive: workers, scores with all their terms, reasons, refusals. The run has split pools, workers of
both roles, one pool missing, prefixes in device and host memory, pulls, guesses that expire, stale snapshots, full inboxes, SLOs, retries
with excluded workers, workers that leave and come back, and cost models that learn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from random import Random
from typing import Any

from protocol.messages import Place
from protocol.wire import encode
from protocol.worker import AllBlocksCleared, BlocksRemoved, BlocksStored, KvEvent, Role, Tier
from router import policies
from router.config import Disaggregate
from router.events import Command, ToGateway
from tests.unit.router.router_world import World, address, chain, place, pools

FLEETS: dict[str, tuple[dict[str, Role], dict[str, Any]]] = {
    "split": (pools(8, 8), {}),
    "split, slow links": (pools(4, 12), {"link_bytes_per_s": 1e7, "transfer_s_per_token": 1e-4}),
    "split, no pulls": (pools(6, 6), {"prefix_pull": False}),
    "all three roles": (pools(4, 4, 4), {}),
    "both": (pools(0, 0, 6), {}),
    "prefill only": (pools(5, 0), {}),
    "always": (pools(3, 3, 2), {"disaggregate": Disaggregate.ALWAYS}),
    "never": (pools(3, 3, 2), {"disaggregate": Disaggregate.NEVER}),
    "one of each": (pools(1, 1), {}),
    "walk": (pools(4, 4), {"index_prefix_closed": False}),
}
POLICIES = ("prefix_cost", "prefix_cost:beta=0,eviction=off", "least_work", "round_robin")
NUM_STEPS = 1500
FAMILIES = [chain(("family", i), 96) for i in range(6)]


def main() -> None:
    for fleet in FLEETS:
        for policy in POLICIES:
            digest, num_said = digest_of(fleet, policy)
            print(f"{digest}  {num_said:6d} answers  {fleet} / {policy}")


def digest_of(fleet: str, policy: str, num_steps: int = NUM_STEPS) -> tuple[str, int]:
    """Hex digest of all answers, and how many they were."""
    roles, config = FLEETS[fleet]
    world = World(
        [address(w, r, num_kv_blocks=2048, max_num_seqs=16, kv_token_bytes=4096) for w, r in roles.items()],
        policy=policies.load(policy),
        **config,
    )
    seen, num_said = hashlib.sha256(), 0
    for commands in run(world, Random(f"{fleet} {policy}"), num_steps):
        for command in commands:
            if isinstance(command, ToGateway):
                seen.update(encode(command.message))
                num_said += 1
    world.core.check()
    return seen.hexdigest()[:16], num_said


def run(world: World, rng: Random, num_steps: int) -> Iterator[list[Command]]:
    workers = list(world.addresses)
    held: dict[str, dict[int, int]] = {w: {} for w in workers}  # family -> blocks held
    numbers = dict.fromkeys(workers, 0)
    totals = {w: {"prompt_tokens_computed": 0, "generated_tokens": 0, "busy_us": 0, "steps": 0} for w in workers}
    live: list[Place] = []
    for number in range(num_steps):
        world.now += rng.expovariate(200.0)
        worker = rng.choice(workers)
        act = rng.choices(("place", "first", "done", "report", "store", "evict", "clear", "tick", "retry", "leave"), _WEIGHTS)[0]
        before = len(world.said)
        if act == "place":
            request = draw_request(rng, number)
            live.append(request)
            world.place(request)
        elif act in ("first", "done", "retry") and live:
            request = rng.choice(live[-40:])
            if act == "first":
                world.prefill_done(request)
            else:
                live.remove(request)
                world.done(request, num_output_tokens=rng.randrange(200))
                if act == "retry":
                    excluded = (rng.choice(workers),)
                    world.place(place(int(request.request_id, 16), request.num_tokens, attempt=1, excluded=excluded))
        elif act == "report":
            for name in rng.sample(workers, min(3, len(workers))):
                world.report(name, **draw_report(rng, totals[name]))
        elif act in ("store", "evict", "clear"):
            event = draw_event(rng, act, numbers[worker] + 1, held[worker])
            if event is not None:
                numbers[worker] += 1
                world.kv_events(worker, event)
        elif act == "tick":
            world.tick(rng.choice((0.0, 0.0, 0.05, 0.3)))
        elif act == "leave":
            world.kill(worker)
            held[worker], numbers[worker] = {}, 0
            world.join(world.addresses[worker])
        yield world.said[before:]


_WEIGHTS = (30, 18, 18, 12, 10, 3, 0.3, 4, 2, 0.4)


def draw_request(rng: Random, number: int) -> Place:
    num_tokens = rng.choice((17, 100, 512, 1000, 1536, 2000))
    family, shared = rng.randrange(len(FAMILIES)), rng.randrange(97)
    beginning = FAMILIES[family][: min(shared, num_tokens // 16)]
    parent = beginning[-1] if beginning else b""
    hashes = beginning + chain(("tail", number), num_tokens // 16 - len(beginning), parent=parent)
    return place(
        number,
        num_tokens,
        block_hashes=hashes,
        expected_output_tokens=rng.choice((1, 64, 1000)),
        num_choices=rng.choice((1, 1, 1, 3)),
        tenant=f"tenant-{rng.randrange(3)}",
        priority=rng.choice((0, 0, 1)),
        slo_ttft_s=rng.choice((None, None, 0.5)),
        slo_tpot_s=rng.choice((None, None, 0.1)),
        local_only=rng.random() < 0.03,
    )


def draw_report(rng: Random, totals: dict[str, int]) -> dict[str, Any]:
    num_steps, prefill, decoded = rng.randrange(1, 8), rng.choice((0, 200, 1500)), rng.randrange(60)
    totals["steps"] += num_steps
    totals["prompt_tokens_computed"] += prefill
    totals["generated_tokens"] += decoded
    totals["busy_us"] += int(num_steps * 8000 + prefill * 80 + decoded * 60)
    owned, cached = rng.randrange(800), rng.randrange(800)
    return {
        "step_count": totals["steps"],
        "num_waiting": rng.randrange(3),
        "num_running": rng.randrange(10),
        "waiting_tokens": rng.choice((0, 0, 700, 3000)),
        "running_kv_tokens": rng.randrange(9000),
        "num_blocks_total": 2048,
        "num_blocks_free": 2048 - owned - cached,
        "num_blocks_owned": owned,
        "num_blocks_cached": cached,
        "counters": {name: n for name, n in totals.items() if name != "steps"},
    }


def draw_event(rng: Random, act: str, number: int, held: dict[int, int]) -> KvEvent | None:
    """Of one worker: its holdings stay prefix-closed; the host tier may hold anything."""
    if act == "clear":
        held.clear()
        return AllBlocksCleared(number=number)
    family = rng.randrange(len(FAMILIES))
    hashes, known = FAMILIES[family], held.get(family, 0)
    if rng.random() < 0.15:
        first = rng.randrange(96)
        part = hashes[first : first + 20]
        event = BlocksStored(number=number, parent=b"", hashes=part, tier=Tier.HOST)
        return event if act == "store" else BlocksRemoved(number=number, hashes=part, tier=Tier.HOST)
    if act == "store":
        held[family] = upto = rng.randrange(known, 97)
        return BlocksStored(number=number, parent=b"", hashes=hashes[known:upto])
    held[family] = upto = rng.randrange(known + 1)
    return BlocksRemoved(number=number, hashes=tuple(reversed(hashes[upto:known])))


if __name__ == "__main__":
    main()
