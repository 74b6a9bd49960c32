"""Workers of one machine hold its packed weights once, and say so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from control.config import ClusterConfig
from protocol.worker import Role
from tests.native_paths import MISSING
from tests.worker_processes import WireGateway, Workers

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(MISSING), reason=MISSING)]


def mapped_inodes(pid: int) -> set[str]:
    """Of the memory of packed weights that a process maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/memfd:baton-weights" in line}


async def test_two_workers_map_one_packing_read_only(tiny_checkpoint: Callable[..., Path]) -> None:
    """By their own counters and by what the kernel maps for them. Seen to fail with a directory of each worker's own."""
    config = ClusterConfig()
    config = replace(config, workers=replace(config.workers, num_kv_blocks=16))
    roles = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
    async with Workers(config, tiny_checkpoint("llama"), roles) as workers, WireGateway(workers) as gateway:
        async with asyncio.timeout(30):
            while set(gateway.snapshots) != set(roles):
                await asyncio.sleep(0.01)
        counters = [snapshot.counters for snapshot in gateway.snapshots.values()]
        (size_bytes,) = {each["weights_bytes_shared"] for each in counters}
        assert size_bytes > 0 and sorted(each["weights_bytes_packed"] for each in counters) == [0, size_bytes]
        inodes = [mapped_inodes(address.pid) for address in workers.addresses.values()]
        assert inodes[0] == inodes[1] and len(inodes[0]) == 1
        for address in workers.addresses.values():
            lines = Path(f"/proc/{address.pid}/maps").read_text().splitlines()
            assert all(line.split()[1].startswith("r--") for line in lines if "/memfd:baton-weights" in line)
