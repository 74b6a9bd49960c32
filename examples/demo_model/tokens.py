"""The demo model's tokenizer and the row of token ids it is trained on.

A byte-level BPE whose pieces never cross a newline, so that a prompt may end anywhere a person stops typing: indentation is a
piece of its own, a name with its underscores is one piece, each digit is one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.demo_model.corpus import SourceFile
from examples.demo_model.turns import conversation_of

VOCAB_SIZE = 4096
END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT_ID, _, TURN_END_ID = range(len(SPECIAL_TOKENS))
PIECES = r"\n| ?[\p{L}_]+|\p{N}| ?[^\s\p{L}\p{N}_]+| +(?= \S)|[^\S\n]+"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """The same texts in the same order give the same file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def documents(files: Iterable[SourceFile]) -> list[str]:
    """What is trained on: each file as it is, and its conversation where it has one; each with its special tokens written out."""
    found: list[str] = []
    for file in files:
        found.append(file.text + END_OF_TEXT)
        if turns := conversation_of(file.text):
            found.append("".join(as_turn(user, assistant) for user, assistant in turns) + END_OF_TEXT)
    return found


def as_turn(user: str, assistant: str) -> str:
    """One question and answer as CHAT_TEMPLATE writes them."""
    return f"{TURN_START}user\n{user}{TURN_END}\n{TURN_START}assistant\n{assistant}{TURN_END}\n"


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[npt.NDArray[np.uint16]]:
    return [np.array(encoding.ids, dtype=np.uint16) for encoding in tokenizer.encode_batch_fast(texts)]
