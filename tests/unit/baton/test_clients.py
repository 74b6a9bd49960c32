"""`baton chat` and `baton status` against a small server: streaming, conversation, errors in the server's words, tables."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from baton.__main__ import main
from baton.chat import Conversation, figures
from baton.connection import EVENT_BYTES_MAX, Server, ServerRefused, ServerUnavailable, find_server, read_events
from baton.status import notes_of, status_table
from control.run_files import RunFile, write_run_file

pytestmark = pytest.mark.pure

STATUS = {
    "schema": "baton.status.v1",
    "model": "demo",
    "ready": False,
    "reasons_not_ready": ["no decode worker"],
    "workers": [
        {
            "worker_id": "prefill-0",
            "role": "prefill",
            "pid": 4242,
            "host": "box",
            "state": "ready",
            "epoch": 9,
            "age_s": 0.125,
            "step_count": 77,
            "queue": {"waiting": 3, "running": 2},
            "kv_blocks": {"total": 100, "free": 90, "owned": 6, "leased": 3, "cached": 1},
            "trouble": None,
            "notes": ["slow path"],
        },
        {"worker_id": "decode-1", "role": "decode", "state": "starting", "queue": None, "kv_blocks": None, "trouble": "stuck"},
    ],
    "router": {"state": "unreachable", "detail": {"notes": ["overlap is missing"]}},
    "fallbacks": {"least_work": 2.0, "tcp": 0.0},
}


class FakeServer(BaseHTTPRequestHandler):
    """Answers each chat with "You said: ..." word by word; "fail", "cut", "mute" and "hang" go wrong on the way."""

    protocol_version = "HTTP/1.1"
    bodies: list[Any]
    left: threading.Event
    key: str | None = None

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.key is not None and self.headers.get("Authorization") != f"Bearer {self.key}":
            return self._json(401, {"error": {"message": "bad key"}})
        if self.path == "/status":
            return self._json(200, STATUS)
        if self.path == "/v1/models":
            return self._json(200, {"object": "list", "data": [{"id": "demo"}, {"id": "alias"}]})
        return self._json(404, {"error": {"message": f"no {self.path}"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).bodies.append(body)
        said = body["messages"][-1]["content"]
        if said == "refuse":
            return self._json(400, {"error": {"message": "max_tokens 9 exceeds 8"}})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._stream(said)
        except OSError:
            self.close_connection = True
            self.left.set()

    def _stream(self, said: str) -> None:
        self._event(": keep-alive\n\n")
        for word in ["You ", "said: ", f"\x1b[31m{said}", " é"]:
            self._event(f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': word}}]})}\n\n")
        if said == "fail":
            self._event(f"data: {json.dumps({'error': {'message': 'the worker is gone'}})}\n\n")
        if said in ("cut", "mute"):
            self.left.wait(timeout=2.0 if said == "mute" else 0.0)
            self.close_connection = True
            return
        while said == "hang":
            self._event(": still here\n\n")
            time.sleep(0.01)
        self._event(f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': 5, 'completion_tokens': 4}})}\n\n")
        self._event("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _json(self, status: int, tree: object) -> None:
        data = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Tolerant(ThreadingHTTPServer):
    """A client that leaves resets the connection if bytes were still on their way: no reason to print."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Running:
    def __init__(self, handler: type[FakeServer], port: int) -> None:
        self.handler = handler
        self.url = f"http://127.0.0.1:{port}"
        self.server = Server(url=self.url, api_key=None, timeout_s=5.0)


@pytest.fixture
def running() -> Iterator[Running]:
    handler = type("Handler", (FakeServer,), {"bodies": [], "left": threading.Event()})
    server = Tolerant(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield Running(handler, server.server_address[1])
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)


def conversation(running: Running, **options: Any) -> Conversation:
    return Conversation(server=running.server, model="demo", options=options, messages=[])


def test_answer_is_streamed_and_the_conversation_remembers_it(running: Running) -> None:
    """Seen to fail with the assistant's message not kept."""
    talk = conversation(running, max_tokens=9)
    assert list(talk.ask("one")) == ["You ", "said: ", "\x1b[31mone", " é"]
    assert talk.usage == {"prompt_tokens": 5, "completion_tokens": 4}
    list(talk.ask("two"))
    sent = running.handler.bodies[1]
    assert [m["role"] for m in sent["messages"]] == ["user", "assistant", "user"]
    assert sent["messages"][1]["content"] == "You said: \x1b[31mone é"
    assert sent["stream"] and sent["stream_options"] == {"include_usage": True} and sent["max_tokens"] == 9


def test_stopping_in_the_middle_closes_the_stream_and_keeps_what_came(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server sees the client leave, though somebody still holds the connection. Seen to fail with the connection left open."""
    held: list[HTTPConnection] = []

    class Held(HTTPConnection):
        def connect(self) -> None:
            held.append(self)
            super().connect()

    monkeypatch.setattr("http.client.HTTPConnection", Held)
    talk = conversation(running)
    answer = talk.ask("hang")
    assert next(answer) == "You "
    answer.close()  # type: ignore[attr-defined]
    assert held and running.handler.left.wait(timeout=5)
    assert talk.messages[-1] == {"role": "assistant", "content": "You "}


@pytest.mark.parametrize(
    ("said", "sentence"), [("refuse", "answered 400: max_tokens 9 exceeds 8"), ("fail", "gave up: the worker is gone")]
)
def test_trouble_is_told_in_the_servers_words(running: Running, said: str, sentence: str) -> None:
    talk = conversation(running)
    with pytest.raises(ServerRefused, match=sentence):
        list(talk.ask(said))
    assert talk.messages[-1]["role"] == "assistant" if said == "fail" else talk.messages == []


@pytest.mark.parametrize(("said", "sentence"), [("cut", "off; what came is not all of it"), ("mute", r"off \(no answer within 0\.5 s\)")])
def test_an_answer_that_breaks_off_is_not_taken_for_whole(running: Running, said: str, sentence: str) -> None:
    """The server ends the connection, or says nothing more, before [DONE].

    Seen to fail when the end of the stream was the end of the answer, and with `began` never set.
    """
    talk = conversation(running)
    talk.server = replace(running.server, timeout_s=0.5 if said == "mute" else 5.0)
    with pytest.raises(ServerUnavailable, match=sentence):
        list(talk.ask(said))
    assert talk.messages[-1]["content"] == f"You said: \x1b[31m{said} é"


def test_server_is_found_by_its_run_file_or_named(running: Running, tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    with pytest.raises(ServerUnavailable, match="start one with `baton serve`"):
        find_server(None, None, environ, timeout_s=1)
    born = psutil.Process().create_time()
    write_run_file(RunFile(pid=os.getpid(), url=running.url, namespace="n", started=born), environ)
    assert find_server(None, "k", environ, timeout_s=1)[0] == Server(url=running.url, api_key="k", timeout_s=1)
    assert find_server("box:8000/v1/", None, environ, timeout_s=1)[0].url == "http://box:8000"


def test_silent_server_ends_within_the_timeout() -> None:
    """A port that accepts and never answers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as silent:
        server = Server(url=f"http://127.0.0.1:{silent.server_address[1]}", api_key=None, timeout_s=0.2)
        began_s = time.monotonic()
        with pytest.raises(ServerUnavailable, match=r"no answer within 0\.2 s"):
            server.get("/status")
        assert time.monotonic() - began_s < 2


def test_key_is_sent_and_its_lack_named(running: Running) -> None:
    running.handler.key = "sesame"
    with pytest.raises(ServerRefused, match="answered 401: bad key; give the key with --api-key or BATON_API_KEY"):
        running.server.get("/status")
    assert Server(url=running.url, api_key="sesame", timeout_s=5).get("/status") == STATUS


def events(text: bytes) -> list[str]:
    return list(read_events(cast(HTTPResponse, io.BytesIO(text))))


def test_events_are_read_as_the_standard_says() -> None:
    """Comments, ids, line ends and several data lines. Seen to fail with the blank line not ending an event."""
    assert events(b": hi\n\ndata: a\n\nid: 3\ndata:b\r\ndata: c\r\n\r\nevent: x\n\n") == ["a", "b\nc"]
    with pytest.raises(ServerUnavailable, match="ended in the middle"):
        events(b"data: a\n")
    with pytest.raises(ServerUnavailable, match="larger than"):
        events(b"data: " + b"x" * EVENT_BYTES_MAX)


def test_figures_of_an_answer() -> None:
    assert "[5 + 41 tokens, first after 0.25 s, then 20.0 tokens/s]" in figures({"prompt_tokens": 5, "completion_tokens": 41}, 0.25, 2.0)
    assert "tokens/s" not in figures({"prompt_tokens": 5, "completion_tokens": 1}, 0.25, 0.0)


def test_table_has_a_row_for_each_worker_and_a_line_for_each_note() -> None:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=160).print(status_table(STATUS, "http://x", is_wide=True))
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("demo at http://x")
    assert lines[2].split() == ["prefill-0", "prefill", "ready", "4242", "box", "2", "3", "90", "6", "3", "1", "77", "100", "0.12"]
    assert lines[3].split() == ["decode-1", "decode", "starting", *["-"] * 11]
    assert notes_of(STATUS) == [
        "not ready: no decode worker",
        "router unreachable: requests are placed by least_work over the last snapshots",
        "router: overlap is missing",
        "fallback least_work: 2",
        "prefill-0: slow path",
        "decode-1: stuck",
    ]
    assert all(any(note in line for line in lines) for note in notes_of(STATUS))
    narrow = io.StringIO()
    Console(file=narrow, width=80).print(status_table(STATUS, "http://x", is_wide=False))
    assert "prefill-0" in narrow.getvalue() and "…" not in narrow.getvalue()


def test_table_has_a_row_for_each_of_several_routers() -> None:
    """Seen to fail with the routers' table left out, and with the note left out."""
    from rich.console import Console

    heard = {"router": "router-1", "linked": True, "in_step": False, "heard_s": 1.5, "bookings": 2}
    first = {"name": "router-0", "state": "up", "ready": False, "reason": "it lags", "is_current": False, "pid": 7, "bookings": 3}
    second = {"name": "router-1", "state": "unreachable", "ready": False, "reason": "", "is_current": True, "pid": 8, "bookings": None}
    document = STATUS | {"routers": [first | {"peers": [heard]}, second | {"peers": None}]}
    out = io.StringIO()
    Console(file=out, width=160).print(status_table(document, "http://x", is_wide=True))
    rows = [line.split() for line in out.getvalue().splitlines() if line.startswith("router-")]
    heard_words = ["router-1", "1.5", "s", "ago,", "not", "in", "step"]
    assert rows[0] == ["router-0", "not", "ready", "7", "3", *heard_words, "it", "lags"]
    assert rows[1] == ["router-1", "unreachable", "yes", "8", "-"]
    assert "router-0 is not ready: it lags" in notes_of(document)
    assert "not ready: it lags" not in notes_of(document | {"routers": [second]})


class Verb:
    """`baton ARGUMENTS` in this process, with `stdin` as its pipe: (exit status, stdout, stderr)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str, stdin: str | io.StringIO = "") -> tuple[object, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["baton", *arguments])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        shown = self._capsys.readouterr()
        return code, shown.out, shown.err


@pytest.fixture
def baton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    monkeypatch.delenv("BATON_API_KEY", raising=False)
    return Verb(monkeypatch, capsys)


def test_one_question_by_argument_or_by_pipe(running: Running, baton: Verb) -> None:
    answer = "You said: \x1b[31mhello é\n"
    assert baton("chat", "hello", "--url", running.url, "--system", "be brief", "--temperature", "0") == (0, answer, "")
    assert baton("chat", "--url", running.url, "--model", "alias", stdin="hello") == (0, answer, "")
    first, second = running.handler.bodies
    assert first["model"] == "demo" and first["temperature"] == 0 and first["messages"][0] == {"role": "system", "content": "be brief"}
    assert second["model"] == "alias" and second["messages"] == [{"role": "user", "content": "hello"}]
    code, _, err = baton("chat", "refuse", "--url", running.url)
    assert (code, err) == (1, "baton: the server answered 400: max_tokens 9 exceeds 8\n")


def test_status_prints_one_document_or_one_table(running: Running, baton: Verb) -> None:
    code, out, _ = baton("status", "--json", "--url", running.url)
    assert (code, json.loads(out)) == (0, STATUS)
    code, out, _ = baton("status", "--url", running.url)
    assert code == 0 and "prefill-0" in out


class Keyboard(io.StringIO):
    """Lines typed on a terminal, then Ctrl-D."""

    def isatty(self) -> bool:
        return True


def test_conversation_goes_on_until_ctrl_d(running: Running, baton: Verb) -> None:
    """Trouble does not end it, /clear forgets, the system prompt stays. Seen to fail with `clear` emptying the messages."""
    typed = Keyboard("one\nrefuse\n\ntwo\n/clear\nthree\n")
    code, out, _ = baton("chat", "--url", running.url, "--system", "be brief", stdin=typed)
    assert code == 0 and "max_tokens 9 exceeds 8" in out and out.count("tokens, first after") == 3
    asked = [[m["content"] for m in body["messages"]] for body in running.handler.bodies]
    first = "You said: \x1b[31mone é"
    assert asked == [["be brief", "one"], ["be brief", "one", first, "refuse"], ["be brief", "one", first, "two"], ["be brief", "three"]]
