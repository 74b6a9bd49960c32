"""What one phase of one attempt takes from one worker, and sums of it: the unit in which the router counts load it has given out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from protocol.request import AttemptKey
from protocol.worker import WorkerId


class Phase(Enum):
    PREFILL = "prefill"
    DECODE = "decode"

    __hash__ = object.__hash__  # at C speed: Enum hashes a member's name, in Python, at each look into a dictionary of holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """What one phase of one attempt will take from one worker. What is summed is integers, so that sums come back to exactly zero."""

    key: AttemptKey
    phase: Phase
    worker_id: WorkerId
    prefill_tokens: int = 0  # missed, to be computed
    prefill_pairs: int = 0  # missed * context
    num_sequences: int = 0
    kv_tokens: int = 0  # at the expected end of the output, all choices
    output_tokens: int = 0  # of one choice, as predicted
    lands_s: float = 0.0  # when its prompt is expected to be computed, on the router's clock


@dataclass(slots=True)
class Tally:
    """Sum of holds."""

    num_prefills: int = 0
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    num_sequences: int = 0
    kv_tokens: int = 0
    output_tokens: int = 0  # of all choices

    def add(self, hold: Hold, sign: int = 1) -> None:
        self.num_prefills += sign * (hold.phase is Phase.PREFILL)
        self.prefill_tokens += sign * hold.prefill_tokens
        self.prefill_pairs += sign * hold.prefill_pairs
        self.num_sequences += sign * hold.num_sequences
        self.kv_tokens += sign * hold.kv_tokens
        self.output_tokens += sign * hold.num_sequences * hold.output_tokens

    @property
    def is_zero(self) -> bool:
        return not (self.num_prefills or self.prefill_tokens or self.prefill_pairs or self.num_sequences or self.kv_tokens)
