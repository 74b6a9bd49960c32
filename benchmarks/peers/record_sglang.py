"""Decisions of SGLang's model gateway, policy cache_aware, over HTTP workers that answer when told; run with aiohttp.

    python -P benchmarks/peers/record_sglang.py --gateway PYTHON --seed 1 --workers 4 > tests/golden/decisions/sglang-4.json

PYTHON is one with sglang-router. A token is a character, so that its tree of characters and ours of blocks see the same prompts; with
--block-tokens 16 prompts part at the ends of blocks only, with 1 anywhere. A request is in flight until its worker answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from runpy import run_path
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

steps = run_path(str(Path(__file__).with_name("decision_workload.py")))["steps"]

READY_S = 30.0
SETTLE_S = 0.004  # an answer's end lowers the load after its last byte
FIRST_CHARACTER = 0x4E00
ANSWER = {
    "id": "x",
    "object": "text_completion",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "text": "a", "finish_reason": "length"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


@dataclass(slots=True)
class Workers:
    """Which one a request came to; `max_tokens` carries its number."""

    arrived: dict[int, asyncio.Future[int]] = field(default_factory=dict)
    may_end: dict[int, asyncio.Event] = field(default_factory=dict)

    async def start(self, index: int) -> str:
        async def completions(request: web.Request) -> web.Response:
            number = (await request.json())["max_tokens"]
            self.arrived[number].set_result(index)
            await self.may_end[number].wait()
            return web.json_response(ANSWER)

        async def anything(request: web.Request) -> web.Response:
            return web.json_response({"status": "ok", "model_path": "m", "served_model_name": "m", "is_generation": True})

        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/v1/completions", completions)
        app.router.add_route("*", "/{tail:.*}", anything)
        runner = web.AppRunner(app)
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return f"http://127.0.0.1:{port}"


async def record(given: argparse.Namespace) -> list[int]:
    workers = Workers()
    urls = [await workers.start(index) for index in range(given.workers)]
    port = free_port()
    limits = ["--balance-abs-threshold", str(given.balance_abs), "--balance-rel-threshold", str(given.balance_rel)]
    command = [given.gateway, "-m", "sglang_router.launch_router", "--policy", "cache_aware", "--worker-urls", *urls, *limits]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port()), "--disable-retries"]
    gateway = subprocess.Popen(command, env={**os.environ, "NO_PROXY": "*", "no_proxy": "*"}, stdout=subprocess.DEVNULL)
    try:
        async with ClientSession(timeout=ClientTimeout(total=None), connector=TCPConnector(limit=0)) as session:
            await _ready(session, f"http://127.0.0.1:{port}", given.workers)
            return await _decisions(session, f"http://127.0.0.1:{port}/v1/completions", workers, given)
    finally:
        gateway.terminate()
        gateway.wait(10)


async def _decisions(session: ClientSession, url: str, workers: Workers, given: argparse.Namespace) -> list[int]:
    async def ask(number: int, prompt: str) -> None:
        async with session.post(url, json={"model": "m", "prompt": prompt, "max_tokens": number}) as response:
            assert response.status == 200, await response.text()
            await response.read()

    chosen, calls = [], {}
    for step in steps(given.requests, seed=given.seed, block_tokens=given.block_tokens, alphabet=given.alphabet):
        for number in step.ended:
            workers.may_end[number].set()
            await calls.pop(number)
        if step.ended:
            await asyncio.sleep(SETTLE_S)
        workers.arrived[step.number] = asyncio.get_running_loop().create_future()
        workers.may_end[step.number] = asyncio.Event()
        prompt = "".join(chr(FIRST_CHARACTER + token) for token in step.tokens)
        calls[step.number] = asyncio.create_task(ask(step.number, prompt))
        chosen.append(await asyncio.wait_for(workers.arrived[step.number], 30))
    for number in calls:
        workers.may_end[number].set()
    await asyncio.gather(*calls.values())
    return chosen


async def _ready(session: ClientSession, url: str, num_workers: int) -> None:
    for _ in range(int(READY_S / 0.1)):
        try:
            async with session.get(f"{url}/workers") as response:
                known: list[Any] = (await response.json()).get("workers", [])
        except (ClientError, json.JSONDecodeError):
            known = []
        if len(known) == num_workers and all(worker["is_healthy"] for worker in known):
            return
        await asyncio.sleep(0.1)
    raise SystemExit(f"the gateway did not take its {num_workers} workers within {READY_S:g} s")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--gateway", required=True, help="a Python with sglang-router")
    parser.add_argument("--requests", type=int, default=2500)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--balance-abs", type=int, default=64)
    parser.add_argument("--balance-rel", type=float, default=1.5)
    parser.add_argument("--block-tokens", type=int, default=16)
    parser.add_argument("--alphabet", type=int, default=20_000)
    given = parser.parse_args()
    version = subprocess.run(
        [given.gateway, "-c", "from importlib.metadata import version; print(version('sglang-router'))"], capture_output=True, text=True
    ).stdout.strip()
    choices = asyncio.run(record(given))
    head = {"router": f"sglang-router {version}", "balance_abs": given.balance_abs, "balance_rel": given.balance_rel}
    head |= {name: getattr(given, name) for name in ("seed", "workers", "block_tokens", "alphabet")}
    print(json.dumps({**head, "chosen": "".join(map(str, choices))}))
