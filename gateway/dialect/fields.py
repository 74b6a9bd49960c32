"""Every request field somebody may send, in one of three classes.

    implemented   a field of ChatBody or CompletionBody
    advisory      cannot change the answer of this server: accepted and passed over
    refused       would change the answer and is not implemented: 400 that names it, unless it has its neutral value

A name in none of them is refused too, with the nearest known one: a typo in `max_tokens` must not cost the user an answer of
another length. tests/unit/gateway/test_field_list.py walks the parameter types of the `openai` package against these tables.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from types import MappingProxyType

from protocol.errors import InvalidRequest

ADVISORY = frozenset(
    {
        # OpenAI's
        "metadata",
        "parallel_tool_calls",  # says how tools are called; without tools it says nothing
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        # vLLM's
        "include_reasoning",
        "request_id",
        "spaces_between_special_tokens",
    }
)

_OFF: tuple[object, ...] = (None, False)
_EMPTY: tuple[object, ...] = (None, [], {})

# Refused field -> values that ask for what happens anyway.
REFUSED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        # OpenAI's
        "audio": (None,),
        "best_of": (None, 1),
        "echo": _OFF,
        "function_call": (None, "none", "auto"),
        "functions": _EMPTY,
        "modalities": (None, [], ["text"]),
        "moderation": (None,),
        "prediction": (None,),
        "reasoning_effort": (None, "none"),
        "response_format": (None, {"type": "text"}),
        "suffix": (None, ""),
        "tool_choice": (None, "none", "auto"),
        "tools": _EMPTY,
        "verbosity": (None, "medium"),
        "web_search_options": (None,),
        # vLLM's
        "add_special_tokens": _OFF,
        "allowed_token_ids": _EMPTY,
        "bad_words": _EMPTY,
        "chat_template": (None,),
        "continue_final_message": _OFF,
        "documents": _EMPTY,
        "guided_choice": (None,),
        "guided_decoding_backend": (None,),
        "guided_grammar": (None,),
        "guided_json": (None,),
        "guided_regex": (None,),
        "guided_whitespace_pattern": (None,),
        "kv_transfer_params": (None,),
        "length_penalty": (None, 1, 1.0),
        "logits_processors": _EMPTY,
        "mm_processor_kwargs": _EMPTY,
        "prompt_embeds": (None,),
        "prompt_logprobs": (None,),
        "structural_tag": (None,),
        "structured_outputs": (None,),
        "thinking_token_budget": (None,),
        "truncate_prompt_tokens": (None, -1),
        "use_beam_search": _OFF,
        "vllm_xargs": _EMPTY,
    }
)


def check_extra_fields(extra: Mapping[str, object], implemented: Collection[str]) -> None:
    """Pass over advisory fields and neutral values.

    Raises:
        InvalidRequest: a field that would change the answer, or an unknown one; names it.
    """
    for name, value in extra.items():
        if name in ADVISORY:
            continue
        if name not in REFUSED:
            raise InvalidRequest(_unknown(name, implemented), param=name, code="unknown_parameter")
        if not any(value == neutral and type(value) is type(neutral) for neutral in REFUSED[name]):
            raise InvalidRequest(
                f"{name} is not implemented by this server and would change the answer; leave it out",
                param=name,
                code="unsupported_parameter",
            )


def _unknown(name: str, implemented: Collection[str]) -> str:
    shown = name if len(name) <= 64 else name[:61] + "..."
    near = difflib.get_close_matches(shown, [*implemented, *ADVISORY, *REFUSED], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown field {shown!r}{hint}"
