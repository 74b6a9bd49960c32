"""A cluster as a user starts it: `baton serve` in a process of its own, and what the tests ask it over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 15.0
REST_TIMEOUT_S = 60.0  # a fresh worker has imported torch by then on a loaded machine
KILLED_ON_PURPOSE = {"stable_after_s": 0.2, "max_young_deaths": 1000}  # the supervisor's patience with tests that kill again and again


@dataclass(slots=True, kw_only=True)
class Serving:
    """One running server. `ready_s` is the time from the start of the process to the first 200 of /ready."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    ready_s: float
    host: str = "127.0.0.1"
    api_key: str | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "serve.log").read_text(errors="replace")

    def request(self, path: str, body: bytes | Mapping[str, Any] | None = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of one exchange; a mapping is sent as JSON. Never raises for a 4xx or 5xx."""
        content = json.dumps(body).encode() if isinstance(body, Mapping) else body
        sent = {"Content-Type": "application/json", **headers}
        if self.api_key is not None:
            sent.setdefault("Authorization", f"Bearer {self.api_key}")
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data=content, headers=sent), timeout=60) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as refusal:
            return refusal.code, refusal.read()

    def json(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        status, answer = self.request(path, body)
        assert status == 200, f"{path}: {status} {answer[:500]!r}"
        return json.loads(answer)

    def status(self) -> dict[str, Any]:
        return dict(self.json("/status"))

    def workers(self) -> dict[str, dict[str, Any]]:
        """Rows of /status by name of the worker."""
        return {row["worker_id"]: row for row in self.status()["workers"]}

    def counter(self, name: str) -> int:
        """Sum of one of the workers' counters over the workers that live now."""
        return sum(int(row["counters"].get(name, 0)) for row in self.workers().values())

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a metric that carry these labels."""
        text = self.request("/metrics")[1].decode()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())

    def wait_at_rest(self, *, num_workers: int) -> dict[str, dict[str, Any]]:
        """Rows of the workers once nothing is held for any request: I3, printed for every worker.

        Raises:
            AssertionError: after REST_TIMEOUT_S, with what is still held.
        """
        deadline_s = time.monotonic() + REST_TIMEOUT_S
        held = ["no answer"]
        while held and time.monotonic() < deadline_s:
            time.sleep(0.1)
            document = self.status()
            held = still_held(document, num_workers)
        assert not held, f"not at rest after {REST_TIMEOUT_S:.0f} s: {held}"
        for row in document["workers"]:
            blocks = row["kv_blocks"]
            print(
                f"{row['worker_id']}: free {blocks['free']} + owned {blocks['owned']} + leased {blocks['leased']} "
                f"+ cached {blocks['cached']} = total {blocks['total']}"
            )
        return {row["worker_id"]: row for row in document["workers"]}

    def is_ready(self) -> bool:
        try:
            return self.request("/ready")[0] == 200
        except OSError:
            return False

    def stop(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Send the signal and wait for the end; seconds it took."""
        started_s = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(timeout=STOP_TIMEOUT_S + 5)
        return time.monotonic() - started_s


def start(
    folder: Path,
    *arguments: str,
    config: Mapping[str, Any] | None = None,
    api_key: str | None = None,
    wait: bool = True,
    script: Path | None = None,
) -> Serving:
    """Run `baton serve` on a free port with `config` as its YAML file (JSON is YAML); or `script`, given that file and the arguments."""
    port = free_port()
    file = folder / "cluster.yaml"
    file.write_text(json.dumps({**(config or {}), **({"http": {"port": port}} if script else {})}))
    command = [sys.executable, "-m", "baton", "serve", "--config", str(file), "--port", str(port), *arguments]
    if script is not None:
        command = [sys.executable, "-P", str(script), str(file), *arguments]
    if api_key is not None:
        command += ["--api-key", api_key]
    started_s = time.monotonic()
    with open(folder / "serve.log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    serving = Serving(process=process, port=port, folder=folder, ready_s=0.0, api_key=api_key)
    while wait and not serving.is_ready():
        if process.poll() is not None or time.monotonic() - started_s > START_TIMEOUT_S:
            end(serving)
            raise AssertionError(f"baton serve did not become ready (exit {process.returncode}):\n{serving.log[-4000:]}")
        time.sleep(0.1)
    serving.ready_s = time.monotonic() - started_s
    return serving


def still_held(document: Mapping[str, Any], num_workers: int) -> list[str]:
    """What keeps a cluster from being at rest, by its own words; the sum of I3 is checked whether it is or not."""
    found = []
    ready = [row for row in document["workers"] if row["state"] == "ready" and row["kv_blocks"] is not None]
    if len(ready) != num_workers:
        found.append(f"{len(ready)} of {num_workers} workers are ready")
    for row in ready:
        blocks, queue = row["kv_blocks"], row["queue"]
        parts = sum(blocks[kind] for kind in ("free", "owned", "leased", "cached"))
        assert parts == blocks["total"] and blocks["unaccounted"] == 0, f"{row['worker_id']} breaks the conservation law: {blocks}"
        if blocks["owned"] or blocks["leased"] or queue["waiting"] or queue["running"]:
            found.append(f"{row['worker_id']} holds {blocks} {queue}")
    router = document["router"]["detail"]
    if router is None:
        found.append(f"router {document['router']['state']}")
    elif router["bookings"] or router["stranded"] or any(queue["waiting"] for queue in router["queues"].values()):
        found.append(f"router holds {router['bookings']} bookings, {router['stranded']} stranded, queues {router['queues']}")
    return found


def end(serving: Serving) -> None:
    """For teardown: stop it kindly, then by force."""
    if serving.process.poll() is None:
        try:
            serving.stop()
        except subprocess.TimeoutExpired:
            os.killpg(serving.process.pid, signal.SIGKILL)
            serving.process.wait(timeout=10)


def environment(folder: Path | None = None) -> dict[str, str]:
    """Ours without what would redirect the server: another Ray, BATON_* variables, the Hub. With a folder, its run file is there only."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BATON_", "RAY_"))}
    found_in = {} if folder is None else {"XDG_RUNTIME_DIR": str(folder)}
    return {**kept, **found_in, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
