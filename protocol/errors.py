"""The error tree: what a caller may catch, with the HTTP status the gateway answers with.

BatonError
├── RequestError                 the caller's mistake, 4xx
│   ├── InvalidRequest           400  a field has a value outside its limits
│   ├── Unauthorized             401
│   ├── ModelNotFound            404
│   ├── RequestTooLarge          413
│   └── Overloaded               429  with retry_after_s
├── ServiceError                 ours, 5xx
│   ├── NoWorker                 503  with retry_after_s
│   ├── AttemptsExhausted        500
│   └── DeadlineExceeded         504
├── ConfigError                  a flag, a YAML key or an environment variable is wrong
├── ModelError                   a checkpoint cannot be served
│   ├── UnsupportedModel
│   ├── ModelDoesNotFit
│   └── ModelUnavailable         the hub or the disk did not give it
├── WireError                    a peer spoke out of turn; the connection ends
│   ├── FrameTooLarge
│   ├── MalformedFrame
│   └── HandshakeRefused
└── KVError                      a hand-off cannot be expressed or must not be read
    ├── LayoutMismatch
    └── FingerprintMismatch
IllegalMove (AssertionError)     a state machine was asked for a move outside its table: a bug, never caught
"""

from __future__ import annotations


class BatonError(Exception):
    """Root of everything a caller may catch. The text holds the value, the limit and the remedy."""


class RequestError(BatonError):
    """The caller's mistake. `param` names the field of the request, as OpenAI's error object does."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(RequestError):
    """A field of the request has a value outside its limits."""


class Unauthorized(RequestError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ModelNotFound(RequestError):
    status = 404
    type = "not_found_error"
    code = "model_not_found"


class RequestTooLarge(RequestError):
    status = 413
    code = "request_too_large"


class Overloaded(RequestError):
    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class ServiceError(BatonError):
    """Ours, not the caller's. `retry_after_s` is None where a retry is not known to help."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoWorker(ServiceError):
    status = 503
    code = "no_worker"


class AttemptsExhausted(ServiceError):
    code = "attempts_exhausted"


class DeadlineExceeded(ServiceError):
    status = 504
    code = "deadline_exceeded"


class ConfigError(BatonError):
    """A flag, a YAML key or an environment variable is wrong; the text names the nearest known one."""


class ModelError(BatonError):
    """A checkpoint cannot be served."""


class UnsupportedModel(ModelError):
    """The architecture or one of its options is not implemented; named in the text."""


class ModelDoesNotFit(ModelError):
    """Weights plus the least KV pool exceed the memory; the text shows the arithmetic."""


class ModelUnavailable(ModelError):
    """The hub, the network or the disk did not give the checkpoint; the text has the remedy."""


class WireError(BatonError):
    """A peer broke the protocol; the connection is closed."""


class FrameTooLarge(WireError):
    pass


class MalformedFrame(WireError):
    pass


class HandshakeRefused(WireError):
    """Version, cluster secret, epoch or model fingerprint differ."""


class KVError(BatonError):
    pass


class LayoutMismatch(KVError):
    """Two layouts cannot be mapped onto each other; names the field that differs."""


class FingerprintMismatch(KVError):
    """Two workers hold different weights; their KV must never meet."""


class IllegalMove(AssertionError):
    """A move outside a state machine's table: a bug of ours."""
