"""What a starting cluster says of itself, so that whoever started it can show it: `cluster` reports, `baton` draws.

PhaseBegan(MODEL) .. PhaseDone(MODEL) .. RAY .. WORKERS .. ENDPOINT .. ServerReady .. ServerStopping
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    """In the order they begin; they may overlap."""

    MODEL = "model"
    RAY = "ray"
    WORKERS = "workers"
    ENDPOINT = "endpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseBegan:
    phase: Phase
    detail: str  # "downloading org/model", "1 prefill, 1 decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseDone:
    phase: Phase
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something the user should know though nothing stops: a slower path, a worker that was replaced."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReady:
    """Requests are answered from now on."""

    url: str  # "http://127.0.0.1:8000"
    model_id: str
    needs_api_key: bool
    prefill_workers: int
    decode_workers: int
    mixed_workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStopping:
    reason: str  # "SIGTERM", "Ctrl-C"


StartupEvent = PhaseBegan | PhaseDone | Notice | ServerReady | ServerStopping
Report = Callable[[StartupEvent], None]
"""Called on the thread that runs `serve`; must not block."""
