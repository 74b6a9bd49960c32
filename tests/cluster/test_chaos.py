"""`kill -9` of a worker in the middle of 32 streams: every stream ends as the undisturbed run does.

A run sends the same 32 requests again (greedy and seeded, with penalties, `min_tokens`, `n=2`), waits until at least eight streams
are in the phase under test, waits a little longer by seed, kills one worker of the role that carries that phase, and leaves
the rest to the cluster. The judge is tests/cluster/ledger.py, which shares no code with the server. At rest the sum of I3 is printed
from /status for every worker, and /proc is searched for what the killed ones could have left.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.processes import process_id
from tests.cluster.ledger import Ledger, difference, stream
from tests.serving import Serving, end, start

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(280)]

NUM_STREAMS = 32
LEAST_IN_PHASE = 8
PHASE_TIMEOUT_S = 60.0
API_KEY = "a-key-of-this-test"

PACED = {
    "model": "demo",
    "workers": {"executor": "paced", "prefill_workers": 8, "decode_workers": 8},
    "router": {"disaggregate": "always"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Where a stream stands, told from outside: by the tokens its choices have."""

    name: str
    role: str  # of the worker that carries it
    fewest: int
    most: int

    def holds(self, ledger: Ledger) -> bool:
        seen = min((len(ledger.tokens.get(choice, [])) for choice in range(ledger.num_choices)), default=0)
        return ledger.ended_s is None and self.fewest <= seen <= self.most


PREFILLING = Phase(name="prefilling", role="prefill", fewest=0, most=0)
TRANSFERRING = Phase(name="transferring", role="prefill", fewest=1, most=1)  # the first token is out, the second needs the KV
DECODING = Phase(name="decoding", role="decode", fewest=2, most=1 << 30)
PHASES = (PREFILLING, TRANSFERRING, DECODING)


def bodies(new_tokens: int) -> list[dict[str, Any]]:
    """32 requests of four kinds; prompts share a beginning in groups of four, so prefix hits take part."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "ignore_eos": True},
        {"temperature": 0.9, "top_p": 0.95, "ignore_eos": True},
        {"temperature": 0.8, "frequency_penalty": 0.6, "presence_penalty": 0.3, "repetition_penalty": 1.1, "min_tokens": new_tokens // 2},
        {"temperature": 1.0, "n": 2, "ignore_eos": True},
    ]
    made = []
    for index in range(NUM_STREAMS):
        words = " ".join(f"word{(index // 4) * 31 + k}" for k in range(40 + 13 * (index % 5)))
        made.append(
            {"model": "demo", "prompt": f"{words} number {index}", "max_tokens": new_tokens, "seed": 1000 + index, **kinds[index % 4]}
        )
    return made


async def play(serving: Serving, requests: list[dict[str, Any]], journal: list[Ledger] | None = None) -> list[Ledger]:
    streams = (stream(serving.host, serving.port, "/v1/completions", body, api_key=serving.api_key, journal=journal) for body in requests)
    return list(await asyncio.gather(*streams))


async def kill_during(serving: Serving, phase: Phase, journal: list[Ledger], rng: random.Random) -> int:
    """SIGKILL one worker of the phase's role once enough streams are in the phase; its pid."""
    victims = sorted(row["pid"] for row in (await asyncio.to_thread(serving.workers)).values() if row["role"] == phase.role)
    pid = rng.choice(victims)
    deadline_s = time.monotonic() + PHASE_TIMEOUT_S
    linger_s = rng.uniform(0.0, 0.03)
    while sum(phase.holds(ledger) for ledger in journal) < LEAST_IN_PHASE:
        assert time.monotonic() < deadline_s, f"fewer than {LEAST_IN_PHASE} streams were ever {phase.name}"
        await asyncio.sleep(0.001)
    await asyncio.sleep(linger_s)
    os.kill(pid, signal.SIGKILL)
    in_phase = sum(phase.holds(ledger) for ledger in journal)
    print(f"killed pid {pid} ({phase.role}) with {in_phase} streams {phase.name}")
    return pid


async def disturb(serving: Serving, undisturbed: list[Ledger], requests: list[dict[str, Any]], phase: Phase, seed: int) -> None:
    """One run with one kill, judged."""
    rows = await asyncio.to_thread(serving.workers)
    journal: list[Ledger] = []
    run = asyncio.create_task(play(serving, requests, journal))
    pid = await kill_during(serving, phase, journal, random.Random(f"{phase.name} {seed}"))
    ledgers = await run
    problems = [
        f"request {index}: {problem}"
        for index, (ledger, reference) in enumerate(zip(ledgers, undisturbed, strict=True))
        for problem in [*ledger.broken_promises, *difference(ledger, reference)]
    ]
    assert not problems, "\n".join(problems[:10])
    await asyncio.to_thread(serving.wait_at_rest, num_workers=len(rows))
    killed = process_id(pid)
    assert killed is None or not killed.is_alive
    assert pid not in {row["pid"] for row in (await asyncio.to_thread(serving.workers)).values()}


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """8 + 8 paced workers, and an API key."""
    server = start(tmp_path_factory.mktemp("paced"), config=PACED, api_key=API_KEY)
    yield server
    end(server)


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
async def test_streams_survive_kill_of_a_torch_worker(serving: Serving, phase: Phase) -> None:
    requests = bodies(24)
    await disturb(serving, await play(serving, requests), requests, phase, seed=0)


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
async def test_streams_survive_kill_of_a_paced_worker(paced: Serving, phase: Phase) -> None:
    requests = bodies(48)
    await disturb(paced, await play(paced, requests), requests, phase, seed=0)
