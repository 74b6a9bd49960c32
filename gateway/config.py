"""Settings of a gateway replica, every one of them a bound or a name."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One accepted key, kept as its SHA-256 in hex, and the tenant its bearer is."""

    sha256: str
    tenant: str = "default"

    @classmethod
    def of(cls, key: str, *, tenant: str = "default") -> ApiKey:
        return cls(sha256=hashlib.sha256(key.encode()).hexdigest(), tenant=tenant)

    def matches(self, key: str) -> bool:
        """Compared in constant time."""
        return hmac.compare_digest(hashlib.sha256(key.encode()).hexdigest(), self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    served_model_names: tuple[str, ...] = ()  # names clients may say; the first is the one we say. Empty: the model's own
    max_model_len: int | None = None  # tokens of prompt + output; None: the least of the workers'
    api_keys: tuple[ApiKey, ...] = ()  # empty: no key is asked for

    # What is told of placements.
    placement_header: bool | None = None  # x-baton-placement; None: where no key is asked for, as GET /status tells anybody the same then
    otlp_traces_endpoint: str = ""  # spans of requests are sent there over HTTP; empty: none are made
    num_explained: int = 256  # newest placements made without the router, for GET /explain

    # What one request may ask for.
    max_body_bytes: int = 8 << 20
    max_messages: int = 4096
    max_prompts: int = 64  # of one /v1/completions body
    max_n: int = 16
    max_stop: int = 16
    max_stop_bytes: int = 256  # of one stop string
    max_stop_token_ids: int = 64
    max_logprobs: int = 20
    max_logit_bias: int = 1024
    max_cache_salt_bytes: int = 64

    # How long things may take, seconds.
    request_timeout_s: float = 600.0
    body_timeout_s: float = 30.0
    router_ack_s: float = 0.2  # no acknowledgement by then: place by least_work over the last snapshots
    router_silent_s: float = 2.0  # an answer owed for longer: the router is taken for dead
    placement_wait_s: float = 30.0  # an accepted request that lost its worker waits this long for another
    link_wait_s: float = 1.0  # a worker just assigned may still be dialed this long
    stuck_after_s: float = 10.0  # work queued and no step for this long: the worker is stuck
    stale_after_s: float = 5.0  # a snapshot older than this is not believed
    tick_s: float = 0.05

    # How much may wait.
    max_attempts: int = 4  # tries of one request that a worker lost or gave up
    max_live_requests: int = 4096
    max_undelivered_tokens: int = 4096  # of one stream whose client does not read
    max_pending_messages: int = 1024  # for one worker still being dialed
    encode_inline_chars: int = 4096  # a longer prompt is tokenized in a thread, off the event loop

    @property
    def shows_placement(self) -> bool:
        """Names of workers are the operator's affair once clients are told apart by keys."""
        return not self.api_keys if self.placement_header is None else self.placement_header
