"""The flags of `baton serve`, one row each: name, key of the configuration, help. BATON_<NAME> means the same in the environment.

Names are those of `vllm serve` where the meaning is the same. A key without a row is set in the YAML file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal, get_args, get_origin

from control.binding import Given, KeyPath, Settings, default_of, leaf_paths
from control.sections import ClusterConfig
from gateway.config import ApiKey
from protocol.errors import ConfigError

VARIABLE_PREFIX = "BATON_"
OTHER_VARIABLES = ("BATON_CONFIG",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """`name` "--port" sets `path`; a boolean has `--no-...` beside it."""

    name: str
    path: KeyPath
    help: str
    group: str
    parse: Callable[[str], object] | None = None  # from text to the value in the tree; None: by the type of the key

    @property
    def parameter(self) -> str:
        """ "max_model_len": the flag as a name in Python."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def variable(self) -> str:
        return VARIABLE_PREFIX + self.parameter.upper()

    @property
    def type(self) -> object:
        return _TYPES[self.path]

    @property
    def is_switch(self) -> bool:
        return self.type is bool

    @property
    def metavar(self) -> str:
        """What stands for the value in help: "INTEGER", "auto|cpu|cuda"."""
        kinds = [k for k in get_args(self.type) if k is not type(None)] or [self.type]
        kind = self.type if get_origin(self.type) is Literal else kinds[0]
        if get_origin(kind) is Literal:
            return "|".join(str(choice) for choice in get_args(kind))
        if isinstance(kind, type) and issubclass(kind, Enum):
            return "|".join(str(choice.value) for choice in kind)
        if kind is int:
            return "BYTES" if self.parameter.endswith("_bytes") else "INTEGER"
        return {float: "SECONDS", Path: "DIRECTORY"}.get(kind, "TEXT") if isinstance(kind, type) else "TEXT"

    @property
    def default(self) -> str:
        """The default in words; empty where absence is the default."""
        value = default_of(ClusterConfig, self.path)
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, Enum):
            return str(value.value)
        return "" if value in (None, "", ()) else str(value)


def _api_keys(text: str) -> object:
    return [ApiKey.of(key.strip()) for key in text.split(",") if key.strip()]


def _row(group: str, name: str, path: str, help: str, parse: Callable[[str], object] | None = None) -> Flag:
    return Flag(name=name, path=tuple(path.split(".")), help=help, group=group, parse=parse)


_TYPES = leaf_paths(ClusterConfig)

MODEL = _row("Model", "--model", "model.path", "A directory, a Hugging Face Hub id, or 'demo' for the built-in model.")
FLAGS: tuple[Flag, ...] = (
    _row("Model", "--revision", "model.revision", "Branch, tag or commit of a Hub id."),
    _row("Model", "--served-model-name", "model.served_model_name", "What clients call the model; MODEL as given when left out."),
    _row("Model", "--dtype", "model.dtype", "Numbers of weights, activations and KV cache."),
    _row("Model", "--max-model-len", "model.max_model_len", "Most tokens of prompt and output together."),
    _row("Model", "--numerics", "model.numerics", "reference: bit-identical however requests are batched and split; fast: quicker."),
    _row("Model", "--kernels", "model.kernels", "Instructions of the CPU kernels, or torch; auto: the best each machine has."),
    _row("Endpoint", "--host", "http.host", "Address to listen on."),
    _row("Endpoint", "--port", "http.port", "Port to listen on; 0 takes a free one."),
    _row("Endpoint", "--api-key", "gateway.api_keys", "Ask clients for this key; several are separated by commas.", _api_keys),
    _row("Endpoint", "--otlp-traces-endpoint", "gateway.otlp_traces_endpoint", "Send spans of requests there, OTLP over HTTP ([tracing])."),
    _row("Workers", "--prefill-workers", "workers.prefill_workers", "Processes that compute prompts."),
    _row("Workers", "--decode-workers", "workers.decode_workers", "Processes that generate."),
    _row("Workers", "--mixed-workers", "workers.mixed_workers", "Processes that do both."),
    _row("Workers", "--device", "workers.device", "Where the model runs."),
    _row("Workers", "--executor", "workers.executor", "torch: the model; paced: real processes, made-up tokens at a model's pace."),
    _row("Workers", "--threads", "workers.threads", "Compute threads of one worker."),
    _row("Workers", "--seed", "workers.seed", "Seeds placement, and requests that bring no seed, in order of arrival."),
    _row("Engine", "--block-size", "workers.block_size", "Tokens of a KV block, a multiple of 16."),
    _row("Engine", "--kv-cache-memory-bytes", "workers.kv_cache_memory_bytes", "KV cache of each worker, such as 2GiB."),
    _row("Engine", "--kv-host-tier-bytes", "workers.kv_host_tier_bytes", "Host memory of each worker for what its KV cache evicts."),
    _row("Engine", "--max-num-seqs", "workers.max_num_seqs", "Most sequences of one batch."),
    _row("Engine", "--max-num-batched-tokens", "workers.max_num_batched_tokens", "Most tokens of one step."),
    _row("Engine", "--offer-early", "workers.offer_early", "Hand KV over layer by layer while prefill still computes."),
    _row("Engine", "--enable-prefix-caching", "workers.enable_prefix_caching", "Reuse the KV of prompts that begin alike."),
    _row("Routing", "--policy", "router.policy", "Placement policy, NAME or NAME:k=v,..."),
    _row("Routing", "--decode-policy", "router.decode_policy", "Placement policy of the decode pool, where it is another."),
    _row("Routing", "--prefix-pull", "router.prefix_pull", "Pull a prefix from another worker where that beats computing it."),
    _row("Routing", "--kv-transport", "transport.kv_transport", "How KV blocks move: auto, shm, tcp, cuda_ipc, ucx or nccl."),
    _row("Routing", "--kv-digest", "transport.digest_mode", "What of each KV block is compared: off, sampled, full."),
    _row("Routing", "--kv-load-failure-policy", "transport.kv_load_failure_policy", "When a prompt's KV does not arrive."),
    _row("Cluster", "--routers", "cluster.routers", "Processes that place requests; each stands by for the others."),
    _row("Cluster", "--record", "recording.dir", "Write what routers are told and answer into this directory, to run it again."),
    _row("Cluster", "--ray-address", "ray.address", "Join this Ray cluster instead of starting one."),
)  # fmt: skip

_BY_PARAMETER = {flag.parameter: flag for flag in (MODEL, *FLAGS)}
_BY_VARIABLE = {flag.variable: flag for flag in (MODEL, *FLAGS)}


def flag_settings(flags: Mapping[str, object]) -> Settings:
    """Settings of the command line: parameter name ("max_model_len") to value; None: not given."""
    settings: Settings = {}
    for parameter, value in flags.items():
        if value is not None:
            flag = _BY_PARAMETER[parameter]
            settings[flag.path] = Given(_parsed(flag, value), "MODEL" if flag is MODEL else flag.name)
    return settings


def variable_settings(environ: Mapping[str, str]) -> Settings:
    """Settings of BATON_* variables; an empty variable counts as not set.

    Raises:
        ConfigError: a variable with our prefix that means nothing.
    """
    settings: Settings = {}
    for name, text in environ.items():
        if not name.startswith(VARIABLE_PREFIX) or name in OTHER_VARIABLES or not text:
            continue
        flag = _BY_VARIABLE.get(name)
        if flag is None:
            near = difflib.get_close_matches(name, _BY_VARIABLE, n=1, cutoff=0.6)
            raise ConfigError(f"{name}: unknown variable" + (f"; did you mean {near[0]}?" if near else "; unset it"))
        settings[flag.path] = Given(_parsed(flag, text), name)
    return settings


def _parsed(flag: Flag, value: object) -> object:
    return flag.parse(value) if flag.parse is not None and isinstance(value, str) else value
