"""Chat messages -> the prompt text a model was trained on, by the Jinja template in its directory.

The template is somebody else's program, so it runs in Jinja's immutable sandbox, sees plain JSON values only, and never comes
from a client. Semantics follow `apply_chat_template` of transformers 5 (trim_blocks, lstrip_blocks, loop controls, the
generation tag, tojson without HTML escapes), which tests/golden/test_chat_template.py holds token by token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protocol.errors import InvalidRequest, ModelError

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]
Message = Mapping[str, JsonValue]


class ChatTemplate:
    """A compiled template with the special tokens it may name (bos_token, eos_token, ...)."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str], clock: Callable[[], datetime] = datetime.now) -> None:
        """
        Raises:
            ModelError: the template is not valid Jinja.
        """
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: clock().strftime(layout)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the model's chat template is not valid Jinja, line {error.lineno}: {error.message}") from None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, variables: Mapping[str, JsonValue] | None = None
    ) -> str:
        """Prompt text, BOS included where the template writes it: encode it without special tokens.

        `variables` are further names for the template (`enable_thinking=False`); they cannot replace its own.

        Raises:
            InvalidRequest: the template refuses these messages, by raise_exception or by stumbling over them.
        """
        given = dict(variables or {})
        given |= {
            "messages": [{k: v for k, v in message.items() if v is not None} for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
        }
        try:
            return self._template.render(given)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", param="messages") from None


def load_chat_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """Source of the model's default template; None when it has none.

    In the order of transformers: chat_template.jinja, chat_template.json, then tokenizer_config.json.
    """
    jinja_file = directory / "chat_template.jinja"
    if jinja_file.is_file():
        return jinja_file.read_text(encoding="utf-8")
    json_file = directory / "chat_template.json"
    found = tokenizer_config.get("chat_template")
    if json_file.is_file():
        found = json.loads(json_file.read_text(encoding="utf-8")).get("chat_template", found)
    if isinstance(found, list):  # several by name: [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()
