"""What must not be answered gets a 4xx in OpenAI's error shape, with the value and the limit, and the server goes on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateway.config import ApiKey, GatewayConfig
from gateway.http import Exchange
from protocol.errors import RequestTooLarge

pytestmark = pytest.mark.pure

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": HI} | fields).encode()


def part(kind: str, **fields: Any) -> bytes:
    return chat(messages=[{"role": "user", "content": [{"type": kind} | fields]}])


# name: path, body, status, param, code, words that the message must hold (value and limit)
MALFORMED: dict[str, tuple[str, bytes, int, str | None, str, tuple[str, ...]]] = {
    "bad JSON": (CHAT, b'{"messages": [', 400, None, "invalid_json", ("14 characters", "column")),
    "not an object": (CHAT, b"[1, 2]", 400, None, "invalid_json", ("[1, 2]", "object")),
    "empty body": (CHAT, b"", 400, None, "invalid_json", ("0 characters",)),
    "wrong type": (CHAT, chat(temperature="hot"), 400, "temperature", "invalid_value", ('"hot"', "number")),
    "wrong type deep": (CHAT, chat(messages=[{"role": "user", "content": 5}]), 400, "messages[0].content", "invalid_value", ("is 5",)),
    "bool for int": (CHAT, chat(max_tokens=True), 400, "max_tokens", "invalid_value", ("true", "integer")),
    "no messages": (CHAT, b'{"model": "tiny"}', 400, "messages", "missing_required_parameter", ("required",)),
    "empty messages": (CHAT, chat(messages=[]), 400, "messages", "invalid_value", ("at least 1",)),
    "unknown model": (CHAT, chat(model="gpt-9"), 404, "model", "model_not_found", ("gpt-9", "tiny")),
    "too long prompt": (
        CHAT, chat(messages=[{"role": "user", "content": "x" * 300}]), 400, "messages", "context_length_exceeded", ("303", "256"),
    ),
    "too long prompt of ids": (
        "/v1/completions", json.dumps({"prompt": [9] * 256}).encode(), 400, "prompt", "context_length_exceeded", ("256",),
    ),
    "prompt and output too long": (CHAT, chat(max_tokens=252), 400, "max_tokens", "context_length_exceeded", ("252", "256", "251")),
    "n too large": (CHAT, chat(n=5), 400, "n", "invalid_value", ("5", "4")),
    "n of a million": (CHAT, chat(n=10**6), 400, "n", "invalid_value", ("1000000", "4")),
    "huge number": (CHAT, chat(max_tokens=10**30), 400, "max_tokens", "context_length_exceeded", ("256",)),
    "invalid UTF-8": (CHAT, b'{"messages": [{"role": "user", "content": "\xff"}]}', 400, None, "invalid_utf8", ("0xff", "offset 43")),
    "lone surrogate": (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, None, "invalid_json", ("hex escape",)),
    "unknown role": (
        CHAT, chat(messages=[{"role": "wizard", "content": "hi"}]), 400, "messages[0].role", "invalid_value", ("wizard", "assistant"),
    ),
    "tool role": (CHAT, chat(messages=[{"role": "tool", "content": "hi"}]), 400, "messages[0].role", "unsupported_parameter", ("tool",)),
    "image": (
        CHAT, part("image_url", image_url={"url": "http://x"}), 400, "messages[0].content[0].type", "unsupported_parameter", ("image_url",),
    ),
    "no content": (CHAT, chat(messages=[{"role": "user"}]), 400, "messages[0].content", "missing_required_parameter", ("required",)),
    "tool calls": (
        CHAT, chat(messages=[{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]), 400, "messages[0].tool_calls",
        "unsupported_parameter", ("tool_calls",),
    ),
    "infinite penalty": (
        CHAT, b'{"messages":[{"role":"user","content":"x"}],"presence_penalty":1e999}', 400, "presence_penalty", "invalid_value",
        ("finite",),
    ),
    "too many stops": (CHAT, chat(stop=["x"] * 17), 400, "stop", "invalid_value", ("17", "16")),
    "empty stop": (CHAT, chat(stop=""), 400, "stop", "invalid_value", ("empty",)),
    "long stop": (CHAT, chat(stop="x" * 300), 400, "stop", "invalid_value", ("300", "256")),
    "long stop of few characters": (CHAT, chat(stop="ä" * 200), 400, "stop", "invalid_value", ("400", "256")),
    "too many stop ids": (CHAT, chat(stop_token_ids=[9] * 65), 400, "stop_token_ids", "invalid_value", ("65", "64")),
    "stop id below zero": (CHAT, chat(stop_token_ids=[-1]), 400, "stop_token_ids[0]", "invalid_value", ("-1", "0")),
    "stop id of 33 bits": (CHAT, chat(stop_token_ids=[2**32]), 400, "stop_token_ids[0]", "invalid_value", (str(2**32),)),
    "too many logprobs": (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "invalid_value", ("21", "20")),
    "top_logprobs alone": (CHAT, chat(top_logprobs=3), 400, "top_logprobs", "invalid_value", ("3", "logprobs")),
    "logit_bias of no token": (CHAT, chat(logit_bias={"99999": 1}), 400, "logit_bias", "invalid_value", ("99999", "261")),
    "logit_bias of a word": (CHAT, chat(logit_bias={"nine": 1}), 400, "logit_bias", "invalid_value", ("nine", "261")),
    "logit_bias of no ASCII digit": (CHAT, chat(logit_bias={"²": 1}), 400, "logit_bias", "invalid_value", ("²", "261")),
    "logit_bias of endless digits": (CHAT, chat(logit_bias={"9" * 5000: 1}), 400, "logit_bias", "invalid_value", ("999...", "261")),
    "logit_bias too strong": (CHAT, chat(logit_bias={"9": 101}), 400, "logit_bias.9", "invalid_value", ("101", "100")),
    "logit_bias too weak": (CHAT, chat(logit_bias={"9": -101}), 400, "logit_bias.9", "invalid_value", ("-101", "-100")),
    "too many logit_bias": (CHAT, chat(logit_bias={str(9 + i): 1 for i in range(9)}), 400, "logit_bias", "invalid_value", ("9", "8")),
    "min_tokens above max": (CHAT, chat(min_tokens=9, max_tokens=8), 400, "min_tokens", "invalid_value", ("9", "8")),
    "stream_options alone": (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options", "invalid_value", ("stream",)),
    "stream_options unknown": (
        CHAT, chat(stream=True, stream_options={"compress": True}), 400, "stream_options", "unsupported_parameter", ("compress",),
    ),
    "tools": (CHAT, chat(tools=[{"type": "function"}]), 400, "tools", "unsupported_parameter", ("tools", "not implemented")),
    "response_format": (CHAT, chat(response_format={"type": "json_object"}), 400, "response_format", "unsupported_parameter", ()),
    "echo": ("/v1/completions", b'{"prompt": "a", "echo": true}', 400, "echo", "unsupported_parameter", ("echo",)),
    "misspelled": (CHAT, chat(max_token=9), 400, "max_token", "unknown_parameter", ("max_token", "max_tokens")),
    "token id outside": ("/v1/completions", b'{"prompt": [1, 261]}', 400, "prompt", "invalid_value", ("261", "260")),
    "empty prompt": ("/v1/completions", b'{"prompt": ""}', 400, "prompt", "invalid_value", ("empty",)),
    "no prompts": ("/v1/completions", b'{"prompt": []}', 400, "prompt", "invalid_value", ("empty",)),
    "mixed prompt": ("/v1/completions", b'{"prompt": [1, "a"]}', 400, "prompt[0]", "invalid_value", ()),
    "too many prompts": ("/v1/completions", json.dumps({"prompt": ["a"] * 65}).encode(), 400, "prompt", "invalid_value", ("65", "64")),
    "too many messages": (CHAT, chat(messages=HI * 33), 400, "messages", "invalid_value", ("33", "32")),
    "part without text": (
        CHAT, part("text"), 400, "messages[0].content[0].text", "missing_required_parameter", ("required",),
    ),
    "empty cache salt": (CHAT, chat(cache_salt=""), 400, "cache_salt", "invalid_value", ("0", "64")),
    "long cache salt": (CHAT, chat(cache_salt="x" * 65), 400, "cache_salt", "invalid_value", ("65", "64")),
    "deep JSON": (CHAT, b"[" * 50_000, 400, None, "invalid_json", ("recursion",)),
    "unknown path": ("/v1/embeddings", b"{}", 404, None, "not_found", ("/v1/embeddings",)),
    "tokenize nothing": ("/tokenize", b"{}", 400, "prompt", "invalid_value", ("prompt or messages",)),
    "tokenize both": ("/tokenize", chat(prompt="a"), 400, "prompt", "invalid_value", ("not both",)),
    "tokenize no messages": ("/tokenize", b'{"messages": []}', 400, "messages", "invalid_value", ("at least 1",)),
    "detokenize outside": ("/detokenize", b'{"tokens": [9, -1]}', 400, "tokens", "invalid_value", ("-1", "260")),
}  # fmt: skip

# field: (a value just outside its range, the limit that the message must hold)
OUT_OF_RANGE: dict[str, list[tuple[float, float]]] = {
    "max_tokens": [(0, 1)],
    "max_completion_tokens": [(0, 1)],
    "n": [(0, 1)],
    "temperature": [(-0.5, 0), (2.5, 2)],
    "top_p": [(-0.5, 0), (1.5, 1)],
    "min_p": [(-0.5, 0), (1.5, 1)],
    "presence_penalty": [(-2.5, -2), (2.5, 2)],
    "frequency_penalty": [(-2.5, -2), (2.5, 2)],
    "repetition_penalty": [(0, 0), (10.5, 10)],
    "top_k": [(-2, -1), (2**31, 2**31)],
    "min_tokens": [(-1, 0)],
    "top_logprobs": [(-1, 0)],
    "seed": [(-(2**63) - 1, -(2**63)), (2**64, 2**64)],
    "priority": [(-(2**31) - 1, -(2**31)), (2**31, 2**31)],
}
for field, cases in OUT_OF_RANGE.items():
    for value, limit in cases:
        MALFORMED[f"{field} {value}"] = (CHAT, chat(**{field: value}), 400, field, "invalid_value", (f"is {value};", str(limit)))
for value, limit in [(-1, 0), (21, 20)]:
    asked = json.dumps({"prompt": "a", "logprobs": value}).encode()
    MALFORMED[f"completion logprobs {value}"] = ("/v1/completions", asked, 400, "logprobs", "invalid_value", (str(value), str(limit)))


async def test_every_malformed_request_names_value_and_limit_and_the_server_goes_on(cluster: Any) -> None:
    """One server takes all of them; a good request is answered after the last. Seen to fail with each limit removed, one at a time."""
    for name, (path, body, status, param, code, words) in MALFORMED.items():
        async with cluster.http.post(path, data=body, headers={"content-type": "application/json"}) as response:
            answer = await response.json()
        error = answer["error"]
        assert (response.status, error["param"], error["code"]) == (status, param, code), (name, error)
        assert set(error) == {"message", "type", "param", "code"} and set(answer) == {"error"}, name
        assert all(word in error["message"] for word in words), (name, error["message"])
        assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error"), name
    assert not cluster.router.places
    async with cluster.http.post(CHAT, data=chat(max_tokens=3)) as response:
        assert response.status == 200 and len((await response.json())["choices"][0]["message"]["content"]) == 3


async def test_huge_body_is_refused_without_being_kept(cluster: Any) -> None:
    """With and without a Content-Length; the limit of these tests is 64 KiB."""

    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 16384

    for data in (b"x" * 200_000, chunks()):
        async with cluster.http.post(CHAT, data=data) as response:
            error = (await response.json())["error"]
        assert response.status == 413 and error["code"] == "request_too_large" and "65,536" in error["message"]
    async with cluster.http.get("/health") as response:
        assert response.status == 200


@pytest.mark.parametrize(("headers", "most"), [([(b"content-length", b"1000000000000")], 32), ([], 5 + 32)], ids=["announced", "chunked"])
async def test_endless_body_is_read_to_a_bound(headers: list[tuple[bytes, bytes]], most: int) -> None:
    """In KiB, of a limit of 4: none is kept where the length is announced, then 8 times the limit is dropped so that the client hears why.

    Seen to fail with the first loop going on past the limit, with the second one not counting, and with Content-Length not looked at.
    """
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        assert taken < 1000
        return {"type": "http.request", "body": b"x" * 1024, "more_body": True}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    exchange = Exchange({"method": "POST", "path": CHAT, "headers": headers}, receive, send)
    with pytest.raises(RequestTooLarge, match="the limit is 4,096"):
        await exchange.body(max_bytes=4096, timeout_s=5.0)
    assert taken <= most


async def test_wrong_method_is_405(cluster: Any) -> None:
    async with cluster.http.get(CHAT) as response:
        assert response.status == 405 and "POST" in (await response.json())["error"]["message"]


async def test_neutral_values_and_advisory_fields_are_accepted(cluster: Any) -> None:
    body = chat(
        max_tokens=2, tools=[], tool_choice="none", response_format={"type": "text"}, user="u", metadata={"a": "b"}, store=False,
        service_tier="auto", parallel_tool_calls=True, modalities=["text"], prediction=None, stop=None, best_of=1,
    )  # fmt: skip
    async with cluster.http.post(CHAT, data=body) as response:
        assert response.status == 200, await response.text()


async def test_text_parts_and_developer_role_reach_the_template(cluster: Any) -> None:
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]
    async with cluster.http.post(CHAT, data=chat(messages=messages, max_tokens=1)) as response:
        usage = (await response.json())["usage"]
    as_text = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a\nb"}]
    async with cluster.http.post("/tokenize", json={"messages": as_text}) as response:
        assert (await response.json())["count"] == usage["prompt_tokens"]


class TestKeys:
    @pytest.fixture
    def gateway_config(self) -> GatewayConfig:
        return GatewayConfig(api_keys=(ApiKey.of("secret-a", tenant="a"), ApiKey.of("secret-b", tenant="b")))

    async def test_everything_but_the_public_paths_asks_for_a_key(self, cluster: Any) -> None:
        """Deny by default: also what does not exist. Seen to fail with a check on /v1 alone."""
        for path in ("/v1/models", "/v1/models/tiny", "/status", "/nothing", "/v1/nothing"):
            async with cluster.http.get(path) as response:
                error = (await response.json())["error"]
            assert response.status == 401 and error["code"] == "invalid_api_key" and "Bearer" in error["message"], path
        for path in (CHAT, "/v1/completions", "/tokenize", "/detokenize"):
            for key in ("wrong", "secret-", "secret-aa", ""):
                headers = {"Authorization": f"Bearer {key}"}
                async with cluster.http.post(path, data=chat(), headers=headers) as response:
                    assert response.status == 401, (path, key)
                    assert key not in (await response.json())["error"]["message"] or not key
        for path in ("/", "/health", "/ready", "/metrics"):
            async with cluster.http.get(path) as response:
                assert response.status == 200, path

    async def test_tenant_comes_from_the_key_and_separates_the_cache(self, cluster: Any) -> None:
        for key in ("secret-a", "secret-b"):
            headers = {"Authorization": f"Bearer {key}", "x-tenant-id": "b"}
            async with cluster.http.post("/v1/completions", json={"prompt": "p" * 20, "max_tokens": 1}, headers=headers) as response:
                assert response.status == 200
        first, second = cluster.router.places
        assert (first.tenant, second.tenant) == ("a", "b") and not set(first.block_hashes) & set(second.block_hashes)

    async def test_two_tenants_never_share_a_session(self, cluster: Any) -> None:
        """Both call it "chat-1", and once more with a name of 4 KiB. Seen to fail with the salt of the cluster instead of the tenant's."""
        for name in ("chat-1", "x" * 4096):
            for key in ("secret-a", "secret-b", "secret-a"):
                headers = {"Authorization": f"Bearer {key}", "X-Session-Id": name}
                async with cluster.http.post("/v1/completions", json={"prompt": "p", "max_tokens": 1}, headers=headers) as response:
                    assert response.status == 200
        sessions = [place.session for place in cluster.router.places]
        assert [len(s) for s in sessions] == [32] * 6
        for of_a, of_b, of_a_again in (sessions[:3], sessions[3:]):
            assert of_a == of_a_again != of_b


class TestSlowBody:
    @pytest.fixture
    def gateway_config(self) -> GatewayConfig:
        return GatewayConfig(body_timeout_s=0.1)

    async def test_body_that_never_ends_is_given_up(self, cluster: Any) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(cluster.url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n"), 2)
        assert b" 400 " in head
        writer.close()


class TestTooManyRequests:
    @pytest.fixture
    def gateway_config(self) -> GatewayConfig:
        return GatewayConfig(max_live_requests=2)

    async def test_requests_beyond_the_limit_are_shed_with_429(self, cluster: Any) -> None:
        cluster.set(paused=True)
        held = [asyncio.create_task(cluster.http.post(CHAT, data=chat(max_tokens=2))) for _ in range(2)]
        while cluster.service.num_live < 2:
            await asyncio.sleep(0.005)
        async with asyncio.timeout(3), cluster.http.post(CHAT, data=chat()) as response:
            assert response.status == 429 and int(response.headers["retry-after"]) >= 1
            assert "limit of this gateway is 2" in (await response.json())["error"]["message"]
        cluster.set(paused=False)
        assert [(await response).status for response in held] == [200, 200]
