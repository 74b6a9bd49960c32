"""Tokens to text: stop strings over token boundaries, text held back no longer than needed, ends that are not shown."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.tokenizer import Detokenizer
from gateway.logprobs import LEAST_LOGPROB, chat_logprobs, completion_logprobs
from gateway.text import ChoiceText, longest_beginning
from protocol.messages import TokenLogprobs
from protocol.request import FinishReason

pytestmark = pytest.mark.pure

EOS = 1000


def token_bytes(token: int) -> bytes:
    return bytes([token]) if token < 256 else b"</s>"


def choice(*stop: str, min_tokens: int = 0, include_stop: bool = False) -> ChoiceText:
    """One byte a token; EOS is special."""
    detokenizer = Detokenizer(token_bytes, skipped=frozenset({EOS}), strip_first_space=False)
    return ChoiceText(detokenizer, stop=stop, hide_last=frozenset({EOS, ord("!")}), min_tokens=min_tokens, include_stop=include_stop)


def push(text: ChoiceText, tokens: str | bytes, reason: FinishReason | None = None) -> str:
    raw = tokens.encode() if isinstance(tokens, str) else tokens
    return text.push(array("I", list(raw)), (), reason).text


def test_only_what_could_begin_a_stop_string_is_held() -> None:
    """Seen to fail when everything shorter than the longest stop string is held."""
    text = choice("abcd", "xy")
    assert [push(text, t) for t in ("1", "a", "b", "2", "x", "a", "b", "c")] == ["1", "", "", "ab2", "", "x", "", ""]
    assert push(text, "", FinishReason.LENGTH) == "abc"


def test_stop_inside_a_run_cuts_text_tokens_and_logprobs() -> None:
    entry = TokenLogprobs(logprob=-1.0, rank=1, top_token_ids=array("I"), top_logprobs=())
    delta = choice("lo").push(array("I", list(b"hello there")), (entry,) * 11, None)
    assert (delta.text, delta.num_tokens, len(delta.logprobs), delta.finish_reason, delta.stopped) == ("hel", 5, 5, FinishReason.STOP, True)


def test_stop_string_that_begins_first_wins() -> None:
    text = choice("cd", "bcd")
    assert push(text, "abc") == "a"
    assert text.push(array("I", list(b"d")), (), None).text == ""


def test_stop_string_with_the_last_token_is_a_stop_not_a_length() -> None:
    assert choice("b").push(array("I", list(b"ab")), (), FinishReason.LENGTH).finish_reason is FinishReason.STOP


def test_include_stop_keeps_it() -> None:
    assert choice("lo", include_stop=True).push(array("I", list(b"hello")), (), None).text == "hello"


def test_min_tokens_come_before_any_stop_string() -> None:
    """Text within the first min_tokens tokens is not searched, nor does it count as a beginning."""
    text = choice("ab", min_tokens=3)
    assert push(text, "aba") == "aba"
    assert push(text, "b") == "b"
    assert text.push(array("I", list(b"xab")), (), None).text == "x"


def test_eos_and_stop_token_end_without_being_shown() -> None:
    assert choice().push(array("I", [*b"hi", EOS]), (), FinishReason.STOP).text == "hi"
    assert choice().push(array("I", list(b"hi!")), (), FinishReason.STOP).text == "hi"
    assert choice().push(array("I", list(b"hi!")), (), FinishReason.LENGTH).text == "hi!"


def test_character_cut_short_by_the_end_becomes_one_replacement() -> None:
    text = choice()
    assert push(text, "é".encode()[:1]) == "" and push(text, b"", FinishReason.LENGTH) == "\ufffd"


@given(text=st.text("ab!", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), data=st.data())
def test_any_cut_into_runs_shows_the_same(text: str, stops: list[str], data: st.DataObject) -> None:
    """However tokens are grouped into deliveries: the text before the stop string that completes first, and never more on the way."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    first_end = min(ends)[0] if ends else None
    want = text if first_end is None else text[: min(text.find(s) for s in stops if 0 <= text.find(s) <= first_end - len(s))]
    machine, shown, at = choice(*stops), "", 0
    while at < len(text):
        size = data.draw(st.integers(1, 5))
        run = text[at : at + size]
        at += size
        delta = machine.push(array("I", list(run.encode())), (), FinishReason.LENGTH if at >= len(text) else None)
        shown += delta.text
        assert want.startswith(shown)
        if delta.stopped:
            break
    assert shown == want


def test_longest_beginning() -> None:
    assert longest_beginning("xxab", ["abc"]) == 2
    assert longest_beginning("abab", ["ababc"]) == 4
    assert longest_beginning("abc", ["abc"]) == 0
    assert longest_beginning("", ["abc"]) == 0


def test_logprobs_that_json_cannot_say_are_clamped_and_part_characters_keep_apart() -> None:
    entry = TokenLogprobs(logprob=float("-inf"), rank=9, top_token_ids=array("I", [0xE2, 0xE3]), top_logprobs=(-0.1, -0.2))
    (chat,) = chat_logprobs(array("I", [0xC3]), [entry], 2, token_bytes)
    assert chat["logprob"] == LEAST_LOGPROB and chat["bytes"] == [0xC3] and [t["bytes"] for t in chat["top_logprobs"]] == [[0xE2], [0xE3]]
    columns = completion_logprobs(array("I", [0xC3]), [entry], 2, token_bytes, text_offset=7)
    assert columns["top_logprobs"] == [{"bytes:\\xe2": -0.1, "bytes:\\xe3": -0.2, "bytes:\\xc3": LEAST_LOGPROB}]
    assert columns["text_offset"] == [7]
