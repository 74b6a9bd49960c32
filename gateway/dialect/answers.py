"""Answers in OpenAI's shapes: whole objects, and the chunks of a stream as ready JSON text.

A stream is role chunk, content chunks, a closing chunk with the finish reason, and with include_usage one chunk of usage:

    chat         delta {role, content ""} → delta {content} … → delta {} + finish_reason → choices [] + usage
    completions  text … → text "" + finish_reason → choices [] + usage
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.logprobs import TokenBytes, chat_logprobs, completion_logprobs
from gateway.text import TextDelta
from protocol.messages import TokenLogprobs
from protocol.request import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerShape:
    """What all chunks of one answer have in common."""

    answer_id: str  # "chatcmpl-..." or "cmpl-..."
    chat: bool
    model: str
    created: int  # Unix seconds
    system_fingerprint: str
    include_usage: bool
    num_logprobs: int | None
    return_token_ids: bool
    token_bytes: TokenBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int

    def to_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


@dataclass(slots=True, kw_only=True)
class ChoiceAnswer:
    """What one choice has said so far: the text of a whole answer, or the offset of a stream's logprobs."""

    texts: list[str] = field(default_factory=list)
    token_ids: array[int] = field(default_factory=lambda: array("I"))
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: TextDelta) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason


class ChunkWriter:
    """JSON text of the chunks of one streamed answer."""

    def __init__(self, shape: AnswerShape) -> None:
        self._shape = shape
        kind = "chat.completion.chunk" if shape.chat else "text_completion"
        head = {
            "id": shape.answer_id,
            "object": kind,
            "created": shape.created,
            "model": shape.model,
            "system_fingerprint": shape.system_fingerprint,
        }
        self._head = _dumps(head)[:-1] + ',"choices":['
        self._tail = '],"usage":null}' if shape.include_usage else "]}"
        self._text_offsets: dict[int, int] = {}

    def role(self, index: int) -> str:
        return self._chunk(index, '"delta":{"role":"assistant","content":""}', "null", None, "")

    def delta(self, index: int, delta: TextDelta) -> list[str]:
        """Chunks for one delivery: none when it shows nothing yet."""
        shape = self._shape
        chunks = []
        wants_logprobs = shape.num_logprobs is not None and delta.num_tokens > 0
        wants_ids = shape.return_token_ids and delta.num_tokens > 0
        if delta.text or wants_logprobs or wants_ids:
            logprobs = _dumps(self._logprobs(index, delta)) if wants_logprobs else "null"
            ids = f',"token_ids":{list(delta.token_ids)}' if wants_ids else ""
            text = _dumps(delta.text)
            body = f'"delta":{{"content":{text}}}' if shape.chat else f'"text":{text}'
            chunks.append(self._chunk(index, body, logprobs, None, ids))
        if delta.finish_reason is not None:
            body = '"delta":{}' if shape.chat else '"text":""'
            chunks.append(self._chunk(index, body, "null", delta.finish_reason, ""))
        return chunks

    def usage(self, usage: Usage) -> str:
        return f'{self._head}],"usage":{_dumps(usage.to_json())}}}'

    def _chunk(self, index: int, body: str, logprobs: str, finish: FinishReason | None, extra: str) -> str:
        reason = "null" if finish is None else f'"{finish.value}"'
        return f'{self._head}{{"index":{index},{body},"logprobs":{logprobs},"finish_reason":{reason}{extra}}}{self._tail}'

    def _logprobs(self, index: int, delta: TextDelta) -> object:
        shape = self._shape
        assert shape.num_logprobs is not None
        if shape.chat:
            content = chat_logprobs(delta.token_ids, delta.logprobs, shape.num_logprobs, shape.token_bytes)
            return {"content": content, "refusal": None}
        offset = self._text_offsets.get(index, 0)
        columns = completion_logprobs(delta.token_ids, delta.logprobs, shape.num_logprobs, shape.token_bytes, text_offset=offset)
        self._text_offsets[index] = offset + sum(len(token) for token in columns["tokens"])
        return columns


def whole_answer(shape: AnswerShape, choices: Sequence[ChoiceAnswer], usage: Usage, prompts: Sequence[array[int]]) -> dict[str, object]:
    """The object of an answer that was not streamed. `prompts`: token ids of each prompt, for return_token_ids."""
    answer: dict[str, object] = {
        "id": shape.answer_id,
        "object": "chat.completion" if shape.chat else "text_completion",
        "created": shape.created,
        "model": shape.model,
        "system_fingerprint": shape.system_fingerprint,
        "choices": [_whole_choice(shape, i, choice) for i, choice in enumerate(choices)],
        "usage": usage.to_json(),
    }
    if shape.return_token_ids:
        answer["prompt_token_ids"] = list(prompts[0]) if shape.chat else [list(p) for p in prompts]
    return answer


def _whole_choice(shape: AnswerShape, index: int, choice: ChoiceAnswer) -> dict[str, object]:
    text = "".join(choice.texts)
    logprobs: object = None
    if shape.num_logprobs is not None:
        if shape.chat:
            content = chat_logprobs(choice.token_ids, choice.logprobs, shape.num_logprobs, shape.token_bytes)
            logprobs = {"content": content, "refusal": None}
        else:
            logprobs = completion_logprobs(choice.token_ids, choice.logprobs, shape.num_logprobs, shape.token_bytes, text_offset=0)
    assert choice.finish_reason is not None
    body: dict[str, object] = {"index": index}
    if shape.chat:
        body["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        body["text"] = text
    body |= {"logprobs": logprobs, "finish_reason": choice.finish_reason.value}
    if shape.return_token_ids:
        body["token_ids"] = list(choice.token_ids)
    return body


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
