"""Connections between simulated processes: whole messages, in order, as late as over loopback. They end as TCP's do, and are dialed again.

killed      what the dead one had sent still arrives, then the others hear of the end; what was sent to it is lost
cut         what was on its way is lost on both sides, both hear of the end, and nobody gets through until it is mended
held        nothing is lost: messages arrive when the network lets them through, in order
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from protocol.links import REDIAL_FIRST_S, REDIAL_MAX_S, Link, Target
from protocol.wire import Identity
from simulator.loop import VirtualLoop

Pair = frozenset[str]  # names of two processes
NEVER_S = float("-inf")


class SimConnection:
    """One end of a connection. `on_close` is called once, unless this end's own process is dead."""

    __slots__ = ("_far", "_network", "held_until_s", "identity", "is_open", "is_told", "on_close", "on_message", "peer")

    def __init__(self, network: SimNetwork, identity: Identity, peer: Identity) -> None:
        self.identity = identity
        self.peer = peer
        self.is_open = True
        self.is_told = False  # of the end
        self.held_until_s = NEVER_S  # what is sent to this end arrives then at the earliest
        self.on_message: Callable[[SimConnection, Any], None] = _drop
        self.on_close: Callable[[SimConnection], None] = _ignore
        self._network = network
        self._far: SimConnection

    def send(self, message: object) -> None:
        """One message; silently dropped when the connection is over."""
        if self.is_open:
            far = self._far
            self._network.later(far, lambda: far.arrive(message))

    def send_all(self, messages: list[object]) -> None:
        """Several in one write."""
        if self.is_open:
            far = self._far

            def arrive() -> None:
                for message in messages:
                    far.arrive(message)

            self._network.later(far, arrive)

    def arrive(self, message: object) -> None:
        if self.is_open:
            self.on_message(self, message)

    def abort(self) -> None:
        """End it at once; what is on its way is lost."""
        self._network.end(self)

    def tell(self) -> None:
        """This end hears that it is over."""
        self.is_open = False
        if not self.is_told:
            self.is_told = True
            self.on_close(self)


class SimLinks:
    """As protocol.links.Links: dials a changing set of peers, and again while they stay in it."""

    def __init__(
        self,
        network: SimNetwork,
        identity: Identity,
        *,
        on_up: Callable[[str, Link], None],
        on_down: Callable[[str, int], None],
        on_message: Callable[[str, Any], None],
    ) -> None:
        self._network = network
        self._identity = identity
        self._on_up = on_up
        self._on_down = on_down
        self._on_message = on_message
        self._targets: dict[Target, None] = {}
        self._open: dict[str, SimConnection] = {}

    def set_targets(self, targets: list[Target]) -> None:
        """Dial what is new, drop what is gone."""
        before, self._targets = self._targets, dict.fromkeys(targets)
        for name, connection in list(self._open.items()):
            if all((t.name, t.epoch) != (name, connection.peer.epoch) for t in targets):
                connection.abort()
        for target in targets:
            if target not in before:
                self._dial(target, REDIAL_FIRST_S)

    def get(self, name: str) -> SimConnection | None:
        return self._open.get(name)

    def send(self, name: str, message: object) -> bool:
        connection = self._open.get(name)
        if connection is None or not connection.is_open:
            return False
        connection.send(message)
        return True

    async def close(self) -> None:
        self.set_targets([])

    def _dial(self, target: Target, pause_s: float) -> None:
        """A handshake takes a word there and one back."""
        self._network.loop.call_later(2 * self._network.latency_s, lambda: self._try(target, pause_s))

    def _try(self, target: Target, pause_s: float) -> None:
        if target not in self._targets or not self._network.is_running(self._identity):
            return
        connection = self._network.connect(self._identity, target)
        if connection is None:
            self._network.loop.call_later(pause_s, lambda: self._try(target, min(2 * pause_s, REDIAL_MAX_S)))
            return
        name = target.name
        connection.on_message = lambda _, message: self._on_message(name, message)
        connection.on_close = lambda ended: self._closed(ended, target)
        self._open[name] = connection
        self._on_up(name, connection)

    def _closed(self, connection: SimConnection, target: Target) -> None:
        if self._open.get(target.name) is connection:
            del self._open[target.name]
        self._on_down(target.name, target.epoch)
        if target in self._targets:
            self._dial(target, REDIAL_FIRST_S)


class SimNetwork:
    """All connections of one simulation. Processes go by their names; an epoch that was killed never speaks again."""

    def __init__(self, loop: VirtualLoop, *, latency_s: float) -> None:
        self.loop = loop
        self.latency_s = latency_s
        self._listeners: dict[str, tuple[Identity, Callable[[SimConnection], None]]] = {}
        self._ends: dict[str, dict[SimConnection, None]] = {}  # open ones, by the process at this end
        self._dead: set[tuple[str, int]] = set()
        self._cut: set[Pair] = set()
        self._held: dict[Pair, float] = {}  # until when

    def links(
        self,
        identity: Identity,
        secret: bytes,
        *,
        on_up: Callable[[str, Link], None],
        on_down: Callable[[str, int], None],
        on_message: Callable[[str, Any], None],
    ) -> SimLinks:
        """A protocol.links.MakeLinks. Nobody needs a secret here."""
        return SimLinks(self, identity, on_up=on_up, on_down=on_down, on_message=on_message)

    def listen(self, identity: Identity, accept: Callable[[SimConnection], None]) -> None:
        """`accept` gets the listener's end of each connection."""
        self._listeners[identity.name] = (identity, accept)

    def is_running(self, identity: Identity) -> bool:
        return (identity.name, identity.epoch) not in self._dead

    def connect(self, dialer: Identity, target: Target) -> SimConnection | None:
        """The dialer's end; None when nobody answers there, or another epoch does."""
        listener, accept = self._listeners.get(target.name, (None, _ignore))
        pair = frozenset((dialer.name, target.name))
        if listener is None or listener.epoch != target.epoch or pair in self._cut:
            return None
        near, far = SimConnection(self, dialer, listener), SimConnection(self, listener, dialer)
        near._far, far._far = far, near
        near.held_until_s = far.held_until_s = self._held.get(pair, NEVER_S)
        for end in (near, far):
            self._ends.setdefault(end.identity.name, {})[end] = None
        accept(far)
        return near

    def later(self, end: SimConnection, call: Callable[[], None]) -> None:
        """When a message sent now arrives at `end`."""
        due_s = self.loop.now + self.latency_s
        self.loop.call_at(due_s if due_s > end.held_until_s else end.held_until_s, call)

    def end(self, near: SimConnection) -> None:
        """Cut one connection: nothing arrives any more, both ends hear of it."""
        far = near._far
        self._forget(near)
        was_open, near.is_open, far.is_open = near.is_open, False, False
        if was_open:
            near.tell()
            self.loop.call_later(self.latency_s, far.tell)

    # --- faults ---

    def kill(self, identity: Identity) -> None:
        """The process is gone; its last words arrive."""
        self._dead.add((identity.name, identity.epoch))
        if identity.name in self._listeners and self._listeners[identity.name][0] == identity:
            del self._listeners[identity.name]
        for near in list(self._ends.get(identity.name, ())):
            if near.identity == identity:
                self._forget(near)
                near.is_open, near.is_told = False, True
                self.later(near._far, near._far.tell)

    def cut(self, one: str, other: str) -> int:
        """Until `mend`. Returns how many connections that ended."""
        self._cut.add(frozenset((one, other)))
        found = self._between(one, other)
        for near in found:
            self._forget(near)
            near.is_open = near._far.is_open = False
            for end in (near, near._far):
                self.loop.call_later(self.latency_s, end.tell)
        return len(found)

    def mend(self, one: str, other: str) -> None:
        self._cut.discard(frozenset((one, other)))

    def hold(self, one: str, other: str, seconds: float) -> None:
        """Nothing arrives between these two for so long."""
        until_s = self._held[frozenset((one, other))] = self.loop.now + seconds
        for near in self._between(one, other):
            for end in (near, near._far):
                end.held_until_s = max(end.held_until_s, until_s)

    def _between(self, one: str, other: str) -> list[SimConnection]:
        """The end at `one` of each open connection."""
        return [end for end in self._ends.get(one, ()) if end.peer.name == other]

    def _forget(self, near: SimConnection) -> None:
        for end in (near, near._far):
            self._ends.get(end.identity.name, {}).pop(end, None)


def _drop(_: SimConnection, __: object) -> None:
    return


def _ignore(_: SimConnection) -> None:
    return
