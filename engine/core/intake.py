"""The target's side of hand-offs in a worker: accept an offer, reserve, pull, verify, acknowledge; or give it up.

What follows a failure is the policy's (kvtransfer.handoff.recourse): the prompt is computed here, pulled once more, or the attempt fails.
An early offer is pulled while its source still computes; it ends well only after `complete` has brought first token and digests.

Target blocks are quarantined while a copy may write them: whatever becomes of the attempt, they are given back only at PullDone.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from engine.core.attempts import LiveAttempt
from engine.core.config import WorkerCoreConfig
from engine.core.events import AckSource, CancelPull, Command, CompletePull, DropSource, RenewSource, StartPull, Tell
from engine.core.scheduler import Scheduler
from engine.core.sequence import Sequence
from kvtransfer.handoff import Refusal, TargetHandoff, recourse, refuse
from protocol.kv import FailurePolicy, HandoffCompletion, KVHandoff, KVLayout, Outcome, TransferError
from protocol.messages import HandoffDone, TransferFailed
from protocol.request import Attempt

OVERDUE_S = 1.0  # transports end a pull by its deadline; one that does not (a library that hangs) holds up nobody longer than this
NOTHING_PULLED = Outcome(num_blocks=0, size_bytes=0, duration_s=0.0, path="cached")


class Intake:
    """Offers to this worker. Bounded by the inbox and by max_num_seqs."""

    def __init__(
        self,
        config: WorkerCoreConfig,
        scheduler: Scheduler,
        counters: dict[str, int],
        *,
        layout: KVLayout,
        fingerprint: bytes,
        fail: Callable[[LiveAttempt, str], None],
    ) -> None:
        """`fail(live, reason)` ends an attempt for good."""
        self._config = config
        self._scheduler = scheduler
        self._counters = counters
        self._layout = layout
        self._fingerprint = fingerprint
        self._fail = fail
        self._open: dict[str, LiveAttempt] = {}  # by handoff id: waiting for room, or pulling
        self._waiting: set[str] = set()  # those of them that wait
        self._cached: set[str] = set()  # early ones that need no copy: only their completion is waited for
        self._quarantine: dict[str, array[int]] = {}  # blocks of attempts that ended while their copy ran

    def __len__(self) -> int:
        return len(self._open) + len(self._quarantine)

    def accept(self, live: LiveAttempt, handoff: KVHandoff, attempt: Attempt, now: float) -> list[Command]:
        """Look at an offer; call it when the attempt is in the inbox. Refused: the source is told, and the policy has its way."""
        target = TargetHandoff(
            handoff=handoff,
            give_up_s=now + self._config.max_handoff_wait_s,
            renew_interval_s=handoff.lease.duration_s / 6,
            next_renewal_s=now + handoff.lease.duration_s / 6,
            completed_s=now,
        )
        refusal = None
        for choice in live.sequences:
            token_ids = attempt.tokens(choice)
            refusal = refusal or refuse(handoff, fingerprint=self._fingerprint, layout=self._layout, token_ids=token_ids)
        if not handoff.is_complete and len(live.sequences) != 1:
            refusal = Refusal(error=TransferError.REFUSED, detail=f"an early offer to {len(live.sequences)} choices; one is the limit")
        if handoff.handoff_id in self._open or handoff.handoff_id in self._quarantine:
            refusal = Refusal(error=TransferError.REFUSED, detail="this offer is being taken already")
        if refusal is not None:
            target.fail(refusal)
            return self._without_kv(live, target)
        live.handoff = target
        self._open[handoff.handoff_id] = live
        self._waiting.add(handoff.handoff_id)
        return []

    def complete(self, live: LiveAttempt, completion: HandoffCompletion, now: float) -> list[Command]:
        """The source of an early offer has computed everything, and sampled the first token. Late or doubled ones are passed over."""
        target = live.handoff
        if target is None or target.handoff_id != completion.handoff_id or target.handoff.is_complete:
            self._counters["late_messages"] += 1
            return []
        ((choice, sequence),) = live.sequences.items()
        first = {token.choice: token.token_id for token in completion.first_tokens}
        target.complete(completion, now)
        if target.has_failed:
            live.handoff = None
            sequence.take_first_token(first[choice])
            self._scheduler.unpark(sequence)
            return self._give_up(live, target)
        self._scheduler.take_first_token(sequence, first[choice])
        if target.is_pulling:
            target.give_up_s = self._overdue_s(target, now)
        if target.handoff_id in self._cached:
            self._cached.remove(target.handoff_id)
            return self.finish(target.handoff_id, NOTHING_PULLED, now)
        return [CompletePull(handoff=target.handoff, deadline_s=self._config.pull_deadline_s)] if target.is_pulling else []

    def start(self, now: float) -> list[Command]:
        """Pull what has room now; offers whose tokens all lie in the local cache need no copy."""
        commands: list[Command] = []
        if not self._waiting:
            return commands
        for sequence in self._scheduler.reserve():
            live = sequence.attempt
            assert live.handoff is not None
            target = live.handoff
            self._waiting.remove(target.handoff_id)
            target.reserve()
            target.pull(give_up_s=self._overdue_s(target, now))
            commands += self._pull(target, sequence, now)
        return commands

    def _pull(self, target: TargetHandoff, sequence: Sequence, now: float) -> list[Command]:
        handoff, size = target.handoff, self._layout.block_size_tokens
        first = sequence.num_computed_tokens // size  # blocks before are here already
        if first == len(sequence.block_table):
            if handoff.is_complete:
                return self.finish(target.handoff_id, NOTHING_PULLED, now)
            self._cached.add(target.handoff_id)
            return []
        shard = handoff.shards[0]
        return [
            StartPull(
                handoff=handoff,
                source_indices=array("I", range(first * size // shard.layout.block_size_tokens, len(shard.block_ids))),
                target_block_ids=sequence.block_table[first:],
                target_start_tokens=first * size,
                deadline_s=self._deadline_s(target),
            )
        ]

    def _deadline_s(self, target: TargetHandoff) -> float:
        """For a pull that begins now. Until an early offer is complete, its source may compute as long as an offer may wait."""
        return self._config.pull_deadline_s if target.handoff.is_complete else self._config.max_handoff_wait_s

    def _overdue_s(self, target: TargetHandoff, now: float) -> float:
        return now + self._deadline_s(target) + OVERDUE_S

    def finish(self, handoff_id: str, outcome: Outcome, now: float) -> list[Command]:
        """A copy has stopped, well or not."""
        if handoff_id in self._quarantine:
            self._scheduler.residence.give_back(self._quarantine.pop(handoff_id), -1)
            return []
        live = self._open.get(handoff_id)
        if live is None or live.handoff is None or not live.handoff.is_pulling:
            self._counters["late_messages"] += 1
            return []
        target = live.handoff
        policy = self._config.kv_load_failure_policy
        if outcome.error is not None and recourse(policy, outcome.error, num_pulls=target.num_pulls) is FailurePolicy.RETRY:
            self._counters["pulls_again"] += 1
            target.pull_again(give_up_s=self._overdue_s(target, now))
            return self._pull(target, _leader(live), now)
        target.finish_pull(outcome)
        if target.refusal is not None:
            return self._without_kv(live, target)
        assert target.handoff.is_complete, "verified without the digests of an early offer"
        self._end(live)
        self._counters["handoffs_taken"] += 1
        self._counters["handoff_bytes_in"] += outcome.size_bytes
        target.release()
        self._scheduler.begin_decoding(_leader(live), target.handoff.num_valid_tokens)
        done = HandoffDone(
            request_id=live.key.request_id,
            attempt=live.key.attempt,
            size_bytes=outcome.size_bytes,
            duration_s=min(outcome.duration_s, now - target.completed_s),
            path=outcome.path,
        )
        return [AckSource(handoff=target.handoff), Tell(gateway=live.gateway, message=done)]

    def cancel(self, live: LiveAttempt) -> list[Command]:
        """The attempt ends before its KV is here. Call it before its sequences are finished."""
        target = live.handoff
        if target is None:
            return []
        commands: list[Command] = []
        if target.has_failed:
            live.handoff = None
            return [DropSource(handoff=target.handoff, reason=TransferError.CANCELLED.value)]
        if target.handoff_id in self._cached:
            self._cached.remove(target.handoff_id)
        elif target.is_pulling:
            commands.append(self._abandon(live, target))
        target.fail(Refusal(error=TransferError.CANCELLED, detail="the attempt was cancelled"))
        self._end(live)
        commands.append(DropSource(handoff=target.handoff, reason=TransferError.CANCELLED.value))
        return commands

    def tick(self, now: float) -> list[Command]:
        """Renew leases; give up what waited too long for room, or for the end of its pull."""
        commands: list[Command] = []
        for live in list(self._open.values()):
            target = live.handoff
            assert target is not None
            if target.handoff_id in self._cached and now >= target.give_up_s:
                self._cached.remove(target.handoff_id)
                target.fail(Refusal(error=TransferError.DEADLINE, detail="the source has not completed its early offer in time"))
                commands += self._without_kv(live, target)
            elif target.is_pulling and now >= target.give_up_s:
                commands.append(self._abandon(live, target))
                detail = f"the transport has not ended it {OVERDUE_S:g} s after its deadline of {self._deadline_s(target):g} s"
                target.fail(Refusal(error=TransferError.DEADLINE, detail=detail))
                commands += self._without_kv(live, target)
            elif now >= target.give_up_s:
                detail = f"no room here within {self._config.max_handoff_wait_s:g} s"
                target.fail(Refusal(error=TransferError.NO_BLOCKS, detail=detail))
                commands += self._without_kv(live, target)
            elif target.take_renewal(now):
                commands.append(RenewSource(handoff=target.handoff))
        return commands

    def _abandon(self, live: LiveAttempt, target: TargetHandoff) -> CancelPull:
        """Nobody waits for the copy any more, but it may still be writing: its blocks wait for its end alone."""
        self._quarantine[target.handoff_id] = _leader(live).give_up_blocks()
        return CancelPull(handoff_id=target.handoff_id)

    def overdue(self, now: float) -> list[LiveAttempt]:
        """Attempts whose early offer came to nothing, and that wait too long for their first token: to be given back."""
        parked = [sequence.attempt for sequence in self._scheduler.parked.values()]
        return [live for live in parked if live.handoff is not None and now >= live.handoff.give_up_s]

    def _end(self, live: LiveAttempt) -> None:
        assert live.handoff is not None
        self._open.pop(live.handoff.handoff_id, None)
        self._waiting.discard(live.handoff.handoff_id)
        live.handoff = None

    def _without_kv(self, live: LiveAttempt, target: TargetHandoff) -> list[Command]:
        """No KV comes of it. An early offer's first token does: it must be the one its source delivers, so nothing is computed before.

        The source keeps its blocks until then, or until the lease is over: it is in the middle of computing them.
        """
        was_pulling = _leader(live).sequence_id in self._scheduler.pulling
        if live.handoff is target:
            self._end(live)
        if not target.handoff.is_complete and self._config.kv_load_failure_policy is not FailurePolicy.FAIL:
            live.handoff = target
            self._scheduler.park(_leader(live))
            return []
        if was_pulling:
            self._scheduler.back_to_waiting(_leader(live))
        return self._give_up(live, target)

    def _give_up(self, live: LiveAttempt, target: TargetHandoff) -> list[Command]:
        """The offer is not taken: compute the prompt here, or fail the attempt."""
        refusal = target.refusal
        assert refusal is not None
        self._counters["transfer_failures"] += 1
        dropped = DropSource(handoff=target.handoff, reason=refusal.error.value)
        policy = recourse(self._config.kv_load_failure_policy, refusal.error, num_pulls=target.num_pulls)
        if policy is FailurePolicy.FAIL:
            why = f"its KV did not come ({refusal.error.value}: {refusal.detail})"
            self._fail(live, f"{why} and kv_load_failure_policy is fail; with recompute or retry it would be computed here")
            return [dropped]
        self._counters["recomputes"] += 1
        failed = TransferFailed(request_id=live.key.request_id, attempt=live.key.attempt, error=refusal.error.value, detail=refusal.detail)
        return [dropped, Tell(gateway=live.gateway, message=failed)]


def _leader(live: LiveAttempt) -> Sequence:
    assert live.leader is not None
    return live.leader
