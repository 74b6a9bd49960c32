"""The same damage under a model that has learned something: the bundled demo model, through the real executor.

Prompts are prefilled into one pool, pulled into another by the local backend with no check at all, damaged, and decoded greedily. A
model forgives what a hash does not: a low bit of a mantissa may leave every token as it was. So this says how often damage shows in
text, per kind, and the hash model (tests.kv_campaign.tokens) says whether it reached a decode step.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, replace
from random import Random

from engine.demo import DEMO_MODEL_DIR
from kvtransfer.layers import layer_spans
from kvtransfer.local import LocalExchange, LocalTransport
from kvtransfer.region import PoolMemory
from kvtransfer.transport import Transfer
from protocol.kv import DigestMode, Endpoint, HandoffShard
from tests.kv_campaign.backends import SOURCE, TARGET
from tests.kv_campaign.cases import PLACES_MAX, Case, Kind, damage, draw
from tests.kv_campaign.layouts import CampaignLayout
from tests.kv_campaign.tokens import EveryRow
from tests.torch_driver import GREEDY, TorchDriver

NUM_DECODED = 32  # tokens compared
_BATCH = 32
_NUM_PROMPTS = 48
_BLOCK_SIZE = 16
_STRIDE = PLACES_MAX + NUM_DECODED // _BLOCK_SIZE + 1  # blocks of the target a sequence: the hand-off's and room to grow


@dataclass(frozen=True, slots=True)
class DemoTally:
    """By kind: injections that damage what a decode step reads, and of those the ones that change the next token, or any of NUM_DECODED."""

    hits: Counter[Kind]
    next_token: Counter[Kind]
    any_token: Counter[Kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    tokens: list[int]
    block_ids: array[int]  # in the source's pool
    output: list[int]  # the sampled first token, then what an undisturbed decode says


def judge(total: int, seed: int) -> DemoTally:
    tally = DemoTally(Counter(), Counter(), Counter())
    with TorchDriver(DEMO_MODEL_DIR) as prefill, TorchDriver(DEMO_MODEL_DIR, num_blocks=_BATCH * _STRIDE) as decode:
        layout = prefill.pool.region.layout
        campaign_layout = CampaignLayout(
            name="demo", model="the demo model", real_block_bytes=layout.block_bytes, layout=layout, spans=tuple(layer_spans(layout))
        )
        prompts = _prompts(prefill, seed)
        target = _Target(prefill.pool, decode.pool, campaign_layout)
        for first in range(0, total, _BATCH):
            batch = []
            for number in range(first, min(first + _BATCH, total)):
                rng = Random(seed << 40 | number)
                prompt, other = rng.sample(prompts, 2)
                case = _fitted(draw(number, seed, ["local"], [campaign_layout]), prompt)
                base = (number - first) * _STRIDE
                table = array("I", range(base, base + case.num_places))
                target.pull(prompt.block_ids, table)
                target.spoil(case, table, other.block_ids, rng)
                if target.differs(prompt.block_ids, table, case.num_tokens):
                    batch.append((case, prompt, table))
            outputs = _decode(decode, first, [(prompt, table) for _, prompt, table in batch])
            for (case, prompt, _), output in zip(batch, outputs, strict=True):
                tally.hits[case.kind] += 1
                tally.next_token[case.kind] += output[0] != prompt.output[1]
                tally.any_token[case.kind] += output != prompt.output[1:]
        target.close()
    return tally


class _Target:
    """The pool that is pulled into, beside the one that is pulled from."""

    def __init__(self, source: PoolMemory, target: PoolMemory, layout: CampaignLayout) -> None:
        exchange = LocalExchange()
        self._source, self._target, self._layout = source, target, layout
        self._transports = [LocalTransport(exchange, worker_id=name, epoch=1) for name in (SOURCE, TARGET)]
        self._transports[0].register(source.region)
        self._transports[1].register(target.region)
        self._rows = EveryRow(source.region), EveryRow(target.region)

    def close(self) -> None:
        del self._rows

    def pull(self, block_ids: array[int], table: array[int]) -> None:
        shard = HandoffShard(
            worker_id=SOURCE,
            rank=0,
            epoch=1,
            endpoint=Endpoint(),
            region_id=0,
            layout=self._layout.layout,
            block_ids=block_ids,
            generations=array("Q", [self._source.region.generations[b] for b in block_ids]),
            digest_mode=DigestMode.OFF,
            digests=b"",
        )
        places = array("I", range(len(block_ids)))
        self._transports[1].start(
            Transfer(source=shard, source_indices=places, target_region_id=0, target_block_ids=table, deadline_s=20.0)
        )
        ((_, outcome),) = self._transports[1].poll()
        assert outcome.error is None, outcome

    def spoil(self, case: Case, table: array[int], other: array[int], rng: Random) -> None:
        """Other blocks are those of another prompt: what lay there before, what is written anew, what is delivered instead."""
        views = [self._block(self._target, b) for b in table]
        others = [bytes(self._block(self._source, other[place % len(other)])) for place in range(len(table))]
        anew = others[rng.randrange(len(others))]
        if case.kind.is_staleness:
            end = len(anew) // 2 if case.half and case.kind is Kind.LATE_WRITER else len(anew)
            views[case.place][:end] = anew[:end]
        else:
            damage(case, self._layout.spans, views, earlier=others, foreign=anew)

    def differs(self, block_ids: array[int], table: array[int], num_tokens: int) -> bool:
        """What a decode step reads there is not what it would read at the source."""
        return self._rows[0].read(block_ids, num_tokens) != self._rows[1].read(table, num_tokens)

    def _block(self, pool: PoolMemory, block_id: int) -> memoryview:
        size = pool.region.layout.block_bytes
        return pool.region.blocks[block_id * size : (block_id + 1) * size]


def _prompts(driver: TorchDriver, seed: int) -> list[_Prompt]:
    """Python text, which is what the model has learned, of two to four blocks; the last one may be partial."""
    from engine.tokenizer import Tokenizer  # imports tokenizers
    from tests.kv_campaign import cases

    tokenizer = Tokenizer.from_directory(DEMO_MODEL_DIR)
    with open(cases.__file__) as file:
        text = list(tokenizer.encode(file.read(), add_special_tokens=False))
    rng = Random(seed)
    lengths = [rng.choice([32, 48, 64, rng.randint(17, 64)]) for _ in range(_NUM_PROMPTS)]
    starts = [rng.randrange(len(text) - 64) for _ in lengths]
    prompts = [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    outputs = driver.generate(prompts, NUM_DECODED + 1)
    return [
        _Prompt(tokens=prompt, block_ids=driver.tables[i][: -(-len(prompt) // _BLOCK_SIZE)], output=outputs[i])
        for i, prompt in enumerate(prompts)
    ]


def _fitted(case: Case, prompt: _Prompt) -> Case:
    """The case for the prompt's number of blocks, so that damage lies where a decode step reads."""
    num_places = len(prompt.block_ids)
    place = case.place % num_places
    other = (place + 1 + case.other_place % (num_places - 1)) % num_places
    return replace(case, num_places=num_places, num_tokens=len(prompt.tokens), place=place, other_place=other)


def _decode(driver: TorchDriver, first_id: int, sequences: list[tuple[_Prompt, array[int]]]) -> list[list[int]]:
    """NUM_DECODED greedy tokens of each, from the KV that lies in its blocks; the blocks behind each table are its room to grow."""
    outputs: list[list[int]] = [[] for _ in sequences]
    ids = range(first_id, first_id + len(sequences))
    starts = [driver.start(i, [*prompt.tokens, prompt.output[0]], **GREEDY) for i, (prompt, _) in zip(ids, sequences, strict=True)]
    for i, (_, table) in zip(ids, sequences, strict=True):
        driver.tables[i] = array("I", range(table[0], table[0] + _STRIDE))
    live = list(zip(ids, sequences, strict=True))
    for step in range(NUM_DECODED):
        entries = [driver.entry(i, len(prompt.tokens) + step, 1) for i, (prompt, _) in live]
        result = driver.step_result(entries, [(row, i) for row, (i, _) in enumerate(live)], starts=starts)
        assert result.error is None, result.error
        for sampled in result.sampled:
            # A flipped exponent makes logits that are no numbers: the executor gives that sequence up, which is no right token either.
            outputs[sampled.sequence_id - first_id].extend(sampled.token_ids if sampled.error is None else [-1])
        live = [(i, sequence) for i, sequence in live if -1 not in outputs[i - first_id]]
        starts = []
    driver.step(ended=list(ids))
    return outputs
