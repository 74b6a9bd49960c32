"""Runs beside other things on the machine: another run, somebody else's Ray, a user's folders of our names; and what is kept up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.processes import descendants, process_id, wait_gone
from tests.serving import START_TIMEOUT_S, Serving, end, environment, free_port, start

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

SMALL = {"model": "demo", "workers": {"executor": "paced", "prefill_workers": 1, "decode_workers": 1}}
ASK = {"model": "demo", "prompt": "Hello", "max_tokens": 4, "ignore_eos": True}

THEIR_RAY = """
import json, sys
import ray
from ray._private.state import actors

@ray.remote(num_cpus=0)
class Theirs:
    def __init__(self): self.count = 0
    def add(self):
        self.count += 1
        return self.count

options = {"num_cpus": 64, "include_dashboard": False, "log_to_driver": False, "object_store_memory": 80 << 20, "_temp_dir": sys.argv[1]}
context = ray.init(address="local", namespace="theirs", **options)
theirs = Theirs.options(name="theirs").remote()
print(context.address_info["gcs_address"], flush=True)
for _ in sys.stdin:
    count = ray.get(theirs.add.remote())  # first: then it is known to be alive
    alive = sorted(a["ActorClassName"] for a in actors().values() if a["State"] == "ALIVE")
    print(json.dumps({"count": count, "alive": alive}), flush=True)
"""


def until(happened: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (found := happened()):
        assert time.monotonic() < deadline_s, "did not happen in time"
        time.sleep(0.05)
    return found


class TheirRay:
    """Somebody else's cluster, in a process of its own, with one actor."""

    def __init__(self, directory: str) -> None:
        self.environment = {**environment(), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", THEIR_RAY, directory],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def ask(self) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("ask\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))


@pytest.fixture
def their_ray() -> Iterator[TheirRay]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="bt-", ignore_cleanup_errors=True) as directory:
        theirs = TheirRay(directory)
        below = descendants(theirs.process.pid)
        yield theirs
        assert theirs.process.stdin is not None and theirs.process.stdout is not None
        theirs.process.stdin.close()
        theirs.process.wait(timeout=30)
        theirs.process.stdout.close()
        assert wait_gone(below, timeout_s=10) == []


def serve_on(theirs: TheirRay, folder: Path) -> Serving:
    """`baton serve --ray-address`, ready."""
    port = free_port()
    file = folder / "cluster.yaml"
    file.write_text(json.dumps(SMALL))
    command = [sys.executable, "-m", "baton", "serve", "--config", str(file), "--port", str(port), "--ray-address", theirs.address]
    with open(folder / "serve.log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=theirs.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    serving = Serving(process=process, port=port, folder=folder, ready_s=0.0)
    began_s = time.monotonic()
    while not serving.is_ready():
        if process.poll() is not None or time.monotonic() - began_s > START_TIMEOUT_S:
            end(serving)
            raise AssertionError(serving.log[-4000:])
        time.sleep(0.1)
    return serving


def test_a_run_on_somebody_elses_ray_leaves_it_as_it_was(their_ray: TheirRay, tmp_path: Path) -> None:
    """Their actor keeps its state, none of ours is left, their Ray goes on. Fails with `ray stop`, or when Serve's controller stays."""
    assert their_ray.ask() == {"count": 1, "alive": ["Theirs"]}
    serving = serve_on(their_ray, tmp_path)
    try:
        assert serving.json("/v1/completions", ASK)["usage"]["completion_tokens"] == 4
        during = their_ray.ask()
        assert during["count"] == 2 and {"WorkerActor", "RouterHost", "DirectoryHost"} <= set(during["alive"])
        assert serving.stop() <= 15.0
        assert serving.process.returncode == 0, serving.log[-2000:]
    finally:
        end(serving)
    assert their_ray.ask() == {"count": 3, "alive": ["Theirs"]}


def test_a_second_run_from_a_folder_with_our_names_works_beside_the_first(serving: Serving, tmp_path: Path) -> None:
    """`router/` and `engine/` of the user's are in the way; both runs answer, ending one leaves the other, ~/.ray is not touched.

    Fails when workers get the user's folder first on their path, or when the two share a port of Ray's.
    """
    for name in ("router", "engine", "gateway", "cluster"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('the {name} of the user')\n")
    home = tmp_path / "home"
    home.mkdir()
    port = free_port()
    command = [str(Path(sys.executable).with_name("baton")), "serve", "--port", str(port), "--config", str(tmp_path / "cluster.yaml")]
    (tmp_path / "cluster.yaml").write_text(json.dumps(SMALL))
    variables = {**environment(), "HOME": str(home)}
    with open(tmp_path / "serve.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    second = Serving(process=process, port=port, folder=tmp_path, ready_s=0.0)
    try:
        until(lambda: second.is_ready() or process.poll() is not None, START_TIMEOUT_S)
        assert process.poll() is None, second.log[-4000:]
        for run in (serving, second):
            assert run.json("/v1/completions", ASK)["usage"]["completion_tokens"] == 4
        below = descendants(process.pid)
        assert second.stop() <= 15.0
        assert wait_gone(below, timeout_s=1.0) == []
        assert serving.json("/v1/completions", ASK)["usage"]["completion_tokens"] == 4
        assert not (home / ".ray").exists()
    finally:
        end(second)


def test_what_is_killed_is_there_again(tmp_path: Path) -> None:
    """A worker, the router, the directory and the gateway, each by SIGKILL, then the run itself: requests are answered after each,
    and with the run every process goes. Fails without keep_up, or when Ray's processes do not end with the run."""
    serving = start(tmp_path, config=SMALL)
    try:
        pids = {name: row["pid"] for name, row in serving.workers().items()}
        os.kill(pids["decode-0"], signal.SIGKILL)
        until(lambda: "decode-1" in _ready_workers(serving))
        assert _answers(serving)
        for title in ("ray::RouterHost", "ray::DirectoryHost", "ray::ServeReplica"):
            (killed,) = [p for p in descendants(serving.process.pid) if p.title.startswith(title)]
            killed.signal(signal.SIGKILL)
            until(lambda title=title, killed=killed: _another(serving, title, killed.pid))
            until(lambda: _answers(serving))
        below = descendants(serving.process.pid)
        me = process_id(serving.process.pid)
        assert me is not None and below
        serving.process.kill()
        serving.process.wait(timeout=10)
        assert [p.title for p in wait_gone(below, timeout_s=20.0)] == []
    finally:
        end(serving)


def _ready_workers(serving: Serving) -> list[str]:
    return [name for name, row in serving.workers().items() if row["state"] == "ready"]


def _another(serving: Serving, title: str, but_not: int) -> bool:
    return any(p.title.startswith(title) and p.pid != but_not for p in descendants(serving.process.pid))


def _answers(serving: Serving) -> bool:
    try:
        status, _ = serving.request("/v1/completions", ASK)
    except OSError:
        return False
    return status == 200


EMBEDDED = """
import json, os, sys, urllib.request
from cluster.build import start
from control.config import load_config

def ask(url):
    body = json.dumps({"model": "demo", "prompt": "Hello", "max_tokens": 4, "ignore_eos": True}).encode()
    request = urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))["usage"]["completion_tokens"]

if __name__ == "__main__":
    before, here = dict(os.environ), os.getcwd()
    for _ in range(2):
        with start(load_config({"http": {"port": 0}, "workers": {"executor": "paced"}})) as cluster:
            print(ask(cluster.url), sorted(cluster.worker_pids()), flush=True)
    assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
    assert os.getcwd() == here
    print("done", flush=True)
"""


@pytest.mark.slow
def test_a_program_starts_and_stops_a_cluster_twice(tmp_path: Path) -> None:
    """Embedded: its directory and environment are as before. Fails when Ray's module state or our variables outlive a run."""
    script = tmp_path / "embedded.py"
    script.write_text(EMBEDDED)
    ran = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert ran.stdout.splitlines() == ["4 ['decode-0', 'prefill-0']"] * 2 + ["done"], ran.stdout + ran.stderr[-3000:]
