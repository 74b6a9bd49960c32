"""Train the demo model: `python -m examples.demo_model.train --out DIR` (about 45 minutes of two cores).

The number of steps is fixed, so is the seed, and the order of the text follows from it: on one machine with one build of torch two
runs give the same file. An interrupted run goes on where its last state was saved.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from examples.demo_model import tokens
from examples.demo_model.corpus import Corpus, read_corpus
from examples.demo_model.network import Network, Shape
from examples.demo_model.team import Team, run_as_team

SAVE_EVERY_STEPS = 50
WATCH_EVERY_STEPS = 100
WATCHED_BYTES = 100_000  # of the held-out text, to see that the figure falls; the real one is evaluate.py's
WATCHED_LENGTH = 256
SAMPLING = {"do_sample": True, "temperature": 0.3, "top_p": 0.95, "repetition_penalty": 1.3}  # where a request says nothing
KEPT_STATES = 2
TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides about the outcome besides the corpus and the shape.

    The rate stays at its peak until `decay_from` of the steps, on short rows, and falls to nothing over the rest, on longer ones: up to
    there the state does not depend on `steps`, so a run can be made longer without beginning anew. Warmup-stable-decay, as in
    MiniCPM (arXiv:2404.06395).
    """

    seed: int = 20260
    steps: int = 2200
    tokens_per_step: int = 4096
    lengths: tuple[tuple[float, int], ...] = ((0.0, 256), (0.7, 1024), (0.95, 2048))  # of a row, from which share of the steps on
    warmup_steps: int = 50
    decay_from: float = 0.7
    matrix_rate: float = 0.02  # Muon's, for the matrices of the layers
    vector_rate: float = 3e-3  # AdamW's, for the embedding and the norms
    weight_decay: float = 0.01  # of the matrices
    members: int = 2  # processes of one thread; half the rows of a step each

    def rate_at(self, step: int) -> float:
        """Of the peak."""
        return min((step + 1) / self.warmup_steps, 1.0, (1 - step / self.steps) / (1 - self.decay_from))

    def length_at(self, step: int) -> int:
        return next(length for start, length in reversed(self.lengths) if step >= start * self.steps)


class Text:
    """The training documents as one endless row of ids, cut into rows that are dealt in an order by seed; any step can be asked for."""

    def __init__(self, documents: list[npt.NDArray[np.uint16]], recipe: Recipe) -> None:
        self._documents = documents
        self._recipe = recipe
        self._epoch = -1
        self._ids = np.empty(0, dtype=np.uint16)
        self.steps_per_epoch = (sum(map(len, documents)) - 1) // recipe.tokens_per_step

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(ids, the ids that follow them), both [rows, length] int64."""
        seed, num_tokens, length = self._recipe.seed, self._recipe.tokens_per_step, self._recipe.length_at(step)
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(self._documents))
            self._epoch, self._ids = epoch, np.concatenate([self._documents[at] for at in order])
        dealt = np.random.Generator(np.random.PCG64([seed, epoch, length])).permutation((len(self._ids) - 1) // length)
        num_rows = num_tokens // length
        rows = [self._ids[at * length :][: length + 1] for at in dealt[index * num_rows : (index + 1) * num_rows]]
        cut = torch.from_numpy(np.stack(rows).astype(np.int64))
        return cut[:, :-1], cut[:, 1:]


class Training:
    """A network with its optimizers at some step, saved and restored as a whole; each member of the team has one."""

    def __init__(self, network: Network, recipe: Recipe, team: Team) -> None:
        self.network = network
        self.step = 0
        self._recipe = recipe
        self._team = team
        self._matrices = [p for name, p in network.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in network.named_parameters() if p.ndim != 2 or "embed" in name]
        muon = torch.optim.Muon(team.owned(self._matrices), lr=recipe.matrix_rate, weight_decay=recipe.weight_decay)
        adamw = torch.optim.AdamW(others, lr=recipe.vector_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [(muon, recipe.matrix_rate), (adamw, recipe.vector_rate)]

    def advance(self, ids: Tensor, targets: Tensor) -> float:
        """One step, of which this member computes its rows; their loss in nats a token."""
        rate = self._recipe.rate_at(self.step)
        own = slice(self._team.rank, None, self._team.size)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.network(ids[own])
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets[own].reshape(-1))
        loss.backward()  # type: ignore[no-untyped-call]
        self._team.average([p.grad for p in self.network.parameters() if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer, peak in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
        self.network.zero_grad(set_to_none=True)
        self._team.exchange([matrix.data for matrix in self._matrices])
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        state = {"step": self.step, "network": self.network.state_dict(), "optimizers": [o.state_dict() for o, _ in self._optimizers]}
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        for (optimizer, _), saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def train(team: Team, out: Path, work: Path, recipe: Recipe, shape: Shape) -> None:
    """Write the checkpoint to `out`; `work` holds what an interrupted run goes on from."""
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    corpus = read_corpus()
    tokenizer = Tokenizer.from_file(str(work / TOKENIZER_NAME))
    text = Text(tokens.encode_documents(tokenizer, tokens.documents(corpus.training)), recipe)
    watched = team.owned(list(_watched(tokenizer, corpus)))
    training = Training(Network(shape), recipe, team)
    if steps := _saved_steps(work, team.size):
        training.restore(_state_path(work, steps[-1], team.rank))
    num_parameters = sum(p.numel() for p in training.network.parameters())
    _say(team, f"{num_parameters:,} parameters; step {training.step} of {recipe.steps}; {text.steps_per_epoch} steps an epoch")
    started_s = time.monotonic()
    for step in range(training.step, recipe.steps):
        loss = training.advance(*text.batch(step))
        if training.step % 10 == 0:
            took_s, started_s = time.monotonic() - started_s, time.monotonic()
            _say(team, f"step {training.step} loss {loss:.3f} {10 * recipe.tokens_per_step / took_s:.0f} tokens/s")
        if training.step % WATCH_EVERY_STEPS == 0:
            _say(team, f"step {training.step} held-out {_bits_per_byte(training.network, watched):.3f} bits/byte of a part")
        if training.step % SAVE_EVERY_STEPS == 0 or training.step == recipe.steps:
            training.save(_state_path(work, training.step, team.rank))
            _state_path(work, training.step - KEPT_STATES * SAVE_EVERY_STEPS, team.rank).unlink(missing_ok=True)
    if team.rank == 0:
        write_checkpoint(out, training.network, tokenizer, shape, corpus, recipe)


def _state_path(work: Path, step: int, rank: int) -> Path:
    return work / f"state-{step}-{rank}.pt"


def _saved_steps(work: Path, num_members: int) -> list[int]:
    """Steps at which every member saved its state, the latest last."""
    saved = Counter(int(path.name.split("-")[1]) for path in work.glob("state-*.pt"))
    return sorted(step for step, count in saved.items() if count == num_members)


def write_checkpoint(out: Path, network: Network, tokenizer: Tokenizer, shape: Shape, corpus: Corpus, recipe: Recipe) -> None:
    """The directory in Hugging Face form, weights in bf16, with training.json beside them: what it was made of and how."""
    out.mkdir(parents=True, exist_ok=True)
    ends = [tokens.TURN_END_ID, tokens.END_OF_TEXT_ID]
    weights = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in network.named_parameters()}
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    _write_json(out / "config.json", shape.config() | {"bos_token_id": None, "eos_token_id": ends, "pad_token_id": ends[1]})
    _write_json(out / "generation_config.json", {"eos_token_id": ends, "pad_token_id": ends[1]} | SAMPLING)
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokens.TURN_END,
            "pad_token": tokens.END_OF_TEXT,
            "model_max_length": shape.max_positions,
            "clean_up_tokenization_spaces": False,
            "chat_template": tokens.CHAT_TEMPLATE,
        },
    )
    _write_json(out / "training.json", {"corpus": corpus.describe(), "recipe": asdict(recipe), "torch": torch.__version__})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _watched(tokenizer: Tokenizer, corpus: Corpus) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(ids, following ids, bytes these stand for) of the first held-out text."""
    left_bytes = WATCHED_BYTES
    for file in corpus.held_out:
        ids = tokenizer.encode(tokens.END_OF_TEXT + file.text).ids
        for at in range(0, len(ids) - 1, WATCHED_LENGTH):
            cut = ids[at : at + WATCHED_LENGTH + 1]
            num_bytes = len(tokenizer.decode(cut[1:]).encode())
            yield torch.tensor([cut[:-1]]), torch.tensor(cut[1:]), num_bytes
            left_bytes -= num_bytes
            if left_bytes <= 0:
                return


@torch.no_grad()
def _bits_per_byte(network: Network, watched: list[tuple[Tensor, Tensor, int]]) -> float:
    nats = 0.0
    for ids, targets, _ in watched:
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(ids)
        nats += F.cross_entropy(logits[0].float(), targets, reduction="sum").item()
    return nats / math.log(2) / sum(num_bytes for _, _, num_bytes in watched)


def _say(team: Team, line: str) -> None:
    if team.rank:
        return
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the finished checkpoint")
    parser.add_argument("--work", type=Path, help="directory of the interrupted run (default: OUT with .work behind it)")
    parser.add_argument("--steps", type=int, default=Recipe().steps, help="fewer for a quick look (default: %(default)s)")
    arguments = parser.parse_args()
    out: Path = arguments.out
    work: Path = arguments.work or out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    if not (work / TOKENIZER_NAME).exists():  # what is saved beside the states is what they belong to
        tokens.train_tokenizer(file.text for file in read_corpus().training).save(str(work / TOKENIZER_NAME))
    recipe = Recipe(steps=arguments.steps)
    run_as_team(recipe.members, work, partial(train, out=out, work=work, recipe=recipe, shape=Shape()))


if __name__ == "__main__":
    main()
