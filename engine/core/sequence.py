"""One choice of one attempt on one worker: its tokens, how many of them have KV, and the blocks that hold it.

    |---------------- tokens ----------------|~ in flight ~|
    |--- prompt ---|--- delivered, sampled --|             |  num_planned_tokens
    |------------- num_computed_tokens ------------|          KV is in the blocks, or will be once the steps in flight are done

"Computed tokens catch up with tokens": a prompt, a prompt after preemption and a decode differ only in how far behind they are.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS, block_hashes
from protocol.lifecycle import SequenceState, advance
from protocol.request import SamplingParams

if TYPE_CHECKING:
    from engine.core.attempts import LiveAttempt
    from engine.core.prefix_cache import CachedBlock

Order = tuple[int, int, int, int]  # (two figures of the prefill policy, arrival, choice): lower runs first


@dataclass(slots=True, kw_only=True, eq=False)
class Fork:
    """Choices that share their first `at` tokens: the leader computes them once, then all continue over its blocks."""

    at: int
    siblings: list[Sequence]


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    sequence_id: int  # never reused by a worker
    attempt: LiveAttempt
    choice: int
    order: Order
    tokens: array[int]  # uint32: prompt + delivered + sampled here
    num_prompt_tokens: int  # original boundary: output position 0 is tokens[num_prompt_tokens]
    sampling: SamplingParams
    cache_root: bytes
    max_total_tokens: int  # no more tokens are sampled for it here
    first_position: int | None  # output position of the attempt's first token; None: another worker sampled it

    state: SequenceState = SequenceState.WAITING
    fork: Fork | None = None  # of the leader, until the shared tokens are computed
    num_computed_tokens: int = 0
    num_planned_tokens: int = field(init=False)  # those of `tokens`, and those that steps in flight will sample
    decode_end: int = 0  # tokens below may be decoded without a look: their blocks are there and ours alone to write
    prefill_end: int = 0  # tokens below are prompt to this residency; each one after is a decode
    num_chunks: int = 0  # steps that computed prompt tokens of this residency
    num_residencies: int = 0  # how often its blocks were given up
    last_step_id: int = -1  # the last step that names it
    is_known_to_executor: bool = False
    num_cached_tokens: int = 0  # prefix hit at first admission
    block_table: array[int] = field(default_factory=lambda: array("I"))  # replaced, never written: steps in flight hold it
    hashes: list[bytes] = field(default_factory=list)  # of full hash blocks of `tokens`, as far as asked for
    num_stored_blocks: int = 0  # of the table, known to the prefix cache
    last_stored: CachedBlock | None = None
    can_store: bool = True  # False once the cache holds other tokens under our name

    def __post_init__(self) -> None:
        self.num_planned_tokens = len(self.tokens)

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_samples_left(self) -> int:
        """Tokens it may still sample, those in flight not counted."""
        return self.max_total_tokens - self.num_planned_tokens

    @property
    def compute_end(self) -> int:
        """Where computing has to get to now: the fork, or all tokens."""
        return self.fork.at if self.fork is not None else self.num_planned_tokens

    @property
    def num_slots(self) -> int:
        """Places in the batch it takes: its own and those of the choices that will fork from it."""
        return 1 + (len(self.fork.siblings) if self.fork is not None else 0)

    @property
    def is_decoding(self) -> bool:
        return self.num_computed_tokens >= self.prefill_end and self.fork is None

    def members(self) -> list[Sequence]:
        return [self, *self.fork.siblings] if self.fork is not None else [self]

    @property
    def num_hit_tokens_max(self) -> int:
        """How much of it may come from the cache: whoever samples next needs the logits of its last token computed here."""
        shortest = min(len(s.tokens) for s in self.members())
        return min(self.compute_end, shortest - 1)

    def take_first_token(self, token_id: int) -> None:
        """Another worker sampled it, after this one began to wait for the KV before it."""
        assert self.num_planned_tokens == len(self.tokens) and not self.is_known_to_executor
        self.tokens.append(token_id)
        self.num_planned_tokens += 1

    def move(self, to: SequenceState) -> None:
        self.state = advance(self.state, to)

    def hash_blocks(self, num_tokens: int) -> list[bytes]:
        """Names of the full hash blocks of the first `num_tokens` tokens (computed once)."""
        full = num_tokens // HASH_BLOCK_SIZE_TOKENS
        if len(self.hashes) < full:
            start = len(self.hashes) * HASH_BLOCK_SIZE_TOKENS
            parent = self.hashes[-1] if self.hashes else self.cache_root
            self.hashes += block_hashes(parent, self.tokens[start : full * HASH_BLOCK_SIZE_TOKENS])
        return self.hashes

    def give_up_blocks(self) -> array[int]:
        """The blocks it held; nothing is computed any more."""
        block_ids, self.block_table = self.block_table, array("I")
        self.num_computed_tokens = 0
        self.decode_end = 0
        self.num_stored_blocks = 0
        self.last_stored = None
        self.num_chunks = 0
        self.num_residencies += 1
        return block_ids
