"""KVEndpoint over pools in device memory: two workers on one loop, the device is the loopback one, or the first GPU (gpu)."""

from __future__ import annotations

import random
import tempfile
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import numpy as np
import pytest

from kvtransfer.config import TransportConfig
from kvtransfer.cuda_runtime import DeviceRuntime
from kvtransfer.device_pool import DevicePool
from kvtransfer.endpoint import KVEndpoint
from kvtransfer.faulty import FaultRates, FaultyTransport
from kvtransfer.region import PoolMemory
from protocol.errors import ConfigError
from protocol.kv import DigestMode, KVLayout, TransferError
from tests.conformance.loopback_runtime import LoopbackRuntime
from tests.conformance.test_transport_endpoint import FINGERPRINT, NUM_BLOCKS, SECRET, Worker, layout, offer, pull

pytestmark = [pytest.mark.conformance, pytest.mark.pure]

SIZE = layout().block_bytes


class DeviceWorker(Worker):
    def __init__(self, name: str, run_dir: str, config: TransportConfig, runtime: DeviceRuntime, **options: object) -> None:
        self.name = name
        self.received = []
        kv_layout = options.pop("kv_layout", layout())
        assert isinstance(kv_layout, KVLayout)
        self.device_pool = DevicePool(runtime, kv_layout, NUM_BLOCKS)
        self.pool = self.device_pool  # type: ignore[assignment]
        self.kv = KVEndpoint(
            config,
            self.device_pool,
            worker_id=name,
            epoch=1000 + len(name),
            secret=SECRET,
            run_dir=run_dir,
            fingerprint=FINGERPRINT,
            **options,  # type: ignore[arg-type]
        )

    def fill(self, seed: int) -> None:
        assert self.device_pool.region.device is not None
        content = np.random.default_rng(seed).integers(0, 256, NUM_BLOCKS * SIZE, dtype=np.uint8)
        self.device_pool.region.device.write(0, content.tobytes())

    def block(self, block_id: int) -> bytes:
        assert self.device_pool.region.device is not None
        (view,) = map(bytes, self.device_pool.region.device.read(np.array([[block_id * SIZE, SIZE]])))
        return view


Make = Callable[..., DeviceWorker]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[DeviceWorker] = []
    with tempfile.TemporaryDirectory(prefix="kv-") as run_dir:

        def build(name: str, policy: str = "auto", *, device_id: str = "loopback:0", **options: object) -> DeviceWorker:
            config = options.pop("config", TransportConfig(kv_transport=policy))
            made.append(DeviceWorker(name, run_dir, config, LoopbackRuntime(device_id), **options))  # type: ignore[arg-type]
            return made[-1]

        yield build
        for worker in made:
            await worker.close()


@pytest.mark.parametrize(("policy", "reason"), [("auto", "same_device"), ("cuda_ipc", "configured")])
@pytest.mark.parametrize("mode", list(DigestMode))
async def test_offer_from_device_memory_is_pulled_and_verified(make: Make, policy: str, reason: str, mode: DigestMode) -> None:
    config = TransportConfig(kv_transport=policy, digest_mode=mode)
    source, target = make("prefill-0", config=config), make("decode-0", config=config)
    await source.kv.start()
    await target.kv.start()
    source.fill(1)
    outcome = await pull(target, offer(source, [5, 6, 9]), [0, 1, 40])
    assert outcome.error is None and outcome.path == "cuda_ipc" and outcome.num_blocks == 3, outcome
    assert [target.block(b) for b in (0, 1, 40)] == [source.block(b) for b in (5, 6, 9)]
    assert target.kv.counters["pulls_cuda_ipc"] == 1
    assert target.kv.counters[f"path_{reason}"] == 1
    assert TransportConfig(kv_transport="cuda_ipc").offer_digest_mode is DigestMode.SAMPLED


async def test_auto_says_why_device_memory_cannot_be_reached(make: Make) -> None:
    """Fails when the device is compared without the proof of one host, and the other way round (both planted)."""
    source, target, elsewhere = make("prefill-0"), make("decode-0"), make("decode-1", device_id="loopback:1")
    for worker in (source, target, elsewhere):
        await worker.kv.start()
    handoff = offer(source, [1])
    outcome = await pull(elsewhere, handoff, [0])
    assert outcome.error is TransferError.REFUSED and "other_device" in outcome.detail
    assert elsewhere.kv.counters["path_other_device"] == 1
    shard = handoff.shards[0]
    moved = replace(handoff, shards=(replace(shard, endpoint=replace(shard.endpoint, host_nonce="")),))
    assert (await pull(target, moved, [0])).error is TransferError.REFUSED
    assert target.kv.counters["path_no_nonce"] == 1
    assert (await pull(target, handoff, [0])).error is None


async def test_flipped_bit_in_device_memory_is_a_digest_mismatch(make: Make) -> None:
    """Fails when digests of device memory are taken of the empty host view (planted)."""
    config = TransportConfig(digest_mode=DigestMode.FULL)
    source = make("prefill-0", config=config)
    target = make("decode-0", config=config, wrap=lambda t: FaultyTransport(t, FaultRates(corrupt=1.0), random.Random(3)))
    await source.kv.start()
    await target.kv.start()
    source.fill(3)
    outcome = await pull(target, offer(source, [1, 2, 3]), [4, 5, 6])
    assert outcome.error is TransferError.DIGEST_MISMATCH and "1 of 3 blocks differ" in outcome.detail


async def test_generation_raised_after_the_offer_is_stale_on_the_device_too(make: Make) -> None:
    source, target = make("prefill-0"), make("decode-0")
    await source.kv.start()
    await target.kv.start()
    handoff = offer(source, [3, 4])
    source.kv.raise_generations(array("I", [4]), array("Q", [1]))
    assert (await pull(target, handoff, [0, 1])).error is TransferError.STALE_GENERATION


async def test_blocks_of_another_layout_are_refused_on_the_device(make: Make) -> None:
    source, target = make("prefill-0", kv_layout=layout(32)), make("decode-0")
    await source.kv.start()
    await target.kv.start()
    outcome = await pull(target, offer(source, [3, 4]), [0, 1, 2, 3])
    assert outcome.error is TransferError.REFUSED and "equal layouts are needed" in outcome.detail


@pytest.mark.parametrize("policy", ["shm", "tcp"])
async def test_a_path_that_cannot_read_the_pool_is_refused_at_start(make: Make, policy: str) -> None:
    with pytest.raises(ConfigError, match=f"kv_transport is {policy}, and this worker's pool is in memory of loopback:0; choose auto"):
        await make("prefill-0", policy).kv.start()


async def test_cuda_ipc_over_host_memory_is_refused_at_start() -> None:
    pool = PoolMemory.create(layout(), NUM_BLOCKS)
    with tempfile.TemporaryDirectory(prefix="kv-") as run_dir:
        kv = KVEndpoint(
            TransportConfig(kv_transport="cuda_ipc"), pool, worker_id="a", epoch=1, secret=SECRET, run_dir=run_dir, fingerprint=FINGERPRINT
        )
        with pytest.raises(ConfigError, match="this worker's pool is in memory of the host; choose auto"):
            await kv.start()
    pool.close()
