"""A cluster of named GPUs, simulated from its cluster.yaml: faster hardware serves sooner, and its memory is its cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.__main__ import app
from control.config import load_config
from engine.hardware import find_gpu
from engine.models.shapes import find_shape
from engine.roofline import kv_capacity_blocks
from protocol.errors import ConfigError, ModelDoesNotFit
from simulator.routed_cluster import RoutedCluster, num_kv_blocks

pytestmark = pytest.mark.pure

POOLS = {"executor": "paced", "prefill_workers": 2, "decode_workers": 2}


def test_a_faster_gpu_serves_the_same_requests_sooner(tmp_path: Path) -> None:
    """`baton sim --config`, one file a GPU. Seen to fail with every pace that of an A100."""
    told = {}
    for gpu in ("A100", "H100", "H200"):
        file = tmp_path / f"{gpu}.yaml"
        file.write_text(f"workers: {json.dumps(POOLS)}\npaced: {{gpu: {gpu}, model: llama-3-8b}}\n")
        asked = ["sim", "--config", str(file), "--generate", "toolbench", "--requests", "40", "--rate", "4", "--json"]
        result = CliRunner().invoke(app, asked)
        assert result.exit_code == 0, result.output
        told[gpu] = json.loads(result.stdout)["summary"]
    assert {summary["num_finished"] for summary in told.values()} == {40}
    assert told["A100"]["ttft"]["mean"] > 2 * told["H100"]["ttft"]["mean"], "prompts are arithmetic: 312 against 989 TFLOP/s"
    assert told["H100"]["tpot"]["mean"] > 1.1 * told["H200"]["tpot"]["mean"], "decodes are traffic: 3.35 against 4.8 TB/s"


def test_a_worker_has_the_blocks_its_gpus_hold() -> None:
    """Unless it is told how many. Seen to fail with the blocks of one GPU for two."""
    tree = {"workers": {**POOLS, "block_size": 32}, "paced": {"gpu": "H100", "model": "llama-3-70b", "tensor_parallel": 4}}
    blocks = kv_capacity_blocks(find_gpu("H100"), find_shape("llama-3-70b"), tensor_parallel=4, block_size_tokens=32)
    cluster = RoutedCluster(load_config(tree))
    assert {worker.core.snapshot(0.0).num_blocks_total for worker in cluster.workers.values()} == {blocks}
    assert num_kv_blocks(load_config({**tree, "workers": {**POOLS, "num_kv_blocks": 7}})) == 7
    with pytest.raises(ModelDoesNotFit, match="leave no room for KV"):
        num_kv_blocks(load_config({**tree, "paced": {"gpu": "H100", "model": "llama-3-70b"}}))
    with pytest.raises(ConfigError, match=r"or paced.gpu and paced.model"):
        num_kv_blocks(load_config({"workers": POOLS}))
