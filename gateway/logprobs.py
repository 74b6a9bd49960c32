"""TokenLogprobs -> OpenAI's two shapes: one for chat, an older one for completions."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TypedDict

from protocol.messages import TokenLogprobs

LEAST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI and vLLM write this

TokenBytes = Callable[[int], bytes]


class ChatTopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class CompletionLogprobs(TypedDict):
    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]] | None


def chat_logprobs(token_ids: array[int], logprobs: Sequence[TokenLogprobs], num_top: int, token_bytes: TokenBytes) -> list[ChatLogprob]:
    """One entry a token, each with its `num_top` most likely."""
    return [
        {
            **_chat_entry(token_bytes(token), entry.logprob),
            "top_logprobs": [
                _chat_entry(token_bytes(t), p) for t, p in zip(entry.top_token_ids[:num_top], entry.top_logprobs[:num_top], strict=True)
            ],
        }
        for token, entry in zip(token_ids, logprobs, strict=True)
    ]


def completion_logprobs(
    token_ids: array[int], logprobs: Sequence[TokenLogprobs], num_top: int, token_bytes: TokenBytes, *, text_offset: int
) -> CompletionLogprobs:
    """Columns. `text_offset` is where the first token's text begins; the sampled token is in `top_logprobs` always."""
    tokens = [_name(token_bytes(t)) for t in token_ids]
    offsets = []
    for name in tokens:
        offsets.append(text_offset)
        text_offset += len(name)
    top: list[dict[str, float]] = []
    for name, entry in zip(tokens, logprobs, strict=True):
        pairs = zip(entry.top_token_ids[:num_top], entry.top_logprobs[:num_top], strict=True)
        best = {_name(token_bytes(t)): max(p, LEAST_LOGPROB) for t, p in pairs}
        best.setdefault(name, max(entry.logprob, LEAST_LOGPROB))
        top.append(best)
    return {
        "text_offset": offsets,
        "token_logprobs": [max(entry.logprob, LEAST_LOGPROB) for entry in logprobs],
        "tokens": tokens,
        "top_logprobs": top if num_top else None,
    }


def _chat_entry(raw: bytes, logprob: float) -> ChatTopLogprob:
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(raw)}


def _name(raw: bytes) -> str:
    """Text of a token as a key; `bytes:\\xe2\\x82` where it is only a part of a character, so that two parts never collide."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)
