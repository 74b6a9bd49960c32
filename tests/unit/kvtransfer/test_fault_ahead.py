"""A pool's memory is there before it is asked for, no more of it than was said, and its content stays."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from kvtransfer import fault_ahead
from kvtransfer.fault_ahead import PIECE_BYTES, FaultAhead
from kvtransfer.mapping import HUGE_PAGE_BYTES
from kvtransfer.region import PoolMemory
from tests.sim_cluster import layout

pytestmark = pytest.mark.pure

AHEAD_BYTES = 2 * PIECE_BYTES
DELAY_S = 0.3


def resident_bytes(pool: PoolMemory) -> int:
    return os.fstat(pool.region.fd).st_blocks * 512


def wait_until(happened: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10.0
    while not happened():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_memory_stays_ahead_of_the_blocks_in_use() -> None:
    """The system's count of the file's pages. Seen to fail with `reached` made to return at once."""
    block_bytes = layout().block_bytes
    pool = PoolMemory.create(layout(), 6 * PIECE_BYTES // block_bytes)
    pool.region.blocks[5:8] = b"abc"
    ahead = FaultAhead(pool.region, AHEAD_BYTES)
    try:
        wait_until(lambda: resident_bytes(pool) >= AHEAD_BYTES)
        time.sleep(0.05)
        assert resident_bytes(pool) <= AHEAD_BYTES + PIECE_BYTES
        ahead.reached(2 * PIECE_BYTES // block_bytes)
        wait_until(lambda: resident_bytes(pool) >= 2 * PIECE_BYTES + AHEAD_BYTES)
        ahead.reached(pool.region.num_blocks - 1)  # as far as it goes
        wait_until(lambda: resident_bytes(pool) >= pool.region.size_bytes)
    finally:
        ahead.close()
    assert bytes(pool.region.blocks[4:9]) == b"\0abc\0"
    pool.close()


def test_who_asks_for_blocks_has_the_machine_first_unless_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With most of it left the next pages wait for DELAY_S; with little left they come at once.

    Seen to fail without the wait, and with ENOUGH at 0.
    """
    monkeypatch.setattr(fault_ahead, "DELAY_S", DELAY_S)
    block_bytes = layout().block_bytes
    far = 8 * PIECE_BYTES
    pool = PoolMemory.create(layout(), 20 * PIECE_BYTES // block_bytes)
    ahead = FaultAhead(pool.region, far)
    try:
        wait_until(lambda: resident_bytes(pool) >= far)
        time.sleep(DELAY_S)
        before = resident_bytes(pool)
        asked_s = time.monotonic()
        ahead.reached(PIECE_BYTES // block_bytes)
        wait_until(lambda: resident_bytes(pool) > before)
        assert time.monotonic() - asked_s >= DELAY_S
        wait_until(lambda: resident_bytes(pool) >= PIECE_BYTES + far)
        time.sleep(DELAY_S)
        monkeypatch.setattr(fault_ahead, "DELAY_S", 60.0)
        before = resident_bytes(pool)
        ahead.reached(8 * PIECE_BYTES // block_bytes)  # one of eight pieces is left
        wait_until(lambda: resident_bytes(pool) > before)
    finally:
        ahead.close()
    pool.close()


def huge_bytes(pool: PoolMemory) -> int:
    """Of this process's mapping of the pool."""
    kib, is_ours = 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            if "-" in line.split()[0]:
                is_ours = str(os.fstat(pool.region.fd).st_ino) in line.split()
            elif is_ours and line.startswith("ShmemPmdMapped:"):
                kib += int(line.split()[1])
    return kib << 10


def test_memory_ahead_is_in_huge_pages() -> None:
    """The system's count of the mapping's huge pages. Seen to fail with a mapping that starts a page later."""
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release < (6, 1):
        pytest.skip(f"Linux {os.uname().release} makes no huge pages of a file's on request; 6.1 does")
    pool = PoolMemory.create(layout(), 4 * HUGE_PAGE_BYTES // layout().block_bytes)
    pool.region.blocks[0:3] = b"abc"
    ahead = FaultAhead(pool.region, pool.region.size_bytes)
    try:
        wait_until(lambda: huge_bytes(pool) >= 4 * HUGE_PAGE_BYTES)
    finally:
        ahead.close()
    assert bytes(pool.region.blocks[:4]) == b"abc\0"
    pool.close()
