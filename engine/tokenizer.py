"""Text <-> token ids of one model, from the files in its directory; no transformers, no torch.

Encoding is the `tokenizers` library on tokenizer.json. Decoding is our own, over bytes: each token stands for a few bytes, so a
stream of tokens is a stream of bytes read as UTF-8, a character split over tokens comes out when its last byte is there, and
logprobs can name the exact bytes of a token. Two families cover the models served here:

    byte level   every character of a token's name stands for one byte    GPT-2, Llama 3, Qwen, Mistral Nemo
    metaspace    "▁" is a space, "<0xE2>" one byte, the first space of a text is dropped    Llama 2, Mistral, Gemma
"""

from __future__ import annotations

import codecs
import hashlib
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers

from engine.chat_template import ChatTemplate, JsonValue, Message, load_chat_template
from protocol.errors import InvalidRequest, ModelError, UnsupportedModel
from protocol.request import token_buffer

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_SPLIT_CHARACTER_BYTES = 3  # what a decoder may hold back: the first bytes of a four-byte character


class Tokenizer:
    """Everything the gateway asks of a model's vocabulary. Immutable; `encode` may run in any thread."""

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        special_token_ids: frozenset[int],
        chat_template: str | None,
        revision: str,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        library.no_truncation()
        library.no_padding()
        self._library = library
        self._family = _decoder_family(library)
        self._bytes: dict[int, bytes] = {}  # by token id; bounded by the vocabulary
        self.special_token_ids = special_token_ids
        self.revision = revision  # hex digest of tokenizer.json, part of the prefix hash root
        self.vocab_size: int = library.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._id_of(special_tokens.get("bos_token"))
        self.eos_token_id = self._id_of(special_tokens.get("eos_token"))
        self._template = None if chat_template is None else ChatTemplate(chat_template, special_tokens=special_tokens, clock=clock)

    @classmethod
    def from_directory(cls, directory: Path, *, clock: Callable[[], datetime] = datetime.now) -> Tokenizer:
        """The tokenizer of a Hugging Face model directory.

        Raises:
            ModelError: tokenizer.json is missing or unreadable; UnsupportedModel: its decoder is of neither family.
        """
        path = directory / "tokenizer.json"
        try:
            raw = path.read_bytes()
            library = tokenizers.Tokenizer.from_buffer(raw)
        except FileNotFoundError:
            raise ModelError(f"{path} is missing; only fast tokenizers are read: save it with AutoTokenizer.save_pretrained") from None
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path} cannot be read as a tokenizer: {error}") from None
        config = _read_json(directory / "tokenizer_config.json")
        named = _special_tokens(config) or _special_tokens(_read_json(directory / "special_tokens_map.json"))
        return cls(
            library,
            special_tokens=named,
            special_token_ids=_special_ids(library, config, named),
            chat_template=load_chat_template(directory, config),
            revision=hashlib.blake2b(raw, digest_size=16).hexdigest(),
            clock=clock,
        )

    # --- text to tokens ---

    def encode(self, text: str, *, add_special_tokens: bool = True) -> array[int]:
        """Token ids, with the BOS (or whatever the tokenizer's post-processor adds) once, even when `text` brings its own."""
        ids = self._library.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self.bos_token_id is not None and ids[:2] == [self.bos_token_id] * 2:
            ids = ids[1:]
        return token_buffer(ids)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, variables: Mapping[str, JsonValue] | None = None
    ) -> str:
        """The prompt text of a conversation.

        Raises:
            InvalidRequest: the model has no chat template, or its template refuses these messages.
        """
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template (no chat_template.jinja, nor chat_template in tokenizer_config.json); "
                "use /v1/completions, or put a template into the model's directory",
                param="messages",
                code="no_chat_template",
            )
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, variables=variables)

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, variables: Mapping[str, JsonValue] | None = None
    ) -> array[int]:
        """Token ids of a conversation; the template writes the BOS, so none is added."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, variables=variables)
        return self.encode(text, add_special_tokens=False)

    # --- tokens to text ---

    def decode(self, token_ids: Sequence[int] | array[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; bytes that are not UTF-8 become U+FFFD."""
        stream = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return stream.push(token_ids) + stream.finish()

    def detokenizer(self, *, skip_special_tokens: bool = True, continues_text: bool = False) -> Detokenizer:
        """A fresh incremental decoder. `continues_text`: a prompt's text stands before it, so a first space stays."""
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        strip = self._family.strips_first_space and not continues_text
        return Detokenizer(self.token_bytes, skipped=skipped, strip_first_space=strip)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, a special token's name included; empty for an id outside the vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            name = self._library.id_to_token(token_id)
            if name is None:
                return b""
            found = self._bytes[token_id] = self._family.to_bytes(name)
        return found

    def token_text(self, token_id: int) -> str:
        """The token's bytes as text, U+FFFD where they are only a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._library.token_to_id(token)


class Detokenizer:
    """Tokens in, text out, never half a character. `finish` gives what is left of a character cut short."""

    def __init__(self, token_bytes: Callable[[int], bytes], *, skipped: frozenset[int], strip_first_space: bool) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._strip_first_space = strip_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int] | array[int]) -> str:
        """Text that these tokens complete; may be empty."""
        raw = b"".join([self._token_bytes(t) for t in token_ids if t not in self._skipped])
        if self._strip_first_space and raw:
            raw = raw.removeprefix(b" ")
            self._strip_first_space = False
        return self._utf8.decode(raw)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _ByteLevel:
    """Each character of a token's name stands for one byte (OpenAI's GPT-2 `bytes_to_unicode`)."""

    strips_first_space = False

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in set(printable)]
        self._byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

    def to_bytes(self, name: str) -> bytes:
        try:
            return bytes([self._byte_of[c] for c in name])
        except KeyError:  # an added token, written as plain text
            return name.encode()


class _Metaspace:
    """SentencePiece names: "▁" is a space and, with byte fallback, "<0x0A>" is one byte."""

    def __init__(self, *, space: str, byte_fallback: bool, strips_first_space: bool) -> None:
        self.strips_first_space = strips_first_space
        self._space = space
        self._byte_of = {f"<0x{b:02X}>": bytes([b]) for b in range(256)} if byte_fallback else {}

    def to_bytes(self, name: str) -> bytes:
        return self._byte_of.get(name) or name.replace(self._space, " ").encode()


def _decoder_family(library: tokenizers.Tokenizer) -> _ByteLevel | _Metaspace:
    if library.decoder is None:
        raise UnsupportedModel("tokenizer.json names no decoder; byte-level and metaspace (SentencePiece) decoders are supported")
    state = json.loads(library.decoder.__getstate__())
    parts = state.get("decoders", [state])
    kinds = [part["type"] for part in parts]
    by_kind = dict(zip(kinds, parts, strict=True))
    if "ByteLevel" in by_kind and set(kinds) <= {"ByteLevel", "Fuse"}:
        return _ByteLevel()
    if "Metaspace" in by_kind and set(kinds) <= {"Metaspace", "ByteFallback", "Fuse"}:
        part = by_kind["Metaspace"]
        strips = part.get("prepend_scheme", "always") != "never"
        return _Metaspace(space=part["replacement"], byte_fallback="ByteFallback" in by_kind, strips_first_space=strips)
    if "Replace" in by_kind and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        part = by_kind["Replace"]
        strip = by_kind.get("Strip")
        plain = "String" in part["pattern"] and part["content"] == " " and (strip is None or _strips_one_space(strip))
        if plain:
            space = part["pattern"]["String"]
            return _Metaspace(space=space, byte_fallback="ByteFallback" in by_kind, strips_first_space=strip is not None)
    raise UnsupportedModel(
        f"tokenizer.json decodes by {' + '.join(kinds)}; byte-level and metaspace (SentencePiece) decoders are supported"
    )


def _strips_one_space(strip: Mapping[str, Any]) -> bool:
    return bool(strip["content"] == " " and strip["start"] == 1 and strip["stop"] == 0)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like by name; an entry is a string or {"content": string, ...}."""
    found = {}
    for name in SPECIAL_TOKEN_NAMES:
        entry = config.get(name)
        content = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(content, str):
            found[name] = content
    return found


def _special_ids(library: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> frozenset[int]:
    ids = {i for i, token in library.get_added_tokens_decoder().items() if token.special}
    ids |= {int(i) for i, entry in config.get("added_tokens_decoder", {}).items() if entry.get("special")}
    ids |= {i for i in map(library.token_to_id, named.values()) if i is not None}
    return frozenset(ids)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file.

    Raises:
        ModelError: the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object")
    return value
