"""The two bodies: /v1/chat/completions and /v1/completions, and the two of /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from engine.chat_template import JsonValue
from gateway.config import GatewayConfig
from gateway.dialect.parse import Body, shown
from gateway.dialect.sampling import SharedFields, check_num_logprobs
from protocol.errors import InvalidRequest

ROLES = ("system", "developer", "user", "assistant")
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions


class ContentPart(Body):
    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(Body):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None


class ChatBody(SharedFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None

    @property
    def most_tokens(self) -> int | None:
        """max_completion_tokens, or max_tokens by its older name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def num_logprobs(self, config: GatewayConfig) -> int | None:
        check_num_logprobs(self.top_logprobs, config, "top_logprobs")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                f"top_logprobs is {self.top_logprobs}; it needs logprobs: true", param="top_logprobs", code="invalid_value"
            )
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(SharedFields):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0)] | None = None

    def num_logprobs(self, config: GatewayConfig) -> int | None:
        check_num_logprobs(self.logprobs, config, "logprobs")
        return self.logprobs

    def prompts(self, config: GatewayConfig, vocab_size: int) -> list[str | list[int]]:
        """One entry a prompt, text or token ids.

        Raises:
            InvalidRequest: no prompt, an empty one, too many, or an id outside the vocabulary.
        """
        raw = self.prompt
        prompts: list[str | list[int]]
        if isinstance(raw, str):
            prompts = [raw]
        elif raw and isinstance(raw[0], int):
            prompts = [[t for t in raw if isinstance(t, int)]]
        else:
            prompts = [p for p in raw if not isinstance(p, int)]
        if not prompts:
            raise InvalidRequest("prompt is an empty list; it should have at least one prompt", param="prompt", code="invalid_value")
        if len(prompts) > config.max_prompts:
            raise InvalidRequest(
                f"prompt has {len(prompts)} prompts; the limit is {config.max_prompts}", param="prompt", code="invalid_value"
            )
        for prompt in prompts:
            if isinstance(prompt, list):
                check_token_ids(prompt, vocab_size, "prompt")
        return prompts


class TokenizeBody(Body):
    """A prompt, or messages put through the chat template. Fields as in vLLM."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[int]


def template_messages(messages: Sequence[ChatMessage], config: GatewayConfig) -> list[dict[str, JsonValue]]:
    """Messages as chat templates read them: content is one string, `developer` is `system`.

    Raises:
        InvalidRequest: too many, an unknown role, or content that is not text.
    """
    if len(messages) > config.max_messages:
        raise InvalidRequest(
            f"messages has {len(messages)} entries; the limit is {config.max_messages}", param="messages", code="invalid_value"
        )
    return [_template_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def check_token_ids(token_ids: list[int], vocab_size: int, param: str) -> None:
    """
    Raises:
        InvalidRequest: an id outside the vocabulary; names it and the limit.
    """
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(t for t in token_ids if not 0 <= t < vocab_size)
        raise InvalidRequest(f"{param} has the token id {wrong}; ids go from 0 to {vocab_size - 1}", param=param, code="invalid_value")


def _template_message(message: ChatMessage, place: str) -> dict[str, JsonValue]:
    if message.role in ("tool", "function"):
        raise InvalidRequest(
            f"{place}.role is {message.role!r}: tools are not implemented; roles are {', '.join(ROLES)}",
            param=f"{place}.role",
            code="unsupported_parameter",
        )
    if message.role not in ROLES:
        raise InvalidRequest(
            f"{place}.role is {shown(message.role)}; it should be one of {', '.join(ROLES)}", param=f"{place}.role", code="invalid_value"
        )
    for name, value in (message.model_extra or {}).items():
        if value not in (None, [], {}, "") and name not in ("annotations",):
            raise InvalidRequest(f"{place}.{name[:64]} is not implemented", param=f"{place}.{name[:64]}", code="unsupported_parameter")
    if message.content is None:
        raise InvalidRequest(f"{place}.content is required", param=f"{place}.content", code="missing_required_parameter")
    given: dict[str, JsonValue] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(message.content, f"{place}.content"),
    }
    if message.name is not None:
        given["name"] = message.name
    if message.reasoning_content is not None:
        given["reasoning_content"] = message.reasoning_content
    return given


def _text(content: str | list[ContentPart], place: str) -> str:
    """The parts' text, a line break between two, as in vLLM."""
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        if part.type not in ("text", "refusal"):
            raise InvalidRequest(
                f"{place}[{i}].type is {shown(part.type)}; this model reads text parts only",
                param=f"{place}[{i}].type",
                code="unsupported_parameter",
            )
        text = part.text if part.type == "text" else part.refusal
        if text is None:
            param = f"{place}[{i}].{part.type}"
            raise InvalidRequest(f"{param} is required", param=param, code="missing_required_parameter")
        texts.append(text)
    return "\n".join(texts)
