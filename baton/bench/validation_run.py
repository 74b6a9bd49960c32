"""The live half of `baton bench validation`: two clusters that can be simulated, and runs of a trace on them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from baton.bench.live_runs import LiveRun, RunKey, TurnsPlan, take_turns
from baton.bench.load import Endpoint, LoadRun
from baton.bench.policy_run import NICENESS, operator_of
from baton.bench.policy_traffic import NUM_WORKERS, cluster_config
from baton.bench.servers import SERVED_NAME, ServerProcess, checkpoint_to_serve, configured_server
from baton.bench.switched import SwitchedCluster
from baton.bench.trace_traffic import TraceWorkload
from baton.bench.validation_model import Asked
from baton.progress import say, say_line
from control.config import ClusterConfig, load_config
from protocol.errors import ConfigError
from router.policies import label
from simulator.summary import Objective
from simulator.traces.generators import SharedPrompts, Unshared
from simulator.traces.trace import Trace

MAX_MODEL_LEN = 2048  # of the demo model
VOCAB_SIZE = 1000
TORCH_KV_BLOCKS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A live cluster, the virtual one that is to say what it does, and what both are asked."""

    name: str  # "paced-8+8"
    served: Mapping[str, object]  # what `baton serve` is told
    simulated: ClusterConfig
    calibrated_on: Asked
    validated_on: Asked
    objective: Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationPlan:
    """How long, how often, under what."""

    policies: tuple[str, ...]
    calibration_policy: str
    seconds: float  # of arrivals in a run
    num_repeats: int
    seed: int

    def seed_of(self, repeat: int) -> int:
        """Of a repeat's arrivals and prompts, live and simulated."""
        return self.seed * 1000 + repeat

    def trace(self, asked: Asked, repeat: int) -> Trace:
        return asked.trace(self.seconds, seed=self.seed_of(repeat), max_tokens=MAX_MODEL_LEN)


def paced_subject(num_workers: int, rate: float | None) -> Subject:
    """The cluster of `baton bench policies`. rate: requests a second of both traces; None: some three fifths of what it can do."""
    served, share = cluster_config(num_workers), num_workers / NUM_WORKERS
    unshared, shared = _prompts(unshared_tokens=700, shared_tokens=1000)
    return Subject(
        name=f"paced-{num_workers}+{num_workers}",
        served=served,
        simulated=load_config(served),
        calibrated_on=Asked(source=unshared, rate_per_s=rate or 20.0 * share, name="unshared"),
        validated_on=Asked(source=shared, rate_per_s=rate or 30.0 * share, name="shared"),
        objective=Objective(ttft_s=0.4, tpot_s=0.03),
    )


def torch_subject(model: str, folder: Path, rate: float | None, step_times: Path | None) -> Subject:
    """One prefill and one decode worker that compute, one thread each.

    step_times: sections of a cluster.yaml that pace a simulated worker as these are.

    Raises:
        ConfigError: no step times, or a model that cannot be had.
    """
    if step_times is None:
        raise ConfigError(
            "a simulation of workers that compute needs their step times; give --step-times FILE, which `baton calibrate` writes"
        )
    workers: dict[str, object] = {"prefill_workers": 1, "decode_workers": 1, "num_kv_blocks": TORCH_KV_BLOCKS, "seed": 0}
    router: dict[str, object] = {"disaggregate": "always", "prefix_pull": False}
    unshared, shared = _prompts(unshared_tokens=200, shared_tokens=300)
    return Subject(
        name=f"torch-{model.rpartition('/')[2]}-1+1",
        served={
            "model": {"path": str(checkpoint_to_serve(model, folder)), "max_model_len": MAX_MODEL_LEN},
            "workers": workers,
            "router": router,
        },
        simulated=load_config({"workers": workers | {"executor": "paced"}, "router": router}, file=step_times),
        calibrated_on=Asked(source=unshared, rate_per_s=rate or 1.0, name="unshared"),
        validated_on=Asked(source=shared, rate_per_s=rate or 1.5, name="shared"),
        objective=Objective(ttft_s=1.5, tpot_s=0.15),
    )


def _prompts(*, unshared_tokens: int, shared_tokens: int) -> tuple[Unshared, SharedPrompts]:
    """To calibrate on: nothing in common. To validate on: most of each prompt shared, as often as tools are in Toolbench."""
    unshared = Unshared(prompt=(unshared_tokens, unshared_tokens / 2), output=(16, 6))
    prompt = (shared_tokens, shared_tokens / 4)
    return unshared, SharedPrompts(name="shared", prompt=prompt, output=(12, 4), shared=0.85, key_portion=0.76, sharers=12, zipf=1.1)


@contextmanager
def live(subject: Subject, folder: Path) -> Iterator[LiveSubject]:
    """The cluster, gone at the end. folder: new, for its log and its files."""
    command = configured_server(subject.served, folder, niceness=NICENESS)
    with ServerProcess(command, log=folder / "server.log") as server:
        server.wait_ready()
        yield LiveSubject(SwitchedCluster(command.url, operator_of(folder)), Endpoint(url=command.url, model=SERVED_NAME))


class LiveSubject:
    """A running cluster that traces are sent to."""

    def __init__(self, cluster: SwitchedCluster, endpoint: Endpoint) -> None:
        self._cluster, self._endpoint = cluster, endpoint

    def runs(self, plan: ValidationPlan, asked: Asked, policies: Sequence[str], objective: Objective) -> list[LiveRun]:
        """The newest run of each policy and repeat; one that did not count was taken again once."""

        def workload_of(repeat: int) -> TraceWorkload:
            return TraceWorkload.of(plan.trace(asked, repeat), vocab_size=VOCAB_SIZE, seed=plan.seed_of(repeat))

        turns = TurnsPlan(
            policies=tuple(policies),
            num_repeats=plan.num_repeats,
            workload_of=workload_of,
            objective=objective,
            seed=plan.seed,
            num_retakes=1,
        )
        taken: dict[RunKey, LiveRun] = {}
        for run in take_turns(turns, self._cluster, self._endpoint, progress_of=_progress_of(asked.name)):
            taken[run.repeat, run.policy] = run
            if run.invalid:
                say_line(f"does not count: {asked.name}, {label(run.policy)}, repeat {run.repeat + 1}: {'; '.join(run.invalid)}")
        say("")
        return [taken[key] for key in sorted(taken)]


def _progress_of(trace: str) -> Callable[[str], Callable[[LoadRun], None] | None]:
    def progress(what: str) -> Callable[[LoadRun], None] | None:
        if not sys.stderr.isatty():
            return None
        return lambda run: say(f"{trace}: {what}; {len(run.requests)} of {run.workload.num_requests} sent, {run.num_in_flight} under way")

    return progress


__all__ = ["LiveSubject", "Subject", "ValidationPlan", "live", "paced_subject", "torch_subject"]
