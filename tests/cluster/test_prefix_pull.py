"""A prefix that lies on one prefill worker is pulled by another: the same tokens, and nobody else's.

How: real workers in processes of their own, driven at their wire. prefill-0 computes prompts with a common beginning, prefill-1 is told
where it lies; its counters prove the pull, and tokens and logprobs are compared with those of one worker that computes everything.
Seen to fail under the planted bug of the last test: a pulled block left empty (digests are checked before, so only tokens can tell).
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from control.config import ClusterConfig, load_config
from protocol.kv import KVPeer
from protocol.messages import PrefixPull
from protocol.request import SamplingParams, first_attempt
from protocol.worker import Role
from tests.serving import end, start
from tests.worker_processes import Completion, WireGateway, Workers

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

VOCAB = 500
NUM_SHARED = 96  # six blocks
ROLES = {"prefill-0": Role.PREFILL, "prefill-1": Role.PREFILL, "decode-0": Role.DECODE}


def make_jobs() -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(11)
    shared = [rng.randrange(3, VOCAB) for _ in range(NUM_SHARED)]
    sampling = SamplingParams(max_tokens=8, temperature=0.9, seed=5, ignore_eos=True, num_logprobs=2)
    return [(shared + [rng.randrange(3, VOCAB) for _ in range(9 + n)], sampling) for n in range(5)]


def config(kv_transport: str = "shm", **workers: Any) -> ClusterConfig:
    base: dict[str, Any] = {"num_kv_blocks": 200, "max_num_seqs": 16, "max_num_batched_tokens": 64, "block_size": 16}
    model = {"numerics": "reference", "dtype": "float32"}
    return load_config({"model": model, "workers": base | workers, "transport": {"kv_transport": kv_transport}})


def source_of(workers: Workers, worker_id: str, num_tokens: int) -> PrefixPull:
    address = workers.addresses[worker_id]
    return PrefixPull(peer=KVPeer(worker_id=worker_id, epoch=address.epoch, endpoint=address.kv_endpoint), num_tokens=num_tokens)


async def complete(gateway: WireGateway, job: Any, prefill: str, pull: PrefixPull | None, root: bytes = b"r" * 16) -> Completion:
    prompt, sampling = job
    attempt = first_attempt(gateway.request(prompt, sampling, root=root))
    return await gateway.run(attempt, prefill=prefill, decode="decode-0", prefix_pull=pull)


async def counters(gateway: WireGateway, *worker_ids: str) -> list[dict[str, int]]:
    """Of workers at rest, as told from now on."""
    gateway.snapshots.clear()
    while not set(worker_ids) <= gateway.snapshots.keys():
        await asyncio.sleep(0.02)
    at_rest = await gateway.at_rest()
    return [at_rest[worker_id].counters for worker_id in worker_ids]


def same(mine: list[Completion], right: list[Completion]) -> list[bool]:
    return [(a.tokens, a.logprobs, a.finish) == (b.tokens, b.logprobs, b.finish) for a, b in zip(mine, right, strict=True)]


@pytest.fixture(scope="module")
def model_dir(tiny_checkpoint: Any) -> Path:
    path: Path = tiny_checkpoint("llama", vocab_size=VOCAB)
    return path


@pytest.fixture(scope="module")
def whole(model_dir: Path) -> list[Completion]:
    """One worker that computes every prompt by itself."""

    async def run() -> list[Completion]:
        async with (
            Workers(config(enable_prefix_caching=False), model_dir, {"w": Role.BOTH}) as workers,
            WireGateway(workers) as gateway,
        ):
            return [await gateway.complete(prompt, sampling, prefill="w", decode="w") for prompt, sampling in make_jobs()]

    return asyncio.run(run())


@pytest.mark.parametrize("kv_transport", ["shm", "tcp"])
def test_a_prefix_is_pulled_instead_of_computed(kv_transport: str, model_dir: Path, whole: list[Completion]) -> None:
    async def run() -> None:
        jobs = make_jobs()
        async with Workers(config(kv_transport), model_dir, ROLES) as workers, WireGateway(workers) as gateway:
            first = await complete(gateway, jobs[0], "prefill-0", None)
            pull = source_of(workers, "prefill-0", NUM_SHARED)
            rest = await asyncio.gather(*(complete(gateway, job, "prefill-1", pull) for job in jobs[1:]))
            source, target = await counters(gateway, "prefill-0", "prefill-1")
            assert all(same([first, *rest], whole))
            assert target["prefix_pulls"] == 1 and target["prefix_pull_tokens"] == NUM_SHARED, "four prompts, one copy"
            assert target["prompt_tokens_computed"] == sum(len(prompt) - NUM_SHARED for prompt, _ in jobs[1:])
            assert source["prefixes_offered"] == 1 and target[f"pulls_{kv_transport}"] == 1

            # Another tenant, the same words: nothing of it is to be had, here or there.
            others = await complete(gateway, jobs[2], "prefill-1", pull, root=b"R" * 16)
            (target,) = await counters(gateway, "prefill-1")
            assert same([others], whole[2:3]) == [True]
            assert (target["prefix_pulls"], target["prefix_pull_failures"]) == (1, 1)
            computed = target["prompt_tokens_computed"] - sum(len(prompt) - NUM_SHARED for prompt, _ in jobs[1:])
            assert computed == len(jobs[2][0])

    asyncio.run(run())


def test_a_source_that_is_gone_costs_the_deadline_at_most(model_dir: Path, whole: list[Completion]) -> None:
    async def run() -> None:
        jobs = make_jobs()
        async with Workers(config(), model_dir, ROLES) as workers, WireGateway(workers) as gateway:
            await complete(gateway, jobs[0], "prefill-0", None)
            pull = source_of(workers, "prefill-0", NUM_SHARED)
            workers.kill("prefill-0")
            began_s = time.monotonic()
            computed = await complete(gateway, jobs[1], "prefill-1", pull)
            assert time.monotonic() - began_s < 10.0  # one second is waited; the rest is what a busy machine takes
            assert same([computed], whole[1:2]) == [True]
            (target,) = await counters(gateway, "prefill-1")
            assert (target["prefix_pulls"], target["prefix_pull_failures"]) == (0, 1)

    asyncio.run(run())


def test_a_source_that_stands_still_holds_nobody_up_and_nothing_back(model_dir: Path, whole: list[Completion]) -> None:
    """SIGSTOP beyond the deadline: the prompt is computed. Once the source goes on, its late offer is dropped and all blocks are free.

    Seen to fail with late offers ignored: the lease runs out instead.
    """

    async def run() -> None:
        jobs = make_jobs()
        async with Workers(config(prefix_pull_deadline_s=2.0), model_dir, ROLES) as workers, WireGateway(workers) as gateway:
            await complete(gateway, jobs[0], "prefill-0", None)
            pull = source_of(workers, "prefill-0", NUM_SHARED)
            pid = workers.processes["prefill-0"].pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            asyncio.get_running_loop().call_later(2.5, os.kill, pid, signal.SIGCONT)
            computed = await complete(gateway, jobs[1], "prefill-1", pull)
            assert same([computed], whole[1:2]) == [True]
            source: dict[str, int] = {}
            while source.get("prefixes_offered", 0) == 0:
                source, target = await counters(gateway, "prefill-0", "prefill-1")
            assert (target["prefix_pulls"], target["prefix_pull_failures"]) == (0, 1)
            assert source["leases_expired"] == 0 and target["late_messages"] == 1

    asyncio.run(run())


def test_the_comparison_sees_an_empty_pulled_block(model_dir: Path, whole: list[Completion]) -> None:
    """Negative control."""

    async def run() -> list[Completion]:
        jobs = make_jobs()
        async with Workers(config(), model_dir, ROLES, sabotage={"prefill-1": "zero_block"}) as workers, WireGateway(workers) as gateway:
            await complete(gateway, jobs[0], "prefill-0", None)
            pull = source_of(workers, "prefill-0", NUM_SHARED)
            return [await complete(gateway, job, "prefill-1", pull) for job in jobs[1:]]

    assert same(asyncio.run(run()), whole[1:]).count(False) >= 3


def test_a_served_prompt_is_pulled_where_another_worker_computed_it(tmp_path: Path) -> None:
    """Router, gateway and workers together, as a user starts them: each in turn prefills, so the second prompt goes where it is not cached.

    Seen to fail with `--no-prefix-pull`.
    """
    workers = {"prefill_workers": 2, "decode_workers": 1, "executor": "paced", "max_num_seqs": 8}
    config = {"workers": workers, "router": {"disaggregate": "always"}}
    serving = start(tmp_path, "--policy", "round_robin", config=config)
    try:
        serving.wait_at_rest(num_workers=3)
        prompt = "All happy families are alike; each unhappy family is unhappy in its own way. " * 12

        def ask(salt: str) -> str:
            body = {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0.0, "cache_salt": salt}
            return str(serving.json("/v1/completions", body)["choices"][0]["text"])

        texts = [ask("one")]
        serving.wait_at_rest(num_workers=3)
        texts.append(ask("one"))
        rows = serving.wait_at_rest(num_workers=3)
        counters = {worker_id: row["counters"] for worker_id, row in rows.items() if row["role"] == "prefill"}
        pulled = [c["prefix_pull_tokens"] for c in counters.values()]
        assert sorted(c["prefix_pulls"] for c in counters.values()) == [0, 1] and max(pulled) >= 128, counters
        assert sum(c["prompt_tokens_computed"] for c in counters.values()) < 1.2 * max(
            c["prompt_tokens_computed"] for c in counters.values()
        )
        detail = serving.status()["router"]["detail"]
        told = [a["prefix_source"] for a in detail["assignments"] if a["prefix_source"]]
        assert detail["counters"]["prefix_pulls"] == len(told) == 1 and told[0]["pull_s"] < told[0]["compute_s"]
        texts.append(ask("two"))  # another root: nothing is named, nothing is shared
        serving.wait_at_rest(num_workers=3)
        assert serving.counter("prefix_pulls") == 1 and serving.status()["router"]["detail"]["counters"]["prefix_pulls"] == 1
        assert len(set(texts)) == 1
    finally:
        end(serving)
