"""Every field of OpenAI's requests is implemented, advisory or refused by name: none is passed over in silence.

The list is taken from the parameter types of the installed `openai` package, so a field added there fails here until somebody
says what we do about it. Tried with `verbosity` taken out of REFUSED: fails naming it.
"""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from gateway.dialect.bodies import ChatBody, CompletionBody
from gateway.dialect.fields import ADVISORY, REFUSED, check_extra_fields
from gateway.dialect.parse import Body, parse_body
from protocol.errors import InvalidRequest

pytestmark = pytest.mark.pure

BODIES: list[tuple[type[Body], Any]] = [(ChatBody, chat_create_params), (CompletionBody, completion_create_params)]


def fields_of(module: Any) -> list[str]:
    names: set[str] = set()
    for kind in ("CompletionCreateParamsNonStreaming", "CompletionCreateParamsStreaming"):
        names |= set(get_type_hints(getattr(module, kind)))
    return sorted(names)


@pytest.mark.parametrize(("body", "module"), BODIES, ids=["chat", "completions"])
def test_every_openai_field_is_in_exactly_one_class(body: type[Body], module: Any) -> None:
    fields = fields_of(module)
    assert len(fields) > 15 and "stream" in fields
    classes = {
        name: [c for c, names in (("implemented", body.model_fields), ("advisory", ADVISORY), ("refused", REFUSED)) if name in names]
        for name in fields
    }
    assert {name: found for name, found in classes.items() if len(found) != 1} == {}


@pytest.mark.parametrize(("body", "module"), BODIES, ids=["chat", "completions"])
def test_refused_fields_are_named_and_their_neutral_values_pass(body: type[Body], module: Any) -> None:
    for name in fields_of(module):
        if name in REFUSED:
            with pytest.raises(InvalidRequest, match=name) as caught:
                check_extra_fields({name: {"surely": "not neutral"}}, body.model_fields)
            assert caught.value.param == name and caught.value.code == "unsupported_parameter"
            for neutral in REFUSED[name]:
                check_extra_fields({name: neutral}, body.model_fields)


def test_no_field_is_both_advisory_and_refused() -> None:
    assert not ADVISORY & set(REFUSED)


def test_true_is_not_the_neutral_one() -> None:
    """`best_of: true` is not `best_of: 1`, though Python thinks so."""
    with pytest.raises(InvalidRequest):
        check_extra_fields({"best_of": True}, ())


def test_unknown_field_is_refused_with_the_nearest_name() -> None:
    raw = b'{"messages": [{"role": "user", "content": "x"}], "top_logprob": 3}'
    with pytest.raises(InvalidRequest, match="did you mean top_logprobs"):
        parse_body(ChatBody, raw)
