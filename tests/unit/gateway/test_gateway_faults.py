"""Workers and routers that die, hang, refuse; clients that leave or do not read: what the user sees, and what is left behind.

The fakes' tokens depend on the position alone, so a lost, repeated or reordered token shows in the text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from dataclasses import replace
from typing import Any

import openai
import pytest

from gateway.app import GatewayApp
from gateway.config import GatewayConfig
from protocol.messages import Done, Submit
from protocol.worker import Role, WorkerState

pytestmark = pytest.mark.pure

MESSAGES = [{"role": "user", "content": "hi"}]


def expected(count: int, *, choice: int = 0, num_prompt_tokens: int = 5) -> str:
    return "".join(chr(ord("a") + (num_prompt_tokens + 3 * choice + 7 * p) % 26) for p in range(count))


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


def ask(cluster: Any, **fields: Any) -> asyncio.Task[Any]:
    body: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20} | fields
    return asyncio.create_task(cluster.openai.chat.completions.create(**body))


def busy(cluster: Any, kind: str) -> Any:
    return next((w for w in cluster.workers.values() if w.worker_id.startswith(kind) and w.tasks), None)


def submits(cluster: Any) -> list[Submit]:
    return [m for w in cluster.workers.values() for m in w.received if isinstance(m, Submit)]


async def metric(cluster: Any, line_start: str) -> float:
    async with cluster.http.get("/metrics") as response:
        lines = [line for line in (await response.text()).splitlines() if line.startswith(line_start)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def test_decode_worker_killed_mid_stream_loses_and_repeats_nothing(cluster: Any) -> None:
    """Seen to fail when the retry starts from the prompt alone, and when it carries one delivered token too few."""
    cluster.set(stop_before=9)
    answer = ask(cluster)
    await until(lambda: busy(cluster, "decode") and 9 in next(iter(busy(cluster, "decode").tasks.values())).positions)
    await asyncio.sleep(0.01)
    cluster.set(stop_before=None)
    dead = busy(cluster, "decode")
    await dead.kill()
    result = await asyncio.wait_for(answer, 5)
    assert result.choices[0].message.content == expected(20) and result.usage.completion_tokens == 20
    retry = max(submits(cluster), key=lambda s: (s.attempt.number, s.handoff is None))
    assert retry.attempt.number == 1 and len(retry.attempt.delivered[0]) == 9
    assert cluster.router.places[-1].excluded == (dead.worker_id,) and cluster.router.places[-1].num_tokens == 5 + 9
    assert await metric(cluster, 'baton_migrations_total{phase="decoding"}') == 1


async def test_prefill_worker_killed_while_prefilling_is_replaced(cluster: Any) -> None:
    cluster.set(paused=True)
    answer = ask(cluster)
    await until(lambda: busy(cluster, "prefill"))
    dead = busy(cluster, "prefill")
    await dead.kill()
    cluster.set(paused=False)
    assert (await asyncio.wait_for(answer, 5)).choices[0].message.content == expected(20)
    assert cluster.router.places[-1].excluded == (dead.worker_id,) and cluster.router.places[-1].attempt == 1


async def test_decode_worker_killed_while_the_prompt_is_computed_elsewhere(cluster: Any) -> None:
    """The prefill worker is told to stop, and another pair takes over."""
    cluster.set(paused=True)
    answer = ask(cluster)
    await until(lambda: busy(cluster, "prefill"))
    prefill = busy(cluster, "prefill")
    await cluster.workers["decode-0"].kill()
    await until(lambda: prefill.cancelled or len(cluster.router.places) == 1)
    cluster.set(paused=False)
    assert (await asyncio.wait_for(answer, 5)).choices[0].message.content == expected(20)


async def test_prefill_worker_killed_after_the_offer_hurts_nobody(cluster: Any) -> None:
    """The decode worker finds the source gone and recomputes; the gateway starts no new attempt."""
    for worker in cluster.workers.values():
        worker.fail_pull = True
        worker.paused = worker.role is Role.DECODE
    answer = ask(cluster)
    await until(lambda: busy(cluster, "decode"))
    source = next(w for w in cluster.workers.values() if any(isinstance(m, Submit) for m in w.received) and w.role is Role.PREFILL)
    await source.kill()
    await asyncio.sleep(0.05)
    cluster.set(paused=False)
    assert (await asyncio.wait_for(answer, 5)).choices[0].message.content == expected(20)
    assert [p.attempt for p in cluster.router.places] == [0]
    assert await metric(cluster, 'baton_kv_handoff_failures_total{error="peer_lost"}') == 1
    assert await metric(cluster, 'baton_fallbacks_total{kind="recompute"}') == 1


async def test_two_choices_that_differ_go_on_where_they_decode(cluster: Any) -> None:
    cluster.set(stop_before=6)
    answer = ask(cluster, n=2)
    await until(lambda: busy(cluster, "decode") and next(iter(busy(cluster, "decode").tasks.values())).positions == [6, 6])
    await asyncio.sleep(0.01)
    cluster.set(stop_before=None)
    await busy(cluster, "decode").kill()
    result = await asyncio.wait_for(answer, 5)
    assert [c.message.content for c in result.choices] == [expected(20), expected(20, choice=1)]
    place = cluster.router.places[-1]
    assert place.local_only and place.attempt == 1
    assert max(s.attempt.number for s in submits(cluster)) == 1 and not any(s.prefill_only for s in submits(cluster) if s.attempt.number)


async def test_worker_that_refuses_is_passed_over(cluster: Any) -> None:
    cluster.workers["prefill-0"].refuse = "inbox full"
    assert (await asyncio.wait_for(ask(cluster), 5)).choices[0].message.content == expected(20)
    assert [p.excluded for p in cluster.router.places if p.attempt] == [("prefill-0",)]


async def test_retries_are_bounded(cluster: Any) -> None:
    cluster.set(refuse="out of order")
    with pytest.raises(openai.InternalServerError) as caught:
        await asyncio.wait_for(ask(cluster), 5)
    assert caught.value.code == "attempts_exhausted" or caught.value.code == "no_worker"
    await until(lambda: cluster.at_rest)


async def test_only_decode_worker_is_lost_and_a_fresh_one_takes_over(cluster: Any) -> None:
    """An accepted request waits for placement_wait_s: the supervisor needs a moment to start another worker."""
    await cluster.workers.pop("decode-1").kill()
    cluster.router.workers = [w for w in cluster.router.workers if w.worker_id != "decode-1"]
    cluster.set(stop_before=7)
    answer = ask(cluster)
    await until(lambda: busy(cluster, "decode") and 7 in next(iter(busy(cluster, "decode").tasks.values())).positions)
    await asyncio.sleep(0.01)
    await cluster.workers["decode-0"].kill()
    await asyncio.sleep(0.2)
    cluster.router.workers.append(await cluster.add_worker("decode-2", Role.DECODE))
    cluster.set(stop_before=None)
    assert (await asyncio.wait_for(answer, 5)).choices[0].message.content == expected(20)


async def test_no_worker_in_time_is_an_error_in_the_stream(cluster: Any) -> None:
    """The client has tokens already, so the error comes as an event, then [DONE]."""
    cluster.set(stop_before=3)
    body = {"messages": MESSAGES, "max_tokens": 20, "stream": True}
    async with cluster.http.post("/v1/chat/completions", json=body) as response:
        await until(lambda: busy(cluster, "decode") and 3 in next(iter(busy(cluster, "decode").tasks.values())).positions)
        for worker_id in ("decode-0", "decode-1"):
            await cluster.workers[worker_id].kill()
        blocks = (await response.read()).decode().split("\n\n")
    assert blocks[-2] == "data: [DONE]"
    error = json.loads(blocks[-3].removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and error["code"] == "no_worker" and "1 s" in error["message"]


async def test_silent_router_is_replaced_by_least_work_after_200_ms_and_says_so(cluster: Any) -> None:
    cluster.router.silent = True
    started_s = asyncio.get_running_loop().time()
    assert (await asyncio.wait_for(ask(cluster), 5)).choices[0].message.content == expected(20)
    assert 0.2 <= asyncio.get_running_loop().time() - started_s < 1.5
    assert await metric(cluster, 'baton_fallbacks_total{kind="least_work"}') == 1
    async with cluster.http.get("/status") as response:
        assert (await response.json())["fallbacks"]["least_work"] == 1
    assert [m.attempt for m in cluster.router.told if isinstance(m, Done)] == [0]


async def test_dead_router_does_not_hold_up_requests(cluster: Any) -> None:
    await cluster.router.kill()
    await until(lambda: not cluster.service.routers.is_up)
    assert (await asyncio.wait_for(ask(cluster), 2)).choices[0].message.content == expected(20)
    async with cluster.http.get("/ready") as response:
        assert response.status == 200


async def test_request_queued_at_a_router_that_hangs_goes_on_without_it(cluster: Any) -> None:
    """It acknowledged, then nothing more: the socket stays open. Seen to fail without the router's sign of life."""
    cluster.router.assign = False
    answer = ask(cluster)
    await until(lambda: cluster.router.places)
    cluster.router.hung = True
    assert (await asyncio.wait_for(answer, 5)).choices[0].message.content == expected(20)


async def test_refusals_carry_status_and_retry_after(cluster: Any) -> None:
    for status, code in ((429, "overloaded"), (503, "no_worker")):
        cluster.router.refuse = (status, "the queue is full: 9 requests wait, the limit is 9", 3.2)
        async with cluster.http.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True}) as response:
            assert response.status == status and response.headers["retry-after"] == "4"
            error = (await response.json())["error"]
        assert error["code"] == code and "limit is 9" in error["message"]
    assert cluster.at_rest or cluster.service.num_live == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_client_that_leaves_stops_the_work(cluster: Any, stream: bool, phase: str) -> None:
    """Seen to fail without the disconnect watch."""
    if phase == "prefill":
        cluster.set(paused=True)
    else:
        cluster.set(stop_before=4)
    body = {"messages": MESSAGES, "max_tokens": 200, "stream": stream}
    request = asyncio.create_task(cluster.http.post("/v1/chat/completions", json=body))
    await until(lambda: busy(cluster, phase))
    worker = busy(cluster, phase)
    if stream and phase == "decode":
        response = await request
        await response.content.readany()
        response.close()
    else:
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await request
    await until(lambda: worker.cancelled)
    await until(lambda: cluster.at_rest)
    assert await metric(cluster, 'baton_requests_total{outcome="cancelled"}') == 1


async def test_request_deadline_is_a_504(cluster: Any) -> None:
    cluster.set(paused=True)
    cluster.service.config = replace(cluster.config, request_timeout_s=0.2)
    async with cluster.http.post("/v1/chat/completions", json={"messages": MESSAGES}) as response:
        assert response.status == 504
        assert (await response.json())["error"]["code"] == "deadline_exceeded"
    await until(lambda: cluster.at_rest)


async def test_not_ready_without_a_decode_worker_and_says_why(cluster: Any) -> None:
    cluster.workers["decode-0"].state = WorkerState.DRAINING
    await cluster.workers["decode-1"].kill()
    await until(lambda: cluster.service.reasons_not_ready)
    async with cluster.http.get("/ready") as response:
        assert response.status == 503
        reasons = (await response.json())["reasons"]
    assert reasons[0] == "no decode worker is ready" and "decode-0 (decode) is draining" in reasons
    async with cluster.http.get("/health") as response:
        assert response.status == 200


class TestStuckWorker:
    @pytest.fixture
    def gateway_config(self) -> GatewayConfig:
        return GatewayConfig(stuck_after_s=0.3)

    async def test_worker_with_work_and_no_steps_makes_the_gateway_not_ready(self, cluster: Any) -> None:
        """Health is progress: sockets and snapshots are fine here, only the step counter stands still."""
        cluster.set(paused=True)
        answers = [ask(cluster) for _ in range(2)]
        await until(lambda: cluster.service.reasons_not_ready)
        assert any("made no step for" in reason for reason in cluster.service.reasons_not_ready)
        cluster.set(paused=False)
        await asyncio.gather(*answers)
        await until(lambda: not cluster.service.reasons_not_ready)


class TestSlowClient:
    @pytest.fixture
    def gateway_config(self) -> GatewayConfig:
        return GatewayConfig(max_undelivered_tokens=64)

    async def test_client_that_does_not_read_is_cut_off(self, cluster: Any) -> None:
        """What it leaves unread is bounded, then its request is cancelled. The app is driven without a socket and its buffers."""
        read = asyncio.Event()
        sent: list[Any] = []
        body = json.dumps({"messages": MESSAGES, "stream": True, "n": 4}).encode()
        incoming = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if incoming:
                return incoming.pop()
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                await read.wait()

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        answering = asyncio.create_task(GatewayApp(cluster.service)(scope, receive, send))
        await until(lambda: len(sent) == 2 and cluster.service.num_live == 0)
        await until(lambda: not any(w.tasks for w in cluster.workers.values()))
        assert await metric(cluster, "baton_slow_clients_total") == 1
        read.set()
        await asyncio.wait_for(answering, 1)
        assert b"more than 64 tokens unread" in sent[-1]["body"] and sent[-1]["body"].endswith(b"data: [DONE]\n\n")


async def test_drain_refuses_new_requests_and_finishes_the_old(cluster: Any) -> None:
    cluster.set(stop_before=5)
    answer = ask(cluster)
    await until(lambda: busy(cluster, "decode"))
    draining = asyncio.create_task(cluster.service.drain(5.0))
    await asyncio.sleep(0.01)
    async with cluster.http.post("/v1/chat/completions", json={"messages": MESSAGES}) as response:
        assert response.status == 503
    async with cluster.http.get("/ready") as response:
        assert response.status == 503
    cluster.set(stop_before=None)
    assert (await answer).choices[0].message.content == expected(20)
    await asyncio.wait_for(draining, 1)


async def test_drain_deadline_ends_what_is_left(cluster: Any) -> None:
    cluster.set(stop_before=5)
    answer = ask(cluster)
    await until(lambda: busy(cluster, "decode"))
    await cluster.service.drain(0.05)
    with pytest.raises(openai.InternalServerError) as caught:
        await asyncio.wait_for(answer, 2)
    assert caught.value.status_code == 503
    await until(lambda: cluster.at_rest)


@pytest.mark.parametrize("seed", range(3))
async def test_kills_among_many_streams(cluster: Any, seed: int) -> None:
    """24 streams, two workers killed at drawn moments and replaced: every stream is whole. The law I2 in small."""
    rng = random.Random(seed)
    cluster.set(step_s=0.002)

    async def one(i: int) -> None:
        n = 1 + i % 2
        answer = await cluster.openai.completions.create(model="tiny", prompt="x" * (i + 1), max_tokens=40, n=n)
        assert [c.text for c in answer.choices] == [expected(40, choice=c, num_prompt_tokens=i + 1) for c in range(n)]

    async def kill(kind: str, role: Role) -> None:
        await asyncio.sleep(rng.uniform(0.005, 0.08))
        victim = rng.choice([w for w in cluster.router.workers if w.worker_id.startswith(kind)])
        cluster.router.workers.remove(victim)
        await victim.kill()
        victim.tasks.clear()
        cluster.router.workers.append(await cluster.add_worker(f"{kind}-9", role))

    async with asyncio.timeout(20):
        await asyncio.gather(*(one(i) for i in range(24)), kill("prefill", Role.PREFILL), kill("decode", Role.DECODE))
    await until(lambda: cluster.at_rest)
