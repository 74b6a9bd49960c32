"""A link that is worse than loopback: a proxy between decode workers and the data ports of prefill workers, in the test's process.

    decode ──► port of the proxy ──(late, throttled, reset at random)──► data port of a prefill worker

A worker asks for its port as it starts (tests/cluster/serve_with_faults.py), so each incarnation has one. The weather may change at
any time, and holds from the next piece on.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import Counter
from dataclasses import dataclass

from cluster.loop_thread import LoopThread

HOST = "127.0.0.1"
PIECE_BYTES = 16 << 10
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of no time: the peer sees ECONNRESET, not an end


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What happens to a connection's bytes on their way from the prefill worker, a piece of 16 KiB."""

    bytes_per_s: float = float("inf")
    delay_s_max: float = 0.0
    reset: float = 0.0  # probability
    seed: int = 0  # of what is random in it


FAIR = Weather()


class SlowLink:
    """Runs on a thread of its own until `close`. `counts`: connections, pieces, resets."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.weather = FAIR
        self._servers: list[asyncio.Server] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = LoopThread("slow-link")
        self.registrar_port: int = self._thread.run(self._start())

    @property
    def weather(self) -> Weather:
        return self._weather

    @weather.setter
    def weather(self, weather: Weather) -> None:
        self._weather = weather
        self._rng = random.Random(weather.seed)

    def close(self) -> None:
        self._thread.run(self._close())
        self._thread.close()

    async def _start(self) -> int:
        server = await asyncio.start_server(self._register, HOST, 0)
        self._servers.append(server)
        return _port_of(server)

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _register(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A line with the real port is answered by one with ours."""
        real_port = int(await reader.readline())

        async def link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._link(reader, writer, real_port)

        server = await asyncio.start_server(link, HOST, 0)
        self._servers.append(server)
        writer.write(f"{_port_of(server)}\n".encode())
        await writer.drain()
        writer.close()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, real_port: int) -> None:
        self.counts["connections"] += 1
        try:
            source_reader, source_writer = await asyncio.open_connection(HOST, real_port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, source_writer}
        self._writers |= both
        ways = [asyncio.create_task(_pass_on(reader, source_writer)), asyncio.create_task(self._weathered(source_reader, writer))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for end in both:
            end.close()
        self._writers -= both

    async def _weathered(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(PIECE_BYTES):
                self.counts["pieces"] += 1
                weather = self.weather
                if self._rng.random() < weather.reset:
                    self.counts["resets"] += 1
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                    writer.transport.abort()
                    return
                late_s = len(piece) / weather.bytes_per_s + self._rng.uniform(0.0, weather.delay_s_max)
                if late_s:
                    await asyncio.sleep(late_s)
                writer.write(piece)
                await writer.drain()
        except OSError:
            return  # one end has gone; the other one follows


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
    except OSError:
        return


def _port_of(server: asyncio.Server) -> int:
    return int(server.sockets[0].getsockname()[1])
