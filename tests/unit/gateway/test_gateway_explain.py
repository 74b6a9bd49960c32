"""How a placement is told over HTTP: the header of an answer, GET /explain/NAME, the log line; over the fakes of conftest.py."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.config import ApiKey, GatewayConfig
from gateway.explain import explain_document, placement_header
from gateway.session import Session
from protocol.messages import Assignment, PrefillDone
from protocol.request import Request, SamplingParams, token_buffer
from tests.unit.gateway.conftest import until

pytestmark = pytest.mark.pure

BODY = {"prompt": "abc", "max_tokens": 4}


def parts(header: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in header.split(";"))


async def answered(cluster: Any, body: dict[str, Any] | None = None, **headers: str) -> tuple[str, Any]:
    """The answer's id and the response."""
    async with cluster.http.post("/v1/completions", json=body or BODY, headers=headers) as response:
        return (await response.json())["id"], response


async def explain(cluster: Any, name: str, *, key: str | None = None) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with cluster.http.get(f"/explain/{name}", headers=headers) as response:
        return response.status, await response.json()


async def test_header_names_the_placement_of_an_answer(cluster: Any) -> None:
    """Seen to fail with prefill and decode worker exchanged in the header."""
    answer_id, response = await answered(cluster)
    (record,) = cluster.router.explanations
    assert parts(response.headers["x-baton-placement"]) == {
        "prefill": record.assignment.prefill_worker,
        "decode": record.assignment.decode_worker,
        "cached": "2",
        "policy": "fake",
        "request": record.key.request_id,
    }
    assert answer_id == f"cmpl-{record.key.request_id}"


async def test_header_of_a_stream_is_there_with_its_first_token(cluster: Any) -> None:
    """While the rest is held back. Seen to fail with the header set after the head was sent."""
    cluster.set(stop_before=1)
    body = {**BODY, "stream": True}
    async with asyncio.timeout(3), cluster.http.post("/v1/completions", json=body) as response:
        assert parts(response.headers["x-baton-placement"])["prefill"].startswith("prefill-")
        cluster.set(stop_before=None)
        await response.read()


async def test_an_answer_to_several_prompts_has_a_header_each_and_is_explained_by_its_id(cluster: Any) -> None:
    """Seen to fail with `known_as` left out of Place."""
    answer_id, response = await answered(cluster, {"prompt": ["abc", "de", "f"], "max_tokens": 2})
    told = [parts(header)["request"] for header in response.headers.getall("x-baton-placement")]
    status, document = await explain(cluster, answer_id)
    assert status == 200 and {a["request_id"] for a in document["attempts"]} == set(told) and len(set(told)) == 3


async def test_a_refusal_has_the_id_to_ask_with(cluster: Any) -> None:
    """Seen to fail with the header set on answers only."""
    cluster.router.refuse = (429, "too much", 1.0)
    async with cluster.http.post("/v1/completions", json=BODY) as response:
        assert response.status == 429
        told = parts(response.headers["x-baton-placement"])
    assert told.keys() == {"request"}
    _, document = await explain(cluster, told["request"])
    (attempt,) = document["attempts"]
    assert attempt["refusal"] == {"status": 429, "message": "too much", "retry_after_s": 1.0} and attempt["outcome"] is None


async def test_a_request_is_explained_by_each_of_its_names_with_its_outcome(cluster: Any) -> None:
    """By the answer's id, the request's and the client's. Seen to fail with the answer's prefix left on."""
    cluster.router.cached_tokens = 2
    answer_id, _ = await answered(cluster, **{"X-Request-Id": "job-7"})
    await until(lambda: cluster.at_rest)
    documents = [(await explain(cluster, name))[1] for name in (answer_id, answer_id.removeprefix("cmpl-"), "job-7")]
    for document in documents:
        (attempt,) = document["attempts"]
        assert document["schema"] == "baton.explain.v1" and attempt["by"] == "router"
        assert attempt["assignment"]["cached_tokens"] == attempt["outcome"]["found_tokens"] == 2
        assert attempt["outcome"]["state"] == "finished" and attempt["outcome"]["output_tokens"] == 4
        assert (attempt["outcome"]["handoff_path"], attempt["outcome"]["handoff_s"]) == ("shm", 0.001)
        assert attempt["outcome"]["ttft_s"] > 0.0


async def test_an_attempt_that_was_lost_says_so_and_the_next_one_has_its_own_outcome(cluster: Any) -> None:
    """How: both decode workers are held, one dies. Seen to fail with `state` left out of Done."""
    cluster.set(stop_before=2)
    task = asyncio.create_task(answered(cluster))
    await until(lambda: any(w.tasks for w in cluster.workers.values() if w.role.decodes))
    (placed,) = cluster.router.explanations
    await until(lambda: placed.first_token_s is not None)
    await cluster.workers[placed.assignment.decode_worker].kill()
    cluster.set(stop_before=None)
    answer_id, _ = await task
    await until(lambda: not cluster.service.num_live)
    _, document = await explain(cluster, answer_id)
    assert [(a["attempt"], a["outcome"]["state"]) for a in document["attempts"]] == [(0, "lost"), (1, "finished")]


async def test_an_unknown_name_says_how_many_are_kept_and_how_to_keep_more(cluster: Any) -> None:
    await answered(cluster)
    status, error = await explain(cluster, "chatcmpl-" + "0" * 32)
    assert status == 404 and error["error"]["code"] == "not_found"
    assert "the newest 8 placements (1 are kept); raise router.num_explained" in error["error"]["message"]
    for odd in ("x" * 200, "%00"):
        assert (await explain(cluster, odd))[0] == 404


async def test_what_was_placed_without_the_router_is_explained_without_it(cluster: Any) -> None:
    """How: the router takes no Place, then dies. Seen to fail with `explanations.placed` left out of PlaceWithoutRouter, and with
    found tokens told to a router that chose other workers."""
    cluster.router.silent = True
    cluster.router.told.clear()
    answer_id, response = await answered(cluster)
    assert parts(response.headers["x-baton-placement"])["policy"] == "least_work@gateway"
    assert [m.num_cached_tokens for m in cluster.router.told if isinstance(m, PrefillDone)] == [None]
    await cluster.router.kill()
    await until(lambda: not cluster.service.routers.is_up)
    _, document = await explain(cluster, answer_id)
    (attempt,) = document["attempts"]
    assert (attempt["by"], attempt["assignment"]["policy"]) == ("gateway-0", "least_work@gateway")
    assert attempt["outcome"]["found_tokens"] == 2 and attempt["outcome"]["state"] == "finished"
    assert attempt["assignment"]["predicted_ttft_s"] is None
    status, error = await explain(cluster, "1" * 32)
    assert status == 503 and "the router does not answer" in error["error"]["message"]


async def test_overlap_and_predictions_are_metrics(cluster: Any) -> None:
    """Expected 64 of 100 prompt tokens, found 2. Seen to fail with found tokens left out of `prefilled`."""
    cluster.router.cached_tokens = 64
    await answered(cluster, {"prompt": "x" * 100, "max_tokens": 2})
    text = (await (await cluster.http.get("/metrics")).read()).decode()
    found = [s for family in text_string_to_metric_families(text) if family.name.startswith("baton_") for s in family.samples]
    samples = {(s.name, *s.labels.values()): s.value for s in found}
    assert [samples["baton_prefix_overlap_total", found] for found in ("found", "short", "none")] == [0, 1, 0]
    assert samples["baton_ttft_prediction_ratio_count",] == 1 and samples["baton_ttft_prediction_ratio_sum",] > 0


async def test_the_log_line_of_an_attempt_has_its_placement(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Seen to fail with the assignment left out of AttemptEnded."""
    with caplog.at_level(logging.INFO, logger="baton.gateway"):
        await answered(cluster)
    (line,) = [r for r in caplog.records if r.message == "attempt ended"]
    (record,) = cluster.router.explanations
    told = line.__dict__
    assert (told["prefill_worker"], told["decode_worker"]) == (record.assignment.prefill_worker, record.assignment.decode_worker)
    assert (told["policy"], told["placed_because"], told["cached_expected"], told["cached_found"]) == ("fake", "round robin", 0, 2)
    assert told["ttft_predicted_s"] == 0.001 and told["ttft_s"] > 0.0 and told["output_tokens"] == 4
    assert (told["handoff_path"], told["handoff_s"], told["state"]) == ("shm", 0.001, "finished")


class TestWithKeys:
    @pytest.fixture
    def gateway_config(self) -> GatewayConfig:
        return GatewayConfig(api_keys=(ApiKey.of("secret-a", tenant="a"), ApiKey.of("secret-b", tenant="b")))

    async def test_a_key_reads_its_own_tenants_requests_only(self, cluster: Any) -> None:
        """By id and by the client's name for it. Seen to fail with `tenant` given as None."""
        answer_id, response = await answered(cluster, Authorization="Bearer secret-a", **{"X-Request-Id": "job"})
        assert "x-baton-placement" not in response.headers, "names of workers are not for those who bear a key"
        for name in (answer_id, "job"):
            assert (await explain(cluster, name, key="secret-a"))[0] == 200
            assert (await explain(cluster, name, key="secret-b"))[0] == 404
            assert (await explain(cluster, name))[0] == 401

    async def test_a_key_sees_nothing_of_other_tenants_in_the_status(self, cluster: Any) -> None:
        """Seen to fail with `tenant` given as None."""
        queue = {"waiting": 2, "tenants": {"a": 10.0, "b": 20.0}}
        cluster.router.status = {"queues": {"m": queue}, "assignments": [{"request_id": "of-b"}]}
        async with cluster.http.get("/status", headers={"Authorization": "Bearer secret-a"}) as response:
            detail = (await response.json())["router"]["detail"]
        assert detail == {"queues": {"m": {"waiting": 2, "tenants": {"a": 10.0}}}, "assignments": []}


@pytest.mark.parametrize(
    ("keys", "header", "shown"),
    [(0, None, True), (1, None, False), (1, True, True), (0, False, False)],
)
def test_header_is_shown_where_nobody_is_told_apart_or_it_is_asked_for(keys: int, header: bool | None, shown: bool) -> None:
    """Seen to fail with `or` for the condition."""
    config = GatewayConfig(api_keys=(ApiKey.of("k"),) * keys, placement_header=header)
    assert config.shows_placement is shown


def test_a_policys_odd_name_cannot_break_the_header() -> None:
    """Seen to fail without `_plain`."""
    request = Request(
        request_id="r", model_id="m", prompt_token_ids=token_buffer([1]), sampling=SamplingParams(max_tokens=1), cache_root=bytes(16),
        arrival_s=0.0,
    )  # fmt: skip
    session = Session(request, GatewayConfig())
    assert placement_header(session) == b"request=r"
    session.assignments.append(
        Assignment(
            request_id="r", attempt=0, prefill_worker="p", decode_worker="d", cached_tokens=0, policy="möd\r\n:C;x", reason="",
            prefill_scores=(), decode_scores=(), waited_s=0.0,
        )
    )  # fmt: skip
    assert placement_header(session) == b"prefill=p;decode=d;policy=m?d??:C?x;request=r"


def test_what_the_gateway_placed_itself_stands_for_what_the_router_gave_out_too_late() -> None:
    """Seen to fail with both told."""

    def attempt(number: int, by: str, age_s: float) -> dict[str, Any]:
        return {"request_id": "r", "attempt": number, "by": by, "age_s": age_s}

    own = {"attempts": [attempt(1, "gateway-0", 1.0)], "left_out": 0, "kept": 1, "limit": 256}
    said = {"attempts": [attempt(0, "router", 2.0), attempt(1, "router", 1.1)], "left_out": 3, "kept": 9, "limit": 10}
    document = explain_document("r", own=own, replies=[json.dumps(said)])
    assert [(a["attempt"], a["by"]) for a in document["attempts"]] == [(0, "router"), (1, "gateway-0")]  # type: ignore[attr-defined]
    assert (document["left_out"], document["kept"], document["limit"]) == (3, 9, 10)
