"""A loaded model on a pool: entries in, logits out."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine.checkpoint import Checkpoint, fingerprint, open_checkpoint
from engine.core.executor import Entries
from engine.models.config import ModelConfig, load_model_config
from engine.models.decoder import Decoder, build_decoder
from engine.models.rope import RotaryFrequencies
from engine.runner.config import RunnerConfig
from engine.runner.inputs import make_inputs
from engine.runner.kv_pool import KVPool
from engine.runner.native_runner import NativeRunner, build_native_runner
from engine.runner.step_logits import StepLogits, with_most_likely
from engine.runner.weights import TORCH_DTYPES, MappedWeights, load_weights
from kernels.linear.reference import depends_on_place
from kernels.native.library import NativeLibrary, choose_kernels, load_library
from kernels.numerics import Kernels, Numerics
from kernels.sampling import Draw, draw_token
from kvtransfer.transport import Region
from protocol.errors import ModelError


class ModelRunner:
    """Runs forward passes in torch. Not thread-safe: one thread calls it."""

    def __init__(self, model: ModelConfig, decoder: Decoder, config: RunnerConfig, pool: KVPool) -> None:
        self.model = model
        self.pool = pool
        self._decoder = decoder
        self._numerics = config.numerics
        self._dtype = TORCH_DTYPES[model.dtype]
        self._device = decoder.embedding.device
        self._rope = RotaryFrequencies(model.rope, model.head_dim, device=str(self._device))

    @torch.inference_mode()
    def forward(self, entries: Entries, token_ids: array[int], sampled_entries: array[int], *, step_id: int = 0) -> StepLogits:
        """Compute KV of every entry; `token_ids` are those of all entries in order, uint32.

        Gives the logits after the last token of the entries named. The pool's clock tells of the layers of step `step_id`.
        """
        inputs = make_inputs(
            entries,
            token_ids,
            rope=self._rope,
            windows=self.model.layer_windows,
            block_size=self.pool.block_size_tokens,
            dtype=self._dtype,
            device=self._device,
            numerics=self._numerics,
        )
        logit_rows = torch.tensor([inputs.last_rows[i] for i in sampled_entries], dtype=torch.int64, device=self._device)
        return with_most_likely(
            self._decoder(
                inputs.token_ids,
                self.pool.layers,
                inputs.attention,
                logit_rows,
                on_layer=lambda layer: self.pool.clock.layer_done(step_id, layer),
            )
        )

    @torch.inference_mode()
    def draw(self, made: StepLogits, rows: Sequence[int], draws: Sequence[Draw]) -> list[int]:
        """One token for each of `draws` from its row of `made`."""
        return [draw_token(made.logits[row], draw) for row, draw in zip(rows, draws, strict=True)]


def load_model_runner(
    model_dir: Path, config: RunnerConfig, region: Region, *, packed_dir: Path | None = None
) -> ModelRunner | NativeRunner:
    """Load the checkpoint in `model_dir` onto a pool: into the native kernels where they are, else into torch.

    packed_dir: of the run on this machine, where its workers find weights that one of them has packed; None: packed for this one alone.

    Raises:
        ModelError: the checkpoint cannot be served (see engine/checkpoint.py), or reference numerics are asked for where
            this machine's BLAS cannot keep their promise. ConfigError: the kernels asked for by name are not to be had, or torch
            would compute reference numerics on several threads.
    """
    model = load_model_config(model_dir, dtype=config.dtype, numerics=config.numerics)
    layout = model.kv_layout(region.layout.block_size_tokens)
    assert region.layout == layout, f"the pool is laid out for {region.layout}, the model needs {layout}"
    pool = KVPool(region)
    checkpoint = open_checkpoint(model_dir, model)
    chosen = choose_kernels(config.kernels, dtype=model.dtype, head_dim=model.head_dim, group=model.heads_per_kv_head)
    config = replace(config, kernels=chosen.name)  # which may contradict the number of threads
    if chosen.name != "torch":
        return build_native_runner(
            model,
            MappedWeights(checkpoint, dtype=model.dtype),
            pool,
            path=chosen.name,
            num_threads=config.num_threads,
            key=packing_key(checkpoint, model, config.numerics, chosen.name),
            packed_dir=packed_dir,
        )
    decoder = build_decoder(model, load_weights(checkpoint, dtype=model.dtype, device="cpu"), config.numerics)
    if config.numerics == "reference":
        _check_row_independence(decoder)
    return ModelRunner(model, decoder, config, pool)


def packing_key(checkpoint: Checkpoint, model: ModelConfig, numerics: Numerics, path: Kernels) -> str:
    """Names packed weights by all that their bytes depend on: the files as they are now, what is made of them, and by which library."""
    library = load_library()
    assert isinstance(library, NativeLibrary), library
    files = [(str(f), s.st_size, s.st_mtime_ns, s.st_ino) for f in checkpoint.files for s in (f.stat(),)]
    told = fingerprint(checkpoint, model, numerics)
    return hashlib.blake2b(repr((library.digest, path, told, files)).encode(), digest_size=16).hexdigest()


def _check_row_independence(decoder: Decoder) -> None:
    by_shape = {linear.weight.shape: linear.weight for linear in decoder.linears()}
    for shape, weight in by_shape.items():
        if depends_on_place(weight):
            raise ModelError(
                f"reference numerics: on this machine a row of x times {list(shape)} changes with the rows beside it; use fast numerics"
            )
