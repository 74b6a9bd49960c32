"""Reference mode: tokens do not depend on where, how or with whom they were computed.

How: real workers in processes of their own, driven at their wire. Every arm first proves from the workers' own counters that its
mechanism happened (bytes handed off between different pids, cached tokens, preemptions, three prefill chunks or more, a batch of two
or more), then compares tokens and logprobs with one undisturbed process that serves request after request.

Seen to fail under the two planted bugs of the last test (a pulled block left empty, positions shifted by one).
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from control.config import ClusterConfig, load_config
from protocol.request import SamplingParams
from protocol.worker import Role, WorkerSnapshot
from tests.worker_processes import Completion, WireGateway, Workers

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

NUM_REQUESTS = 32
VOCAB = 500

Job = tuple[list[int], SamplingParams]


def make_jobs() -> list[Job]:
    """Prompts of 1 to 150 tokens, half of them sharing a prefix; greedy, seeded, penalised, with min_tokens and two choices."""
    rng = random.Random(7)
    shared = [rng.randrange(3, VOCAB) for _ in range(70)]
    jobs: list[Job] = []
    for index in range(NUM_REQUESTS):
        own = [rng.randrange(3, VOCAB) for _ in range(rng.choice([1, 7, 15, 16, 17, 33, 80]))]
        prompt = shared + own if index % 2 else own
        sampling: dict[str, Any] = {"max_tokens": rng.choice([5, 12, 20]), "ignore_eos": True, "num_logprobs": 2}
        if index % 4 == 0:
            sampling |= {"temperature": 0.0}
        elif index % 4 == 1:
            sampling |= {"temperature": 0.9, "seed": 1000 + index, "top_p": 0.95}
        elif index % 4 == 2:
            sampling |= {"temperature": 0.8, "seed": 1000 + index, "n": 2, "presence_penalty": 0.5, "frequency_penalty": 0.3}
        else:
            sampling |= {"temperature": 0.0, "repetition_penalty": 1.2, "min_tokens": 4}
        jobs.append((prompt, SamplingParams(**sampling)))
    return jobs


def config(**workers: Any) -> ClusterConfig:
    transport = workers.pop("kv_transport", "shm")
    settings = {"numerics": "reference", "dtype": "float32"}
    base: dict[str, Any] = {"num_kv_blocks": 400, "max_num_seqs": 32, "max_num_batched_tokens": 256, "block_size": 16}
    return load_config({"model": settings, "workers": base | workers, "transport": {"kv_transport": transport}})


async def run_jobs(
    gateway: WireGateway, jobs: list[Job], *, prefill: str, decode: str, concurrency: int = NUM_REQUESTS
) -> list[Completion]:
    gate = asyncio.Semaphore(concurrency)

    async def one(prompt: list[int], sampling: SamplingParams) -> Completion:
        async with gate:
            return await gateway.complete(prompt, sampling, prefill=prefill, decode=decode)

    return await asyncio.gather(*(one(*job) for job in jobs))


def differences(whole: list[Completion], split: list[Completion]) -> list[int]:
    """Indices of the requests whose tokens, logprobs or finish reasons differ in any bit."""
    return [
        i for i, (a, b) in enumerate(zip(whole, split, strict=True)) if (a.tokens, a.logprobs, a.finish) != (b.tokens, b.logprobs, b.finish)
    ]


@pytest.fixture(scope="module")
def model_dir(tiny_checkpoint: Any) -> Path:
    path: Path = tiny_checkpoint("llama", vocab_size=VOCAB)
    return path


@pytest.fixture(scope="module")
def whole(model_dir: Path) -> list[Completion]:
    """One process, one request at a time, no prefix cache: nothing is shared and nothing moves."""

    async def run() -> list[Completion]:
        async with (
            Workers(config(enable_prefix_caching=False), model_dir, {"whole": Role.BOTH}) as workers,
            WireGateway(workers) as gateway,
        ):
            completions = await run_jobs(gateway, make_jobs(), prefill="whole", decode="whole", concurrency=1)
            at_rest = (await gateway.at_rest())["whole"]
            assert at_rest.counters["cached_tokens"] == 0 and at_rest.counters["handoff_bytes_in"] == 0
            return completions

    return asyncio.run(run())


def test_the_first_token_matters_for_later_ones(model_dir: Path, whole: list[Completion]) -> None:
    """Else equality below would be cheap: with its first token changed, a prompt continues differently."""

    async def run() -> int:
        jobs = [(prompt, sampling) for prompt, sampling in make_jobs() if sampling.temperature == 0 and len(prompt) > 16][:6]
        changed = [([prompt[0] % (VOCAB - 4) + 3, *prompt[1:]], sampling) for prompt, sampling in jobs]
        async with Workers(config(), model_dir, {"w": Role.BOTH}) as workers, WireGateway(workers) as gateway:
            before = await run_jobs(gateway, jobs, prefill="w", decode="w")
            after = await run_jobs(gateway, changed, prefill="w", decode="w")
        return len(differences(before, after))

    assert asyncio.run(run()) >= 5


ARMS: dict[str, dict[str, Any]] = {
    "one process, batched, cached": {"roles": {"w": Role.BOTH}},
    "disaggregated over shm": {"kv_transport": "shm"},
    "disaggregated over tcp, block size 32, chunks of 16": {"kv_transport": "tcp", "block_size": 32, "max_num_batched_tokens": 16},
    "disaggregated, no prefix cache, odd chunks": {"enable_prefix_caching": False, "max_num_batched_tokens": 37},
    "disaggregated, forced preemption, two steps in flight": {"force_preempt_every": 5, "max_inflight_steps": 2},
}


@pytest.mark.parametrize("arm", ARMS)
def test_split_equals_whole(arm: str, model_dir: Path, whole: list[Completion]) -> None:
    settings = dict(ARMS[arm])
    roles = settings.pop("roles", {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE})
    prefill, decode = next(iter(roles)), list(roles)[-1]

    async def run() -> tuple[list[Completion], list[Completion], dict[str, WorkerSnapshot], dict[str, int]]:
        async with Workers(config(**settings), model_dir, roles) as workers, WireGateway(workers) as gateway:
            first = await run_jobs(gateway, make_jobs(), prefill=prefill, decode=decode)
            second = await run_jobs(gateway, make_jobs()[:8], prefill=prefill, decode=decode, concurrency=3)
            return first, second, await gateway.at_rest(), {a.worker_id: a.pid for a in workers.addresses.values()}

    first, second, at_rest, pids = asyncio.run(run())
    source, target = at_rest[prefill], at_rest[decode]
    print(f"\n{arm}: pids {pids}")
    for worker_id, snapshot in at_rest.items():
        counted = {k: v for k, v in sorted(snapshot.counters.items()) if v}
        held = (snapshot.num_blocks_free, snapshot.num_blocks_owned, snapshot.num_blocks_leased, snapshot.num_blocks_cached)
        print(f"  {worker_id}: free+owned+leased+cached = {'+'.join(map(str, held))} = {snapshot.num_blocks_total}; {counted}")

    # The mechanism happened.
    assert target.counters["max_batch"] >= 2
    assert source.counters["max_chunks_per_prompt"] >= (3 if settings.get("max_num_batched_tokens", 256) < 64 else 1)
    if prefill != decode:
        assert pids[prefill] != pids[decode]
        assert source.counters["handoff_bytes_out"] > 0 and target.counters["handoff_bytes_in"] > 0
        assert {c.path for c in first} == {settings.get("kv_transport", "shm")}
        assert target.counters["prompt_tokens_computed"] == 0 or settings.get("force_preempt_every"), "decode recomputed prompts"
        assert not any(c.failures for c in first)
    if settings.get("enable_prefix_caching", True):
        assert source.counters["cached_tokens"] > 0
    if settings.get("force_preempt_every"):
        assert target.counters["preemptions"] > 0

    # And nothing shows it.
    assert differences(whole, first) == []
    assert differences(whole[:8], second) == []


@pytest.mark.parametrize("bug", ["zero_block", "shift_positions"])
def test_the_comparison_sees_a_planted_bug(bug: str, model_dir: Path, whole: list[Completion]) -> None:
    """Negative control: digests are off, so that only the tokens can tell."""

    async def run() -> list[Completion]:
        settings = config()
        roles = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
        async with (
            Workers(settings, model_dir, roles, sabotage={"decode-0": bug}) as workers,
            WireGateway(workers) as gateway,
        ):
            return await run_jobs(gateway, make_jobs(), prefill="prefill-0", decode="decode-0")

    assert len(differences(whole, asyncio.run(run()))) >= 8
