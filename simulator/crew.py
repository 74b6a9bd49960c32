"""Tasks of a tournament on several cores: processes that are handed one after the other, and are gone when nobody asks any more."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from protocol.errors import ConfigError, ServiceError
from router.policies.user_path import import_last_from
from simulator.tournament import Outcome, Runner, Task, Tournament

JOIN_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """What came of a task in its place. `is_asked_wrong`: the caller's mistake."""

    text: str
    is_asked_wrong: bool


def run_tasks(
    tournament: Tournament, tasks: Sequence[Task], *, num_processes: int, user_path: str = ""
) -> Generator[tuple[Task, Outcome], None, None]:
    """As they are done; each comes out the same whatever the number of processes. One process: in this one.

    user_path: a directory that policies are imported from when they are nowhere else; "": none.

    Closing the iterator, or an interrupt in it, ends the processes and with them what they have under way.

    Raises:
        ConfigError: a task cannot be run as asked.
        ServiceError: one failed, or its process was ended.
    """
    if num_processes == 1:
        runner = Runner(tournament)
        yield from ((task, runner.run(task)) for task in tasks)
        return
    crew = [_Member(tournament, user_path) for _ in range(min(num_processes, len(tasks)))]
    try:
        to_do = iter(tasks)
        busy = {member.pipe: member for member, task in zip(crew, to_do, strict=False) if member.give(task)}
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                member = busy[pipe]
                task, outcome = member.take()
                if not member.give(next(to_do, None)):
                    del busy[pipe]
                yield task, outcome
    finally:
        for member in crew:
            member.end()


class _Member:
    def __init__(self, tournament: Tournament, user_path: str) -> None:
        # Spawned, not forked: what a thread of this process holds at the moment would be held there for ever.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=_work, args=(tournament, user_path, theirs), daemon=True)
        self._task: Task | None = None
        self._process.start()
        theirs.close()  # so that its end is seen here

    def give(self, task: Task | None) -> bool:
        """False: there is nothing to do."""
        self._task = task
        if task is not None:
            self.pipe.send(task)
        return task is not None

    def take(self) -> tuple[Task, Outcome]:
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(JOIN_S)
            raise ServiceError(
                f"the process that ran {self._task} ended with {self._process.exitcode}; where memory is short take fewer --jobs"
            ) from None
        if isinstance(answer, Failed):
            raise ConfigError(answer.text) if answer.is_asked_wrong else ServiceError(f"{self._task} failed\n{answer.text}")
        assert self._task is not None and isinstance(answer, Outcome)
        return self._task, answer

    def end(self) -> None:
        self.pipe.close()
        self._process.terminate()  # it holds nothing that another one needs
        self._process.join(JOIN_S)


def _work(tournament: Tournament, user_path: str, pipe: Connection) -> None:
    """Of a process, until its parent closes the pipe."""
    if user_path:
        import_last_from(user_path)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of a terminal's processes; the parent decides
    runner = Runner(tournament)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            answer: Outcome | Failed = runner.run(task)
        except ConfigError as error:
            answer = Failed(text=str(error), is_asked_wrong=True)
        except Exception:
            answer = Failed(text=traceback.format_exc(), is_asked_wrong=False)
        pipe.send(answer)


__all__ = ["run_tasks"]
