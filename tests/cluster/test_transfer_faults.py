"""KV transfers broken in every way while at least five requests are in PULLING: all of them finish with the tokens of the undisturbed run.

One prefill and one decode worker, paced: their tokens are a hash of what they read from their KV blocks, so one wrong byte shows. Pulls
are held in flight by a proxy that throttles the data port (tests/cluster/slow_link.py), or by transfers that start late
(kvtransfer.faulty in the workers, tests/cluster/serve_with_faults.py). That there are five is read from /status, the decode worker's own
word, right before the fault; what the fault did is read from the workers' counters after it. The judge of the streams is
tests/cluster/ledger.py. At rest nothing is held, and in a run in fair weather that follows all KV is handed off again.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.worker_build import WRAPPED_NOTE
from tests.cluster.ledger import Ledger, difference, stream
from tests.cluster.slow_link import FAIR, SlowLink, Weather
from tests.serving import KILLED_ON_PURPOSE, Serving, end, start

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

SCRIPT = Path(__file__).with_name("serve_with_faults.py")
NUM_STREAMS = 12
NEW_TOKENS = 24
LEAST_PULLING = 5
PHASE_TIMEOUT_S = 30.0
RUN_TIMEOUT_S = 60.0  # several times what any run here takes, less than one that hangs would
FAR_DEADLINE_S = 2.0  # of a pull over the slow link
NEAR_DEADLINE_S = 8.0
STANDSTILL_S = 10.0
LEASE_S = 2.0
NUM_KV_BLOCKS = 500  # for all prompts of a run (321); two runs write every block anew that nobody keeps

CONFIG: dict[str, Any] = {
    "model": "demo",
    "workers": {"executor": "paced", "prefill_workers": 1, "decode_workers": 1, "lease_s": LEASE_S, "num_kv_blocks": NUM_KV_BLOCKS},
    "paced": {"prefill_token_s": 0.00002},
    "router": {"disaggregate": "always"},
    "supervisor": KILLED_ON_PURPOSE,
}
CREEPING = Weather(bytes_per_s=200e3)  # the KV of one prompt takes seconds
HELD_BACK = {"stall": 1.0, "stall_s_min": 2.5, "stall_s_max": 4.0}
LOSSY = {
    **{"stall": 1.0, "stall_s_min": 0.9, "stall_s_max": 1.3, "delay": 1.0, "delay_s_max": 0.3},
    **{"corrupt": 0.4, "truncate": 0.2, "misplace": 0.2, "cut": 0.1, "drop": 0.1, "duplicate": 0.6},
}


@dataclass(slots=True, kw_only=True)
class Faulty:
    """A cluster whose transfers can be disturbed, and how its streams end when they are not."""

    serving: Serving
    rates_file: Path
    link: SlowLink | None
    undisturbed: list[Ledger]

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Of every transfer that starts from now on: fields of kvtransfer.faulty.FaultRates, and a seed."""
        fresh = self.rates_file.with_suffix(".new")
        fresh.write_text(json.dumps(dict(rates)))
        fresh.replace(self.rates_file)

    def set_weather(self, weather: Weather) -> None:
        if self.link is not None:
            self.link.weather = weather

    async def workers(self) -> dict[str, dict[str, Any]]:
        """Rows of /status by role: of those that are ready where there is a choice."""
        rows = (await asyncio.to_thread(self.serving.workers)).values()
        return {row["role"]: row for row in sorted(rows, key=lambda row: bool(row["state"] == "ready"))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What /status said before and after a disturbed run, and what its users saw."""

    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]
    ledgers: list[Ledger]
    num_begun_again: int = 0  # attempts after a lost one

    def survived(self, role: str) -> bool:
        return bool(self.before[role]["pid"] == self.after[role]["pid"])

    def grown(self, role: str, counter: str) -> int:
        """Of a worker that came later: all of it."""
        was = self.before[role]["counters"][counter] if self.survived(role) else 0
        return int(self.after[role]["counters"][counter]) - int(was)


Run = asyncio.Task[list[Ledger]]
Fault = Callable[[Faulty, Run], Awaitable[None]]


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """Shared memory, and tcp when that fails."""
    yield from serve(tmp_path_factory.mktemp("near"), {"kv_transport": "auto", "digest_mode": "full"}, NEAR_DEADLINE_S)


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """Nothing but tcp, through the slow link; a pull that broke off is made once more."""
    transport = {"kv_transport": "tcp", "digest_mode": "full", "kv_load_failure_policy": "retry"}
    yield from serve(tmp_path_factory.mktemp("far"), transport, FAR_DEADLINE_S, link=SlowLink())


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """Where KV that does not come ends the request."""
    yield from serve(tmp_path_factory.mktemp("failing"), {"kv_load_failure_policy": "fail"}, NEAR_DEADLINE_S)


def serve(folder: Path, transport: dict[str, Any], pull_deadline_s: float, link: SlowLink | None = None) -> Iterator[Faulty]:
    rates_file = folder / "rates.json"
    rates_file.write_text("{}")
    config = {**CONFIG, "workers": {**CONFIG["workers"], "pull_deadline_s": pull_deadline_s}, "transport": transport}
    registrar_port = 0 if link is None else link.registrar_port
    serving = start(folder, str(rates_file), str(registrar_port), config=config, script=SCRIPT)
    with ThreadPoolExecutor(1) as thread:  # where no test's event loop is
        undisturbed = thread.submit(asyncio.run, play(serving, "undisturbed")).result()
    assert all(WRAPPED_NOTE in row["notes"] for row in serving.workers().values()), "nobody shall take this for an ordinary cluster"
    yield Faulty(serving=serving, rates_file=rates_file, link=link, undisturbed=undisturbed)
    end(serving)
    if link is not None:
        link.close()


# --- a worker dies and another takes its place; the other side goes on as it was --------------------------------------


async def test_source_dies_while_blocks_are_copied_out_of_its_memory(near: Faulty) -> None:
    """The memory outlives its owner; nobody reads it once the death is known. Seen to fail with `Session.has_ended` always False."""
    seen = await disturb(near, "source dies", kill("prefill"), rates={"stall": 1.0, "stall_s_min": 1.5, "stall_s_max": 2.5})
    assert seen.grown("decode", "pull_failures_peer_lost") >= LEAST_PULLING and seen.grown("decode", "recomputes") >= LEAST_PULLING
    assert seen.survived("decode") and not seen.survived("prefill")


@pytest.mark.slow
async def test_source_dies_while_blocks_are_on_the_wire(far: Faulty) -> None:
    """What is pulled once more finds nobody. Seen to fail with a lost connection taken for the end of a pull (digests caught it)."""
    seen = await disturb(far, "source dies", kill("prefill"), weather=CREEPING)
    assert seen.grown("decode", "pull_failures_peer_lost") >= LEAST_PULLING and seen.grown("decode", "pulls_again") >= LEAST_PULLING
    assert seen.grown("decode", "recomputes") >= LEAST_PULLING
    assert seen.survived("decode") and not seen.survived("prefill")


@pytest.mark.slow
async def test_target_dies_and_its_source_has_its_blocks_back(near: Faulty) -> None:
    """At once, long before their leases end: the gateway cancels what it begins again elsewhere. Seen to fail without that Cancel."""
    seen = await disturb(near, "target dies", kill("decode"), rates=HELD_BACK)
    assert seen.survived("prefill") and not seen.survived("decode")
    assert seen.num_begun_again >= LEAST_PULLING and seen.grown("prefill", "leases_expired") == 0


@pytest.mark.slow
async def test_target_hangs_and_its_source_has_its_blocks_back(near: Faulty) -> None:
    """A worker that stands still renews no lease, and nobody tells of its end. Then it dies. Seen to fail with leases that never end."""

    async def hang_then_die(faulty: Faulty, run: Run) -> None:
        target, source = (await faulty.workers())["decode"], (await faulty.workers())["prefill"]
        least = source["counters"]["leases_expired"] + LEAST_PULLING
        os.kill(target["pid"], signal.SIGSTOP)
        try:
            async with asyncio.timeout(3 * LEASE_S):
                while source["counters"]["leases_expired"] < least or source["kv_blocks"]["leased"]:
                    await asyncio.sleep(0.1)
                    source = (await faulty.workers())["prefill"]
        finally:
            os.kill(target["pid"], signal.SIGKILL)

    seen = await disturb(near, "target hangs", hang_then_die, rates=HELD_BACK)
    assert seen.survived("prefill") and not seen.survived("decode")


@pytest.mark.slow
async def test_target_comes_back_after_its_leases_and_reads_nothing_of_what_was_written_since(near: Faulty) -> None:
    """Other prompts have taken the offered blocks when its pulls begin.

    Seen to fail with wrong tokens where neither generations nor digests are compared; either is enough.
    """

    async def sleep_while_others_work(faulty: Faulty, run: Run) -> None:
        pid = (await faulty.workers())["decode"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(3 * LEASE_S):
                while (await faulty.workers())["prefill"]["kv_blocks"]["leased"]:
                    await asyncio.sleep(0.05)
            for others in ("others", "and others"):
                ledgers = await play(faulty.serving, others, max_tokens=1)  # which no decode worker has a part in
                assert not any(ledger.broken_promises for ledger in ledgers)
        finally:
            os.kill(pid, signal.SIGCONT)

    seen = await disturb(near, "target sleeps", sleep_while_others_work, rates=HELD_BACK, least_pulling=NUM_STREAMS)
    assert seen.grown("decode", "pull_failures_stale_generation") >= LEAST_PULLING
    assert seen.survived("prefill") and seen.survived("decode")


@pytest.mark.slow
async def test_under_fail_requests_whose_kv_does_not_come_end_with_the_reason(failing: Faulty) -> None:
    """And no others. Seen to fail with `Intake._give_up` not asking the policy."""
    seen = await disturb(failing, "source dies", kill("prefill"), rates=HELD_BACK, may_fail=True)
    errors = [str(error) for ledger in seen.ledgers for error in ledger.errors]
    assert len(errors) >= LEAST_PULLING and seen.grown("decode", "recomputes") == 0
    assert all("peer_lost" in error and "kv_load_failure_policy is fail" in error for error in errors), errors[0]
    assert all(ledger.num_done == 1 and len(ledger.errors) <= 1 for ledger in seen.ledgers), "each ends once"


# --- a worker stands still for a while --------------------------------------------------------------------------------


@pytest.mark.slow
async def test_source_stands_still_and_copies_out_of_its_memory_go_on(near: Faulty) -> None:
    """One-sided: every copy begins after the source has stopped, and every stream ends before it goes on.

    Seen to fail with a connection a pull.
    """
    held_longer = {"stall": 1.0, "stall_s_min": 3.0, "stall_s_max": 4.5}
    standstill = Standstill()
    seen = await disturb(near, "standstill", standstill, rates=held_longer, least_pulling=NUM_STREAMS)
    assert standstill.num_ended_meanwhile(seen.ledgers) == NUM_STREAMS
    assert seen.grown("decode", "pulls_shm") == NUM_STREAMS and seen.grown("decode", "recomputes") == 0
    assert seen.survived("decode") and seen.survived("prefill")


@pytest.mark.slow
async def test_source_stands_still_and_pulls_over_the_wire_meet_their_deadline(far: Faulty) -> None:
    """And streams go on without it: what was in flight ends by the deadlines of a pull and of another one, 4 s together.

    Seen to fail with `Pull.check` not looking at the deadline.
    """
    standstill = Standstill()
    seen = await disturb(far, "standstill", standstill, weather=CREEPING)
    assert standstill.num_ended_meanwhile(seen.ledgers) >= LEAST_PULLING
    assert seen.grown("decode", "pull_failures_deadline") >= LEAST_PULLING and seen.grown("decode", "recomputes") >= LEAST_PULLING
    assert seen.survived("decode") and seen.survived("prefill")


# --- the way between them is bad --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_link_that_is_late_throttled_and_reset(far: Faulty, seed: int) -> None:
    """Pulls come through, at once or once more, or end in time. Seen to fail with the policy retry never retrying."""
    rng = random.Random(seed)
    storm = Weather(bytes_per_s=rng.uniform(2e6, 8e6), delay_s_max=rng.uniform(0.0, 0.004), reset=rng.uniform(0.02, 0.05), seed=seed)
    link = far.link
    assert link is not None
    num_resets = link.counts["resets"]

    async def break_out(faulty: Faulty, run: Run) -> None:
        faulty.set_weather(storm)

    seen = await disturb(far, f"storm {seed}", break_out, weather=CREEPING)
    assert link.counts["resets"] > num_resets and seen.grown("decode", "pulls_again") >= 1
    assert seen.survived("decode") and seen.survived("prefill")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 3))
@pytest.mark.parametrize("where", ["near", "far"])
async def test_transfers_that_lie(where: str, seed: int, request: pytest.FixtureRequest) -> None:
    """Lost, cut off, late, told twice, out of order; and delivered with a flipped bit, a missing end or two blocks exchanged.

    Seen to fail with wrong tokens when `verify_parts` finds nothing.
    """
    faulty: Faulty = request.getfixturevalue(where)

    seen = await disturb(faulty, f"lies {seed}", nothing_more, rates={**LOSSY, "seed": seed})
    assert seen.grown("decode", "duplicate_outcomes") >= 1
    mismatches, retries = seen.grown("decode", "pull_failures_digest_mismatch"), seen.grown("decode", "pull_retries")
    assert mismatches + retries >= 1, "nothing was damaged"
    assert seen.survived("decode") and seen.survived("prefill")


@pytest.mark.slow
async def test_pulls_whose_end_no_transport_tells(far: Faulty) -> None:
    """They are waited for a second longer than their deadline, and not pulled again.

    Seen to fail with a stream that hangs when `Intake.tick` believes in transports.
    """

    seen = await disturb(far, "silence", nothing_more, rates={"delay": 1.0, "delay_s_max": 3 * RUN_TIMEOUT_S})
    assert seen.grown("decode", "recomputes") >= LEAST_PULLING and seen.grown("decode", "pull_failures_cancelled") >= LEAST_PULLING
    assert seen.survived("decode") and seen.survived("prefill")


# --- one disturbed run ------------------------------------------------------------------------------------------------


async def disturb(
    faulty: Faulty,
    name: str,
    fault: Fault,
    *,
    rates: Mapping[str, float] | None = None,
    weather: Weather = FAIR,
    least_pulling: int = LEAST_PULLING,
    may_fail: bool = False,
) -> Seen:
    """The requests again, in this weather; `fault` comes once so many of them are in PULLING. Judged, at rest, and then once more."""
    before = await faulty.workers()
    begun_again = await asyncio.to_thread(faulty.serving.metric, "baton_migrations_total")
    faulty.set_rates(rates or {})
    faulty.set_weather(weather)
    try:
        async with asyncio.timeout(RUN_TIMEOUT_S):
            run = asyncio.create_task(play(faulty.serving, name))
            print(f"{await until_pulling(faulty, least_pulling)} in PULLING: {name}")
            await fault(faulty, run)
            ledgers = await run
    finally:
        faulty.set_rates({})
        faulty.set_weather(FAIR)
    judge(ledgers, faulty.undisturbed, may_fail=may_fail)
    await asyncio.to_thread(faulty.serving.wait_at_rest, num_workers=2)
    after = await faulty.workers()
    begun_again = await asyncio.to_thread(faulty.serving.metric, "baton_migrations_total") - begun_again
    judge(await play(faulty.serving, f"after {name}"), faulty.undisturbed)
    await asyncio.to_thread(faulty.serving.wait_at_rest, num_workers=2)
    later = Seen(before=after, after=await faulty.workers(), ledgers=[])
    assert later.grown("decode", "handoffs_taken") == NUM_STREAMS and later.grown("decode", "recomputes") == 0
    return Seen(before=before, after=after, ledgers=ledgers, num_begun_again=int(begun_again))


def judge(ledgers: list[Ledger], undisturbed: list[Ledger], *, may_fail: bool = False) -> None:
    problems = [
        f"request {index}: {problem}"
        for index, (ledger, reference) in enumerate(zip(ledgers, undisturbed, strict=True))
        for problem in [*ledger.broken_promises, *difference(ledger, reference)]
        if not (may_fail and ledger.errors)
    ]
    assert not problems, "\n".join(problems[:10])


async def until_pulling(faulty: Faulty, least: int) -> int:
    """How many requests are in PULLING, once there are so many."""
    deadline_s = time.monotonic() + PHASE_TIMEOUT_S
    while True:
        pulling = int((await faulty.workers())["decode"]["queue"]["pulling"])
        if pulling >= least:
            return pulling
        assert time.monotonic() < deadline_s, f"{pulling} in PULLING, {least} were wanted"
        await asyncio.sleep(0.005)


async def nothing_more(faulty: Faulty, run: Run) -> None:
    """A `Fault` for transfers that are disturbed from their start."""


def kill(role: str) -> Fault:
    async def kill_it(faulty: Faulty, run: Run) -> None:
        os.kill((await faulty.workers())[role]["pid"], signal.SIGKILL)
        faulty.set_rates({})

    return kill_it


class Standstill:
    """A `Fault`: the prefill worker stops for ten seconds."""

    def __init__(self) -> None:
        self._resumed_s = 0.0

    async def __call__(self, faulty: Faulty, run: Run) -> None:
        pid = (await faulty.workers())["prefill"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(STANDSTILL_S)
        finally:
            self._resumed_s = time.monotonic()
            os.kill(pid, signal.SIGCONT)

    def num_ended_meanwhile(self, ledgers: list[Ledger]) -> int:
        return sum(ledger.ended_s is not None and ledger.ended_s < self._resumed_s for ledger in ledgers)


async def play(serving: Serving, cache_salt: str, **changes: object) -> list[Ledger]:
    requests = [body | changes for body in bodies(cache_salt)]
    return list(await asyncio.gather(*(stream(serving.host, serving.port, "/v1/completions", body) for body in requests)))


def bodies(cache_salt: str) -> list[dict[str, Any]]:
    """Prompts of several hundred tokens with nothing in common, a megabyte of KV each; a salt keeps the caches of two runs apart."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "ignore_eos": True},
        {"temperature": 0.9, "top_p": 0.95, "ignore_eos": True},
        {"temperature": 1.0, "n": 2, "ignore_eos": True},
    ]
    made = []
    for index in range(NUM_STREAMS):
        words = " ".join(f"word{index * 31 + k}" for k in range(90 + 10 * (index % 4)))
        common = {"model": "demo", "prompt": f"{index} {words}", "max_tokens": NEW_TOKENS, "seed": 1000 + index}
        made.append({**common, "cache_salt": cache_salt, **kinds[index % len(kinds)]})
    return made
