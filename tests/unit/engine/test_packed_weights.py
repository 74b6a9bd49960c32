"""Packed weights are in a machine's memory once, whoever dies when, and nobody reads what is not whole."""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.checkpoint import open_checkpoint
from engine.core.executor import Entries, PlanEntry
from engine.models.config import load_model_config
from engine.models.memory import native_weights_bytes
from engine.runner import packed_weights as module
from engine.runner.packed_weights import packed_weights
from kvtransfer.region import PoolMemory
from tests.native_paths import MISSING, PATHS

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

SIZE_BYTES = 24 << 20
KEY = "a1"
# A worker in a process of its own: packs or maps, says which, and holds the memory until its input ends. "half": hangs half-way.
WORKER = f"""
import ctypes, sys
from pathlib import Path
from engine.runner.packed_weights import packed_weights

def fill(base):
    if sys.argv[2] == "half":
        ctypes.memset(base, 7, {SIZE_BYTES} // 2)
        print("half", flush=True)
        sys.stdin.read()
    ctypes.memset(base, 7, {SIZE_BYTES})

weights = packed_weights("{KEY}", {SIZE_BYTES}, fill, directory=Path(sys.argv[1]))
seen = ctypes.string_at(weights.base, {SIZE_BYTES})
print(weights.packed.was_packed_here, weights.packed.is_shared, seen == bytes([7]) * {SIZE_BYTES}, flush=True)
sys.stdin.read()
"""


class Worker:
    def __init__(self, directory: Path, how: str = "whole") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(directory), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def says(self) -> str:
        """(packed here, shared, all bytes as they should be), or what it printed else."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def shared_kib(self) -> int:
        """Its part of the shared memory it maps: divided by the processes that map it too."""
        rollup = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return int(next(line.split()[1] for line in rollup.splitlines() if line.startswith("Pss_Shmem:")))

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def start(how: str = "whole") -> Worker:
        started.append(Worker(tmp_path / "packed", how))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def test_workers_of_a_machine_hold_one_copy_and_a_fresh_one_finds_it(worker: Callable[..., Worker], tmp_path: Path) -> None:
    """Three processes one after the other, the packer killed before the third. Seen to fail with a search that finds nothing, and with
    a packer alone that announces what it has."""
    first = worker()
    assert first.says() == "True True True"
    alone_kib = first.shared_kib()
    assert SIZE_BYTES <= alone_kib * 1024 <= SIZE_BYTES + (4 << 20)
    second = worker()
    assert second.says() == "False True True"
    assert first.shared_kib() + second.shared_kib() <= alone_kib + 64, "the second takes nothing of its own"
    first.kill()
    third = worker()
    assert third.says() == "False True True"
    assert len(list((tmp_path / "packed").glob(f"{KEY}.*.*"))) == 2, "the killed one is forgotten"
    second.kill()
    third.kill()
    last = worker()
    assert last.says() == "True True True", "with the last of them the memory is gone"


def test_a_worker_killed_while_it_packs_leaves_nothing_that_is_read(worker: Callable[..., Worker]) -> None:
    """One is killed half-way while another waits for it. Seen to fail with a lock that is a
    file's existence."""
    first, second = worker("half"), None
    assert first.says() == "half"
    second = worker()
    first.kill()
    assert second.says() == "True True True"


def test_memory_that_is_not_sealed_is_nobodys(tmp_path: Path, worker: Callable[..., Worker]) -> None:
    """Whole to look at, but whoever made it may still write it. Seen to fail without the look at the seals."""
    directory = tmp_path / "packed"
    directory.mkdir()
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, module._file_bytes(SIZE_BYTES))
    os.pwrite(fd, module._header(KEY, SIZE_BYTES), 0)
    (directory / f"{KEY}.{os.getpid()}.{fd}").touch()
    assert worker().says() == "True True True"
    os.close(fd)


def test_shared_weights_cannot_be_written_by_anybody(tmp_path: Path) -> None:
    weights = packed_weights(KEY, 100, lambda base: None, directory=tmp_path / "packed")
    (announced,) = (tmp_path / "packed").glob(f"{KEY}.*.*")
    link = f"/proc/self/fd/{announced.name.rsplit('.', 1)[1]}"
    with pytest.raises(PermissionError):
        os.pwrite(os.open(link, os.O_RDWR), b"x", module.HEADER_BYTES)
    del weights
    assert not announced.exists()


@pytest.mark.parametrize("trouble", ["no directory", "held lock"])
def test_where_sharing_fails_a_worker_packs_for_itself_and_says_so(trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "packed"
    if trouble == "no directory":
        tmp_path = tmp_path / "away"
        directory = tmp_path / "packed"
    else:
        monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.05)
        directory.mkdir()
        holder = (directory / f"{KEY}.lock").open("w")
        fcntl.flock(holder, fcntl.LOCK_EX)
    weights = packed_weights(KEY, SIZE_BYTES, lambda base: ctypes.memset(base, 7, SIZE_BYTES) and None, directory=directory)
    assert not weights.packed.is_shared and weights.packed.was_packed_here
    assert weights.packed.note.startswith("weights packed for this worker alone: ")
    assert ctypes.string_at(weights.base, SIZE_BYTES) == bytes([7]) * SIZE_BYTES


# --- with a model -----------------------------------------------------------------------------------------------------


class Loaded:
    def __init__(self, model_dir: Path, packed_dir: Path | None, **config: Any) -> None:
        from engine.runner.config import RunnerConfig
        from engine.runner.model_runner import load_model_runner

        runner = RunnerConfig(numerics="fast", **config)
        self.model = load_model_config(model_dir, dtype=runner.dtype)
        self.pool = PoolMemory.create(self.model.kv_layout(16), 8)
        self.runner: Any = load_model_runner(model_dir, runner, self.pool.region, packed_dir=packed_dir)

    def logits(self) -> np.ndarray:
        entry = PlanEntry(sequence_id=0, start=0, num_tokens=40, block_table=array("I", [2, 0, 5]))
        made = self.runner.forward(Entries.of([entry]), array("I", range(3, 43)), array("q", [0]))
        return np.array(made.logits.numpy())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize(("arch", "tied"), [("llama", False), ("qwen2", True), ("qwen3_moe", False)])
def test_a_model_on_shared_weights_computes_the_same_bits(
    arch: str, tied: bool, dtype: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Biases, tied heads and a converted embedding lie in the arena too. Seen to fail with biases of the packer alone."""
    model_dir = tiny_checkpoint(arch, tie_word_embeddings=tied)
    alone = Loaded(model_dir, None, dtype=dtype)
    shared = [Loaded(model_dir, tmp_path / "packed", dtype=dtype) for _ in range(2)]
    assert [one.runner.packed.was_packed_here for one in shared] == [True, False]
    for one in shared:
        assert np.array_equal(one.logits(), alone.logits())
        packed = one.runner.packed
        mapped_bytes = 0 if dtype == "bfloat16" else one.model.vocab_size * one.model.hidden_size * 4
        assert native_weights_bytes(one.model, PATHS[0], 16) == packed.size_bytes + mapped_bytes, "planned as measured"  # type: ignore[arg-type]


def test_other_weights_paths_and_dtypes_are_not_mixed_up(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """All in one directory at once. Seen to fail with a key that leaves out the path."""
    from engine.runner.model_runner import packing_key

    first, second = tiny_checkpoint("llama"), tiny_checkpoint("llama", seed=1)
    kept = [
        Loaded(model_dir, tmp_path / "packed", kernels=path, dtype=dtype)
        for model_dir in (first, second)
        for path in PATHS
        for dtype in ("float32", "bfloat16")
    ]
    assert all(one.runner.packed.was_packed_here for one in kept)
    model = load_model_config(first)
    before = packing_key(open_checkpoint(first, model), model, "fast", "portable")
    (weights_file,) = first.glob("*.safetensors")
    status = weights_file.stat()
    os.utime(weights_file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert packing_key(open_checkpoint(first, model), model, "fast", "portable") != before, "the file was written anew"


def test_loaded_weights_leave_the_files_pages(tiny_checkpoint: Callable[..., Path]) -> None:
    """What was read to pack is not held in the process. Seen to fail without `let_go`."""
    model_dir = tiny_checkpoint("llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=2)
    (weights_file,) = model_dir.glob("*.safetensors")
    loaded = Loaded(model_dir, None)
    loaded.logits()
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    resident_kib = sum(
        int(next(line for line in lines if line.startswith("Rss:")).split()[1]) for line in lines if line.endswith(weights_file.name)
    )
    assert weights_file.stat().st_size > 20 << 20 and resident_kib <= 4096
