"""Run files: found while the server lives, ignored and swept when it is gone, closed to others."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from control.run_files import RunFile, read_run_files, remove_run_file, runtime_dir, write_run_file
from protocol.errors import ConfigError

pytestmark = pytest.mark.pure


def me(started: float | None = None) -> RunFile:
    born = psutil.Process().create_time()
    return RunFile(
        pid=os.getpid(), url="http://127.0.0.1:8000", namespace="baton-1", started=born + 1 if started is None else started, model_id="m"
    )


def test_a_server_is_found_until_it_takes_its_file_back(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    path = write_run_file(me(), environ)
    assert read_run_files(environ) == [me()]
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    remove_run_file(os.getpid(), environ)
    remove_run_file(os.getpid(), environ)
    assert read_run_files(environ) == []


def test_newest_server_comes_first(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    sleeper = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        later = psutil.Process(sleeper.pid).create_time() + 100
        write_run_file(RunFile(pid=sleeper.pid, url="b", namespace="", started=later), environ)
        write_run_file(me(), environ)
        assert [run.url for run in read_run_files(environ)] == ["b", "http://127.0.0.1:8000"]
    finally:
        sleeper.communicate(timeout=10)


def test_file_of_a_dead_server_is_ignored_and_swept_by_the_next(tmp_path: Path) -> None:
    """A pid that is gone, one that another process got since, and files that are not ours. Seen to fail without the birth time."""
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=10)
    folder = runtime_dir(environ)
    write_run_file(RunFile(pid=gone.pid, url="a", namespace="", started=2e9), environ)
    (folder / "1.json").write_text('{"schema": "baton.run.v1", "pid": "x"}')
    (folder / "2.json").write_text("[]")
    (folder / "port-8000.lock").write_text("")
    assert read_run_files(environ) == []
    write_run_file(me(started=psutil.Process().create_time() - 1000), environ)
    assert read_run_files(environ) == [], "the pid lives, but it was born after the file"
    write_run_file(me(), environ)
    assert sorted(path.name for path in folder.iterdir()) == sorted([f"{os.getpid()}.json", "port-8000.lock"])


def test_a_directory_others_can_write_is_refused(tmp_path: Path) -> None:
    """Seen to fail with the mode unchecked."""
    (tmp_path / "baton").mkdir(mode=0o700)
    (tmp_path / "baton").chmod(0o777)
    with pytest.raises(ConfigError, match="mode 0700"):
        runtime_dir({"XDG_RUNTIME_DIR": str(tmp_path)})
    (tmp_path / "baton").rmdir()
    (tmp_path / "baton").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="mode 0700"):
        runtime_dir({"XDG_RUNTIME_DIR": str(tmp_path)})


def test_without_xdg_the_directory_is_named_after_the_user() -> None:
    path = Path(f"/tmp/baton-{os.getuid()}")
    try:
        assert runtime_dir({}) == runtime_dir({"XDG_RUNTIME_DIR": "/nowhere"}) == path
    finally:
        with contextlib.suppress(OSError):  # a server uses it
            path.rmdir()
