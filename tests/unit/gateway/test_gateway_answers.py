"""The endpoints through the `openai` client and plain HTTP, over a cluster of fakes that speaks the real wire (conftest.py)."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

pytestmark = pytest.mark.pure

MESSAGES = [{"role": "user", "content": "hi"}]
NUM_PROMPT_TOKENS = 5  # <s> <|user|> h i <|assistant|>


def expected(count: int, *, choice: int = 0, num_prompt_tokens: int = NUM_PROMPT_TOKENS) -> str:
    """The fakes' rule, written down a second time."""
    return "".join(chr(ord("a") + (num_prompt_tokens + 3 * choice + 7 * p) % 26) for p in range(count))


async def sse(cluster: Any, path: str, body: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """Events of a stream as JSON, and the response; asserts the framing and the closing [DONE]."""
    async with cluster.http.post(path, json={**body, "stream": True}) as response:
        assert response.status == 200
        blocks = (await response.read()).decode().split("\n\n")
    assert blocks.pop() == "" and blocks.pop() == "data: [DONE]"
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks], response


async def test_chat_answer_is_what_the_workers_said(cluster: Any) -> None:
    answer = await cluster.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12)
    (choice,) = answer.choices
    assert choice.message.content == expected(12) and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == "tiny"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (NUM_PROMPT_TOKENS, 12, 17)
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert cluster.at_rest


async def test_chat_stream_is_role_then_content_then_reason_then_usage(cluster: Any) -> None:
    """Seen to fail with the role chunk left out."""
    events, response = await sse(
        cluster, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 6, "stream_options": {"include_usage": True}}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    *contents, closing, usage = events[1:]
    assert "".join(e["choices"][0]["delta"]["content"] for e in contents) == expected(6)
    assert closing["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 6
    assert all(e["usage"] is None for e in events[:-1])
    assert {e["object"] for e in events} == {"chat.completion.chunk"} and len({e["id"] for e in events}) == 1


async def test_stream_has_no_usage_unless_asked(cluster: Any) -> None:
    events, _ = await sse(cluster, "/v1/completions", {"prompt": "abc", "max_tokens": 3})
    assert all("usage" not in e for e in events)
    assert "".join(e["choices"][0]["text"] for e in events) == expected(3, num_prompt_tokens=3)
    assert events[-1]["choices"][0]["finish_reason"] == "length"


async def test_openai_client_reads_the_stream(cluster: Any) -> None:
    stream = await cluster.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=9, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected(9)


async def test_tokens_are_streamed_one_by_one(cluster: Any) -> None:
    """A client sees the first token while the worker is held before the third. Seen to fail with a feed read at its end."""
    cluster.set(stop_before=2)
    body = {"messages": MESSAGES, "max_tokens": 5, "stream": True}
    async with asyncio.timeout(3), cluster.http.post("/v1/chat/completions", json=body) as response:
        first = b""
        while first.count(b"\n\n") < 3:  # role, two letters
            first += await response.content.readany()
        cluster.set(stop_before=None)
        rest = await response.read()
    text = (first + rest).decode()
    assert "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in text.split("\n\n")[:-2]) == expected(5)


async def test_n_choices_have_their_own_streams(cluster: Any) -> None:
    answer = await cluster.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=7, n=3)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert [c.message.content for c in answer.choices] == [expected(7, choice=c) for c in range(3)]
    assert answer.usage.completion_tokens == 21
    events, _ = await sse(cluster, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4, "n": 2})
    for index in (0, 1):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["finish_reason"] == "length"
        assert "".join(c["delta"].get("content", "") for c in mine) == expected(4, choice=index)


async def test_several_prompts_share_one_answer(cluster: Any) -> None:
    """Choice c of prompt p is choice p * n + c."""
    answer = await cluster.openai.completions.create(model="tiny", prompt=["ab", "abcd"], max_tokens=5, n=2)
    assert [c.text for c in answer.choices] == [expected(5, choice=c, num_prompt_tokens=length) for length in (2, 4) for c in (0, 1)]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 20)
    by_ids = await cluster.openai.completions.create(model="tiny", prompt=[[10, 11], [10, 11, 12, 13]], max_tokens=5)
    assert [c.text for c in by_ids.choices] == [expected(5, num_prompt_tokens=length) for length in (2, 4)]


async def test_completions_default_to_16_tokens_and_chat_to_what_is_left(cluster: Any) -> None:
    assert (await cluster.openai.completions.create(model="tiny", prompt="abc")).usage.completion_tokens == 16
    answer = await cluster.openai.chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.usage.total_tokens == 256 and answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_is_cut_and_usage_counts_what_was_delivered(cluster: Any, stream: bool) -> None:
    """ "lo, w" spans tokens; the token that completes it is counted, nothing of it is shown, and the worker is told to stop."""
    cluster.set(script="hello, world and much more that nobody asked for")
    body = {"messages": MESSAGES, "max_tokens": 40, "stop": ["xx", "lo, w"]}
    if stream:
        events, _ = await sse(cluster, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
        reason, usage = events[-2]["choices"][0]["finish_reason"], events[-1]["usage"]
    else:
        async with cluster.http.post("/v1/chat/completions", json=body) as response:
            answer = await response.json()
        text, reason, usage = answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"], answer["usage"]
    assert (text, reason, usage["completion_tokens"]) == ("hel", "stop", len("hello, w"))
    await asyncio.sleep(0.05)
    assert cluster.at_rest


async def test_stop_string_of_one_choice_leaves_the_other_alone(cluster: Any) -> None:
    stop = expected(6)[3:5]  # in choice 0 only
    assert stop not in expected(8, choice=1)
    answer = await cluster.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, n=2, stop=stop)
    assert [c.finish_reason for c in answer.choices] == ["stop", "length"]
    assert [c.message.content for c in answer.choices] == [expected(3), expected(8, choice=1)]
    assert answer.usage.completion_tokens == 5 + 8


async def test_eos_is_counted_and_not_shown(cluster: Any) -> None:
    cluster.set(script="Paris")
    answer = await cluster.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=40)
    assert answer.choices[0].message.content == "Paris" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len("Paris") + 1


async def test_character_split_over_tokens_comes_whole(cluster: Any) -> None:
    """Seen to fail with a decoder that is not incremental: U+FFFD."""
    text = "größe 東京 🙂"
    cluster.set(script=[5 + byte for byte in text.encode()])
    events, _ = await sse(cluster, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 60})
    pieces = [e["choices"][0]["delta"].get("content", "") for e in events]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and "東" in pieces


async def test_chat_logprobs_from_the_first_token(cluster: Any) -> None:
    answer = await cluster.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == list(expected(4))
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 and entry.bytes == list(entry.token.encode()) for entry in content)
    assert [t.logprob for t in content[0].top_logprobs] == [-0.5, -1.5]
    events, _ = await sse(cluster, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4, "logprobs": True})
    streamed = [e["choices"][0]["logprobs"]["content"][0]["token"] for e in events if e["choices"][0]["logprobs"]]
    assert streamed == list(expected(4))


async def test_completion_logprobs_are_columns(cluster: Any) -> None:
    answer = await cluster.openai.completions.create(model="tiny", prompt="abc", max_tokens=3, logprobs=1)
    columns = answer.choices[0].logprobs
    assert columns.tokens == list(expected(3, num_prompt_tokens=3)) and columns.token_logprobs == [-0.5] * 3
    assert columns.text_offset == [0, 1, 2] and columns.top_logprobs == [{t: -0.5} for t in columns.tokens]
    events, _ = await sse(cluster, "/v1/completions", {"prompt": "abc", "max_tokens": 3, "logprobs": 1})
    assert [o for e in events if e["choices"][0]["logprobs"] for o in e["choices"][0]["logprobs"]["text_offset"]] == [0, 1, 2]


async def test_sampling_takes_generation_config_where_the_user_said_nothing(cluster: Any) -> None:
    await cluster.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1, extra_body={"min_p": 0.1})
    await cluster.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=9, temperature=0, seed=-1, logit_bias={"7": -5}, stop=["zz"],
        extra_body={"top_k": 0, "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [99], "priority": 3},
    )  # fmt: skip
    submits = [m.attempt.request for w in cluster.workers.values() for m in w.received if hasattr(m, "prefill_only") and m.handoff is None]
    first, second = sorted(submits, key=lambda r: r.arrival_s)
    assert (first.sampling.temperature, first.sampling.top_k, first.sampling.min_p) == (0.7, 20, 0.1)
    assert first.sampling.eos_token_ids == (1,) and first.priority == 0
    s = second.sampling
    assert (s.temperature, s.top_k, s.seed, s.logit_bias, s.min_tokens) == (0.0, 0, 2**64 - 1, ((7, -5.0),), 2)
    assert (s.ignore_eos, s.stop_token_ids, second.priority) == (True, (99,), 3)


async def test_prefill_and_decode_run_on_different_workers_with_a_handoff_between(cluster: Any) -> None:
    await cluster.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5)
    submits = {w.worker_id: m for w in cluster.workers.values() for m in w.received if hasattr(m, "prefill_only")}
    (prefill,) = [s for w, s in submits.items() if w.startswith("prefill")]
    (decode,) = [s for w, s in submits.items() if w.startswith("decode")]
    assert prefill.prefill_only and prefill.handoff is None
    assert not decode.prefill_only and decode.handoff.request_id == decode.attempt.request.request_id
    assert [type(m).__name__ for m in cluster.router.told] == ["PrefillDone", "Done"]
    assert cluster.router.told[-1].num_output_tokens == 5


async def test_cache_salt_and_tenant_separate_the_prefix_hashes(cluster: Any) -> None:
    prompt = "p" * 40
    for salt in (None, None, "a"):
        body = {"prompt": prompt, "max_tokens": 1} | ({} if salt is None else {"cache_salt": salt})
        async with cluster.http.post("/v1/completions", json=body) as response:
            assert response.status == 200
    plain, again, salted = [place.block_hashes for place in cluster.router.places]
    assert len(plain) == 2 and plain == again and not set(plain) & set(salted)


async def test_session_is_the_header_then_prompt_cache_key_then_user(cluster: Any) -> None:
    """One name in three places is one session; none is none. Seen to fail with `user` before `prompt_cache_key`."""
    fields: list[dict[str, str]] = [{"user": "a"}, {"prompt_cache_key": "a", "user": "b"}, {"prompt_cache_key": "b", "user": "b"}, {}]
    for header, body in [({}, fields[0]), ({}, fields[1]), ({"X-Session-Id": "a"}, fields[2]), ({}, fields[3])]:
        async with cluster.http.post("/v1/completions", json={"prompt": "p", "max_tokens": 1} | body, headers=header) as response:
            assert response.status == 200
    by_user, by_key, by_header, none = [place.session for place in cluster.router.places]
    assert by_user == by_key == by_header != "" and none == ""


async def test_objectives_of_a_request_reach_the_router_and_odd_ones_are_refused(cluster: Any) -> None:
    """In milliseconds by header, in seconds to the router. Seen to fail with `slo` not passed to the request."""
    body = {"prompt": "p", "max_tokens": 1}
    for headers in ({}, {"X-SLO-TTFT-MS": "200"}, {"x-slo-tpot-ms": "12.5", "x-slo-ttft-ms": "1000"}):
        async with cluster.http.post("/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200
    found = [(place.slo_ttft_s, place.slo_tpot_s) for place in cluster.router.places]
    assert found == [(None, None), (0.2, None), (1.0, 0.0125)]
    for odd in ("0", "-1", "soon", "nan", "1e3", "", "9" * 20):
        async with cluster.http.post("/v1/completions", json=body, headers={"X-SLO-TTFT-MS": odd}) as response:
            assert response.status == 400 and "x-slo-ttft-ms" in (await response.json())["error"]["message"]
    assert len(cluster.router.places) == 3


async def test_tokenize_and_detokenize_are_inverse_and_agree_with_usage(cluster: Any) -> None:
    text = "größe 東京 🙂 and a plain word"
    async with cluster.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}) as response:
        tokens = await response.json()
    async with cluster.http.post("/detokenize", json={"tokens": tokens["tokens"]}) as response:
        assert (await response.json())["prompt"] == text
    usage = (await cluster.openai.completions.create(model="tiny", prompt=text, max_tokens=1)).usage
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"]) == usage.prompt_tokens
    async with cluster.http.post("/tokenize", json={"messages": MESSAGES}) as response:
        assert (await response.json())["count"] == NUM_PROMPT_TOKENS


async def test_models_health_ready_status_metrics_and_page(cluster: Any) -> None:
    (model,) = (await cluster.openai.models.list()).data
    assert model.id == "tiny" and model.max_model_len == 256
    assert (await cluster.openai.models.retrieve("tiny")).id == "tiny"
    for path, needle in (("/", "Baton serves tiny"), ("/health", "ok"), ("/ready", '"ready":true'), ("/metrics", "baton_kv_blocks")):
        async with cluster.http.get(path) as response:
            assert response.status == 200 and needle in await response.text()
    async with cluster.http.get("/status") as response:
        status = await response.json()
    assert status["schema"] == "baton.status.v1" and status["ready"] and status["router"]["detail"] == {"policy": "fake"}
    assert [w["worker_id"] for w in status["workers"]] == ["decode-0", "decode-1", "prefill-0", "prefill-1"]
    row = status["workers"][0]
    assert (row["role"], row["pid"], row["state"], row["epoch"]) == ("decode", 4242, "ready", cluster.workers["decode-0"].epoch)
    assert row["kv_blocks"] == {"total": 64, "free": 60, "owned": 2, "leased": 1, "cached": 1, "unaccounted": 0}
    assert (row["queue"]["waiting"], row["queue"]["pulling"], row["queue"]["running"]) == (3, 2, 0)
    assert row["counters"] == {"handoffs_out": 5}


async def test_metrics_are_parsable_and_count(cluster: Any) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    await cluster.openai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5)
    async with cluster.http.get("/metrics") as response:
        families = {f.name: f for f in text_string_to_metric_families(await response.text())}

    def value(family: str, suffix: str = "", **labels: str) -> float:
        (sample,) = [s for s in families[family].samples if s.name == family + suffix and labels.items() <= s.labels.items()]
        return float(sample.value)

    assert value("baton_requests", "_total", outcome="finished") == 1
    assert value("vllm:generation_tokens", "_total") == 5 and value("vllm:prompt_tokens", "_total") == NUM_PROMPT_TOKENS
    assert value("vllm:time_to_first_token_seconds", "_count") == 1
    assert value("vllm:inter_token_latency_seconds", "_count") == 4
    assert value("vllm:request_success", "_total", finished_reason="length") == 1
    assert value("baton_kv_handoff_bytes", "_sum") == 4096
    assert value("baton_placements", "_total", decision="prefill-decode") == 1
    assert value("baton_kv_blocks_unaccounted", worker="decode-0") == 0 and value("baton_kv_pulls", worker="decode-0") == 2


async def test_client_request_id_is_echoed(cluster: Any) -> None:
    async with cluster.http.get("/v1/models", headers={"X-Request-Id": "mine-1"}) as response:
        assert response.headers["x-request-id"] == "mine-1"


async def test_32_streams_at_once(cluster: Any) -> None:
    async def one(i: int) -> None:
        prompt = "x" * (i + 1)
        events, _ = await sse(cluster, "/v1/completions", {"prompt": prompt, "max_tokens": 20})
        assert "".join(e["choices"][0]["text"] for e in events) == expected(20, num_prompt_tokens=i + 1)

    async with asyncio.timeout(20):
        await asyncio.gather(*(one(i) for i in range(32)))
    assert cluster.at_rest
