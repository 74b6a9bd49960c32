"""With a compiler the kernels are built, without one torch serves and says so; what was asked for by name is had or refused."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import kernels.native.library as library  # noqa: E402
from baton.status import notes_of  # noqa: E402
from cluster.worker_build import WorkerSpec, build_worker  # noqa: E402
from control.config import ClusterConfig  # noqa: E402
from engine.models.memory import native_weights_bytes  # noqa: E402
from engine.models.tensors import EMBEDDING, expected_tensors  # noqa: E402
from engine.runner.model_runner import ModelRunner  # noqa: E402
from engine.runner.native_runner import NativeRunner  # noqa: E402
from gateway.metrics import Metrics  # noqa: E402
from kernels.native.build import CompileFailed, build_library  # noqa: E402
from kernels.native.library import choose_kernels, load_library  # noqa: E402
from kernels.native.network import NativeError  # noqa: E402
from kernels.numerics import Kernels  # noqa: E402
from protocol.errors import ConfigError  # noqa: E402
from protocol.worker import Role  # noqa: E402
from tests.native_paths import PATHS  # noqa: E402
from tests.torch_driver import TorchDriver  # noqa: E402

LARGEST_GROUP = {"head_dim": 2, "hidden_size": 192, "num_attention_heads": 192, "num_key_value_heads": 1}


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "load_library", lambda: load_library(tmp_path / "libbaton_native.so"))


def test_without_a_compiler_the_build_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompileFailed, match="no-such-compiler is not installed; install g"):
        build_library(tmp_path)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(CompileFailed, match="failed"):
        build_library(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.usefixtures("no_library")
def test_without_the_library_torch_serves_and_says_so(tiny_checkpoint: Callable[..., Path]) -> None:
    chosen = choose_kernels(dtype="float32")
    assert chosen.name == chosen.bits == "torch" and "not built" in chosen.note
    with pytest.raises(ConfigError, match=r"kernels avx2 cannot be used: .* not built"):
        choose_kernels("avx2", dtype="float32")
    with TorchDriver(tiny_checkpoint("llama")) as driver:
        assert isinstance(driver.executor._runner, ModelRunner)
        assert len(driver.generate([[5, 6, 7]], 4)[0]) == 4


@pytest.mark.usefixtures("no_library")
async def test_that_torch_serves_is_a_line_of_the_status_and_a_metric(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """From a worker as a run builds it to what a scrape reads. Seen to fail with a worker that keeps the plan's note to itself."""
    config = ClusterConfig()
    model_dir = tiny_checkpoint("llama")
    spec = WorkerSpec(
        config=replace(config, workers=replace(config.workers, num_kv_blocks=8)),
        model_dir=model_dir,
        worker_id="decode-0",
        role=Role.DECODE,
        directory_host="127.0.0.1",
        directory_port=1,
        secret=bytes(32),
        run_dir=tmp_path,
    )
    host = build_worker(spec)
    host._loop = asyncio.get_running_loop()  # as `start` does, without the sockets
    snapshot = host.snapshot()
    (note,) = snapshot.notes
    assert note.startswith("kernels torch, which are slow: the native kernels are not built")
    assert notes_of({"workers": [{"worker_id": "decode-0", "notes": list(snapshot.notes)}]}) == [f"decode-0: {note}"]
    scraped = Metrics("demo", snapshots=lambda: [snapshot], gauges=dict).render().decode()
    assert 'baton_worker_notes{worker="decode-0"} 1.0' in scraped


def test_a_library_of_another_kind_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "libbaton_native.so").write_bytes(b"not a library")
    reason = load_library(tmp_path / "libbaton_native.so")
    assert isinstance(reason, str) and "cannot be loaded" in reason


def test_the_best_path_is_chosen_and_others_can_be_asked_for() -> None:
    assert choose_kernels(dtype="bfloat16").name == PATHS[0] and choose_kernels(dtype="bfloat16").note == ""
    for path in PATHS:
        assert choose_kernels(path, dtype="float32").name == path  # type: ignore[arg-type]
    assert choose_kernels("torch", dtype="float32").note == "", "asked for, so nothing to tell"
    assert "no float16" in choose_kernels(dtype="float16").note
    assert choose_kernels(dtype="float32", head_dim=512, group=192).name == PATHS[0]
    assert "head_dim 514 exceeds the 512" in choose_kernels(dtype="float32", head_dim=514).note
    assert "193 query heads share a KV head" in choose_kernels(dtype="float32", group=193).note
    with pytest.raises(ConfigError, match=r"head_dim 514 .* use auto or torch"):
        choose_kernels("portable", dtype="float32", head_dim=514)
    unknown: Kernels = "avx10"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="this machine has"):
        choose_kernels(unknown, dtype="float32")


FULL_PANELS: dict[str, dict[str, int]] = {
    "llama": {},
    "mixtral": {"num_local_experts": 64, "intermediate_size": 32},
    "qwen3_moe": {"num_experts": 64, "moe_intermediate_size": 32},
}


@pytest.mark.parametrize("arch", FULL_PANELS)
def test_what_is_packed_is_the_size_that_memory_is_planned_for(arch: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """All but the embedding, which stays in its file, and the norms. Each piece begins a page. Seen to fail with the experts left out of
    the arena, and with the embedding left out of the plan."""
    with TorchDriver(tiny_checkpoint(arch, num_hidden_layers=2, **FULL_PANELS[arch])) as driver:
        runner = driver.executor._runner
        assert isinstance(runner, NativeRunner)
        tensors = expected_tensors(runner.model)
        packed = [math.prod(shape) for name, shape in tensors.items() if len(shape) == 2 and name != EMBEDDING]
        assert 4 * sum(packed) <= runner.packed.size_bytes < 4 * sum(packed) + 4096 * len(packed)
        planned = native_weights_bytes(runner.model, PATHS[0], 16)  # type: ignore[arg-type]
        assert planned == runner.packed.size_bytes + 4 * math.prod(tensors[EMBEDDING])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("arch", "sizes"), [("qwen3", {"head_dim": 32}), ("mixtral", {})])
def test_threads_change_no_bit(arch: str, sizes: dict[str, int], path: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """Chunked prompts and a decode batch on 1 and 3 threads. Seen to fail with threads that share one scratch."""
    model_dir = tiny_checkpoint(arch, num_hidden_layers=2, dtype="bfloat16", **sizes)
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 500) for _ in range(length)] for length in (1, 70, 33, 5, 64)]
    seen = []
    for num_threads in (1, 3):
        with TorchDriver(model_dir, numerics="fast", kernels=path, num_threads=num_threads) as driver:
            outputs = driver.generate(prompts, 20, chunk=48)
            seen.append((outputs, torch.stack([row for i in range(len(prompts)) for row in driver.logits[i]])))
    assert seen[0][0] == seen[1][0] and torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [{"head_dim": 512}, LARGEST_GROUP])
def test_the_largest_shapes_are_computed(shape: dict[str, int], path: Kernels, tiny_checkpoint: Callable[..., Path]) -> None:
    """What `choose_kernels` lets through is what the library takes, and its scratch is large enough for it."""
    model_dir = tiny_checkpoint("llama", num_hidden_layers=1, **shape)
    prompt = [random.Random(1).randrange(3, 500) for _ in range(70)]
    rows = []
    for kernels in ("torch", path):
        with TorchDriver(model_dir, kernels=kernels) as driver:
            driver.generate([prompt], 3, chunk=50)
            rows.append(torch.stack(driver.logits[0]))
    assert (rows[0] - rows[1]).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [{"head_dim": 514}, LARGEST_GROUP | {"hidden_size": 193, "num_attention_heads": 193}])
def test_a_shape_beyond_the_native_kernels_is_computed_in_torch(shape: dict[str, int], tiny_checkpoint: Callable[..., Path]) -> None:
    with TorchDriver(tiny_checkpoint("llama", num_hidden_layers=1, **shape)) as driver:
        assert isinstance(driver.executor._runner, ModelRunner)
        assert len(driver.generate([[5, 6, 7]], 2)[0]) == 2


@pytest.mark.usefixtures("no_library")
def test_torch_refuses_several_threads_in_reference_numerics(tiny_checkpoint: Callable[..., Path]) -> None:
    """Also where it computes only because nothing else can."""
    with pytest.raises(ConfigError, match="in torch reference numerics run on 1 thread, not 2"):
        TorchDriver(tiny_checkpoint("llama"), num_threads=2)


def test_a_step_outside_its_memory_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    """The library checks what it is told before it writes. Seen to crash without the check of block ids."""
    from array import array

    from engine.core.executor import Entries, PlanEntry

    with TorchDriver(tiny_checkpoint("llama"), num_blocks=8) as driver:
        forward = driver.executor._runner.forward
        for start, table, token in ((0, [8], 1), (16, [0], 1), (0, [0], 512)):
            entry = PlanEntry(sequence_id=0, start=start, num_tokens=1, block_table=array("I", table))
            with pytest.raises(NativeError, match="outside"):
                forward(Entries.of([entry]), array("I", [token]), array("q"))
