"""Sampling in plain torch, one row at a time.

A token's weight is e^((logit - greatest logit) / temperature) in multiples of 2^-34: what is 2^35 times less likely than the most likely
token is never drawn, and the sum of up to 2^19 weights is exact in float64, in whatever order it is made. So the native sampler
(kernels/native/src/sampling.cpp), which sums in another order, draws the same tokens bit for bit.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import torch

from kernels.sampling.philox import uniform
from protocol.messages import TokenLogprobs
from protocol.request import SamplingParams

MIN_TEMPERATURE = 1e-5  # below it greedy: logits divided by less would overflow, as in vLLM
MAX_TEMPERATURE = 1e30  # beyond it 1 / temperature is no float32
WEIGHT_UNIT = 2.0**-34
NUM_CANDIDATES = 1024  # sorted first for top_k and top_p: a full sort of 150k logits takes 8 ms, and few rows need more than these
_EXPONENTIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)  # Cephes expf


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Everything but the logits that decides a token. `token_ids` may grow: the next output position follows from its length."""

    params: SamplingParams
    choice: int
    token_ids: array[int]  # uint32: prompt and output so far
    num_prompt_tokens: int

    @property
    def position(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def masked(self) -> tuple[int, ...]:
        """Tokens that may not come yet (min_tokens)."""
        params = self.params
        if self.position >= params.min_tokens:
            return ()
        return params.stop_token_ids + (() if params.ignore_eos else params.eos_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    token_id: int
    logprobs: TokenLogprobs | None  # None: not asked for


def sample(logits: torch.Tensor, draw: Draw) -> Sampled:
    """Draw the next token. logits [vocab_size] float32, not changed."""
    token_id = draw_token(logits, draw)
    num_logprobs = draw.params.num_logprobs
    return Sampled(token_id=token_id, logprobs=None if num_logprobs is None else logprobs_of(logits, token_id, num_logprobs))


def is_greedy(params: SamplingParams) -> bool:
    """Whether `draw_token` gives the first of the greatest logits, from output position `min_tokens` on: a caller need not ask then."""
    is_adjusted = params.logit_bias or params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty
    return params.temperature < MIN_TEMPERATURE and not is_adjusted


def draw_token(logits: torch.Tensor, draw: Draw) -> int:
    """The next token alone. logits [vocab_size] float32, not changed."""
    row = _adjust(logits, draw)
    if inverse_temperature(draw.params.temperature) == 0.0 or torch.isneginf(row.max()):
        return int(row.argmax())
    weights = weigh(row, draw.params.temperature)
    number = uniform(seed=draw.params.seed, choice=draw.choice, position=draw.position)
    return _invert(weights * _kept(row, weights, draw.params), number)


def logprobs_of(logits: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Of `token_id` and the `num_top` most likely tokens, from the raw logits."""
    logprobs = torch.log_softmax(logits, 0)
    own = logprobs[token_id]
    top, ids = logprobs.topk(min(num_top, logits.shape[0]))
    return TokenLogprobs(
        logprob=float(own),
        rank=int((logprobs > own).sum()) + 1,
        top_token_ids=array("I", ids.tolist()),
        top_logprobs=tuple(top.tolist()),
    )


def inverse_temperature(temperature: float) -> float:
    """What differences of logits are multiplied with, in float32; 0: greedy."""
    return 0.0 if temperature < MIN_TEMPERATURE else 1.0 / min(temperature, MAX_TEMPERATURE)


def weigh(row: torch.Tensor, temperature: float) -> torch.Tensor:
    """Weights in float64, for a temperature that is not greedy. Written out, since every library's exponential has bits of its own."""
    x = ((row - row.max()) * inverse_temperature(temperature)).clamp(min=-87.0)
    n = (x * 1.44269504088896341 + 12582912.0) - 12582912.0  # 1.5 * 2^23: adding it rounds to an integer
    r = n * 2.12194440e-4 + (n * -0.693359375 + x)
    y = torch.full_like(r, _EXPONENTIAL[0])
    for coefficient in _EXPONENTIAL[1:]:
        y = y * r + coefficient
    y = y * (r * r) + (r + 1.0)
    power = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    magic = 1.5 * 2.0**52 * WEIGHT_UNIT
    return ((y * power).double() + magic) - magic


def _adjust(logits: torch.Tensor, draw: Draw) -> torch.Tensor:
    """logit_bias, min_tokens mask, penalties: a new row where any of them is asked for."""
    params = draw.params
    row = logits
    if params.logit_bias:
        ids, bias = zip(*params.logit_bias, strict=True)
        row = row.index_add(0, _ids(ids, row), torch.tensor(bias, dtype=row.dtype, device=row.device))
    if masked := draw.masked:
        row = row.index_fill(0, _ids(tuple(i for i in masked if i < len(row)), row), float("-inf"))
    if params.repetition_penalty != 1.0:
        seen = _ids(np.unique(_tokens(draw.token_ids)), row)
        hit = row[seen]
        row = row.index_copy(0, seen, torch.where(hit > 0, hit / params.repetition_penalty, hit * params.repetition_penalty))
    if (params.frequency_penalty or params.presence_penalty) and draw.position > 0:
        output, counts = np.unique(_tokens(draw.token_ids)[draw.num_prompt_tokens :], return_counts=True)
        penalty = params.frequency_penalty * counts + params.presence_penalty
        row = row.index_add(0, _ids(output, row), torch.from_numpy(-penalty).to(row))
    return row


def _kept(row: torch.Tensor, weights: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What top_k, top_p and min_p leave, as a mask. Of equal logits the one with the lower id counts as the likelier."""
    kept = torch.ones_like(row, dtype=torch.bool) if params.min_p <= 0.0 else weights >= params.min_p
    has_top_k = 0 < params.top_k < len(row)
    if has_top_k or params.top_p < 1.0:
        order = _most_likely(row, weights, params)
        if has_top_k:
            order = order[: params.top_k]
        in_order = weights[order]
        total = in_order.sum() if has_top_k else weights.sum()
        before = in_order.cumsum(0) - in_order
        chosen = order[before < params.top_p * total] if params.top_p < 1.0 else order
        if len(chosen) == 0:
            chosen = order[:1]  # top_p 0 keeps the most likely
        kept &= torch.zeros_like(kept).index_fill_(0, chosen, True)
    return kept


def _most_likely(row: torch.Tensor, weights: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Ids, most likely first: all that top_k and top_p can keep, and not many more."""
    if len(row) > 2 * NUM_CANDIDATES:
        limit = row.topk(NUM_CANDIDATES).values[-1]
        near = (row > limit).nonzero()[:, 0]  # without those equal to the last: they may be more than were taken
        is_enough = len(near) >= params.top_k if 0 < params.top_k < len(row) else weights[near].sum() >= params.top_p * weights.sum()
        if is_enough and len(near) > 0:
            return near[row[near].sort(descending=True, stable=True).indices]
    return row.sort(descending=True, stable=True).indices


def _invert(weights: torch.Tensor, number: float) -> int:
    """Index of the first entry at which the cumulative sum exceeds `number` of the total; never one of weight 0."""
    cumulative = weights.cumsum(0)
    index = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
    last = int(weights.nonzero()[-1])
    return min(index, last)


def _tokens(token_ids: array[int]) -> np.ndarray:
    return np.frombuffer(token_ids, dtype=np.uint32)


def _ids(ids: tuple[int, ...] | np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.asarray(ids, dtype=np.int64)).to(like.device)
