"""Errors -> OpenAI's error object, with the HTTP status and headers they are answered with."""

from __future__ import annotations

import math

from protocol.errors import BatonError, Overloaded, RequestError, ServiceError

ErrorObject = dict[str, dict[str, str | None]]


def error_object(error: BatonError) -> ErrorObject:
    """`{"error": {"message", "type", "param", "code"}}`."""
    kind, param, code = "server_error", None, None
    if isinstance(error, RequestError):
        kind, param, code = error.type, error.param, error.code
    elif isinstance(error, ServiceError):
        kind, code = error.type, error.code
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def error_status(error: BatonError) -> int:
    return error.status if isinstance(error, (RequestError, ServiceError)) else 500


def error_headers(error: BatonError) -> list[tuple[bytes, bytes]]:
    """Retry-After in whole seconds, where the error knows one."""
    retry_after_s = error.retry_after_s if isinstance(error, (Overloaded, ServiceError)) else None
    if retry_after_s is None:
        return []
    return [(b"retry-after", str(max(1, math.ceil(retry_after_s))).encode())]
