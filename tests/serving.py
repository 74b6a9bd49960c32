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

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 15.0
REST_TIMEOUT_S = 20.0


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


def start(folder: Path, *arguments: str, config: Mapping[str, Any] | None = None, api_key: str | None = None, wait: bool = True) -> Serving:
    """Run `baton serve` on a free port with `config` as its YAML file (JSON is YAML)."""
    port = free_port()
    file = folder / "cluster.yaml"
    file.write_text(json.dumps(dict(config or {})))
    command = [sys.executable, "-m", "baton", "serve", "--config", str(file), "--port", str(port), *arguments]
    if api_key is not None:
        command += ["--api-key", api_key]
    started_s = time.monotonic()
    with open(folder / "serve.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    serving = Serving(process=process, port=port, folder=folder, ready_s=0.0, api_key=api_key)
    while wait and not serving.is_ready():
        if process.poll() is not None or time.monotonic() - started_s > START_TIMEOUT_S:
            end(serving)
            raise AssertionError(f"baton serve did not become ready (exit {process.returncode}):\n{serving.log[-4000:]}")
        time.sleep(0.1)
    serving.ready_s = time.monotonic() - started_s
    return serving


def end(serving: Serving) -> None:
    """For teardown: stop it kindly, then by force."""
    if serving.process.poll() is None:
        try:
            serving.stop()
        except subprocess.TimeoutExpired:
            os.killpg(serving.process.pid, signal.SIGKILL)
            serving.process.wait(timeout=10)


def environment() -> dict[str, str]:
    """Ours without what would redirect the server: another Ray, BATON_* variables, the Hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BATON_", "RAY_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
