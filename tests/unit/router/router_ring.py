"""Several router cores with one fleet, and between them a network whose every message the test holds in its hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from protocol.messages import Done, Place, PrefillDone, ServiceAddress
from protocol.peering import AskBookings, BookingNews, BookingSet
from protocol.worker import Role
from router.events import BatchBegun, BatchDue, Command, Event, FromGateway, FromPeer, PeerDown, PeerHungUp, PeerUp, Tick, ToPeers
from tests.unit.router.router_world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """One message on its way."""

    sender: str
    epoch: int  # of the sender
    receiver: str
    message: AskBookings | BookingSet | BookingNews


class Ring:
    """Routers router-0, router-1, ... that hear each other; `now` moves only when told. Messages wait in `flights`."""

    def __init__(self, num_routers: int, workers: dict[str, Role], **config: Any) -> None:
        self.workers = workers
        self.config = config
        self.now = 100.0
        self.flights: list[Flight] = []
        self.epochs = {f"router-{i}": 1 for i in range(num_routers)}
        self.worlds: dict[str, World] = {}
        self.batches_due: set[str] = set()
        for name in self.epochs:
            self._start(name)

    # --- life and death ---

    def kill(self, name: str) -> None:
        del self.worlds[name]
        self.batches_due.discard(name)
        for other in self.worlds:
            self.on(other, PeerDown(peer=name, epoch=self.epochs[name]))
            self.on(other, PeerHungUp(peer=name))

    def revive(self, name: str) -> None:
        self.epochs[name] += 1
        self._start(name)

    def cut(self, hearer: str, speaker: str) -> None:
        """The link over which `hearer` hears `speaker` breaks and is dialed again; what was on it is lost."""
        asked = [f for f in self.flights if (f.sender, f.receiver) == (hearer, speaker) and isinstance(f.message, AskBookings)]
        told = [f for f in self.flights if (f.sender, f.receiver) == (speaker, hearer) and not isinstance(f.message, AskBookings)]
        self.flights = [f for f in self.flights if f not in asked and f not in told]
        self.on(hearer, PeerDown(peer=speaker, epoch=self.epochs[speaker]))
        self.on(speaker, PeerHungUp(peer=hearer))
        self.on(hearer, PeerUp(peer=speaker, epoch=self.epochs[speaker]))

    def _start(self, name: str) -> None:
        services = tuple(ServiceAddress(name=n, kind="router", epoch=e, host="127.0.0.1", port=1, pid=1) for n, e in self.epochs.items())
        seed = int(name.removeprefix("router-"))
        self.worlds[name] = World(self.workers, name=name, seed=seed, services=services, now=self.now, **self.config)
        for other in [n for n in self.worlds if n != name]:
            self.on(name, PeerUp(peer=other, epoch=self.epochs[other]))
            self.on(other, PeerUp(peer=name, epoch=self.epochs[name]))

    # --- events ---

    def on(self, name: str, event: Event) -> list[Command]:
        world = self.worlds[name]
        world.now = self.now
        commands = world.on(event)
        for command in commands:
            if isinstance(command, ToPeers):
                self.flights += [
                    Flight(sender=name, epoch=self.epochs[name], receiver=peer, message=command.message) for peer in command.peers
                ]
            elif isinstance(command, BatchBegun):
                self.batches_due.add(name)
        return commands

    def place(self, name: str, request: Place, gateway: str = "gateway-0") -> list[Command]:
        return self.on(name, FromGateway(gateway=gateway, message=request))

    def prefill_done(self, name: str, request: Place) -> None:
        self.on(name, FromGateway(gateway="gateway-0", message=PrefillDone(request_id=request.request_id, attempt=request.attempt)))

    def done(self, name: str, request: Place) -> None:
        message = Done(request_id=request.request_id, attempt=request.attempt, num_output_tokens=1)
        self.on(name, FromGateway(gateway="gateway-0", message=message))

    # --- the network ---

    def flush(self) -> None:
        for name in sorted(self.batches_due):
            self.on(name, BatchDue())
        self.batches_due.clear()

    def deliver(self, flight: Flight) -> None:
        if flight.receiver in self.worlds and self.epochs[flight.sender] == flight.epoch and flight.sender in self.worlds:
            self.on(flight.receiver, FromPeer(peer=flight.sender, epoch=flight.epoch, message=flight.message))

    def settle(self) -> None:
        """Deliver everything, in order, until nobody has anything to say."""
        self.flush()
        while self.flights:
            self.deliver(self.flights.pop(0))
            self.flush()

    def tick(self, seconds: float = 0.05) -> None:
        self.now += seconds
        for name in list(self.worlds):
            self.on(name, Tick())

    def check(self) -> None:
        for world in self.worlds.values():
            world.core.check()

    def booked(self, name: str) -> dict[str, tuple[int, int, int, int]]:
        """By worker: prefills, tokens to prefill, sequences, KV tokens that the router believes given out, by whomever."""
        tallies = {w.worker_id: w.booked for w in self.worlds[name].core.fleet}
        return {w: (t.num_prefills, t.prefill_tokens, t.num_sequences, t.kv_tokens) for w, t in tallies.items() if not t.is_zero}

    @property
    def is_empty(self) -> bool:
        """Nobody believes that anything is given out."""
        return all(world.is_empty and len(world.core.peers.bookings) == 0 for world in self.worlds.values())
