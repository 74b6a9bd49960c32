"""How a placement is told to those who ask: the answer's header, the log line of an attempt, the document of `GET /explain/NAME`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from gateway.events import AttemptEnded
from gateway.session import Session
from protocol.errors import RequestError, ServiceError
from protocol.lifecycle import AttemptState

log = logging.getLogger("baton.gateway")

EXPLAIN_SCHEMA = "baton.explain.v1"
PLACEMENT_HEADER = b"x-baton-placement"
MAX_PLACEMENT_HEADERS = 8  # of an answer to many prompts
MAX_NAME_CHARS = 160

_ANSWER_ID = re.compile(r"(?:chatcmpl|cmpl)-([0-9a-f]{32})")


class NotFound(RequestError):
    status = 404
    type = "not_found_error"
    code = "not_found"


class NoRouter(ServiceError):
    """What is asked for, only the router may know."""

    status = 503
    code = "no_router"


def placement_header(session: Session) -> bytes:
    """`prefill=prefill-3;decode=decode-1;cached=512;policy=prefix_cost;request=ID` of the newest placement; the id alone before one.

    `cached`: tokens of the prompt that were found, as far as the worker has said.
    """
    parts = {}
    if session.assignments:
        placed = session.assignments[-1]
        parts = {"prefill": placed.prefill_worker, "decode": placed.decode_worker}
        if session.found_tokens is not None:
            parts["cached"] = str(session.found_tokens)
        parts["policy"] = placed.policy
    parts["request"] = session.request.request_id
    return ";".join(f"{name}={_plain(value)}" for name, value in parts.items()).encode("ascii")


def attempt_fields(session: Session, ended: AttemptEnded) -> dict[str, object]:
    """Of one attempt, for its log line: where it went and why, what was expected and what came."""
    fields: dict[str, object] = {
        "request_id": session.request.request_id,
        "attempt": ended.number,
        "during": ended.during.value,
        "state": ended.state.value,
        "reason": ended.reason,
        "output_tokens": session.num_output_tokens,
    }
    placed = ended.assignment
    if placed is None:
        return fields
    fields |= {
        "prefill_worker": placed.prefill_worker,
        "decode_worker": placed.decode_worker,
        "policy": placed.policy,
        "placed_because": placed.reason,
        "cached_expected": placed.cached_tokens,
        "cached_found": ended.found_tokens,
    }
    if placed.predicted_ttft_s is not None:
        fields["ttft_predicted_s"] = round(placed.predicted_ttft_s, 6)
    ttft_s = session.timelines[0].ttft_s
    if ended.number == 0 and ttft_s is not None:
        fields["ttft_s"] = round(ttft_s, 6)
    if ended.handoff is not None:
        fields |= {"handoff_path": ended.handoff.path, "handoff_s": round(ended.handoff.duration_s, 6)}
    return fields


def log_attempt(session: Session, ended: AttemptEnded) -> None:
    level = logging.INFO if ended.state in (AttemptState.FINISHED, AttemptState.CANCELLED) else logging.WARNING
    log.log(level, "attempt ended", extra=attempt_fields(session, ended))


def request_id_of(name: str) -> str:
    """The id within an answer's `chatcmpl-ID` or `cmpl-ID`; any other name as it is.

    Raises:
        NotFound: nothing is called so.
    """
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise NotFound(
            f"{name[:32]!r} names no request: 1 to {MAX_NAME_CHARS} printable characters, from an answer's id or its X-Request-Id"
        )
    found = _ANSWER_ID.fullmatch(name)
    return name if found is None else found[1]


def explain_document(name: str, *, own: dict[str, Any], replies: Sequence[str]) -> dict[str, object]:
    """What the routers say (`replies`, JSON) and what this gateway placed in their stead (`own`); schema `baton.explain.v1`.

    Raises:
        NotFound: neither keeps anything under that name. NoRouter: this gateway does not, and no router says anything.
    """
    said: list[dict[str, Any]] = [json.loads(reply) for reply in replies]
    kept, limit = (sum(router[key] for router in said) if said else None for key in ("kept", "limit"))
    mine = {(a["request_id"], a["attempt"]) for a in own["attempts"]}
    theirs = [
        a for router in said for a in router["attempts"] if (a["request_id"], a["attempt"]) not in mine
    ]  # given out, and not taken in time
    attempts = sorted([*own["attempts"], *theirs], key=lambda a: (-a["age_s"], a["attempt"]))
    if not attempts and not said:
        raise NoRouter("the router does not answer, and this gateway has placed no such request by itself; see GET /status")
    if not attempts:
        raise NotFound(
            f"nothing is kept of a request {name!r}: it was another tenant's or server's, or is older than the newest "
            f"{limit:,} placements ({kept:,} are kept); raise router.num_explained to keep more"
        )
    return {
        "schema": EXPLAIN_SCHEMA,
        "name": name,
        "attempts": attempts,
        "left_out": sum(router["left_out"] for router in said) + own["left_out"],
        "kept": kept,
        "limit": limit,
    }


def _plain(value: str) -> str:
    """Fit for a header: a user's policy may be called anything."""
    return re.sub(r"[^!-:<-~]", "?", value)
