"""A gateway of the abort campaign: one attempt at a time step by step, so that it can be stopped in any state of its hand-off."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

from control.config import ClusterConfig, load_config
from engine.demo import DEMO_MODEL_DIR
from engine.hash_model import next_token, prefix_words, read_of
from kvtransfer.handoff import complete
from protocol.kv import KVHandoff
from protocol.links import Target
from protocol.messages import AttemptFailed, Cancel, HandoffDone, OfferCompleted, Offered, Submit, TokenRun, TransferFailed
from protocol.request import Attempt, Request, SamplingParams
from protocol.worker import Role, WorkerAddress
from tests.worker_processes import WireGateway

DEADLINE_S = 2.0  # of a pull, and of a lease; the figure
MODEL_DIR: Path = DEMO_MODEL_DIR
VOCAB_SIZE = 4096  # of the demo model
PREFILL, DECODE = "prefill-0", "decode-0"


def config(kv_transport: str, role: Role, *, offer_early: bool) -> ClusterConfig:
    # Pools are small, so that blocks given up are soon written anew; and no digest comes to the generations' help.
    return load_config(
        {
            "model": {"path": "demo"},
            "workers": {
                "executor": "paced",
                "num_kv_blocks": 20 if role is Role.PREFILL else 24,
                "block_size": 16,
                "max_num_seqs": 16,
                "lease_s": DEADLINE_S,
                "pull_deadline_s": DEADLINE_S,
                "max_handoff_wait_s": DEADLINE_S,
                "offer_early": offer_early,
            },
            "paced": {
                "prefill_base_s": 0.002,
                "prefill_token_s": 0.0,
                "decode_base_s": 0.003,
                "decode_sequence_s": 0.0,
                "decode_read_s": 0.0,
            },
            "transport": {
                "kv_transport": kv_transport,
                "digest_mode": "off",
                "copy_slice_bytes": 1,
                "idle_close_s": 0.3,
                "fault_ahead_bytes": 0,
            },
        }
    )


def undisturbed(request: Request) -> list[int]:
    """What a paced worker says when nothing happens to it: the make-believe model, one token after the other."""
    tokens = array("I", request.prompt_token_ids)
    words = prefix_words(0, tokens)
    output: list[int] = []
    while len(output) < request.sampling.max_tokens:
        token = next_token(read_of(words.tobytes()), request.sampling, choice=0, position=len(output), vocab_size=VOCAB_SIZE)
        output.append(token)
        words += prefix_words(words[-1], array("I", [token]))
    return output


class Cluster(Protocol):
    """Where the workers are."""

    secret: bytes

    @property
    def addresses(self) -> dict[str, WorkerAddress]: ...


@dataclass(slots=True, eq=False)
class Trace:
    """What became of one attempt so far."""

    attempt: Attempt
    is_held_back: bool = False  # the gateway keeps the offer for itself
    handoff: KVHandoff | None = None
    completion: OfferCompleted | None = None  # of an offer that was made before its prefill's end
    is_sent_on: bool = False
    path: str = ""  # set once the target has the KV
    errors: list[str] = field(default_factory=list)  # of transfers that failed
    tokens: list[int] = field(default_factory=list)
    refused: str = ""  # a worker gave the attempt up

    @property
    def request_id(self) -> str:
        return self.attempt.request.request_id

    @property
    def has_complete_offer(self) -> bool:
        """There is an offer, and all that its target needs of the source but the KV."""
        return self.handoff is not None and (self.handoff.is_complete or self.completion is not None)

    def complete_offer(self) -> KVHandoff:
        assert self.handoff is not None and self.has_complete_offer
        return self.handoff if self.completion is None else complete(self.handoff, self.completion.completion)


class CampaignGateway(WireGateway):
    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)  # type: ignore[arg-type]
        self._cluster = cluster

    async def meet_all(self, timeout_s: float = 10.0) -> None:
        """Links to the workers that are there now; those of earlier incarnations go."""
        addresses = self._cluster.addresses
        self._links.set_targets([Target(name=a.worker_id, epoch=a.epoch, host=a.host, port=a.port) for a in addresses.values()])
        self.snapshots.clear()
        async with asyncio.timeout(timeout_s):
            while set(self._links.up) != set(addresses):
                await asyncio.sleep(0.005)

    def cancel_at(self, worker: str, request_id: str) -> None:
        self._links.send(worker, Cancel(request_id=request_id, attempt=0))

    def hang_up(self) -> None:
        """As a gateway that dies: every connection ends in the middle of things."""
        for name in self._links.up:
            if (connection := self._links.get(name)) is not None:
                connection.abort()

    def draw_request(self, rng: Random, shared: list[int]) -> Request:
        """One to five blocks of prompt, a third of them beginning alike; two to six tokens."""
        own = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.choice([1, 15, 16, 17, 30, 60]))]
        prompt = (shared if rng.random() < 0.3 else []) + own
        return self.request(prompt, SamplingParams(max_tokens=rng.randint(2, 6), temperature=0.0, ignore_eos=True))

    def long_request(self, rng: Random) -> Request:
        """Of a third of the source's blocks."""
        return self.request(
            [rng.randrange(3, VOCAB_SIZE) for _ in range(100)], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        )

    async def drive(self, trace: Trace, *, handoff: KVHandoff | None = None) -> None:
        """The attempt to its end: prefilled here, decoded there. `handoff`: begin with an offer that is at hand."""
        attempt = trace.attempt
        key = (trace.request_id, attempt.number)
        inbox: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._inbox[key] = inbox
        try:
            if handoff is None:
                self._submit(PREFILL, trace, None)
            else:
                trace.tokens = [handoff.first_tokens[0].token_id]
                self._submit(DECODE, trace, handoff)
            while not trace.refused and len(trace.tokens) < attempt.request.sampling.max_tokens:
                self._take(trace, await inbox.get())
        finally:
            del self._inbox[key]

    def _take(self, trace: Trace, told: tuple[str, Any]) -> None:
        _, message = told
        if isinstance(message, Offered):
            trace.handoff = message.handoff
            if not trace.is_held_back:
                self.send_on(trace)
        elif isinstance(message, OfferCompleted):
            trace.completion = message
            if trace.is_sent_on:
                self._links.send(DECODE, message)
        elif isinstance(message, HandoffDone):
            trace.path = message.path
        elif isinstance(message, TransferFailed):
            trace.errors.append(message.error)
        elif isinstance(message, AttemptFailed):
            trace.refused = message.reason
        else:
            assert isinstance(message, TokenRun)
            assert message.position == len(trace.tokens), f"position {message.position} after {len(trace.tokens)} tokens"
            trace.tokens.extend(message.token_ids)

    def send_on(self, trace: Trace) -> None:
        """The offer to the decode worker, now or, where there is none yet, when it comes."""
        trace.is_held_back = False
        if trace.handoff is None or trace.is_sent_on:
            return
        self._submit(DECODE, trace, trace.handoff)
        if trace.completion is not None:
            self._links.send(DECODE, trace.completion)

    def _submit(self, worker: str, trace: Trace, handoff: KVHandoff | None) -> None:
        trace.is_sent_on = trace.is_sent_on or worker == DECODE
        if not self._links.send(worker, Submit(attempt=trace.attempt, prefill_only=worker == PREFILL, handoff=handoff)):
            trace.refused = f"{worker} is down"
