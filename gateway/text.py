"""Tokens of one choice -> the text its user sees: characters whole, stop strings cut, nothing shown that may be taken back.

Text that could be the beginning of a stop string is held until it is clear:

    stop "\\n\\nUser:"      tokens  "Yes." "\\n" "\\nUs" "er:"
                          shown   "Yes." ""   ""     ""      finish: stop

Usage counts the tokens delivered up to the one that completed the stop string, shown or not.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from engine.tokenizer import Detokenizer
from protocol.messages import TokenLogprobs
from protocol.request import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """What one delivery adds to a choice. `num_tokens` of the delivery count; fewer than given: a stop string cut it."""

    text: str
    token_ids: array[int]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stopped: bool  # a stop string ended the choice here

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class ChoiceText:
    """One choice's decoder and stop search.

    hide_last: ids that end a choice without being shown (EOS and stop tokens), when the worker says STOP with them.
    min_tokens: stop strings are looked for after this many tokens only.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stop: tuple[str, ...],
        hide_last: frozenset[int],
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        assert all(stop), "an empty stop string would stop everything"
        self._detokenizer = detokenizer
        self._stop = stop
        self._hide_last = hide_last
        self._unsearched_tokens = min_tokens
        self._include_stop = include_stop
        self._held = ""

    def push(self, token_ids: array[int], logprobs: tuple[TokenLogprobs, ...], finish_reason: FinishReason | None) -> TextDelta:
        """The visible part of the next tokens; with a finish reason, or once a stop string is complete, the last part."""
        shown = token_ids
        if finish_reason is FinishReason.STOP and not self._include_stop and len(shown) and shown[-1] in self._hide_last:
            shown = shown[:-1]
        if not self._stop:
            text = self._detokenizer.push(shown)
            if finish_reason is not None:
                text += self._detokenizer.finish()
            return TextDelta(text=text, token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason, stopped=False)
        free = min(self._unsearched_tokens, len(shown))
        self._unsearched_tokens -= free
        given, text = self._detokenizer.push(shown[:free]), self._held
        for count, token in enumerate(shown[free:], start=free + 1):
            text += self._detokenizer.push((token,))
            end = self._find_stop(text)
            if end is not None:
                return TextDelta(
                    text=given + text[:end],
                    token_ids=token_ids[:count],
                    logprobs=logprobs[:count],
                    finish_reason=FinishReason.STOP,
                    stopped=True,
                )
        if finish_reason is not None:
            text += self._detokenizer.finish()
            self._held = ""
        else:
            keep = longest_beginning(text, self._stop)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return TextDelta(text=given + text, token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason, stopped=False)

    def _find_stop(self, text: str) -> int | None:
        """Where to cut: at the stop string that begins first."""
        starts = [(start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if not starts:
            return None
        start, stop = min(starts)
        return start + len(stop) if self._include_stop else start


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Number of characters at the end of `text` that are a proper beginning of one of `stops`."""
    limit = min(len(text), max(len(stop) for stop in stops) - 1)
    for length in range(limit, 0, -1):
        tail = text[-length:]
        if any(len(stop) > length and stop.startswith(tail) for stop in stops):
            return length
    return 0
