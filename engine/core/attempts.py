"""From a Submit to sequences: what is refused with its arithmetic, which choices share their first tokens, where each one ends."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from engine.core.sequence import Fork, Order, Sequence
from kvtransfer.handoff import TargetHandoff
from protocol.kv import FirstToken, KVHandoff, KVLayout
from protocol.messages import Submit
from protocol.request import Attempt, AttemptKey

PartKey = tuple[str, int, bool]  # request, attempt, prefill only: a worker may compute a prompt and later decode the same attempt


@dataclass(slots=True, kw_only=True, eq=False)
class LiveAttempt:
    """One Submit being worked on."""

    key: AttemptKey
    gateway: str
    prefill_only: bool
    handoff: TargetHandoff | None = None  # KV on offer to us; None once it is pulled, or given up
    sequences: dict[int, Sequence] = field(default_factory=dict)  # by choice, those not ended
    leader: Sequence | None = None  # the sequence whose blocks hold the shared tokens; None before `open_attempt` is done
    first_tokens: list[FirstToken] = field(default_factory=list)  # prefill only: of the choices that go on elsewhere
    early_offer: KVHandoff | None = None  # prefill only: made before the last step of its prefill was done

    @property
    def part(self) -> PartKey:
        return (self.key.request_id, self.key.attempt, self.prefill_only)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a worker can ever hold."""

    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    layout: KVLayout

    def refusal(self, submit: Submit) -> str | None:
        """Why no amount of waiting would let this worker compute `submit`; None when it can."""
        attempt = submit.attempt
        sampling = attempt.request.sampling
        if len(attempt.live_choices) > self.max_num_seqs:
            return f"{len(attempt.live_choices)} choices exceed max_num_seqs {self.max_num_seqs}; lower n or raise it"
        chains = choice_tokens(attempt, submit.handoff)
        if not chains or not all(chains.values()):
            return "the attempt has no live choice, or an empty prompt"
        if submit.prefill_only and (submit.handoff is not None or len({chain.tobytes() for chain in chains.values()}) > 1):
            return "only choices that still share all their tokens can be computed here and handed off; place the attempt where it decodes"
        longest = max(len(chain) for chain in chains.values())
        if longest >= self.max_model_len:
            return (
                f"{longest} tokens (prompt and delivered) leave no room for another within max_model_len {self.max_model_len}; "
                "raise it or shorten the prompt"
            )
        if any(len(chain) - attempt.request.num_prompt_tokens >= sampling.max_tokens for chain in chains.values()):
            return f"max_tokens {sampling.max_tokens} are delivered already; nothing is left to compute"
        end = longest if submit.prefill_only else min(attempt.request.num_prompt_tokens + sampling.max_tokens, self.max_model_len) - 1
        size = self.layout.block_size_tokens
        need = -(-end // size)
        if need > self.num_blocks:
            return (
                f"KV of {end} tokens needs {need} blocks of {size} tokens ({need * self.layout.block_bytes:,} bytes), this worker has "
                f"{self.num_blocks}; lower max_tokens or raise num_kv_blocks"
            )
        return None


def choice_tokens(attempt: Attempt, handoff: KVHandoff | None) -> dict[int, array[int]]:
    """All known tokens of each choice to go on with, by choice. After a hand-off: those that have a first token, with it.

    An early offer has none yet: they come with its completion.
    """
    if handoff is None or not handoff.is_complete:
        return {choice: attempt.tokens(choice) for choice in attempt.live_choices}
    first = {t.choice: t.token_id for t in handoff.first_tokens}
    return {choice: attempt.tokens(choice) + array("I", [first[choice]]) for choice in attempt.live_choices if choice in first}


def open_sequences(live: LiveAttempt, submit: Submit, *, order: tuple[int, int, int], next_sequence_id: int, max_model_len: int) -> None:
    """Give `live` a sequence for each choice; the first leads, and the others fork from it where their tokens part.

    With a hand-off the fork lies behind the offered tokens, also when it is computed here after all.
    """
    attempt = submit.attempt
    request = attempt.request
    for choice, tokens in choice_tokens(attempt, submit.handoff).items():
        end = min(request.num_prompt_tokens + request.sampling.max_tokens, max_model_len)
        choice_order: Order = (*order, choice)
        live.sequences[choice] = Sequence(
            sequence_id=next_sequence_id + len(live.sequences),
            attempt=live,
            choice=choice,
            order=choice_order,
            tokens=tokens,
            num_prompt_tokens=request.num_prompt_tokens,
            sampling=request.sampling,
            cache_root=request.cache_root,
            max_total_tokens=min(end, len(tokens) + 1) if live.prefill_only else end,
            first_position=len(tokens) - request.num_prompt_tokens if submit.handoff is None else None,
        )
    live.leader, *siblings = live.sequences.values()
    if siblings:
        known = choice_tokens(attempt, None)
        live.leader.fork = Fork(at=common_length([known[choice] for choice in live.sequences]), siblings=siblings)


def common_length(chains: list[array[int]]) -> int:
    """How many first tokens all chains share."""
    shortest = min(chains, key=len)
    low, high = 0, len(shortest)
    while low < high:  # the longest equal prefix, by bisection over slices
        middle = (low + high + 1) // 2
        if all(chain[:middle] == shortest[:middle] for chain in chains):
            low = middle
        else:
            high = middle - 1
    return low
