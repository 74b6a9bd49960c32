"""config.json and generation_config.json, read once into a frozen record everything else computes from. Torch-free.

Both dialects of rotary options are read: the old `rope_theta` + `rope_scaling` and transformers-5's `rope_parameters`.
An option that changes the answer and is not implemented is refused by name: nothing is ignored in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import overload

from engine.models.table import Architecture, BiasRule, ExpertNames, WindowRule, find_architecture
from kernels.numerics import Numerics
from protocol.errors import ConfigError, ModelError, ModelUnavailable, UnsupportedModel
from protocol.kv import DTYPE_SIZE_BYTES, KVLayout, LayerGroup, LayerKind, ShardRectangle

Json = Mapping[str, object]


class RopeKind(Enum):
    """How rotary frequencies are stretched past the length the model was trained on."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    YARN = "yarn"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position options; fields of other kinds keep their defaults."""

    kind: RopeKind = RopeKind.DEFAULT
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: from factor and mscale
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """The mixture of experts that some or all layers have in place of the dense MLP."""

    names: ExpertNames
    num_experts: int
    num_chosen: int  # of them, by each token
    intermediate_size: int  # of one expert
    normalize: bool  # the weights of a token's experts sum to one
    layers: tuple[bool, ...]  # per layer: it has experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One checkpoint's shape and options. `dtype` is what it is computed in, `checkpoint_dtype` what lies on disk."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of a dense MLP
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    layer_windows: tuple[int | None, ...]  # per layer: tokens a query may look back over, itself included; None: all
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    experts: ExpertsConfig | None  # None: every layer is dense
    tie_embeddings: bool
    dtype: str
    checkpoint_dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens; linear and yarn scaling extend the trained length by their factor, as in vLLM."""
        if self.rope.kind in (RopeKind.LINEAR, RopeKind.YARN):
            return max(self.max_position_embeddings, int(self.rope.original_max_position_embeddings * self.rope.factor))
        return self.max_position_embeddings

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def kv_layout(self, block_size_tokens: int) -> KVLayout:
        """Memory order of one whole (unsharded) worker's pool.

        Raises:
            ConfigError: the block size is not a positive multiple of 16, the cluster's hash block.
        """
        if block_size_tokens <= 0 or block_size_tokens % 16:
            raise ConfigError(f"block size {block_size_tokens} is not a positive multiple of 16 tokens; use 16 or 32")
        groups = []
        first = 0
        for window, run in groupby(self.layer_windows):
            num_layers = len(list(run))
            groups.append(
                LayerGroup(
                    kind=LayerKind.FULL if window is None else LayerKind.WINDOW,
                    first_layer=first,
                    num_layers=num_layers,
                    num_kv_heads=self.num_kv_heads,
                    head_dim=self.head_dim,
                    dtype=self.dtype,
                    window_tokens=window,
                )
            )
            first += num_layers
        shard = ShardRectangle(first_head=0, last_head=self.num_kv_heads, first_layer=0, last_layer=self.num_layers)
        return KVLayout(block_size_tokens=block_size_tokens, groups=tuple(groups), shard=shard)


def load_model_config(model_dir: Path, *, dtype: str = "auto", numerics: Numerics = "fast") -> ModelConfig:
    """The record of the checkpoint in `model_dir`.

    Args:
        dtype: "auto" (float32 in reference numerics, else the checkpoint's own), or a name of DTYPE_SIZE_BYTES.

    Raises:
        ModelUnavailable: no readable config.json there. UnsupportedModel: the architecture or an option is not implemented.
        ConfigError: `dtype` is unknown, or reference numerics are asked for in another dtype than float32.
    """
    config = _read_json(model_dir / "config.json")
    if config is None:
        raise ModelUnavailable(f"{model_dir} has no config.json; name the directory of a Hugging Face checkpoint")
    generation = _read_json(model_dir / "generation_config.json") or {}
    return parse_model_config(config, generation, dtype=dtype, numerics=numerics)


def parse_model_config(config: Json, generation: Json, *, dtype: str = "auto", numerics: Numerics = "fast") -> ModelConfig:
    """`load_model_config` on dictionaries already read."""
    row = find_architecture(_strings(config.get("architectures")))
    _refuse_unimplemented(config, row)
    num_layers = _required(config, "num_hidden_layers")
    num_heads = _required(config, "num_attention_heads")
    hidden_size = _required(config, "hidden_size")
    num_kv_heads = _value(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(f"config.json: {num_heads} attention heads are not a multiple of {num_kv_heads} key-value heads")
    max_positions = _value(config, "max_position_embeddings", row.default_max_position_embeddings)
    checkpoint_dtype = _value(config, "dtype", _value(config, "torch_dtype", "float32"))
    return ModelConfig(
        architecture=row.name,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_value(config, "head_dim", hidden_size // num_heads),
        intermediate_size=_required(config, "intermediate_size"),
        vocab_size=_required(config, "vocab_size"),
        rms_norm_eps=_value(config, "rms_norm_eps", row.default_rms_norm_eps),
        rope=_rope(config, row, max_positions),
        max_position_embeddings=max_positions,
        layer_windows=_layer_windows(config, row, num_layers),
        qk_norm=row.qk_norm,
        qkv_bias=_bias(row.qkv_bias, config, "attention_bias"),
        output_bias=_bias(row.output_bias, config, "attention_bias"),
        mlp_bias=_bias(row.mlp_bias, config, "mlp_bias"),
        experts=_experts(config, row, num_layers),
        tie_embeddings=_value(config, "tie_word_embeddings", False),
        dtype=_served_dtype(dtype, checkpoint_dtype, numerics),
        checkpoint_dtype=checkpoint_dtype,
        eos_token_ids=_token_ids(generation, "eos_token_id") or _token_ids(config, "eos_token_id"),
        bos_token_id=next(iter(_token_ids(config, "bos_token_id")), None),
    )


def _refuse_unimplemented(config: Json, row: Architecture) -> None:
    if config.get("quantization_config") is not None:
        method = _mapping(config, "quantization_config").get("quant_method", "?")
        raise UnsupportedModel(f"quantization {method!r} is not supported; serve the unquantized checkpoint of this model")
    if (activation := _value(config, "hidden_act", "silu")) not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act {activation!r} is not supported with {row.name}; known: silu")
    if (fraction := _value(config, "partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor {fraction} is not supported with {row.name}; known: 1.0")


def _served_dtype(asked: str, checkpoint_dtype: str, numerics: Numerics) -> str:
    dtype = ("float32" if numerics == "reference" else checkpoint_dtype) if asked == "auto" else asked
    if dtype not in DTYPE_SIZE_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not supported; known: auto, {', '.join(DTYPE_SIZE_BYTES)}")
    if numerics == "reference" and dtype != "float32":
        raise ConfigError(f"reference numerics are float32 only, not {dtype}; use --dtype float32 or fast numerics")
    return dtype


def _bias(rule: BiasRule, config: Json, key: str) -> bool:
    return rule is BiasRule.ALWAYS or (rule is BiasRule.CONFIG and _value(config, key, False))


def _layer_windows(config: Json, row: Architecture, num_layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window", row.default_sliding_window)
    if window is not None and (not isinstance(window, int) or window <= 0):
        raise ModelError(f"config.json: sliding_window {window!r} is not a positive number of tokens")
    if row.window is WindowRule.ALL_LAYERS:
        return (window,) * num_layers
    if row.window is WindowRule.NONE or not _value(config, "use_sliding_window", False) or window is None:
        return (None,) * num_layers
    if row.window is WindowRule.ALL_IF_USED:
        return (window,) * num_layers
    if (types := _strings(config.get("layer_types"))) != []:
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != num_layers:
            raise UnsupportedModel(f"layer_types with {sorted(unknown)} over {len(types)} of {num_layers} layers is not supported")
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = _value(config, "max_window_layers", 28)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _experts(config: Json, row: Architecture, num_layers: int) -> ExpertsConfig | None:
    """transformers 5 writes `num_local_experts` for every architecture, checkpoints of the Hub `num_experts` for Qwen3-MoE."""
    if row.experts is None:
        return None
    num_experts = _required(config, "num_local_experts" if "num_local_experts" in config else "num_experts")
    num_chosen = _required(config, "num_experts_per_tok")
    if num_chosen > num_experts:
        raise ModelError(f"config.json: num_experts_per_tok {num_chosen} is more than the {num_experts} experts there are")
    normalize_key, step, dense = row.experts.normalize_key, _value(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if step < 1 or not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ModelError(f"config.json: decoder_sparse_step {step!r} or mlp_only_layers {dense!r} does not say which layers have experts")
    layers = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
    if not any(layers):
        return None
    return ExpertsConfig(
        names=row.experts,
        num_experts=num_experts,
        num_chosen=num_chosen,
        intermediate_size=_required(config, row.experts.size_key),
        normalize=normalize_key is None or _value(config, normalize_key, False),
        layers=layers,
    )


def _rope(config: Json, row: Architecture, max_positions: int) -> RopeConfig:
    scaling = _mapping(config, "rope_parameters") or _mapping(config, "rope_scaling")
    name = _value(scaling, "rope_type", _value(scaling, "type", "default"))
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise UnsupportedModel(f"rotary options per layer type ({', '.join(scaling)}) are not supported")
    if name not in {kind.value for kind in RopeKind}:
        why = "; its frequencies depend on the length seen so far, which cached KV cannot follow" if name == "dynamic" else ""
        raise UnsupportedModel(f"rope scaling {name!r} is not supported{why}; known: {', '.join(k.value for k in RopeKind)}")
    if (fraction := _value(scaling, "partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor {fraction} is not supported; known: 1.0")
    original = _value(scaling, "original_max_position_embeddings", max_positions)
    factor = _value(scaling, "factor", max_positions / original)
    return RopeConfig(
        kind=RopeKind(name),
        theta=_value(scaling, "rope_theta", _value(config, "rope_theta", row.default_rope_theta)),
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=_value(scaling, "low_freq_factor", 1.0),
        high_freq_factor=_value(scaling, "high_freq_factor", 4.0),
        beta_fast=_value(scaling, "beta_fast", 32.0),
        beta_slow=_value(scaling, "beta_slow", 1.0),
        attention_factor=_optional(scaling, "attention_factor"),
        mscale=_optional(scaling, "mscale"),
        mscale_all_dim=_optional(scaling, "mscale_all_dim"),
        truncate=_value(scaling, "truncate", True),
    )


# --- reading JSON that somebody else wrote ----------------------------------------------------------------------------


def _read_json(path: Path) -> Json | None:
    """The object in `path`, or None where there is no such file."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{path} cannot be read: {error}; fetch the checkpoint again") from None
    if not isinstance(parsed, dict):
        raise ModelUnavailable(f"{path} holds a {type(parsed).__name__}, not an object; fetch the checkpoint again")
    return parsed


@overload
def _value(config: Json, key: str, default: bool) -> bool: ...
@overload
def _value(config: Json, key: str, default: int) -> int: ...
@overload
def _value(config: Json, key: str, default: float) -> float: ...
@overload
def _value(config: Json, key: str, default: str) -> str: ...
def _value(config: Json, key: str, default: bool | int | float | str) -> bool | int | float | str:
    """`config[key]` in the type of `default`; `default` where it is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ModelError(f"config.json: {key} is {value!r}; expected {type(default).__name__}")
    assert isinstance(value, (bool, int, float, str))
    return value


def _required(config: Json, key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value <= 0:
        raise ModelError(f"config.json: {key} is {value!r}; expected a positive int")
    return value


def _optional(config: Json, key: str) -> float | None:
    return None if config.get(key) is None else _value(config, key, 0.0)


def _mapping(config: Json, key: str) -> Json:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ModelError(f"config.json: {key} is {value!r}; expected an object")
    return value


def _strings(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _token_ids(config: Json, key: str) -> tuple[int, ...]:
    """One id or a list of them."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ModelError(f"config.json: {key} is {value!r}; expected a token id or a list of them")
    return tuple(ids)


__all__ = ["ExpertsConfig", "ModelConfig", "RopeConfig", "RopeKind", "load_model_config", "parse_model_config"]
