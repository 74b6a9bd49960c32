"""What a starting server says: snippets that run as they stand, and no key in them."""

from __future__ import annotations

import ast
import json
import shlex

import pytest

from baton.banner import curl_snippet, openai_snippet, phase_line, ready_headline
from baton.serve import StartupDisplay
from control.startup import Notice, Phase, PhaseBegan, PhaseDone, ServerReady, ServerStopping

pytestmark = pytest.mark.pure


def ready(**changes: object) -> ServerReady:
    told: dict[str, object] = {
        "url": "http://127.0.0.1:8000", "model_id": "it's", "needs_api_key": False,
        "prefill_workers": 2, "decode_workers": 1, "mixed_workers": 0,
    }  # fmt: skip
    return ServerReady(**{**told, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("needs_key", [False, True])
def test_curl_snippet_is_one_command_with_a_whole_body(needs_key: bool) -> None:
    """A quote in the name of the model survives the shell. Seen to fail without shlex.quote."""
    words = shlex.split(curl_snippet(ready(needs_api_key=needs_key)))
    assert words[:3] == ["curl", "-sN", "http://127.0.0.1:8000/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == "it's" and body["stream"]
    assert ("Authorization: Bearer $BATON_API_KEY" in words) is needs_key


@pytest.mark.parametrize("needs_key", [False, True])
def test_openai_snippet_is_python(needs_key: bool) -> None:
    snippet = openai_snippet(ready(needs_api_key=needs_key))
    names = [ast.unparse(node) for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.keyword)]
    assert "base_url='http://127.0.0.1:8000/v1'" in names and 'model="it\'s"' in names
    assert ("os.environ['BATON_API_KEY']" in " ".join(names)) is needs_key


def test_headline_counts_the_workers_there_are() -> None:
    assert ready_headline(ready(), 9.94)[:2] == ["it's at http://127.0.0.1:8000/v1", "2 prefill + 1 decode workers, ready after 9.9 s"]
    assert "API key" in "\n".join(ready_headline(ready(needs_api_key=True), 1))


def test_phases_line_up() -> None:
    assert phase_line(Phase.RAY, "own", 3.21) == "ray       own (3.2 s)"
    assert phase_line(Phase.ENDPOINT, "http://x", None) == "endpoint  http://x"


def test_a_start_is_shown_as_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal: plain lines, progress on stderr, what to copy on stdout and not boxed in."""
    with StartupDisplay() as display:
        display.show(PhaseBegan(phase=Phase.MODEL, detail="looking"))
        display.show(PhaseDone(phase=Phase.MODEL, detail="/models/[tiny]"))
        display.show(Notice(text="slow path"))
        display.show(ready())
        display.show(ServerStopping(reason="SIGTERM"))
    shown = capsys.readouterr()
    assert [line.split(" (")[0] for line in shown.err.splitlines()] == ["model     /models/[tiny]", "slow path", "stopping"]
    assert curl_snippet(ready()) in shown.out and openai_snippet(ready()) in shown.out
    assert "\x1b" not in shown.out + shown.err
