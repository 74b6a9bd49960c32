"""The built-in demo model: a small Llama checkpoint in Hugging Face form, made on this machine in a few seconds. Torch-free.

Its weights are random, so it speaks in word salad; what it shows is the machinery. The scales are chosen so that attention picks
out tokens rather than averaging them: an early token decides about later ones, and greedy answers do not fall into a loop.
The tokenizer is a byte-level BPE trained on the documentation every Python carries.
"""

from __future__ import annotations

import ast
import json
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.models.config import parse_model_config
from engine.models.tensors import EMBEDDING, LM_HEAD, Shape, expected_tensors
from protocol.errors import ModelUnavailable

VERSION = 1  # raised when any file below would come out differently; a directory of another version is made anew
VERSION_KEY = "baton_demo_version"  # in config.json
VOCAB_SIZE = 2048
END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
LOGIT_SPREAD = 3.0
QUERY_KEY_SPREAD = 1.6  # scores spread by its square, so attention is far from uniform
SELF_DAMPING = 0.12  # of a token's own embedding in its logit: no token is its own best successor
TURN_END_LOGIT_SCALE = 0.8  # of a usual token's: an answer can end by itself, seldom soon
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
    VERSION_KEY: VERSION,
}
TEXT_FILES = (  # of the standard library, whose docstrings the tokenizer is trained on
    "argparse", "ast", "calendar", "cmd", "collections/__init__", "concurrent/futures/_base", "configparser", "contextlib", "copy",
    "csv", "dataclasses", "datetime", "decimal", "difflib", "dis", "doctest", "email/message", "enum", "fractions", "functools",
    "gettext", "heapq", "html/parser", "http/client", "http/cookiejar", "http/server", "imaplib", "inspect", "ipaddress",
    "json/__init__", "json/decoder", "locale", "logging/__init__", "logging/handlers", "mailbox", "mimetypes", "multiprocessing/pool",
    "optparse", "os", "pathlib", "pdb", "pickle", "pickletools", "pkgutil", "platform", "pprint", "pydoc", "random", "re", "sched",
    "shutil", "smtplib", "socket", "socketserver", "statistics", "string", "subprocess", "sysconfig", "tarfile", "tempfile",
    "textwrap", "threading", "timeit", "tokenize", "trace", "traceback", "typing", "unittest/case", "unittest/mock", "urllib/parse",
    "urllib/request", "uuid", "warnings", "weakref", "xml/etree/ElementTree", "zipfile", "zipfile/__init__",
)  # fmt: skip


def make_demo_model(target_dir: Path) -> Path:
    """Make the checkpoint in `target_dir`, unless this version of it is there already; returns `target_dir`.

    The directory appears whole or not at all, so several processes may call this at once.

    Raises:
        OSError: the disk is full or the parent directory cannot be written.
        ModelUnavailable: this Python has no library source to train the tokenizer on.
    """
    if _is_made(target_dir):
        return target_dir
    target_dir.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(dir=target_dir.parent, prefix=f".{target_dir.name}-"))
    try:
        _write_checkpoint(making)
        _put_in_place(making, target_dir)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return target_dir


def _is_made(target_dir: Path) -> bool:
    try:
        config = json.loads((target_dir / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get(VERSION_KEY) == VERSION


def _put_in_place(making: Path, target_dir: Path) -> None:
    """Rename; where an old version or a half-deleted directory is in the way, move that aside first."""
    try:
        making.rename(target_dir)
        return
    except OSError:
        if _is_made(target_dir):  # another process was faster
            return
    with tempfile.TemporaryDirectory(dir=target_dir.parent, prefix=f".{target_dir.name}-old-") as aside:
        target_dir.rename(Path(aside) / "model")
        making.rename(target_dir)


def _write_checkpoint(directory: Path) -> None:
    tokenizer = _train_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    save_file(_weights(tokenizer), str(directory / "model.safetensors"), metadata={"format": "pt"})
    _write_json(directory / "config.json", CONFIG)
    _write_json(directory / "generation_config.json", {"eos_token_id": [2, 0], "pad_token_id": 0})
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    if (size := tokenizer.get_vocab_size()) != VOCAB_SIZE:
        raise ModelUnavailable(
            f"the demo model's tokenizer got {size} of {VOCAB_SIZE} tokens: this Python lacks the source of its library; name another model"
        )
    return tokenizer


def _texts() -> Iterator[str]:
    """Docstrings as the source files have them: what else this process imported makes no difference."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in TEXT_FILES:
        path = library / f"{name}.py"
        if not path.exists():  # another Python keeps it elsewhere
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                yield text


def _weights(tokenizer: Tokenizer) -> dict[str, npt.NDArray[np.float32]]:
    """Random weights by seed; a linear's output has the spread its place calls for when its input has spread 1."""
    rng = np.random.Generator(np.random.PCG64(20260))
    config = parse_model_config(CONFIG, {})
    weights = {name: _random(rng, name, shape) for name, shape in expected_tensors(config).items()}
    weights[LM_HEAD] -= SELF_DAMPING * weights[EMBEDDING]
    for token_id in range(VOCAB_SIZE):
        if not _is_readable(tokenizer.decode([token_id], skip_special_tokens=True)):
            weights[LM_HEAD][token_id] = 0.0
    turn_end = weights[LM_HEAD][tokenizer.token_to_id(TURN_END)]
    turn_end[:] = rng.standard_normal(turn_end.shape) * TURN_END_LOGIT_SCALE * LOGIT_SPREAD / turn_end.shape[0] ** 0.5
    return weights


def _random(rng: np.random.Generator, name: str, shape: Shape) -> npt.NDArray[np.float32]:
    if name.endswith("norm.weight"):
        return np.ones(shape, dtype=np.float32)
    if name == EMBEDDING:
        spread = 1.0
    elif name == LM_HEAD:
        spread = LOGIT_SPREAD / shape[1] ** 0.5
    elif "q_proj" in name or "k_proj" in name:
        spread = QUERY_KEY_SPREAD / shape[1] ** 0.5
    else:
        spread = 1.0 / shape[1] ** 0.5
    return (rng.standard_normal(shape) * spread).astype(np.float32)


def _is_readable(text: str) -> bool:
    """Whole characters that a terminal shows; greedy answers consist of these."""
    return bool(text) and "\ufffd" not in text and all(c.isprintable() or c == "\n" for c in text)
