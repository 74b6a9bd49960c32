"""Bytes of a body -> a checked model of it, with errors that name the field, its value and the limit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gateway.dialect.fields import check_extra_fields
from protocol.errors import InvalidRequest

MAX_SHOWN_CHARS = 64


class Body(BaseModel):
    """A JSON object whose fields are strict: "5" is no number and 1 is no truth. What is not declared goes to fields.py."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)


B = TypeVar("B", bound=Body)


def parse_body(cls: type[B], raw: bytes) -> B:
    """
    Raises:
        InvalidRequest: not UTF-8, not JSON, a wrong type or value, a field that is not implemented, an unknown field.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the body is not valid UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; send JSON in UTF-8",
            code="invalid_utf8",
        ) from None
    try:
        body = cls.model_validate_json(text)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False), text) from None
    check_extra_fields(body.model_extra or {}, cls.model_fields)
    return body


def shown(value: object) -> str:
    """A value as JSON, short enough for an error."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."


def _explain(errors: Sequence[Any], text: str) -> InvalidRequest:
    first = errors[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body of {len(text)} characters is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if not first["loc"]:
        return InvalidRequest(f"the body has to be a JSON object, not {shown(first['input'])}", code="invalid_json")
    path, _ = _split(first["loc"])
    # A union (a string or a list of strings) gives one error for each of its arms: report the deepest place, or all arms.
    same = [e for e in errors if _split(e["loc"])[0][:1] == path[:1]]
    deepest = max(same, key=lambda e: len(_split(e["loc"])[0]))
    path, _ = _split(deepest["loc"])
    param = _dotted(path)
    if deepest["type"] == "missing":
        return InvalidRequest(f"{param} is required", param=param, code="missing_required_parameter")
    wants = list(dict.fromkeys(_wanted(e) for e in same if _split(e["loc"])[0] == path))
    return InvalidRequest(f"{param} is {shown(deepest['input'])}; it should be {' or '.join(wants)}", param=param, code="invalid_value")


def _wanted(error: Mapping[str, Any]) -> str:
    message = str(error["msg"])
    for start in ("Input should be ", "Value error, "):
        message = message.removeprefix(start)
    return message[:1].lower() + message[1:]


def _split(location: Sequence[int | str]) -> tuple[list[int | str], list[str]]:
    """(path in the body, names of union arms that pydantic puts into a location)."""
    path: list[int | str] = []
    arms: list[str] = []
    for part in location:
        if isinstance(part, str) and (part in _ARMS or "[" in part):
            arms.append(part)
        else:
            path.append(part)
    return path, arms


_ARMS = frozenset({"str", "int", "float", "bool", "list", "dict", "TextPart", "RefusalPart", "OtherPart"})


def _dotted(path: Sequence[int | str]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
