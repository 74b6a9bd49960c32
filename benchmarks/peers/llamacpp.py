"""llama.cpp as a subject of `baton bench engine --compare llamacpp`: llama-cpp-python's low-level batches, without its Python sampling.

    PYTHON -P benchmarks/peers/llamacpp.py baton/bench/spoken.py

The checkpoint is converted with the gguf package's writer (Llama, Qwen3 and Qwen3-MoE; bfloat16 or float32), which the time to ready leaves
out. A run has a context of its own with one KV stream a sequence, as llama-batched-bench has; a shared prefix is computed once and copied
(llama_memory_seq_cp). Requests that arrive while it runs would need llama-server's scheduler, which is not here.
"""

from __future__ import annotations

import ctypes
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

SPOKEN = runpy.run_path(sys.argv[1])
N_BATCH, N_UBATCH = 2048, 512  # its defaults
SHARED_TOKENS_MIN = 256  # a prefix all prompts share is copied from this length on
PADDING = 256  # tokens; llama.cpp rounds each KV stream up
ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3moe"}
TENSORS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
EXPERT_TENSORS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


class LlamaCppEngine:
    """One model; a context for each run."""

    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        began_s = time.monotonic()
        converted = convert(Path(asked["model"]), asked["dtype"])
        excluded_s = time.monotonic() - began_s
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(converted).encode(), params)
        converted.unlink()  # mapped; nothing is left behind
        assert self._model, "llama.cpp did not load what was converted"
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._dtype, self._num_threads = asked["dtype"], asked["num_threads"]
        self._context: Any = None
        self._batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)
        return {"engine": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})", "excluded_s": excluded_s}

    def prepare(self, requests: list[dict[str, Any]], is_streamed: bool) -> None:
        if any(request["at_s"] for request in requests):
            raise SPOKEN["Unsupported"]("requests that arrive while it runs need llama-server's scheduler, which is not in the library")
        self._requests = requests
        longest = max(len(request["prompt"]) + request["num_tokens"] for request in requests)
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = len(requests)
        params.n_ctx = -(-longest // PADDING) * PADDING * len(requests)
        params.n_batch, params.n_ubatch = N_BATCH, N_UBATCH
        if self._dtype == "float32":  # both are float16 inside by default: tokens part after some twenty
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_threads = params.n_threads_batch = self._num_threads
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp made no context"

    def run(self) -> dict[str, Any]:
        deliveries: list[list[tuple[float, int]]] = [[] for _ in self._requests]
        token_ids: list[list[int]] = [[] for _ in self._requests]
        began_s = time.perf_counter()
        for sequence, token in self._prompts():
            deliveries[sequence].append((time.perf_counter() - began_s, 1))
            token_ids[sequence].append(token)
        position = [len(request["prompt"]) for request in self._requests]
        while live := [i for i, request in enumerate(self._requests) if len(token_ids[i]) < request["num_tokens"]]:
            rows = [(token_ids[i][-1], position[i], i, True) for i in live]
            for sequence, token in self._decode(rows):
                deliveries[sequence].append((time.perf_counter() - began_s, 1))
                token_ids[sequence].append(token)
                position[sequence] += 1
        return {"deliveries": deliveries, "token_ids": token_ids}

    def _prompts(self) -> Any:
        """(sequence, first token) as the prompts are computed, in batches that hold the ends and beginnings of several."""
        prompts = [request["prompt"] for request in self._requests]
        shared = _shared_length(prompts)
        if shared:
            for start in range(0, shared, N_BATCH):
                list(self._decode([(prompts[0][i], i, 0, False) for i in range(start, min(shared, start + N_BATCH))]))
            memory = llama_cpp.llama_get_memory(self._context)
            for sequence in range(1, len(prompts)):
                llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        rows = [
            (prompt[i], i, sequence, i == len(prompt) - 1) for sequence, prompt in enumerate(prompts) for i in range(shared, len(prompt))
        ]
        for start in range(0, len(rows), N_BATCH):
            yield from self._decode(rows[start : start + N_BATCH])

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> Any:
        """One batch of (token, position, sequence, is sampled); then (sequence, its next token) of those sampled."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, is_sampled) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = is_sampled
        status = llama_cpp.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode returned {status}"
        for i, (_, _, sequence, is_sampled) in enumerate(rows):
            if is_sampled:
                logits = llama_cpp.llama_get_logits_ith(self._context, i)
                yield sequence, int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


def _shared_length(prompts: list[list[int]]) -> int:
    """Tokens with which all prompts begin, the last one of each left out; 0 where they are few."""
    if len(prompts) < 2:
        return 0
    most = min(len(prompt) for prompt in prompts) - 1
    shared = next((i for i in range(most) if any(prompt[i] != prompts[0][i] for prompt in prompts)), most)
    return shared if shared >= SHARED_TOKENS_MIN else 0


# --- conversion -------------------------------------------------------------------------------------------------------


def convert(model_dir: Path, dtype: str) -> Path:
    """The checkpoint as one GGUF file beside it; norms stay in float32, as in every GGUF."""
    config = json.loads((model_dir / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["architectures"][0])
    if architecture is None:
        raise SPOKEN["Unsupported"](f"no conversion of {config['architectures'][0]} to GGUF here")
    target = model_dir / f"{dtype}.gguf"
    writer = gguf.GGUFWriter(str(target), architecture)
    _write_options(writer, config)
    kind = gguf.GGMLQuantizationType.F32 if dtype == "float32" else gguf.GGMLQuantizationType.BF16
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, bits in _read_bfloat16(model_dir):
        layer, place = _place_of(name)
        if architecture == "llama" and place.endswith(("q_proj", "k_proj")):  # its rotation pairs neighbours, not halves
            heads = config["num_attention_heads"] if place.endswith("q_proj") else _num_kv_heads(config)
            bits = bits.reshape(heads, 2, -1, bits.shape[-1]).swapaxes(1, 2).reshape(bits.shape)
        if ".experts." in name:
            _, expert, linear = place.rsplit(".", 2)
            held = experts.setdefault(f"blk.{layer}.{EXPERT_TENSORS[linear]}.weight", {})
            held[int(expert)] = bits
            continue
        stored = f"blk.{layer}.{TENSORS[place]}.weight" if layer is not None else f"{TENSORS[place]}.weight"
        _add(writer, stored, bits, gguf.GGMLQuantizationType.F32 if bits.ndim == 1 or place == "mlp.gate" else kind)
    for stored, held in experts.items():
        _add(writer, stored, np.stack([held[i] for i in range(len(held))]), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _write_options(writer: Any, config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(_num_kv_heads(config))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_tokenizer_model("no_vocab")


def _num_kv_heads(config: dict[str, Any]) -> int:
    return int(config.get("num_key_value_heads", config["num_attention_heads"]))


def _place_of(name: str) -> tuple[int | None, str]:
    """ "model.layers.3.mlp.up_proj.weight" -> (3, "mlp.up_proj")."""
    place = name.removesuffix(".weight")
    if not place.startswith("model.layers."):
        return None, place
    layer, _, rest = place.removeprefix("model.layers.").partition(".")
    return int(layer), rest


def _read_bfloat16(model_dir: Path) -> Any:
    """(name, bits as uint16) of every tensor of the directory's safetensors: `[u64 header size][JSON][bytes]`."""
    for path in sorted(model_dir.glob("*.safetensors")):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        raw = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + header_bytes)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise SPOKEN["Unsupported"](f"{name} is {entry['dtype']}; only bfloat16 checkpoints are converted here")
            first, last = entry["data_offsets"]
            yield name, raw[first:last].view(np.uint16).reshape(entry["shape"])


def _add(writer: Any, name: str, bits: np.ndarray, kind: Any) -> None:
    """`bits` are bfloat16's: the upper half of a float32."""
    if kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, (bits.astype(np.uint32) << 16).view(np.float32))
    else:
        writer.add_tensor(name, np.ascontiguousarray(bits).view(np.uint8), raw_dtype=kind)


@llama_cpp.llama_log_callback
def _keep_quiet(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level >= 4:  # errors
        print(text.decode(errors="replace").rstrip(), file=sys.stderr)


if __name__ == "__main__":
    llama_cpp.llama_log_set(_keep_quiet, ctypes.c_void_p(0))
    SPOKEN["answer"](LlamaCppEngine())
