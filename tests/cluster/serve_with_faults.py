"""`baton serve` with something between its workers and their KV transports: a program of tests/cluster/test_transfer_faults.py.

    python serve_with_faults.py CONFIG RATES REGISTRAR_PORT

RATES is a JSON file, read before each transfer: fields of kvtransfer.faulty.FaultRates, for every worker, and the seed of what they
draw, which begins anew when it changes. REGISTRAR_PORT is that of a
tests.cluster.slow_link, and 0 without one. Everything workers need of this file goes to them by value, with their WorkerSpec.
"""

from __future__ import annotations

import json
import random
import socket
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from cluster.build import serve
from control.config import load_config
from kvtransfer.faulty import FaultRates, FaultyTransport
from kvtransfer.transport import KVTransport, Ticket, Transfer
from protocol.kv import Endpoint


class ToldFaults(FaultyTransport):
    """Looks up what it shall do, and says that its data port is that of the link."""

    def __init__(self, inner: KVTransport, worker_id: str, *, rates_file: Path, registrar_port: int) -> None:
        super().__init__(inner, FaultRates(), random.Random())
        self._worker_id = worker_id
        self._seed = -1
        self._rates_file = rates_file
        self._registrar_port = registrar_port

    def start(self, transfer: Transfer) -> Ticket:
        told = json.loads(self._rates_file.read_text())
        seed = told.pop("seed", 0)
        if seed != self._seed:
            self._seed, self._rng = seed, random.Random(f"{self._worker_id} {self.name} {seed}")
        self.rates = FaultRates(**told)
        return super().start(transfer)

    def endpoint(self) -> Endpoint:
        said = super().endpoint()
        if not (said.port and self._registrar_port):
            return said
        with socket.create_connection(("127.0.0.1", self._registrar_port), timeout=10) as registrar:
            registrar.sendall(f"{said.port}\n".encode())
            with registrar.makefile() as answer:
                return replace(said, port=int(answer.readline()))


def wrap(rates_file: Path, registrar_port: int, worker_id: str, transport: KVTransport) -> KVTransport:
    return ToldFaults(transport, worker_id, rates_file=rates_file, registrar_port=registrar_port)


if __name__ == "__main__":
    config_file, rates, registrar = sys.argv[1:]
    serve(load_config(file=Path(config_file)), wrap_transport=partial(wrap, Path(rates), int(registrar)))
