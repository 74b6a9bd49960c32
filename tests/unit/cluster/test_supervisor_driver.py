"""The supervisor's driver over processes that are made up: who is told of what, and who is started again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from cluster import supervisor as driver_module
from cluster.supervisor import SupervisorDriver, brief, keep_up
from control.supervisor import StartWorker, Supervisor, SupervisorConfig
from protocol.kv import Endpoint
from protocol.messages import Membership
from protocol.worker import Role, WorkerAddress, WorkerId

pytestmark = pytest.mark.pure


@dataclass
class MadeUpProcess:
    """Registers by hand (`World.register`), ends by hand or when it is stopped or killed."""

    worker_id: WorkerId
    failure: str | None = None  # what start() answers
    answers: bool = True  # to pings
    calls: list[str] = field(default_factory=list)
    end: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> str | None:
        self.calls.append("start")
        return self.failure

    async def ended(self) -> str:
        await self.end.wait()
        return "made up"

    async def ping(self) -> None:
        self.calls.append("ping")
        if not self.answers:
            await asyncio.sleep(60)

    async def drain(self) -> None:
        self.calls.append("drain")

    async def stop(self) -> None:
        self.calls.append("stop")
        self.end.set()

    def kill(self) -> None:
        self.calls.append("kill")
        self.end.set()


class World:
    def __init__(self, **config: float) -> None:
        self.processes: dict[WorkerId, MadeUpProcess] = {}
        self.failure: str | None = None
        self.told: list[str] = []
        self.registered: set[WorkerId] = set()
        core = Supervisor(SupervisorConfig(backoff_first_s=0.01, **config))  # type: ignore[arg-type]
        self.driver = SupervisorDriver(core, launch=self._launch, tell=self.told.append)

    def _launch(self, command: StartWorker) -> MadeUpProcess:
        process = MadeUpProcess(command.worker_id, failure=self.failure)
        self.processes[command.worker_id] = process
        return process

    def register(self, *worker_ids: WorkerId) -> None:
        self.registered.update(worker_ids)
        self._say()

    def leave(self, worker_id: WorkerId) -> None:
        self.registered.discard(worker_id)
        self._say()

    def _say(self) -> None:
        self.driver.membership_changed(Membership(version=1, workers=tuple(map(_address, sorted(self.registered))), services=()))

    async def until(self, happened: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not happened():
                await asyncio.sleep(0.005)


def _address(worker_id: WorkerId) -> WorkerAddress:
    return WorkerAddress(
        worker_id=worker_id,
        role=Role.BOTH,
        epoch=1,
        host="127.0.0.1",
        port=1,
        pid=1,
        hostname="here",
        kv_endpoint=Endpoint(),
        model_id="m",
        fingerprint=b"",
        block_size_tokens=16,
        num_kv_blocks=1,
        max_model_len=1,
        max_num_seqs=1,
        max_num_batched_tokens=16,
    )


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses of the driver, shortened."""
    for name, seconds in {"TICK_S": 0.01, "LEFT_GRACE_S": 0.05, "PING_TIMEOUT_S": 0.1, "SERVICE_PAUSE_FIRST_S": 0.01}.items():
        monkeypatch.setattr(driver_module, name, seconds)


async def test_a_dead_worker_is_replaced_under_a_new_id() -> None:
    """Its process ends; another starts, the user hears of it. Fails when the end of a process is awaited only after its start."""
    world = World()
    world.driver.start({Role.PREFILL: 1, Role.DECODE: 1})
    world.register("prefill-0", "decode-0")
    world.processes["decode-0"].end.set()
    await world.until(lambda: "decode-1" in world.processes)
    assert set(world.processes) == {"prefill-0", "decode-0", "decode-1"}
    assert any("decode-0" in line for line in world.told)
    await world.driver.shut_down(drain=False, timeout_s=5)


async def test_a_start_that_fails_ends_its_process_and_says_why() -> None:
    """Fails when the process of a refused start is left running."""
    world = World(max_young_deaths=1)
    world.failure = "no such weights"
    world.driver.start({Role.DECODE: 1})
    await world.until(lambda: bool(world.driver.failures))
    assert world.driver.failures == ["no such weights"]
    assert "kill" in world.processes["decode-0"].calls
    await world.until(lambda: any("no more decode workers" in line for line in world.told))
    await world.driver.shut_down(drain=False, timeout_s=5)


async def test_a_worker_that_left_the_directory_and_does_not_answer_is_killed_and_replaced() -> None:
    """A hung process: no end, no answer. Fails when only the end of a process counts."""
    world = World()
    world.driver.start({Role.DECODE: 1})
    world.register("decode-0")
    world.processes["decode-0"].answers = False
    world.leave("decode-0")
    await world.until(lambda: "decode-1" in world.processes)
    assert "kill" in world.processes["decode-0"].calls
    await world.driver.shut_down(drain=False, timeout_s=5)


async def test_a_worker_that_answers_is_kept_while_the_directory_is_away() -> None:
    """It left because the directory restarts. Fails when leaving is taken for death."""
    world = World()
    world.driver.start({Role.DECODE: 1})
    world.register("decode-0")
    world.leave("decode-0")
    await world.until(lambda: "ping" in world.processes["decode-0"].calls)
    await asyncio.sleep(0.05)
    world.register("decode-0")
    assert set(world.processes) == {"decode-0"}
    await world.driver.shut_down(drain=False, timeout_s=5)


async def test_shutdown_drains_what_prefills_before_what_decodes_and_ends_all() -> None:
    """Fails when stop comes without drain, or when a replacement is started on the way down."""
    world = World()
    world.driver.start({Role.PREFILL: 1, Role.DECODE: 1})
    world.register("prefill-0", "decode-0")
    await asyncio.sleep(0.02)
    await world.driver.shut_down(drain=True, timeout_s=5)
    assert {name: [c for c in p.calls if c != "start"] for name, p in world.processes.items()} == {
        "prefill-0": ["drain", "stop"],
        "decode-0": ["drain", "stop"],
    }
    assert world.told == []


async def test_who_does_not_stop_in_time_is_killed() -> None:
    """The worker's stop hangs. Fails when shut_down waits for it without a bound."""
    world = World(stop_deadline_s=60.0)
    world.driver.start({Role.DECODE: 1})
    world.register("decode-0")
    process = world.processes["decode-0"]

    async def hang() -> None:
        await asyncio.sleep(60)

    process.stop = hang  # type: ignore[method-assign]
    began_s = asyncio.get_running_loop().time()
    await world.driver.shut_down(drain=False, timeout_s=0.2)
    assert "kill" in process.calls and asyncio.get_running_loop().time() - began_s < 2.0


async def test_a_service_that_ends_is_started_again() -> None:
    """Also when it cannot be started at once. Fails when an exception of start ends the keeping."""
    starts: list[int] = []
    told: list[str] = []

    async def start() -> Callable[[], object]:
        starts.append(len(starts))
        if len(starts) == 2:
            raise OSError("no room")

        async def ended() -> str:
            if len(starts) >= 4:
                await asyncio.sleep(60)
            return "killed"

        return ended

    keeper = asyncio.ensure_future(keep_up("router", start, tell=told.append))  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        while len(starts) < 4:
            await asyncio.sleep(0.005)
    keeper.cancel()
    assert len(told) == 3 and "killed" in told[0] and "no room" in told[1]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\x1b[36mray::X.start()\x1b[39m (pid=1)\n  File 'a.py'\nKeyError: 'no'\n", "OSError: KeyError: 'no'"),
        ("", "OSError"),
        ("x" * 999, "OSError: " + "x" * 300),
    ],
)
def test_a_remote_traceback_is_told_in_one_line(text: str, line: str) -> None:
    """Colours gone, the last line kept. Fails when the first line is taken."""
    assert brief(OSError(text)) == line
