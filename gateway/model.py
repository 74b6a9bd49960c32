"""The model as clients see it: its names, its tokenizer, and what its files say about sampling and the end of a text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.tokenizer import Tokenizer
from gateway.dialect.sampling import SamplingDefaults
from protocol.errors import ModelError, ModelNotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    names: tuple[str, ...]  # names clients may say; the first is ours
    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    defaults: SamplingDefaults
    created: int  # Unix seconds, of the checkpoint's config

    @property
    def name(self) -> str:
        return self.names[0]

    def resolve(self, said: str | None) -> str:
        """The name to answer with; None means the model served here.

        Raises:
            ModelNotFound: another model; names those there are.
        """
        if said is None or said in self.names:
            return said or self.name
        shown = said if len(said) <= 64 else said[:61] + "..."
        raise ModelNotFound(f"the model {shown!r} is not served here; there is {', '.join(self.names)}", param="model")


def load_served_model(directory: Path, names: tuple[str, ...]) -> ServedModel:
    """Tokenizer and generation settings of a Hugging Face directory; no weights are read.

    Raises:
        ModelError: a file is missing or unreadable.
    """
    tokenizer = Tokenizer.from_directory(directory)
    generation = _read_object(directory / "generation_config.json")
    config = _read_object(directory / "config.json")
    eos = _as_ids(generation.get("eos_token_id")) or _as_ids(config.get("eos_token_id"))
    if tokenizer.eos_token_id is not None:
        eos += (tokenizer.eos_token_id,)
    path = directory / "config.json"
    return ServedModel(
        names=names or (directory.resolve().name,),
        tokenizer=tokenizer,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        defaults=SamplingDefaults.of(generation),
        created=int(path.stat().st_mtime) if path.is_file() else 0,
    )


def _as_ids(value: object) -> tuple[int, ...]:
    """eos_token_id is an int or a list of them."""
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object")
    return value
