"""The command line: quick help that imports nothing heavy, errors of one line with the remedy, nothing to talk to."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from baton.__main__ import main
from control.flags import FLAGS

pytestmark = pytest.mark.pure

HEAVY = ("torch", "ray", "jinja2", "fastapi", "numpy", "aiohttp", "huggingface_hub", "transformers", "tokenizers")
Baton = Callable[..., tuple[int, str, str]]


@pytest.fixture
def baton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Baton:
    """Run `baton ARGUMENTS` here: (exit status, stdout, stderr)."""
    for name in list(os.environ):
        if name.startswith(("BATON_", "RAY_", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["baton", *arguments])
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        shown = capsys.readouterr()
        return int(code or 0), shown.out, shown.err  # type: ignore[call-overload, no-any-return]

    return run


def test_help_takes_half_a_second_at_most() -> None:
    """Processor time of the best of three, as neighbours take turns. Seen to fail with `import torch` in baton/serve.py."""
    spent_s = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-m", "baton", "--help"], stdout=subprocess.DEVNULL)
        _, code, usage = os.wait4(process.pid, 0)
        process.returncode = code
        assert code == 0
        spent_s.append(usage.ru_utime + usage.ru_stime)
    assert min(spent_s) <= 0.5, spent_s


def test_no_verb_imports_what_it_does_not_need(tmp_path: Path) -> None:
    """In a fresh process. typer brings pydantic when it parses options, so that is looked for after the plain help only.

    At the end the module that starts a server, whose first line is to be seen before Ray is read. Seen to fail with the import of
    cluster.pieces at the top of baton/serve.py, of baton/status.py and of cluster/build.py.
    """
    code = f"""
import sys
from baton.__main__ import main
calls = ["--help"], ["serve", "--help"], ["chat", "--help"], ["status"], ["explain", "x"], ["serve", "--port", "x"], ["--version"]
for arguments in calls:
    sys.argv = ["baton", *arguments]
    try:
        main()
    except SystemExit:
        pass
    unwanted = {HEAVY!r} + (("pydantic", "rich") if arguments == ["--help"] else ())
    heavy = [name for name in unwanted if name in sys.modules]
    assert not heavy, (arguments, heavy)
import cluster.build
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
"""
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    outcome = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert outcome.returncode == 0, outcome.stderr


def test_serve_help_has_every_flag_in_full(baton: Baton) -> None:
    """Long names are not cut at the width of a terminal. Seen to fail with rich's help on 80 columns."""
    _, told, _ = baton("serve", "--help")
    for name in (*(flag.name for flag in FLAGS), "--no-enable-prefix-caching", "--config"):
        assert f"{name} " in told or f"{name}\n" in told, name
    for words in ("[MODEL]", "[8000]", "[prefix_cost]", "BATON_NAME"):
        assert words in told


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["serve", "--port", "x"], 2, "baton: --port: http.port must be a whole number, found 'x'"),
        (["serve", "--config", "none.yaml"], 2, "baton: cannot read the configuration none.yaml: No such file"),
        (["serve", "--prefill-workers", "0"], 2, "nobody would compute prompts"),
        (["serve", "--prot", "1"], 2, "--port"),
        (["frobnicate"], 2, "frobnicate"),
        (["status"], 1, "baton: no server of yours runs on this machine; start one with `baton serve`, or name it with --url"),
        (["status", "--json"], 1, "no server of yours"),
        (["chat", "hello"], 1, "no server of yours"),
        (["explain", "cmpl-0"], 1, "baton: no server of yours runs on this machine; start one with `baton serve`, or name it with --url"),
        (["explain", "cmpl-0", "--url", "http://127.0.0.1:1"], 1, "baton: no server at http://127.0.0.1:1 (Connection refused); start one"),
        (["explain"], 2, "REQUEST_ID"),
        (["status", "--url", "http://127.0.0.1:1"], 1, "baton: no server at http://127.0.0.1:1 (Connection refused); start one"),
        (["status", "--url", "http://[oops"], 2, "is not an address such as http://127.0.0.1:8000"),
    ],
)
def test_trouble_is_one_line_with_the_remedy(arguments: list[str], code: int, sentence: str, baton: Baton) -> None:
    """And it comes within 3 s."""
    began_s = time.monotonic()
    status, out, err = baton(*arguments)
    assert time.monotonic() - began_s < 3.0
    assert (status, out) == (code, "") and sentence in err
    if err.startswith("baton: "):
        assert err.count("\n") == 1


def test_version_is_that_of_the_package(baton: Baton) -> None:
    assert baton("--version") == (0, f"baton {version('baton-serve')}\n", "")


def test_without_a_verb_it_shows_the_verbs(baton: Baton) -> None:
    _, out, err = baton()
    assert all(verb in out + err for verb in ("serve", "chat", "status", "explain"))
