"""Pools as queues of prompts and batches of decodes, step by step: what a search for a plan can afford to run hundreds of times.

    arrival ─► fewest tokens waiting ─► prompts in batches of L_m ─► first token ─► fewest sequences ─► room ─► transfer ─► decode ─► end
               (prefill or mixed)                                                   (decode)           the prompt's KV stays at its source

No prefix is found cached, nobody has a priority, a worker's steps follow each other without a gap, and KV is counted in tokens. Policies
are compared on the cluster's own code (simulator/routed_cluster.py); here the question is how many workers of which size.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from operator import sub
from random import Random

from engine.step_time import StepShape
from simulator.loop import VirtualLoop
from simulator.pools import Link, Pool, Pools, WorkerModel
from simulator.routed_gateway import Served
from simulator.traces.trace import TraceRequest

FREE_SHARE = 0.01  # of a worker's KV that is kept free when somebody is admitted, and
GROWTH_TOKENS = 8  # for each sequence that decodes, half a block: as decode_workers/policy.py does
DEADLINE_S = 90 * 86_400.0  # of virtual time; a run that is not over then never ends


@dataclass(slots=True, kw_only=True)
class Outcome(Served):
    """And the longest time between two of its tokens, in seconds; 0 where there is one at most."""

    pause_s: float = 0.0


def run_phases(
    requests: Sequence[TraceRequest],
    pools: Pools,
    models: Mapping[int, WorkerModel],
    *,
    link: Link,
    batch_tokens: int,
    rng: Random | None = None,
) -> list[Outcome]:
    """What comes of each request, in order. The same arguments are the same run.

    With `pools.prefill` alone a request ends with its first token; with `pools.decode` alone it arrives computed, its first token with it.

    models: by number of GPUs.
    batch_tokens: L_m, from which on more prompts in a batch only wait for each other (Sec. 3.1 of DistServe, OSDI'24); a longer prompt is
        computed alone.
    rng: draws workers evenly, as closed forms assume; None: the one with the least to do is taken.
    """
    run = _Run(requests, pools, models, link=link, batch_tokens=batch_tokens, rng=rng)
    done = run.loop.run(lambda: run.num_over == len(requests), deadline_s=DEADLINE_S)
    assert done, f"{len(requests) - run.num_over} requests do not end"
    return run.served


@dataclass(slots=True, kw_only=True, eq=False)
class _Sequence:
    """One request on one worker. `num_prompt_tokens`: to be computed at once; grows by what was generated when it has to start again."""

    served: Outcome
    num_prompt_tokens: int
    num_left: int  # tokens that are still to come
    num_computed: int = 0  # of the prompt
    joined_step: int = 0
    told_s: float = 0.0  # when its last token came, while it does not decode
    origin: int = 0  # context at step s of its worker is origin + s, while it decodes
    ticket: int = -1  # of its membership in the batch; -1: in none


class _Worker:
    """One worker's queue, batch and KV. `on_first(sequence)` is told when a prompt is computed; True: the sequence decodes here."""

    def __init__(
        self,
        run: _Run,
        model: WorkerModel,
        *,
        chunk_tokens: int | None,
        on_first: Callable[[_Worker, _Sequence], bool],
    ) -> None:
        self.model = model
        self.link_free_s = 0.0
        self.num_waiting_tokens = 0
        self.num_running = 0
        self.num_coming = 0  # sequences that wait for room here or are on their way
        self._run = run
        self._loop = run.loop
        self._chunk_tokens = chunk_tokens
        self._on_first = on_first
        self._waiting: deque[_Sequence] = deque()  # prompts, in order; the first may be computed in part
        self._coming: deque[tuple[_Sequence, _Worker | None]] = deque()  # with the worker that holds its KV, in order
        self._here: list[_Sequence] = []  # that decode from the next step on
        self._ends: list[tuple[int, int, _Sequence]] = []  # (first step without it, ticket, sequence) of the batch, and of who left it
        self._joined: list[tuple[int, _Sequence]] = []  # (ticket, sequence) in order, and of who left
        self._num_tickets = 0
        self._step = 0
        self._step_ends_s: list[float] = []  # of each decode step; those that were taken together evenly
        self._num_reads = 0  # KV tokens that the next decode step reads
        self._num_held = 0  # tokens of KV
        self._is_busy = False

    # --- what comes in ---

    def compute(self, sequence: _Sequence) -> None:
        self.num_waiting_tokens += sequence.num_prompt_tokens
        self._waiting.append(sequence)
        self._wake()

    def decode(self, sequence: _Sequence, source: _Worker | None) -> None:
        """As soon as there is room, and its KV has come. source: None, it is here when there is room."""
        self.num_coming += 1
        self._coming.append((sequence, source))
        self._accept()
        self._wake()

    def release(self, num_tokens: int) -> None:
        self._num_held -= num_tokens
        self._accept()
        self._wake()

    # --- steps ---

    def _wake(self) -> None:
        if not self._is_busy:
            self._join_arrived()
            self._begin()

    def _begin(self) -> None:
        parts = self._whole_prompts() if self._chunk_tokens is None else self._chunks(self._chunk_tokens)
        if parts:
            shape = StepShape()
            for sequence, num_tokens in parts:
                shape = shape.with_prefill(sequence.num_computed, num_tokens)
            with_decodes = self._chunk_tokens is not None and self.num_running > 0
            if with_decodes:
                shape = shape.with_decodes(self.num_running, self._num_reads)
            self._is_busy = True
            duration_s = self.model.step_time.step_s(shape)
            self._loop.call_later(duration_s, lambda: self._end(parts, int(with_decodes), duration_s))
        elif self.num_running:
            self._decode_steps(1 if self._make_room() else inf)

    def _decode_steps(self, most: float) -> None:
        """As many as nothing changes in, `most` at the most, and the one that the next change falls into."""
        count = self.num_running
        if not count:
            self._begin()  # the last one made room and is computed anew
            return
        most = min(most, self._next_end() - self._step, (self.model.kv_tokens - self._num_held) // count)
        left_s = self._run.change_s - self._loop.now
        duration_s, num_steps = 0.0, 0
        while not num_steps or (num_steps < most and duration_s < left_s):
            reads = self._num_reads + num_steps * count
            duration_s += self.model.step_time.step_s(StepShape(decodes=count, decode_reads=reads))
            num_steps += 1
        self._num_held += (num_steps - 1) * count  # whoever asks for room meanwhile asks in the last of these steps
        self._is_busy = True
        self._loop.call_later(duration_s, lambda: self._end((), num_steps, duration_s / num_steps))

    def _end(self, parts: Sequence[tuple[_Sequence, int]], num_steps: int, step_s: float) -> None:
        now = self._loop.now
        self._step_ends_s += [now - step_s * left for left in range(num_steps - 1, -1, -1)]
        self._step += num_steps
        self._num_reads += num_steps * self.num_running
        self._num_held += min(1, num_steps) * self.num_running  # of the last; `_decode_steps` counted those before
        while self._ends and self._ends[0][0] <= self._step:
            _, ticket, sequence = heapq.heappop(self._ends)
            if sequence.ticket == ticket:
                self._num_held -= self._leave(sequence)
                self._run.end(sequence)
        for sequence, num_tokens in parts:
            sequence.num_computed += num_tokens
            self.num_waiting_tokens -= num_tokens
            if sequence.num_computed == sequence.num_prompt_tokens:
                self._first_token(sequence)
        self._accept()
        self._is_busy = False
        self._wake()

    def _first_token(self, sequence: _Sequence) -> None:
        """The first, or the first since it was computed anew."""
        sequence.num_left -= 1
        served, now = sequence.served, self._loop.now
        if served.first_token_s is None:
            served.first_token_s = now
        else:
            served.pause_s = max(served.pause_s, now - sequence.told_s)
        sequence.told_s = now
        if not sequence.num_left:
            self._num_held -= sequence.num_prompt_tokens
            self._run.end(sequence)
        elif self._on_first(self, sequence):
            self._num_held += 1
            self._join(sequence, sequence.num_prompt_tokens + 1)

    # --- who computes ---

    def _whole_prompts(self) -> list[tuple[_Sequence, int]]:
        """First come, first served, up to L_m tokens; one prompt whatever its length."""
        parts: list[tuple[_Sequence, int]] = []
        num_tokens = 0
        while self._waiting:
            head = self._waiting[0]
            if (parts and num_tokens + head.num_prompt_tokens > self._run.batch_tokens) or not self._has_room(head.num_prompt_tokens):
                break
            num_tokens += head.num_prompt_tokens
            self._num_held += head.num_prompt_tokens
            parts.append((self._waiting.popleft(), head.num_prompt_tokens))
        return parts

    def _chunks(self, chunk_tokens: int) -> list[tuple[_Sequence, int]]:
        """Every sequence that decodes takes a token of the step's, prompts the rest (Sarathi-Serve, OSDI'24)."""
        if not self._waiting:
            return []
        self._make_room()
        parts: list[tuple[_Sequence, int]] = []
        num_left = chunk_tokens - self.num_running
        while self._waiting and num_left > 0:
            head = self._waiting[0]
            if not head.num_computed:
                if not self._has_room(head.num_prompt_tokens):
                    break
                self._num_held += head.num_prompt_tokens
            num_tokens = min(num_left, head.num_prompt_tokens - head.num_computed)
            parts.append((head, num_tokens))
            num_left -= num_tokens
            if head.num_computed + num_tokens < head.num_prompt_tokens:
                break
            self._waiting.popleft()
        return parts

    # --- who decodes ---

    def _accept(self) -> None:
        while self._coming and self._has_room(self._coming[0][0].num_prompt_tokens + 1):
            sequence, source = self._coming.popleft()
            self._num_held += sequence.num_prompt_tokens + 1
            if source is None:
                self._here.append(sequence)
            else:
                self._pull(sequence, source)

    def _pull(self, sequence: _Sequence, source: _Worker) -> None:
        link, now = self._run.link, self._loop.now
        begin_s = max(now, source.link_free_s, self.link_free_s)
        end_s = begin_s + sequence.num_prompt_tokens * self.model.kv_token_bytes / link.bytes_per_s
        source.link_free_s = self.link_free_s = end_s

        def arrived() -> None:
            self._here.append(sequence)
            source.release(sequence.num_prompt_tokens)
            self._wake()

        self._loop.call_at(end_s + link.latency_s, arrived)

    def _join_arrived(self) -> None:
        for sequence in self._here:
            self.num_coming -= 1
            self._join(sequence, sequence.num_prompt_tokens + 1)
        self._here.clear()

    def _join(self, sequence: _Sequence, num_context_tokens: int) -> None:
        step = self._step
        sequence.ticket, sequence.joined_step, sequence.origin = self._num_tickets, step, num_context_tokens - step
        self._num_tickets += 1
        heapq.heappush(self._ends, (step + sequence.num_left, sequence.ticket, sequence))
        self._joined.append((sequence.ticket, sequence))
        self.num_running += 1
        self._num_reads += num_context_tokens

    def _leave(self, sequence: _Sequence) -> int:
        """Tokens of its context."""
        num_tokens = sequence.origin + self._step
        times = [sequence.told_s, *self._step_ends_s[sequence.joined_step : self._step]]
        sequence.told_s = times[-1]
        sequence.served.pause_s = max([sequence.served.pause_s, *map(sub, times[1:], times)])
        sequence.ticket = -1
        self.num_running -= 1
        self._num_reads -= num_tokens
        return num_tokens

    def _next_end(self) -> int:
        while self._ends[0][2].ticket != self._ends[0][1]:
            heapq.heappop(self._ends)
        return self._ends[0][0]

    def _has_room(self, num_tokens: int) -> bool:
        kept = max(FREE_SHARE * self.model.kv_tokens, GROWTH_TOKENS * self.num_running)
        return not self._num_held or self._num_held + num_tokens + kept <= self.model.kv_tokens

    def _make_room(self) -> bool:
        """For one token of everybody who decodes: who joined last leaves, and is computed anew when there is room.

        True: somebody left, so that there may be room for others after the next step.
        """
        before = self.num_running
        while self.num_running and self._num_held + self.num_running > self.model.kv_tokens:
            ticket, sequence = self._joined.pop()
            if sequence.ticket != ticket:
                continue
            ends_at = next(end for end, other, _ in self._ends if other == ticket)
            num_tokens = self._leave(sequence)
            self._num_held -= num_tokens
            sequence.num_left = ends_at - self._step
            sequence.num_prompt_tokens, sequence.num_computed = num_tokens, 0
            self.num_waiting_tokens += num_tokens
            at = 1 if self._waiting and self._waiting[0].num_computed else 0
            self._waiting.insert(at, sequence)
        return self.num_running < before


class _Run:
    """The pools of one run, and who is sent where."""

    def __init__(
        self,
        requests: Sequence[TraceRequest],
        pools: Pools,
        models: Mapping[int, WorkerModel],
        *,
        link: Link,
        batch_tokens: int,
        rng: Random | None,
    ) -> None:
        self.loop = VirtualLoop()
        self.link = link
        self.batch_tokens = batch_tokens
        self.served = [_outcome(number, request) for number, request in enumerate(requests)]
        self.num_over = 0
        self._rng = rng

        def workers(pool: Pool | None, on_first: Callable[[_Worker, _Sequence], bool]) -> list[_Worker]:
            if pool is None:
                return []
            model = models[pool.gpus_each]
            return [_Worker(self, model, chunk_tokens=pools.chunk_tokens, on_first=on_first) for _ in range(pool.count)]

        self._prefill = workers(pools.prefill, self._hand_off) or workers(pools.mixed, _stay)
        self._decode = workers(pools.decode, _stay)
        self._kv_tokens = min(worker.model.kv_tokens for worker in self._prefill + self._decode)
        self._due = iter(self.served)
        self._next_arrival_s = inf
        self._await_next()

    @property
    def change_s(self) -> float:
        """When somebody who decodes may hear of something next: workers that do both hear of arrivals alone, others of hand-offs too."""
        return self.loop.next_s if self._decode else self._next_arrival_s

    def end(self, sequence: _Sequence) -> None:
        sequence.served.end_s, sequence.served.terminal = self.loop.now, "finished"
        self.num_over += 1

    def _await_next(self) -> None:
        """One arrival at a time is on the clock, which is the quicker the less it holds."""
        served = next(self._due, None)
        self._next_arrival_s = served.arrived_s if served is not None else inf
        if served is not None:
            self.loop.call_at(served.arrived_s, lambda: self._arrive(served))

    def _arrive(self, served: Outcome) -> None:
        self._await_next()
        sequence = _Sequence(served=served, num_prompt_tokens=served.num_prompt_tokens, num_left=served.num_output_tokens)
        if sequence.num_prompt_tokens + sequence.num_left > self._kv_tokens:
            served.end_s, served.terminal = self.loop.now, "refused"
            served.reason = f"{sequence.num_prompt_tokens + sequence.num_left:,} tokens; a worker holds {self._kv_tokens:,}"
            self.num_over += 1
        elif self._prefill:
            self._least(self._prefill, lambda w: (w.num_waiting_tokens, w.num_running)).compute(sequence)
        else:
            served.first_token_s = sequence.told_s = self.loop.now
            sequence.num_left -= 1
            if sequence.num_left:
                self._least(self._decode, lambda w: (w.num_running + w.num_coming, 0)).decode(sequence, None)
            else:
                self.end(sequence)

    def _hand_off(self, source: _Worker, sequence: _Sequence) -> bool:
        if self._decode:
            self._least(self._decode, lambda w: (w.num_running + w.num_coming, 0)).decode(sequence, source)
        else:
            source.release(sequence.num_prompt_tokens)
            self.end(sequence)
        return False

    def _least(self, workers: Sequence[_Worker], key: Callable[[_Worker], tuple[int, int]]) -> _Worker:
        return min(workers, key=key) if self._rng is None else self._rng.choice(workers)


def _outcome(number: int, request: TraceRequest) -> Outcome:
    return Outcome(
        request_id=f"{number:08x}",
        arrived_s=request.at_s,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=request.output_tokens,
    )


def _stay(worker: _Worker, sequence: _Sequence) -> bool:
    return True
