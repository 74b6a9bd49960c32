"""Where a plan gets its workers from: what was published of a model on a GPU, else datasheets, or the pace that a cluster.yaml states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from control.compose import step_time
from control.config import ClusterConfig
from control.sections import DEMO_MODEL
from engine.demo import DEMO_MODEL_DIR
from engine.hardware import find_gpu
from engine.models.config import load_model_config
from engine.models.shapes import find_shape
from engine.published_steps import GPU, PUBLISHED
from engine.roofline import kv_capacity_blocks, kv_token_bytes, roofline
from protocol.errors import ConfigError, ModelDoesNotFit
from simulator.pools import WorkerModel

SIZES = (1, 2, 4, 8)  # GPUs of a worker
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerModels:
    """By number of GPUs, the fewest first. `origin`: of the step times, in words."""

    by_gpus: dict[int, WorkerModel]
    origin: str
    paced_model: str | None  # whose KV it is, as `paced.model` names it; None: the checkpoint's
    link_bytes_per_s: float  # between two GPUs of a machine, one way


def known_workers(model: str, gpu: str) -> WorkerModels:
    """Published step times of OPT on A100-80GB; of anything else the roofline of datasheet and shape.

    Raises:
        ConfigError: no such GPU or model. ModelDoesNotFit: not even over the most GPUs.
    """
    card = find_gpu("A100" if gpu.lower() == GPU else gpu)
    if card.name == "A100" and model.lower() in PUBLISHED:
        by_gpus = {
            tp: WorkerModel(num_gpus=tp, step_time=known.step_time, kv_tokens=known.kv_tokens, kv_token_bytes=known.kv_token_bytes)
            for tp, known in PUBLISHED[model.lower()].items()
        }
        origin = "published (DistServe's profile)"
        return WorkerModels(by_gpus=by_gpus, origin=origin, paced_model=model, link_bytes_per_s=card.link_bytes_per_s)
    shape = find_shape(model)
    by_gpus, too_small = {}, ModelDoesNotFit("")
    for tp in SIZES:
        try:
            num_blocks = kv_capacity_blocks(card, shape, tensor_parallel=tp, block_size_tokens=BLOCK_TOKENS)
        except ModelDoesNotFit as error:
            too_small = error
            continue
        except ConfigError:  # its heads are not divided so
            continue
        steps = roofline(card, shape, tensor_parallel=tp)
        kv_tokens = num_blocks * BLOCK_TOKENS
        by_gpus[tp] = WorkerModel(num_gpus=tp, step_time=steps, kv_tokens=kv_tokens, kv_token_bytes=kv_token_bytes(shape, tp))
    if not by_gpus:
        raise too_small
    origin = "a roofline of datasheets, within some 30 %"
    return WorkerModels(by_gpus=by_gpus, origin=origin, paced_model=model, link_bytes_per_s=card.link_bytes_per_s)


def paced_workers(config: ClusterConfig) -> WorkerModels:
    """The worker that `paced`, `workers.num_kv_blocks` and the model of `config` describe.

    Raises:
        ConfigError: one of them is missing. ModelError: the checkpoint cannot be read.
    """
    pace, num_blocks, size = step_time(config), config.workers.num_kv_blocks, config.workers.block_size
    if pace is None or num_blocks is None:
        raise ConfigError("a plan needs a pace and a number of blocks; give workers.executor: paced, and workers.num_kv_blocks")
    num_gpus = config.paced.tensor_parallel
    if config.paced.model is not None:
        token_bytes = kv_token_bytes(find_shape(config.paced.model), num_gpus)
    else:
        directory = DEMO_MODEL_DIR if config.model.path == DEMO_MODEL else Path(config.model.path)
        if not directory.is_dir():
            raise ConfigError(f"model.path {config.model.path} is no directory, so the size of its KV is not known; give paced.model")
        token_bytes = load_model_config(directory, dtype=config.model.dtype).kv_layout(size).block_bytes // size
    worker = WorkerModel(num_gpus=num_gpus, step_time=pace, kv_tokens=num_blocks * size, kv_token_bytes=token_bytes)
    return WorkerModels(
        by_gpus={num_gpus: worker},
        origin="the pace of the file",
        paced_model=config.paced.model,
        link_bytes_per_s=find_gpu(config.paced.gpu or "A100").link_bytes_per_s,
    )


__all__ = ["BLOCK_TOKENS", "WorkerModels", "known_workers", "paced_workers"]
