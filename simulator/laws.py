"""The promises of the system as checks that run beside a simulation: what was true in one turn is looked at where the next may change it.

    I1  a request ends once, and in a way that was earned
    I2  what is delivered has no gap, nothing twice, and is what one worker alone would have said
    I3  blocks add up at every turn, and nobody reuses one that somebody still needs; at rest nothing is held (simulator/fault_run.py)
    I4  no block of one tenant is read, offered or copied for another
    I5  no step reads a block that a copy may still write or that was not verified, or a word its tokens do not call for
    I6  the counts a user is billed by are what was delivered and what was found

A turn costs what changed in it; whole pools are looked at now and then.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

from engine.core.events import (
    Command,
    Emit,
    Event,
    LoadBlocks,
    LoadDone,
    OfferKv,
    OfferPrefix,
    PeerAcked,
    PeerDropped,
    PullDone,
    RaiseGenerations,
    RunStep,
    SaveBlocks,
    StartPull,
    StepDone,
)
from engine.core.executor import BatchPlan
from engine.hash_model import next_token, prefix_words, read_of
from gateway.events import Abandon, Deliver, Fail, Finish, WorkerSaid
from gateway.events import Event as SessionEvent
from gateway.session import Session
from protocol.errors import AttemptsExhausted, NoWorker, Overloaded
from protocol.kv import KVHandoff
from protocol.messages import TokenRun
from protocol.request import FinishReason, Request
from simulator.sim_worker import SimWorker

FULL_CHECK_TURNS = 16  # one turn in so many looks at the whole pool
MAX_LEASES_SEEN = 64


class Law(Enum):
    ONE_END = "I1"
    STREAM = "I2"
    BLOCKS = "I3"
    TENANTS = "I4"
    VERIFIED = "I5"
    USAGE = "I6"
    INDEX = "index"  # at rest the router believes of each cache what is in it
    OWN = "assert"  # a part found by itself that it is broken


class LawBroken(AssertionError):
    """`law` does not hold; the text says where and how."""

    def __init__(self, law: Law, text: str) -> None:
        super().__init__(f"{law.value}: {text}")
        self.law = law


def check_books(check: Callable[[], None]) -> None:
    """A part's own count of everything it holds."""
    try:
        check()
    except AssertionError as error:
        raise LawBroken(Law.BLOCKS, str(error)) from error


class WorkerLaws:
    """Looks at every turn of one incarnation of a worker. Requests are told apart by their sampling seed, which is their number."""

    def __init__(self, worker: SimWorker, requests: Sequence[Request], by_id: Mapping[str, Request], *, num_blocks: int) -> None:
        self._worker = worker
        self._requests = requests
        self._by_id = by_id
        self._roots: list[bytes | None] = [None] * num_blocks  # whose content a block has; None: nobody's yet
        self._slot_roots: dict[int, bytes | None] = {}  # of the host tier
        self._unverified: set[int] = set()
        self._needed: dict[str, set[int]] = {}  # by step, copy or load under way
        self._leases: dict[str, set[int]] = {}  # by offer; some have ended
        self._sequences: dict[int, Request] = {}
        self._found: dict[str, set[int]] = {}  # request -> where computing its prompt began, in each residency here
        self._num_turns = 0

    def __call__(self, event: Event, commands: Sequence[Command]) -> None:
        self._hear(event)
        for command in commands:
            self._see(command)
        self._num_turns += 1
        if self._num_turns % FULL_CHECK_TURNS == 0:
            check_books(self._worker.core.check)

    def _hear(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._needed.pop(f"step {event.result.step_id}", None)
            if self._worker.executor.num_wrong_reads:
                raise LawBroken(
                    Law.VERIFIED, f"step {event.result.step_id} of {self._worker.worker_id} read what its tokens do not call for"
                )
        elif isinstance(event, PullDone):
            copied = self._needed.pop(f"copy {event.handoff_id}", set())
            if event.outcome.error is None:
                self._unverified -= copied
        elif isinstance(event, LoadDone):
            self._needed.pop(f"load {event.load_id}", None)
        elif isinstance(event, (PeerAcked, PeerDropped)):
            self._leases.pop(event.handoff_id, None)

    def _see(self, command: Command) -> None:
        roots = self._roots
        if isinstance(command, RunStep):
            self._step(command.plan)
        elif isinstance(command, RaiseGenerations):
            self._reuse(set(command.block_ids))
        elif isinstance(command, Emit):
            for run in command.runs:
                self._usage(run)
        elif isinstance(command, (OfferKv, OfferPrefix)):
            self._offer(command.handoff)
        elif isinstance(command, StartPull):
            targets = self._needed[f"copy {command.handoff.handoff_id}"] = set(command.target_block_ids)
            self._unverified |= targets
            root = self._by_id[command.handoff.request_id].cache_root
            for block_id in targets:
                roots[block_id] = root
        elif isinstance(command, SaveBlocks):
            for block_id, slot in zip(command.block_ids, command.slots, strict=True):
                self._slot_roots[slot] = roots[block_id]
        elif isinstance(command, LoadBlocks):
            self._needed[f"load {command.load_id}"] = set(command.block_ids)
            for block_id, slot in zip(command.block_ids, command.slots, strict=True):
                roots[block_id] = self._slot_roots[slot]

    def _step(self, plan: BatchPlan) -> None:
        roots, sequences = self._roots, self._sequences
        for sequence_id in plan.ended:
            sequences.pop(sequence_id, None)
        for start in plan.starts:
            sequences[start.sequence_id] = self._requests[start.sampling.seed]
        entries = plan.entries
        for start in plan.starts:
            if start.choice == 0 or start.sequence_id in entries.sequence_ids:
                index = entries.sequence_ids.index(start.sequence_id) if start.sequence_id in entries.sequence_ids else -1
                if index >= 0:
                    self._found.setdefault(sequences[start.sequence_id].request_id, set()).add(entries.starts[index])
        for source, target in plan.block_copies:
            roots[target] = roots[source]
        for sequence_id, table in zip(entries.sequence_ids, entries.block_tables, strict=True):
            root = sequences[sequence_id].cache_root
            held = set(map(roots.__getitem__, table))
            if held != {root}:
                if not held <= {root, None}:
                    text = f"step {plan.step_id} of {self._worker.worker_id} reads a block of another tenant"
                    raise LawBroken(Law.TENANTS, f"{text} for {sequences[sequence_id].request_id}")
                for block_id in table:
                    roots[block_id] = root
            if self._unverified and not self._unverified.isdisjoint(table):
                blocks = sorted(self._unverified.intersection(table))
                raise LawBroken(
                    Law.VERIFIED, f"step {plan.step_id} of {self._worker.worker_id} reads blocks {blocks} before they are verified"
                )
        named = set().union(*entries.block_tables, *plan.block_copies)
        self._needed[f"step {plan.step_id}"] = named

    def _reuse(self, raised: set[int]) -> None:
        for name, held in self._needed.items():
            if not held.isdisjoint(raised):
                raise LawBroken(Law.BLOCKS, f"{self._worker.worker_id} reuses blocks {sorted(held & raised)} that {name} needs")
        for handoff_id, held in list(self._leases.items()):
            if held.isdisjoint(raised):
                continue
            if self._worker.core.is_offering(handoff_id):
                raise LawBroken(Law.BLOCKS, f"{self._worker.worker_id} reuses blocks {sorted(held & raised)} that it offers")
            del self._leases[handoff_id]
        self._unverified -= raised
        for block_id in raised:
            self._roots[block_id] = None

    def _offer(self, handoff: KVHandoff) -> None:
        block_ids = set(handoff.shards[0].block_ids)
        whose = {self._roots[block_id] for block_id in block_ids}
        if not whose <= {self._by_id[handoff.request_id].cache_root, None}:
            raise LawBroken(Law.TENANTS, f"{self._worker.worker_id} offers a block of another tenant for {handoff.request_id}")
        if len(self._leases) >= MAX_LEASES_SEEN:
            self._leases = {name: held for name, held in self._leases.items() if self._worker.core.is_offering(name)}
        self._leases[handoff.handoff_id] = block_ids

    def _usage(self, run: TokenRun) -> None:
        """What is told of cached tokens is where computing began."""
        if run.num_cached_tokens:
            num_prompt_tokens = self._by_id[run.request_id].num_prompt_tokens
            began = {min(start, num_prompt_tokens) for start in self._found.get(run.request_id, ())}
            if run.num_cached_tokens not in began:
                told = f"{self._worker.worker_id} tells of {run.num_cached_tokens} cached tokens of {run.request_id}"
                raise LawBroken(Law.USAGE, f"{told}, it began at {sorted(began)}")


class _Choice:
    """What one choice of a request must say, token by token, computed anew from the prompt."""

    def __init__(self, request: Request, choice: int) -> None:
        self._sampling = request.sampling
        self._choice = choice
        self._words = prefix_words(0, request.prompt_token_ids)
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    def next(self, vocab_size: int) -> int:
        sampling, position = self._sampling, self.num_tokens
        token = next_token(read_of(self._words.tobytes()), sampling, choice=self._choice, position=position, vocab_size=vocab_size)
        self._words += prefix_words(self._words[-1], array("I", [token]))
        self.num_tokens += 1
        if token in sampling.stop_token_ids and position >= sampling.min_tokens:
            self.finish_reason = FinishReason.STOP
        elif self.num_tokens == sampling.max_tokens:
            self.finish_reason = FinishReason.LENGTH
        return token


class RequestLaws:
    """Looks at what sessions deliver and how they end."""

    def __init__(self, requests: Sequence[Request], *, vocab_size: int) -> None:
        self.num_cancelled = 0
        self._by_id = {request.request_id: request for request in requests}
        self._vocab_size = vocab_size
        self._choices: dict[str, list[_Choice]] = {}
        self._found: dict[str, int] = {}  # request -> cached tokens, as told with its first token
        self._ended: set[str] = set()

    def hear(self, session: Session, event: SessionEvent) -> None:
        """Before the session is told."""
        fact = event.fact if isinstance(event, WorkerSaid) else None
        if isinstance(fact, TokenRun) and fact.attempt == session.attempt.number and session.num_output_tokens == 0:
            self._found[session.request.request_id] = fact.num_cached_tokens

    def delivered(self, session: Session, deliver: Deliver) -> None:
        request = session.request
        choices = self._choices.get(request.request_id)
        if choices is None:
            choices = self._choices[request.request_id] = [_Choice(request, c) for c in range(request.sampling.n)]
        choice = choices[deliver.choice]
        where = f"choice {deliver.choice} of {request.request_id}"
        if request.request_id in self._ended:
            raise LawBroken(Law.ONE_END, f"{where} goes on after its end")
        if deliver.position != choice.num_tokens:
            raise LawBroken(Law.STREAM, f"{where} goes on at {deliver.position}, {choice.num_tokens} tokens are delivered")
        for token_id in deliver.token_ids:
            if choice.finish_reason is not None:
                raise LawBroken(Law.STREAM, f"{where} goes on after token {choice.num_tokens}, which was its last")
            expected = choice.next(self._vocab_size)
            if token_id != expected:
                raise LawBroken(Law.STREAM, f"{where} says {token_id} at {choice.num_tokens - 1}, alone it would say {expected}")
        if deliver.finish_reason is not choice.finish_reason:
            raise LawBroken(Law.STREAM, f"{where} ends by {deliver.finish_reason}, alone it would by {choice.finish_reason}")

    def ended(self, session: Session) -> None:
        request_id, end = session.request.request_id, session.end
        if request_id in self._ended:
            raise LawBroken(Law.ONE_END, f"{request_id} ends twice")
        self._ended.add(request_id)
        choices = self._choices.pop(request_id, [])
        if isinstance(end, Fail) and not isinstance(end.error, (AttemptsExhausted, NoWorker, Overloaded)):
            raise LawBroken(Law.ONE_END, f"{request_id} fails: {type(end.error).__name__}: {end.error}")
        self.num_cancelled += isinstance(end, Abandon)
        if isinstance(end, Finish) and (not choices or any(choice.finish_reason is None for choice in choices)):
            raise LawBroken(Law.STREAM, f"{request_id} is finished, and a choice of it is not")
        counted = sum(choice.num_tokens for choice in choices)
        if session.num_output_tokens != counted:
            raise LawBroken(Law.USAGE, f"{request_id} counts {session.num_output_tokens} tokens, {counted} were delivered")
        found = min(self._found.pop(request_id, 0), session.request.num_prompt_tokens) if counted else 0
        if session.num_cached_tokens != found:
            raise LawBroken(Law.USAGE, f"{request_id} counts {session.num_cached_tokens} cached tokens, {found} were found")
