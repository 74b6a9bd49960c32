"""A malformed request gets a 4xx in OpenAI's error shape, with the value and the limit, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serving import Serving

pytestmark = pytest.mark.cluster

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": HELLO, "max_tokens": 4, **fields}


# name: (path, body, status, what the message must hold)
MALFORMED: dict[str, tuple[str, bytes | dict[str, Any], int, tuple[str, ...]]] = {
    "bad JSON": (CHAT, b'{"model": "demo", "messages": [', 400, ("JSON",)),
    "wrong types": (CHAT, chat(temperature="hot"), 400, ("temperature",)),
    "unknown model": (CHAT, chat(model="gpt-17"), 404, ("gpt-17", "demo")),
    "prompt too long": ("/v1/completions", {"model": "demo", "prompt": "word " * 200_000, "max_tokens": 4}, 400, ("tokens",)),
    "n too large": (CHAT, chat(n=10_000), 400, ("n", "10000", "16")),
    "huge body": (CHAT, b" " * (9 << 20), 413, ("bytes",)),
    "invalid UTF-8": (CHAT, b'{"model": "demo", "messages": [{"role": "user", "content": "\xff\xfe"}]}', 400, ("UTF-8",)),
    "negative max_tokens": (CHAT, chat(max_tokens=-5), 400, ("max_tokens", "-5")),
    "unknown role": (CHAT, chat(messages=[{"role": "wizard", "content": "Hello"}]), 400, ("wizard",)),
    "not implemented": (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, ("tools",)),
}


def plain(text: str) -> str:
    return text.replace(",", "").replace("_", "")


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request_is_refused_and_the_server_goes_on(serving: Serving, name: str) -> None:
    path, body, expected_status, expected_words = MALFORMED[name]
    status, answer = serving.request(path, body)
    error = json.loads(answer)["error"]
    assert status == expected_status, error
    assert set(error) >= {"message", "type", "param", "code"}
    assert all(plain(word) in plain(error["message"]) for word in expected_words), error["message"]
    assert serving.json(CHAT, chat())["usage"]["completion_tokens"] >= 1


def test_unknown_path_and_method_are_refused_in_the_same_shape(serving: Serving) -> None:
    for path in ("/v1/nothing", "/v1/models/none"):
        status, answer = serving.request(path)
        assert status == 404 and "message" in json.loads(answer)["error"]
    status, answer = serving.request(CHAT)  # GET
    assert status == 405 and "message" in json.loads(answer)["error"]
