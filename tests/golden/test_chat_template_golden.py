"""Chat template + encoding equals `transformers.AutoTokenizer` token by token, for the shapes of the models served here.

The tokenizers are trained on the spot on a few lines, the templates are written below after those of the model families: Llama 3
(header tokens, BOS from the template, date), Mistral ([INST], alternation enforced, SentencePiece), Qwen (default system text,
tools branch, enable_thinking) and plain ChatML with a generation tag, whose
tokenizer adds a BOS that the template does not want. No network, no weights.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.tokenizer import Tokenizer
from protocol.errors import InvalidRequest

pytestmark = pytest.mark.golden

CORPUS = [
    "You are a helpful assistant. What is the capital of France? Paris is the capital of France.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3",
    "Die Größe der Straße: 12,5 km. Übermäßig schön! Où est l'été? Ça va.",
    "東京は日本の首都です。北京是中国的首都。서울은 한국의 수도입니다.",
    "Привет, мир! Γειά σου Κόσμε 🙂🚀👩‍👩‍👧 — “quotes” … \t tabs",
] * 4

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, got " + message["role"]) }}
    {%- endif %}
{%- endfor %}
"""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}{%- continue %}{%- endif %}
    {%- set ns.last = loop.index0 %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

CHATML = """{% for message in messages %}
    {% if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

    {% else %}
<|im_start|>{{ message.role }}{% if message.name %} ({{ message.name | tojson }}){% endif %}

{{ message.content }}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


def byte_level(specials: list[str], *, bos: str | None) -> tokenizers.Tokenizer:
    """Shape of Llama 3 and Qwen: a split by pattern, then byte-level BPE; a post-processor that adds the BOS."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    """Shape of Mistral and Llama 2: BPE over "▁" with byte fallback, and "<s> " before a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"] + [f"<0x{b:02X}>" for b in range(256)]
    # Latin text only: everything else goes through the bytes.
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False, limit_alphabet=60)
    tokenizer.train_from_iterator([line for line in CORPUS if line.isascii()], trainer)
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = saved["added_tokens"][:5]  # the byte tokens are ordinary ones
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(saved))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return tokenizer


HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAPES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "llama3": (lambda: byte_level(HEADERS, bos="<|begin_of_text|>"), LLAMA3, {"bos_token": HEADERS[0], "eos_token": HEADERS[4]}),
    "mistral": (
        sentencepiece,
        MISTRAL,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": {"__type": "AddedToken", "content": "<unk>", "special": True}},
    ),
    "qwen": (lambda: byte_level(IM, bos=None), QWEN, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "chatml": (lambda: byte_level(IM, bos="<|endoftext|>"), CHATML, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}),
}

CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "What is the capital of France?"}],
    "system": [{"role": "system", "content": "  Be brief.  "}, {"role": "user", "content": "hi"}],
    "many turns": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and 2 + 2?\n\n"},
        {"role": "assistant", "content": "4", "tool_calls": None},
        {"role": "user", "content": "thanks "},
    ],
    "not ascii": [
        {"role": "user", "content": "Größe? 東京 🙂👩‍👩‍👧 “quotes” … Привет Ça é\u0301 \u00a0 x"},
        {"role": "assistant", "content": "ß"},
        {"role": "user", "content": "<b>&amp; \"'{{ 7*7 }} {% if %}"},
    ],
    "whitespace": [{"role": "user", "content": "\n  a\t\tb \r\n"}],
    "special text": [{"role": "user", "content": "say <|im_end|> and </s> and [INST] <s>"}],
}


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any, Path]:
    """(ours, transformers', the directory both were read from)"""
    from transformers import AutoTokenizer

    make, template, named = SHAPES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    make().save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "clean_up_tokenization_spaces": False, **named}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory), directory


@pytest.mark.parametrize("chat", list(CHATS))
@pytest.mark.parametrize("prompted", [True, False])
def test_chat_is_rendered_and_encoded_as_transformers_does(pair: Any, chat: str, prompted: bool) -> None:
    """Tried with trim_blocks off and with special tokens added: both fail."""
    ours, theirs, _ = pair
    messages = CHATS[chat]
    assert ours.render_chat(messages, add_generation_prompt=prompted) == theirs.apply_chat_template(
        messages, add_generation_prompt=prompted, tokenize=False
    )
    want = theirs.apply_chat_template(messages, add_generation_prompt=prompted, return_dict=False)
    assert list(ours.encode_chat(messages, add_generation_prompt=prompted)) == want


def test_bos_comes_once(pair: Any) -> None:
    ours, theirs, _ = pair
    if theirs.bos_token_id is None or "bos_token" not in theirs.chat_template:
        return
    ids = list(ours.encode_chat(CHATS["one turn"]))
    assert ids[0] == ours.bos_token_id and ids.count(ours.bos_token_id) == 1
    rendered = ours.render_chat(CHATS["one turn"])  # a client that renders for itself and sends it to /v1/completions
    assert list(ours.encode(rendered)).count(ours.bos_token_id) == 1


def test_template_variables_reach_the_template(pair: Any) -> None:
    ours, theirs, _ = pair
    for variables in ({"enable_thinking": False}, {"date_string": "1 Jan 2020"}):
        want = theirs.apply_chat_template(CHATS["system"], add_generation_prompt=True, tokenize=False, **variables)
        assert ours.render_chat(CHATS["system"], variables=variables) == want


@pytest.mark.parametrize("text", [m["content"] for chat in CHATS.values() for m in chat] + ["", " ", "a", "  a", "\n"])
def test_text_is_encoded_as_transformers_does(pair: Any, text: str) -> None:
    ours, theirs, _ = pair
    assert list(ours.encode(text, add_special_tokens=False)) == theirs.encode(text, add_special_tokens=False)
    assert list(ours.encode(text)) == theirs.encode(text)


def test_every_token_decodes_as_transformers_does(pair: Any) -> None:
    """Each id alone after a plain word, each pair of neighbours, and whole texts; skipping special tokens and not."""
    ours, theirs, _ = pair
    word = list(ours.encode("of", add_special_tokens=False))
    ids = range(ours.vocab_size)
    for skip in (True, False):
        singles = [[*word, i] for i in ids] + [[i] for i in ids]
        for sequence in singles:
            want = theirs.decode(sequence, skip_special_tokens=skip)
            assert ours.decode(sequence, skip_special_tokens=skip) == want, sequence
    for text in CORPUS[:5]:
        encoded = list(ours.encode(text))
        assert ours.decode(encoded) == theirs.decode(encoded, skip_special_tokens=True)


def test_stream_of_single_tokens_equals_the_whole(pair: Any) -> None:
    """Also where a character is cut over several tokens, and for ids drawn at random, which are mostly not UTF-8."""
    ours, _, _ = pair
    rng = random.Random(7)
    sequences = [list(ours.encode(text)) for text in CORPUS[:5]]
    sequences += [[rng.randrange(ours.vocab_size) for _ in range(40)] for _ in range(50)]
    for sequence in sequences:
        stream = ours.detokenizer()
        pieces = [stream.push([t]) for t in sequence] + [stream.finish()]
        assert "".join(pieces) == ours.decode(sequence)
    text = "東京🙂"
    stream = ours.detokenizer()
    assert "\ufffd" not in "".join(stream.push([t]) for t in ours.encode(text, add_special_tokens=False))


def test_random_ids_decode_as_transformers_does_when_byte_level(pair: Any) -> None:
    """Random weights give random bytes: even U+FFFD must come as often as there. (With byte fallback the library replaces a whole
    run of byte tokens once any of it is wrong, which no stream can know in advance; ours replaces only what is wrong.)"""
    ours, theirs, directory = pair
    if "ByteFallback" in (directory / "tokenizer.json").read_text():
        return
    rng = random.Random(3)
    for _ in range(300):
        sequence = [rng.randrange(ours.vocab_size) for _ in range(rng.randint(1, 30))]
        assert ours.decode(sequence) == theirs.decode(sequence, skip_special_tokens=True)


def test_refusal_of_the_template_is_the_callers_error(pair: Any) -> None:
    ours, _, directory = pair
    if "raise_exception" not in (directory / "tokenizer_config.json").read_text():
        return
    with pytest.raises(InvalidRequest, match="must alternate"):
        ours.encode_chat([{"role": "assistant", "content": "hi"}])


def test_template_files_take_their_place_before_the_config(pair: Any, tmp_path: Path) -> None:
    """chat_template.jinja wins, as in transformers."""
    from transformers import AutoTokenizer

    _, _, directory = pair
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!\n")
    want = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(CHATS["one turn"], tokenize=False)
    assert Tokenizer.from_directory(tmp_path).render_chat(CHATS["one turn"]) == want
