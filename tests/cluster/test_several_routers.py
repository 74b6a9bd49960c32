"""`--routers 2`, and `kill -9` of the one in use under load: every request completes, and the other knows what was given out.

Paced workers, streams of 2 s, so that the kill comes in the middle of all of them. Seen to fail with the peers' bookings not taken in
(`Peers._book` returning at once): the survivor then knows of none of the streams it did not place itself.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.ledger import Ledger, stream
from tests.serving import Serving, end, start

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200)]

NUM_STREAMS = 16
NEW_TOKENS = 80
CONFIG = {
    "model": "demo",
    "workers": {"executor": "paced", "prefill_workers": 2, "decode_workers": 2},
    "paced": {"decode_base_s": 0.025},
    "router": {"disaggregate": "always"},
}


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    server = start(tmp_path_factory.mktemp("routers"), "--routers", "2", config=CONFIG)
    yield server
    end(server)


def routers(serving: Serving) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in serving.status()["routers"]}


def wait_until_ready(serving: Serving, num_routers: int = 2) -> dict[str, dict[str, Any]]:
    deadline_s = time.monotonic() + 30.0
    while True:
        rows = routers(serving)
        if len(rows) == num_routers and all(row["ready"] and len(row["peers"] or []) == num_routers - 1 for row in rows.values()):
            return rows
        assert time.monotonic() < deadline_s, rows
        time.sleep(0.05)


async def send(serving: Serving, number: int) -> Ledger:
    body = {"model": "demo", "prompt": f"number {number} " * 40, "max_tokens": NEW_TOKENS, "seed": number, "ignore_eos": True}
    return await stream(serving.host, serving.port, "/v1/completions", body)


async def test_every_request_completes_when_the_router_in_use_is_killed_and_the_other_knows_the_bookings(serving: Serving) -> None:
    rows = await asyncio.to_thread(wait_until_ready, serving)
    used = next(name for name, row in rows.items() if row["is_current"])
    other = next(name for name in rows if name != used)
    first = [asyncio.create_task(send(serving, number)) for number in range(NUM_STREAMS)]
    deadline_s = time.monotonic() + 20.0
    while True:  # all are placed by the one, and the other has heard of them
        rows = await asyncio.to_thread(routers, serving)
        told = sum(peer["bookings"] for peer in rows[other]["peers"])
        if rows[used]["bookings"] == told == NUM_STREAMS:
            break
        assert time.monotonic() < deadline_s, f"of {NUM_STREAMS} bookings of {used} {other} knows {told}: {rows}"
        await asyncio.sleep(0.01)
    os.kill(rows[used]["pid"], signal.SIGKILL)
    second = [asyncio.create_task(send(serving, number)) for number in range(100, 100 + NUM_STREAMS)]
    await asyncio.sleep(0.3)
    document = await asyncio.to_thread(serving.status)
    assert document["router"]["name"] == other and document["router"]["ready"]
    taken_over = document["router"]["detail"]
    held = sum(row["booked_sequences"] for row in taken_over["workers"])
    own = taken_over["bookings"]
    print(f"killed {used}; {other} placed {own} and holds {held} sequences, {held - own} of them of {used}")
    assert held > own, "it knows what the dead one gave out"
    ledgers = await asyncio.gather(*first, *second)
    assert not [problem for ledger in ledgers for problem in ledger.broken_promises]
    assert [ledger.num_tokens for ledger in ledgers] == [NEW_TOKENS] * len(ledgers)
    assert serving.metric("baton_fallbacks_total", kind="least_work") == 0
    rows = await asyncio.to_thread(wait_until_ready, serving)
    assert set(rows) == {used, other}, "a fresh one stands in its place"
    serving.wait_at_rest(num_workers=4)
    assert [row["bookings"] for row in routers(serving).values()] == [0, 0]
