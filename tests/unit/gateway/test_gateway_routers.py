"""A gateway between several routers: which one it asks, and what it does when that one dies, hangs or is not ready."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.routers import Routers
from protocol.messages import Done, Membership, ServiceAddress
from protocol.peering import RouterReadiness
from protocol.wire import Identity
from tests.unit.gateway.conftest import FakeRouter, until
from tests.unit.gateway.test_gateway_faults import ask, expected, metric
from tests.unit.router.router_world import place


@pytest.fixture
async def two(cluster: Any) -> AsyncIterator[tuple[Any, FakeRouter, FakeRouter]]:
    """The cluster with a second router; the one the gateway asks, and the other."""
    second = FakeRouter(list(cluster.workers.values()), cluster.directory.port, name="router-1")
    await second.start()
    routers = cluster.service.routers
    await until(lambda: [row.is_ready for row in routers.rows.values()] == [True, True])
    both = sorted((cluster.router, second), key=lambda r: r.name != routers.current.service.name)
    yield cluster, both[0], both[1]
    await second.kill()


async def answered(cluster: Any, timeout_s: float = 2.0) -> None:
    assert (await asyncio.wait_for(ask(cluster), timeout_s)).choices[0].message.content == expected(20)


def service(name: str, epoch: int = 1) -> ServiceAddress:
    return ServiceAddress(name=name, kind="router", epoch=epoch, host="127.0.0.1", port=1, pid=1)


async def chosen(gateway: str, readiness: dict[str, bool | None]) -> str | None:
    """Whom this gateway asks, given what routers said; None: not linked."""
    identity = Identity(name=gateway, kind="gateway", epoch=1)
    routers = Routers(identity, b"", silent_s=2.0, on_up=lambda: None, on_lost=lambda _: None, on_message=lambda _: None)
    routers.follow(Membership(version=1, workers=(), services=tuple(service(name) for name in readiness)))
    for name, is_ready in readiness.items():
        if is_ready is not None:
            routers._receive(name, RouterReadiness(is_ready=is_ready, reason=""))
    found = routers.current
    await routers.close()
    return None if found is None else found.service.name


async def test_gateways_spread_over_the_ready_routers_and_each_keeps_its_own() -> None:
    """300 gateways, three routers. When one is not ready only its own gateways go elsewhere.

    Seen to fail with the gateway's name left out of the hash, and with `is_ready` left out of the preference.
    """
    all_ready: dict[str, bool | None] = {f"router-{i}": True for i in range(3)}
    before = {f"gateway-{i}": await chosen(f"gateway-{i}", all_ready) for i in range(300)}
    assert all(Counter(before.values())[name] > 70 for name in all_ready)
    for lost in (False, None):
        after = {g: await chosen(g, all_ready | {"router-1": lost}) for g in before}
        assert {g for g in before if after[g] != before[g]} == {g for g in before if before[g] == "router-1"}
        assert "router-1" not in after.values()


async def test_one_that_is_not_ready_is_better_than_none() -> None:
    """Seen to fail with only ready ones counted as usable."""
    assert await chosen("gateway-0", {"router-0": None, "router-1": False}) == "router-1"
    assert await chosen("gateway-0", {"router-0": None}) is None


async def test_requests_queued_at_a_router_that_dies_are_asked_again_at_the_other(two: Any) -> None:
    """Seen to fail with `_lose` left out of `_down`."""
    cluster, first, second = two
    first.assign = False
    waiting = asyncio.create_task(answered(cluster, 5))
    await until(lambda: first.places)
    assert not second.places
    await first.kill()
    await waiting
    assert [p.request_id for p in second.places] == [p.request_id for p in first.places]
    assert await metric(cluster, 'baton_fallbacks_total{kind="least_work"}') == 0
    await until(lambda: any(isinstance(m, Done) for m in second.told))


async def test_a_router_whose_connection_is_closing_is_not_asked_again_and_again(two: Any) -> None:
    """How: connections are closed, and nobody has been told yet: the other is asked, then none is there to be asked.

    Seen to fail with `current` kept when nothing can be sent to it: no router was asked, the request asked at once again, and for ever.
    """
    cluster, first, second = two
    routers = cluster.service.routers
    await lose(routers, first.name)
    asked = routers.place(place(1))
    assert asked is not None and asked.service.name == second.name
    await lose(routers, second.name)
    assert routers.place(place(2)) is None
    assert not routers.can_ask_another(place(2).request_id)


async def lose(routers: Routers, name: str) -> None:
    """The connection is lost; whoever keeps the link hears it in the next turn of the loop."""
    connection = routers._links.get(name)
    assert connection is not None
    connection.abort()
    await asyncio.sleep(0)
    assert not connection.is_open and routers.is_linked(name)


async def test_a_router_that_hangs_costs_one_acknowledgement_time_and_the_next_request_nothing(two: Any) -> None:
    """Its socket stays open. Seen to fail with `can_ask_another` always false: least_work places them."""
    cluster, first, second = two
    first.hung = True
    started_s = asyncio.get_running_loop().time()
    await answered(cluster)
    assert asyncio.get_running_loop().time() - started_s >= 0.2
    await answered(cluster)
    assert len(second.places) == 2
    assert await metric(cluster, 'baton_fallbacks_total{kind="least_work"}') == 0


async def test_a_router_that_says_it_is_not_ready_is_left_at_once_with_what_waits_there(two: Any) -> None:
    """And its end is told to the router that placed it. Seen to fail with `_lose` left out of `_take_readiness`."""
    cluster, first, second = two
    first.assign = False
    waiting = asyncio.create_task(answered(cluster, 5))
    await until(lambda: first.places)
    first.say("its event loop stood still for 1.0 s")
    await waiting
    assert len(second.places) == 1
    await until(lambda: any(isinstance(m, Done) for m in second.told))
    assert not first.told
    first.assign = True
    first.say("")
    await until(lambda: cluster.service.routers.current.service.name == first.name)
    await answered(cluster)
    assert len(first.places) == 2


async def test_when_no_router_is_ready_one_is_asked_all_the_same_and_that_is_said(two: Any) -> None:
    """Seen to fail with the count left out of `_perform`."""
    cluster, first, second = two
    for router in (first, second):
        router.say("waits for 9 KV events of workers, the limit is 5")
    await until(lambda: not any(row.is_ready for row in cluster.service.routers.rows.values()))
    await answered(cluster)
    assert len(first.places) == 1
    assert await metric(cluster, 'baton_fallbacks_total{kind="unready_router"}') == 1
    async with cluster.http.get("/status") as response:
        status = await response.json()
    assert status["ready"], "requests are answered"
    assert [(r["name"], r["ready"], r["reason"]) for r in status["routers"]] == [
        (name, False, "waits for 9 KV events of workers, the limit is 5") for name in ("router-0", "router-1")
    ]
    assert [r["name"] for r in status["routers"] if r["is_current"]] == [first.name] == [status["router"]["name"]]
