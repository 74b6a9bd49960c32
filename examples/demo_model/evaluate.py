"""How good the demo model is: `python -m examples.demo_model.evaluate --out results.json`, and the model card from it.

Bits per byte of the held-out files against 5-gram models and xz, then 100 completions of held-out functions and ten samples, asked of
`baton serve` as any user would, in reference numerics with fixed seeds, so that the same tree gives the same words.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import math
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from baton.bench.report import Row, Target, make_document
from engine.demo import DEMO_MODEL_DIR
from examples.demo_model import card
from examples.demo_model.completions import MAX_NEW_TOKENS, NUM_PROMPTS, HeldOutPrompt, completed, held_out_prompts, loops, parses
from examples.demo_model.corpus import Corpus, SourceFile, read_corpus
from examples.demo_model.network import Network, Shape
from examples.demo_model.ngrams import ORDER, KneserNey
from examples.demo_model.tokens import END_OF_TEXT_ID

SCHEMA = "baton.demo-model.v1"
LEAST_PARSED = 70
MOST_LOOPED = 10
NUM_BYTE_SYMBOLS = 257  # 256 and the end of a file
READY_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 300.0
CONCURRENCY = 16
SAMPLE_TOKENS = 96
SAMPLES = (  # fixed before the model was trained; the card shows the first three, whatever they say
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""',
    'class Stack:\n    """A last-in, first-out stack."""\n\n    def push(self, item):',
    'def read_lines(path):\n    """Return the lines of the file at path',
    "def is_prime(n):",
    "import os\nimport sys\n\ndef main():",
    'def reverse(text):\n    """Return text with its characters in reverse order."""',
    "class Point:\n    def __init__(self, x, y):",
    "try:\n    import json\nexcept ImportError:",
    "for name in sorted(names):\n    if",
    '"""This module provides a simple interface to',
)


# --- bits per byte ----------------------------------------------------------------------------------------------------


def network_bits_per_byte(model_dir: Path, held_out: tuple[SourceFile, ...]) -> float:
    """Of each file and its end, float32, in windows that overlap by half: most tokens see at least half a window before them."""
    shape = Shape()
    network = Network(shape)
    weights = {name: weight.float() for name, weight in load_file(model_dir / "model.safetensors").items()}
    network.load_state_dict(weights)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    end = END_OF_TEXT_ID
    nats = 0.0
    for file in held_out:
        ids = torch.tensor([end, *tokenizer.encode(file.text).ids, end])
        told = 0  # ids[1 : told + 1] are accounted for
        for start in range(0, len(ids) - 1, shape.max_positions // 2):
            window = ids[start : start + shape.max_positions + 1]
            if start + len(window) - 1 <= told:
                break
            with torch.inference_mode():
                logits = network(window[None, :-1])[0, told - start :]
            nats += F.cross_entropy(logits, window[1 + told - start :], reduction="sum").item()
            told = start + len(window) - 1
    return nats / math.log(2) / _size_bytes(held_out)


def ngram_bits_per_byte(corpus: Corpus, symbols: Callable[[str], list[int]], end: int, vocab_size: int) -> float:
    model = KneserNey(_as_row(corpus.training, symbols, end), vocab_size)
    return model.bits(_as_row(corpus.held_out, symbols, end)) / _size_bytes(corpus.held_out)


def xz_bits_per_byte(held_out: tuple[SourceFile, ...]) -> float:
    """`xz -9` of all held-out files as one, which lets it find again in one what it saw in another."""
    return len(lzma.compress(b"".join(file.text.encode() for file in held_out), preset=9)) * 8 / _size_bytes(held_out)


def _as_row(files: tuple[SourceFile, ...], symbols: Callable[[str], list[int]], end: int) -> npt.NDArray[np.int64]:
    parts = [[end] * (ORDER - 1), *([*symbols(file.text), end] for file in files)]
    return np.concatenate([np.array(part, dtype=np.int64) for part in parts])


def _size_bytes(files: tuple[SourceFile, ...]) -> int:
    return sum(file.size_bytes for file in files)


# --- completions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    text: str
    is_cut_off: bool  # for want of tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running `baton serve` with the model."""

    url: str

    def go_on(self, text: str, *, seed: int, max_tokens: int) -> Answer:
        """The text as it stands, continued."""
        choice = self._ask("completions", {"prompt": text, "seed": seed, "max_tokens": max_tokens})
        return Answer(text=choice["text"], is_cut_off=choice["finish_reason"] == "length")

    def finish(self, head: str, *, seed: int, max_tokens: int) -> Answer:
        """The function that begins so, as a chat answers: what follows the head, from its newline on."""
        messages = [{"role": "user", "content": head}]
        choice = self._ask("chat/completions", {"messages": messages, "seed": seed, "max_tokens": max_tokens})
        return Answer(text="\n" + (choice["message"]["content"] or ""), is_cut_off=choice["finish_reason"] == "length")

    def _ask(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        """The first choice; sampled as generation_config.json says."""
        request = urllib.request.Request(f"{self.url}/v1/{path}", json.dumps(body).encode(), headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as reply:
            choice: dict[str, Any] = json.load(reply)["choices"][0]
        return choice


def ask_all(ask: Callable[..., Answer], prompts: Sequence[str], *, max_tokens: int) -> list[Answer]:
    """Each prompt with its place in the list as its seed."""
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return list(pool.map(lambda item: ask(item[1], seed=item[0], max_tokens=max_tokens), enumerate(prompts)))


@contextlib.contextmanager
def served(model_dir: Path) -> Iterator[Server]:
    """`baton serve` of the checkpoint, exact, ended with the block.

    Raises:
        TimeoutError: it was not ready in time; its output is on stderr.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "baton", "serve", str(model_dir), "--numerics", "reference", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            server = Server(url=f"http://127.0.0.1:{port}")
            _wait_until_ready(server, process)
            yield server
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{server.url}/ready", timeout=5):
            return
        time.sleep(0.2)
    raise TimeoutError(f"baton serve was not ready after {READY_TIMEOUT_S:.0f} s (exit status {process.poll()})")


# --- the whole --------------------------------------------------------------------------------------------------------


def evaluate(model_dir: Path) -> dict[str, object]:
    """The document of results.json."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    corpus = read_corpus()
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    by_bytes = ngram_bits_per_byte(corpus, lambda text: list(text.encode()), NUM_BYTE_SYMBOLS - 1, NUM_BYTE_SYMBOLS)
    by_tokens = ngram_bits_per_byte(corpus, lambda text: tokenizer.encode(text).ids, END_OF_TEXT_ID, tokenizer.get_vocab_size())
    xz = xz_bits_per_byte(corpus.held_out)
    network = network_bits_per_byte(model_dir, corpus.held_out)
    prompts = held_out_prompts(corpus.held_out)
    heads = [prompt.head for prompt in prompts]
    with served(model_dir) as server:
        answers = ask_all(server.finish, heads, max_tokens=MAX_NEW_TOKENS)
        plain_answers = ask_all(server.go_on, heads, max_tokens=MAX_NEW_TOKENS)
        samples = ask_all(server.go_on, SAMPLES, max_tokens=SAMPLE_TOKENS)
    judged = judge(prompts, answers)
    plain = judge(prompts, plain_answers)
    below = Target(relation="<=", bound=round(min(by_bytes, by_tokens, xz), 4))
    rows = [
        Row(name="held-out/model", value=round(network, 4), unit="bits/byte", target=below),
        Row(name="held-out/5-gram of bytes", value=round(by_bytes, 4), unit="bits/byte"),
        Row(name="held-out/5-gram of tokens", value=round(by_tokens, 4), unit="bits/byte"),
        Row(name="held-out/xz -9", value=round(xz, 4), unit="bits/byte"),
        Row(
            name="completions/parse",
            value=count(judged, "parses"),
            unit=f"of {NUM_PROMPTS}",
            target=Target(relation=">=", bound=LEAST_PARSED),
        ),
        Row(
            name="completions/loop", value=count(judged, "loops"), unit=f"of {NUM_PROMPTS}", target=Target(relation="<=", bound=MOST_LOOPED)
        ),
        Row(name="completions as plain text/parse", value=count(plain, "parses"), unit=f"of {NUM_PROMPTS}"),
        Row(name="completions as plain text/loop", value=count(plain, "loops"), unit=f"of {NUM_PROMPTS}"),
    ]
    sections: dict[str, object] = {
        "model": card.describe(model_dir),
        "corpus": corpus.describe(),
        "samples": [{"prompt": prompt, "completion": answer.text} for prompt, answer in zip(SAMPLES, samples, strict=True)],
        "completions": judged,
        "completions as plain text": plain,
    }
    return make_document(SCHEMA, seed=0, rows=rows, sections=sections)


def judge(prompts: Sequence[HeldOutPrompt], answers: Sequence[Answer]) -> list[dict[str, object]]:
    """What is recorded of each completion, by the criteria of completions.py."""
    judged: list[dict[str, object]] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        function = completed(prompt.head, answer.text, is_cut_off=answer.is_cut_off)
        completion = function[len(prompt.head) :]
        told = {"path": prompt.path, "head": prompt.head, "completion": completion}
        judged.append({**told, "parses": parses(function), "loops": loops(completion)})
    return judged


def count(judged: Sequence[Mapping[str, object]], criterion: str) -> int:
    return sum(bool(one[criterion]) for one in judged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL_DIR, help="directory of the checkpoint (default: the built-in one)")
    parser.add_argument("--out", type=Path, default=card.RESULTS, help="where the figures go (default: %(default)s)")
    arguments = parser.parse_args()
    document = evaluate(arguments.model)
    arguments.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.out == card.RESULTS:
        card.CARD.write_text(card.with_figures(card.CARD.read_text(encoding="utf-8"), document), encoding="utf-8")
    sys.stdout.write(card.figures(document) + "\n")


if __name__ == "__main__":
    main()
