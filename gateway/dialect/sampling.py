"""The fields both endpoints share, and how they become SamplingParams.

A field the user left out takes its value from the model's generation_config.json, as in vLLM, and only then OpenAI's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from gateway.config import GatewayConfig
from gateway.dialect.parse import Body, shown
from protocol.errors import InvalidRequest
from protocol.request import SamplingParams

LEAST_TOP_P = 1e-6  # top_p 0 means the most likely token alone, as OpenAI has it


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis: advisory


class SharedFields(Body):
    """Fields of /v1/chat/completions and /v1/completions alike; ranges are OpenAI's, or vLLM's where the field is vLLM's."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = None
    prompt_cache_key: str | None = None  # names the conversation, for placement
    user: str | None = None  # likewise, where prompt_cache_key is left out
    # vLLM's extensions
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**32)]] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a model's generation_config.json says; None: nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    @classmethod
    def of(cls, generation_config: Mapping[str, object]) -> SamplingDefaults:
        def number(name: str) -> float | None:
            value = generation_config.get(name)
            return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

        top_k, max_tokens = number("top_k"), number("max_new_tokens")
        return cls(
            temperature=number("temperature"),
            top_p=number("top_p"),
            top_k=None if top_k is None else int(top_k),
            min_p=number("min_p"),
            repetition_penalty=number("repetition_penalty"),
            max_tokens=None if max_tokens is None else int(max_tokens),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """Of the model as it is served now."""

    max_model_len: int  # tokens of prompt + output
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    defaults: SamplingDefaults


def check_limits(body: SharedFields, config: GatewayConfig, vocab_size: int) -> None:
    """
    Raises:
        InvalidRequest: the body asks for more than this gateway gives; names value and limit.
    """
    _at_most("n", body.n or 1, config.max_n)
    _at_most("stop", len(body.stop_strings), config.max_stop, "strings")
    _at_most("stop_token_ids", len(body.stop_token_ids or ()), config.max_stop_token_ids, "ids")
    _at_most("logit_bias", len(body.logit_bias or ()), config.max_logit_bias, "entries")
    _logit_bias(body, vocab_size)
    if "" in body.stop_strings:
        raise _wrong("stop", "stop has an empty string, which would stop every answer at once; leave it out")
    longest = max((len(stop.encode()) for stop in body.stop_strings), default=0)
    if longest > config.max_stop_bytes:
        raise _wrong("stop", f"a stop string has {longest} bytes; the limit is {config.max_stop_bytes}")
    if body.cache_salt is not None and not 1 <= len(body.cache_salt.encode()) <= config.max_cache_salt_bytes:
        size = len(body.cache_salt.encode())
        raise _wrong("cache_salt", f"cache_salt has {size} bytes; it should have 1 to {config.max_cache_salt_bytes}")
    if body.stream_options is not None and not body.stream:
        raise _wrong("stream_options", "stream_options is only allowed with stream: true")
    if body.stream_options is not None and body.stream_options.model_extra:
        name = next(iter(body.stream_options.model_extra))
        raise InvalidRequest(f"stream_options.{name[:64]} is not implemented", param="stream_options", code="unsupported_parameter")


def check_num_logprobs(count: int | None, config: GatewayConfig, param: str) -> None:
    """
    Raises:
        InvalidRequest: more of the most likely tokens than the limit.
    """
    _at_most(param, count or 0, config.max_logprobs)


def sampling_params(
    body: SharedFields,
    model: ModelLimits,
    *,
    num_prompt_tokens: int,
    max_tokens: int | None,
    default_max_tokens: int | None,
    num_logprobs: int | None,
    drawn_seed: int,
) -> SamplingParams:
    """Of one prompt. `max_tokens`: what the user said; `default_max_tokens`: the endpoint's, None for all that is left.

    Raises:
        InvalidRequest: the prompt, or prompt and max_tokens together, exceed the model's length.
    """
    left = model.max_model_len - num_prompt_tokens
    if left < 1:
        raise InvalidRequest(
            f"the prompt has {num_prompt_tokens:,} tokens; with at least one token of output it exceeds this model's "
            f"maximum length of {model.max_model_len:,} tokens; shorten it",
            param="messages" if "messages" in type(body).model_fields else "prompt",
            code="context_length_exceeded",
        )
    if max_tokens is not None and max_tokens > left:
        raise InvalidRequest(
            f"the prompt has {num_prompt_tokens:,} tokens and max_tokens is {max_tokens:,}, together more than this model's "
            f"maximum length of {model.max_model_len:,} tokens; ask for {left:,} at most",
            param="max_tokens",
            code="context_length_exceeded",
        )
    d = model.defaults
    most = max_tokens if max_tokens is not None else min(left, default_max_tokens or d.max_tokens or left)
    min_tokens = body.min_tokens or 0
    if min_tokens > most:
        raise _wrong("min_tokens", f"min_tokens is {min_tokens}; it should be at most max_tokens, {most}")
    return SamplingParams(
        max_tokens=most,
        temperature=_first(body.temperature, d.temperature, 1.0),
        top_p=max(_first(body.top_p, d.top_p, 1.0), LEAST_TOP_P),
        top_k=max(int(_first(body.top_k, d.top_k, 0)), 0),
        min_p=_first(body.min_p, d.min_p, 0.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_first(body.repetition_penalty, d.repetition_penalty, 1.0),
        min_tokens=min_tokens,
        seed=(body.seed if body.seed is not None else drawn_seed) % 2**64,
        n=body.n or 1,
        num_logprobs=num_logprobs,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids or ())),
        eos_token_ids=model.eos_token_ids,
        logit_bias=_logit_bias(body, model.vocab_size),
    )


def _first(*values: float | None) -> float:
    return next(v for v in values if v is not None)


def _logit_bias(body: SharedFields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, bias in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            raise _wrong("logit_bias", f"logit_bias has the key {shown(key)}; keys are token ids below {vocab_size}, as strings")
        pairs.append((int(key), bias))
    return tuple(sorted(pairs))


def _at_most(param: str, value: int, limit: int, of: str = "") -> None:
    if value > limit:
        raise _wrong(param, f"{param} {'has' if of else 'is'} {value}{of and ' '}{of}; the limit is {limit}")


def _wrong(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
