"""Sampling in plain torch, one row at a time."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import torch

from kernels.sampling.philox import uniform
from protocol.messages import TokenLogprobs
from protocol.request import SamplingParams

MIN_TEMPERATURE = 1e-5  # below it greedy: logits divided by less would overflow, as in vLLM
NUM_CANDIDATES = 1024  # sorted first for top_p: a full sort of 150k logits takes 8 ms, and few rows need more than these


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Everything but the logits that decides a token. The next output position is len(token_ids) - num_prompt_tokens."""

    params: SamplingParams
    choice: int
    token_ids: array[int]  # uint32: prompt and output so far
    num_prompt_tokens: int

    @property
    def position(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    token_id: int
    logprobs: TokenLogprobs | None  # None: not asked for


def sample(logits: torch.Tensor, draw: Draw) -> Sampled:
    """Draw the next token. logits [vocab_size] float32, not changed."""
    params = draw.params
    row = _adjust(logits, draw)
    token_id = int(row.argmax()) if params.temperature < MIN_TEMPERATURE else _draw_token(row / params.temperature, draw)
    return Sampled(token_id=token_id, logprobs=None if params.num_logprobs is None else _logprobs(logits, token_id, params.num_logprobs))


def takes_most_likely(draw: Draw) -> bool:
    """Whether `sample` would give the first of the greatest logits and nothing else: a caller that knows it need not ask."""
    params = draw.params
    is_adjusted = params.logit_bias or params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty
    return params.temperature < MIN_TEMPERATURE and not is_adjusted and draw.position >= params.min_tokens and params.num_logprobs is None


def _adjust(logits: torch.Tensor, draw: Draw) -> torch.Tensor:
    """logit_bias, min_tokens mask, penalties: a new row where any of them is asked for."""
    params = draw.params
    row = logits
    if params.logit_bias:
        ids, bias = zip(*params.logit_bias, strict=True)
        row = row.index_add(0, _ids(ids, row), torch.tensor(bias, dtype=row.dtype, device=row.device))
    if draw.position < params.min_tokens:
        ends = params.stop_token_ids + (() if params.ignore_eos else params.eos_token_ids)
        row = row.index_fill(0, _ids(ends, row), float("-inf"))
    if params.repetition_penalty != 1.0:
        seen = _ids(np.unique(_tokens(draw.token_ids)), row)
        hit = row[seen]
        row = row.index_copy(0, seen, torch.where(hit > 0, hit / params.repetition_penalty, hit * params.repetition_penalty))
    if (params.frequency_penalty or params.presence_penalty) and draw.position > 0:
        output, counts = np.unique(_tokens(draw.token_ids)[draw.num_prompt_tokens :], return_counts=True)
        penalty = params.frequency_penalty * counts + params.presence_penalty
        row = row.index_add(0, _ids(output, row), torch.from_numpy(-penalty).to(row))
    return row


def _draw_token(row: torch.Tensor, draw: Draw) -> int:
    """Inverse of the cumulative distribution at the uniform number of (seed, choice, position)."""
    params = draw.params
    number = uniform(seed=params.seed, choice=draw.choice, position=draw.position)
    vocab_size = row.shape[0]
    top_k = params.top_k if 0 < params.top_k < vocab_size else vocab_size
    if top_k == vocab_size and params.top_p >= 1.0 and params.min_p <= 0.0:
        return _invert(torch.softmax(row.double(), 0), number)
    if top_k < vocab_size:
        scores, ids = row.topk(top_k)
    else:
        scores, ids = _most_likely(row, params)
    probabilities = torch.softmax(scores.double(), 0) if top_k < vocab_size else torch.exp(scores.double() - row.double().logsumexp(0))
    before = probabilities.cumsum(0) - probabilities
    keep = (before < params.top_p) & (probabilities >= params.min_p * probabilities[0])
    keep[0] = True  # top_p 0 keeps the most likely
    return int(ids[_invert(probabilities * keep, number)])


def _most_likely(row: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and ids, most likely first: surely all that top_p or min_p can keep, and not many more."""
    if row.shape[0] > NUM_CANDIDATES:
        scores, ids = row.topk(NUM_CANDIDATES)
        mass = float(torch.exp(scores.double() - row.double().logsumexp(0)).sum())
        rest_is_unlikely = params.min_p > 0.0 and float(torch.exp(scores[-1].double() - scores[0].double())) < params.min_p
        if mass >= params.top_p or rest_is_unlikely:
            return scores, ids
    return row.sort(descending=True, stable=True)


def _invert(probabilities: torch.Tensor, number: float) -> int:
    """Index of the first entry at which the cumulative sum exceeds `number` of the total; never one of probability 0."""
    cumulative = probabilities.cumsum(0)
    index = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
    last = int(probabilities.nonzero()[-1])
    return min(index, last)


def _logprobs(logits: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    logprobs = torch.log_softmax(logits, 0)
    own = logprobs[token_id]
    top, ids = logprobs.topk(min(num_top, logits.shape[0]))
    return TokenLogprobs(
        logprob=float(own),
        rank=int((logprobs > own).sum()) + 1,
        top_token_ids=array("I", ids.tolist()),
        top_logprobs=tuple(top.tolist()),
    )


def _tokens(token_ids: array[int]) -> np.ndarray:
    return np.frombuffer(token_ids, dtype=np.uint32)


def _ids(ids: tuple[int, ...] | np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(like.device)
