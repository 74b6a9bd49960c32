"""What was decided of each attempt and how it came out, kept for a while so that somebody can ask why: `baton explain`.

    placed or refused ──► first token ──► end          of one (request, attempt); facts of another change nothing

Pure, and bounded by count: the oldest record goes when a new one finds no room, whether its attempt has ended or not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice

from protocol.lifecycle import AttemptState
from protocol.messages import Assignment, CandidateScore, Done, HandoffDone, Place, Refused
from protocol.request import AttemptKey

MAX_ANSWERED = 16  # attempts told of in one answer, newest first kept: a client may use one name again and again


@dataclass(slots=True, kw_only=True)
class Explanation:
    """One attempt. What is not known yet, or never will be, is None."""

    key: AttemptKey
    tenant: str
    known_as: tuple[str, ...]
    num_tokens: int  # prompt + delivered
    decided_s: float  # on the clock of who keeps it
    decision: Assignment | Refused
    first_token_s: float | None = None  # from the decision on
    found_tokens: int | None = None  # cached, as the worker said
    num_output_tokens: int | None = None
    state: AttemptState | None = None  # a final one
    duration_s: float | None = None  # from the decision to the end
    handoff: HandoffDone | None = None
    transfer_error: str = ""

    @property
    def assignment(self) -> Assignment | None:
        return self.decision if isinstance(self.decision, Assignment) else None

    @property
    def ttft_s(self) -> float | None:
        """From the arrival of this attempt at the router."""
        if self.first_token_s is None or not isinstance(self.decision, Assignment):
            return None
        return self.decision.waited_s + self.first_token_s


class Explanations:
    """The newest `max_count` attempts that were placed or refused."""

    def __init__(self, *, max_count: int) -> None:
        self.max_count = max_count
        self._by_key: OrderedDict[AttemptKey, Explanation] = OrderedDict()
        self._named: dict[str, OrderedDict[AttemptKey, None]] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Explanation]:
        """Oldest first."""
        return iter(self._by_key.values())

    def placed(self, place: Place, assignment: Assignment, now: float) -> None:
        self._add(place, assignment, now)

    def refused(self, place: Place, refusal: Refused, now: float) -> None:
        self._add(place, refusal, now)

    def reassigned(self, key: AttemptKey, assignment: Assignment) -> None:
        """Another worker is to decode it: `assignment` stands for the one before, whose reason it repeats. It may lack prefill's scores."""
        record = self._by_key.get(key)
        if record is not None and record.assignment is not None and record.state is None:
            record.decision = replace(assignment, prefill_scores=record.assignment.prefill_scores)

    def first_token(self, key: AttemptKey, now: float, *, found_tokens: int | None) -> None:
        """`found_tokens`: what its worker found cached of the prompt; None: not told. Only the first word counts."""
        record = self._by_key.get(key)
        if record is not None and record.assignment is not None and record.first_token_s is None and record.state is None:
            record.first_token_s, record.found_tokens = now - record.decided_s, found_tokens

    def ended(self, done: Done, now: float) -> None:
        record = self._by_key.get(AttemptKey(request_id=done.request_id, attempt=done.attempt))
        if record is not None and record.assignment is not None and record.state is None:
            record.state, record.num_output_tokens = done.state, done.num_output_tokens
            record.handoff, record.transfer_error = done.handoff, done.transfer_error
            record.duration_s = now - record.decided_s

    def find(self, name: str, tenant: str | None = None) -> tuple[Explanation, ...]:
        """What is remembered under a request id or another name, oldest first. `tenant`: only that one's; None: everybody's."""
        records = (self._by_key[key] for key in self._named.get(name, ()))
        return tuple(r for r in records if tenant is None or r.tenant == tenant)

    def newest(self, count: int) -> list[Explanation]:
        """At most so many, oldest first."""
        return list(islice(reversed(self._by_key.values()), count))[::-1]

    def check(self) -> None:
        """Assert that the bound holds and that every name leads to a record that is there, and every record has its names."""
        assert len(self) <= self.max_count, f"{len(self)} explanations kept, the limit is {self.max_count}"
        named = {(name, key) for name, keys in self._named.items() for key in keys}
        assert named == {(name, record.key) for record in self for name in _names(record)}, "names and records differ"
        assert all(self._named.values()), "a name that leads nowhere"

    def _add(self, place: Place, decision: Assignment | Refused, now: float) -> None:
        if self.max_count == 0:
            return
        key = AttemptKey(request_id=place.request_id, attempt=place.attempt)
        self._forget(key)  # asked for again after its booking was over
        while len(self._by_key) >= self.max_count:
            self._forget(next(iter(self._by_key)))
        record = Explanation(
            key=key, tenant=place.tenant, known_as=place.known_as, num_tokens=place.num_tokens, decided_s=now, decision=decision
        )
        self._by_key[key] = record
        for name in _names(record):
            self._named.setdefault(name, OrderedDict())[key] = None

    def _forget(self, key: AttemptKey) -> None:
        record = self._by_key.pop(key, None)
        if record is None:
            return
        for name in _names(record):
            keys = self._named[name]
            del keys[key]
            if not keys:
                del self._named[name]


def _names(record: Explanation) -> Iterable[str]:
    return dict.fromkeys((record.key.request_id, *record.known_as))


# --- as JSON ----------------------------------------------------------------------------------------------------------


def answer(explanations: Explanations, name: str, tenant: str | None, now: float, *, by: str) -> dict[str, object]:
    """What is kept under `name`, as plain JSON values: the newest MAX_ANSWERED attempts, and how many are kept in all."""
    found = explanations.find(name, tenant)
    return {
        "attempts": [document(record, now, by=by) for record in found[-MAX_ANSWERED:]],
        "left_out": max(0, len(found) - MAX_ANSWERED),
        "kept": len(explanations),
        "limit": explanations.max_count,
    }


def document(record: Explanation, now: float, *, by: str) -> dict[str, object]:
    """One attempt; `by` says who decided: the router, or a gateway in its place."""
    placed = isinstance(record.decision, Assignment)
    return {
        "request_id": record.key.request_id,
        "attempt": record.key.attempt,
        "by": by,
        "age_s": round(now - record.decided_s, 3),
        "num_tokens": record.num_tokens,
        "assignment": assignment_document(record.decision) if isinstance(record.decision, Assignment) else None,
        "refusal": _refusal(record.decision) if isinstance(record.decision, Refused) else None,
        "outcome": _outcome(record) if placed else None,
    }


def assignment_document(assignment: Assignment) -> dict[str, object]:
    predicted_s = assignment.predicted_ttft_s
    return {
        "request_id": assignment.request_id,
        "attempt": assignment.attempt,
        "prefill_worker": assignment.prefill_worker,
        "decode_worker": assignment.decode_worker,
        "cached_tokens": assignment.cached_tokens,
        "confirmed_tokens": assignment.confirmed_tokens,
        "policy": assignment.policy,
        "reason": assignment.reason,
        "waited_s": round(assignment.waited_s, 6),
        "predicted_ttft_s": None if predicted_s is None else round(predicted_s, 6),
        "predicted_handoff_s": round(assignment.predicted_handoff_s, 6),
        "prefix_source": asdict(assignment.prefix_source) if assignment.prefix_source is not None else None,
        "prefill_scores": [_score(s) for s in assignment.prefill_scores],
        "decode_scores": [_score(s) for s in assignment.decode_scores],
    }


def _outcome(record: Explanation) -> dict[str, object]:
    handoff = record.handoff
    return {
        "ttft_s": _rounded(record.ttft_s),
        "first_token_s": _rounded(record.first_token_s),
        "found_tokens": record.found_tokens,
        "output_tokens": record.num_output_tokens,
        "state": record.state.value if record.state is not None else None,
        "duration_s": _rounded(record.duration_s),
        "handoff_s": _rounded(handoff.duration_s) if handoff is not None else None,
        "handoff_path": handoff.path if handoff is not None else None,
        "handoff_bytes": handoff.size_bytes if handoff is not None else None,
        "transfer_error": record.transfer_error or None,
    }


def _refusal(refused: Refused) -> dict[str, object]:
    return {"status": refused.status, "message": refused.message, "retry_after_s": refused.retry_after_s}


def _score(score: CandidateScore) -> dict[str, object]:
    return {
        "worker_id": score.worker_id,
        "seconds": score.seconds,
        "cached_tokens": score.cached_tokens,
        "signal_age_s": round(score.signal_age_s, 4),
        "terms": dict(zip(score.term_names, score.term_seconds, strict=True)),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
