"""Connections of the simulator end as TCP's do, and what the gateway does about an end that may have swallowed its words."""

from __future__ import annotations

from typing import Any

import pytest

from control.config import load_config
from protocol.links import Target
from protocol.messages import Ping
from protocol.request import Request, SamplingParams, token_buffer
from protocol.wire import Identity
from simulator.faulty_cluster import ROUTER, FaultyCluster
from simulator.loop import VirtualLoop
from simulator.routed_cluster import GATEWAY, MODEL_ID
from simulator.sim_network import SimConnection, SimNetwork

pytestmark = pytest.mark.pure

LATENCY_S = 0.001
SERVER = Identity(name="server", kind="worker", epoch=1)


class Pair:
    """A client that dials a server, and what each hears and when."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.network = SimNetwork(self.loop, latency_s=LATENCY_S)
        self.heard: list[tuple[float, str, Any]] = []
        self.accepted: list[SimConnection] = []
        self.network.listen(SERVER, self._accept)
        self.links = self.network.links(
            Identity(name="client", kind="gateway", epoch=1),
            b"",
            on_up=lambda name, _: self._note("client", "up"),
            on_down=lambda name, epoch: self._note("client", "down"),
            on_message=lambda name, message: self._note("client", message.nonce),
        )
        self.links.set_targets([Target(name="server", epoch=1, host="", port=1)])

    def _note(self, who: str, what: Any) -> None:
        self.heard.append((round(self.loop.now, 4), who, what))

    def _accept(self, connection: SimConnection) -> None:
        self.accepted.append(connection)
        connection.on_message = lambda _, message: self._note("server", message.nonce)
        connection.on_close = lambda _: self._note("server", "down")

    def until(self, when_s: float) -> None:
        self.loop.call_at(when_s, lambda: None)
        self.loop.run(lambda: self.loop.now >= when_s, deadline_s=when_s)


def test_words_arrive_in_order_and_a_held_link_loses_none() -> None:
    """Seen to fail with a hold that does not outlast what is sent after it."""
    pair = Pair()
    pair.until(0.01)
    pair.links.send("server", Ping(nonce=1))
    pair.until(0.02)
    pair.network.hold("client", "server", 0.1)
    pair.links.send("server", Ping(nonce=2))
    pair.until(0.119)
    pair.links.send("server", Ping(nonce=3))
    pair.until(0.2)
    assert pair.heard == [(0.002, "client", "up"), (0.011, "server", 1), (0.12, "server", 2), (0.12, "server", 3)]


def test_a_cut_loses_what_is_on_its_way_and_both_hear_of_it() -> None:
    """Seen to fail with connections that stay open at the far end."""
    pair = Pair()
    pair.until(0.01)
    pair.links.send("server", Ping(nonce=1))
    pair.accepted[0].send(Ping(nonce=2))
    pair.network.cut("server", "client")
    pair.until(0.3)
    assert sorted(pair.heard[1:]) == [(0.011, "client", "down"), (0.011, "server", "down")] and pair.links.get("server") is None
    pair.network.mend("client", "server")
    pair.until(1.0)
    assert pair.heard[-1][1:] == ("client", "up") and pair.links.send("server", Ping(nonce=3))


def test_last_words_of_the_dead_arrive_and_another_epoch_is_another_peer() -> None:
    """Seen to fail with a kill that drops what was sent, and with targets known by their name alone."""
    pair = Pair()
    pair.until(0.01)
    pair.accepted[0].send(Ping(nonce=7))
    pair.network.kill(SERVER)
    pair.until(0.02)
    assert pair.heard[1:] == [(0.011, "client", 7), (0.011, "client", "down")]
    pair.network.listen(Identity(name="server", kind="worker", epoch=2), pair._accept)
    pair.until(2.0)
    assert pair.links.get("server") is None
    pair.links.set_targets([Target(name="server", epoch=2, host="", port=1)])
    pair.until(3.0)
    assert pair.links.get("server") is not None


@pytest.mark.parametrize("fault", ["stands still", "is cut off"])
def test_no_booking_outlives_its_request_where_the_router_missed_its_end(fault: str) -> None:
    """How: every answer ends while the router hears nothing, for longer than its gateway waits for a sign of life.

    Seen to fail with ends that are not told again: the bookings stood until their TTL, and the decode worker counted as full.
    """
    tree = {
        "workers": {"executor": "paced", "prefill_workers": 1, "decode_workers": 1, "num_kv_blocks": 256},
        "gateway": {"router_silent_s": 0.5},
    }
    cluster = FaultyCluster(load_config(tree), max_kept_kv_events=64, on_start=lambda process: None)
    gateway, loop = cluster.gateway, cluster.loop
    for number in range(8):
        request = Request(
            request_id=f"{number:032x}",
            model_id=MODEL_ID,
            prompt_token_ids=token_buffer(range(100)),
            sampling=SamplingParams(max_tokens=20, temperature=0.0),
            cache_root=b"r" * 16,
            arrival_s=0.0,
        )
        loop.call_at(1.0, lambda request=request: gateway.submit(request))  # type: ignore[misc]
    loop.run(lambda: loop.now > 1.2, deadline_s=2.0)
    assert len(gateway.live) == len(cluster.router.bookings) == 8
    if fault == "stands still":
        cluster.stop_router(2.0)
    else:
        cluster.network.cut(GATEWAY, ROUTER)
        loop.call_later(1.0, lambda: cluster.network.mend(GATEWAY, ROUTER))
    loop.run(lambda: loop.now > 5.0, deadline_s=6.0)
    assert {one.terminal for one in gateway.served.values()} == {"finished"}
    assert len(cluster.router.bookings) == 0
    cluster.router.check()
