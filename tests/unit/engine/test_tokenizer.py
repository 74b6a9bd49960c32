"""Tokenizer and chat template on small tokenizers built here: what is refused and how, streams of bytes, special tokens.

Equality with transformers is in tests/golden/test_chat_template_golden.py.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from engine.chat_template import ChatTemplate
from engine.tokenizer import Detokenizer, Tokenizer
from protocol.errors import InvalidRequest, ModelError, UnsupportedModel

pytestmark = pytest.mark.pure

SPECIALS = ["<s>", "</s>"]
HI = [{"role": "user", "content": "hi"}]


def library() -> tokenizers.Tokenizer:
    """Two special tokens, then one token a byte."""
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={}, merges=[]))
    tokenizer.add_special_tokens(SPECIALS)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.model = models.BPE(vocab={name: i for i, name in enumerate(SPECIALS + alphabet)}, merges=[])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write(directory: Path, made: tokenizers.Tokenizer | None = None, **config: Any) -> Path:
    (made or library()).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}} | config))
    return directory


def test_special_tokens_are_known_by_name_and_skipped(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.special_token_ids) == (0, 1, frozenset({0, 1}))
    ids = [0, *tokenizer.encode("a ü"), 1]
    assert tokenizer.decode(ids) == "a ü" and tokenizer.decode(ids, skip_special_tokens=False) == "<s>a ü</s>"
    assert tokenizer.token_bytes(0) == b"<s>" and tokenizer.token_bytes(10_000) == b""


def test_model_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match=r"no chat template.*use /v1/completions") as caught:
        tokenizer.encode_chat(HI)
    assert caught.value.code == "no_chat_template"


def test_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing.*save_pretrained"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as a tokenizer"):
        Tokenizer.from_directory(tmp_path)
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds a list"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Sequence([decoders.ByteLevel(), decoders.CTC()])])
def test_decoder_of_another_family_is_refused_by_name(tmp_path: Path, decoder: Any) -> None:
    made = library()
    if decoder is None:
        raw = json.loads(made.to_str()) | {"decoder": None}
        made = tokenizers.Tokenizer.from_str(json.dumps(raw))
    else:
        made.decoder = decoder
    with pytest.raises(UnsupportedModel, match="byte-level and metaspace"):
        Tokenizer.from_directory(write(tmp_path, made))


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    """Many checkpoints carry the settings of their training. Seen to fail without no_truncation."""
    made = library()
    made.enable_truncation(4)
    made.enable_padding(length=9)
    assert len(Tokenizer.from_directory(write(tmp_path, made)).encode("abcdefgh")) == 8


def test_template_by_name_takes_the_default(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}{{ eos_token }}"}]
    assert Tokenizer.from_directory(write(tmp_path, chat_template=templates)).render_chat(HI) == "hi</s>"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert Tokenizer.from_directory(tmp_path).render_chat(HI) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.from_directory(tmp_path).render_chat(HI) == "jinja"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ (1).__init__.__globals__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ raise_exception('only pairs') }}",
        "{{ messages[0].nothing.deeper }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_template_that_misbehaves_is_one_refused_request(source: str) -> None:
    """The sandbox holds, and whatever a template stumbles over is a 400, not a 500."""
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        ChatTemplate(source, special_tokens={}).render(HI)


def test_broken_template_is_the_models_error() -> None:
    with pytest.raises(ModelError, match="line 2"):
        ChatTemplate("a\n{% if %}", special_tokens={})


def test_clock_and_variables_and_none() -> None:
    template = ChatTemplate(
        "{{ strftime_now('%d %b') }}|{{ flag }}|{{ messages|length }}|{{ 'name' in messages[0] }}|{{ bos_token }}",
        special_tokens={"bos_token": "<s>"},
        clock=lambda: datetime(2026, 2, 3),
    )
    messages = [{"role": "user", "content": "hi", "name": None}]
    assert template.render(messages, variables={"flag": "on", "messages": "mine", "bos_token": "x"}) == "03 Feb|on|1|False|<s>"


@given(text=st.text(max_size=20), data=st.data())
def test_characters_come_out_when_their_last_byte_is_there(text: str, data: st.DataObject) -> None:
    """One byte a token: after each token the text is exactly the complete characters so far."""
    raw = text.encode()
    stream = Detokenizer(lambda t: bytes([t]), skipped=frozenset(), strip_first_space=False)
    shown = ""
    for i, byte in enumerate(raw):
        shown += stream.push([byte])
        assert shown == raw[: i + 1].decode("utf-8", "ignore")
    assert shown + stream.finish() == text


def test_first_space_is_dropped_once_and_kept_after_a_prompt() -> None:
    for strip, want in ((True, "a b"), (False, " a b")):
        stream = Detokenizer(lambda t: [b"", b" a", b" b"][t], skipped=frozenset({9}), strip_first_space=strip)
        assert stream.push([9]) + stream.push([0]) + stream.push([1]) + stream.push([2]) == want
