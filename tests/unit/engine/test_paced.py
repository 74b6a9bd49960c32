"""The paced executor: tokens follow from the prefix as read from real blocks, whatever the batch; a wrong block changes them."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from dataclasses import replace

import pytest

from engine.core.executor import BatchPlan, Entries, PlanEntry, SampleEntry, Samples, SequenceStart, StepResult
from engine.hash_model import HashModel, next_token, prefix_words, read_of
from engine.paced import PacedExecutor, RegionMemory
from engine.step_time import LinearStepTime
from kvtransfer.region import PoolMemory
from protocol.errors import ConfigError
from protocol.kv import KVLayout, LayerGroup, LayerKind, ShardRectangle
from protocol.request import SamplingParams

pytestmark = pytest.mark.pure

GREEDY = SamplingParams(max_tokens=10, temperature=0.0)


def make_layout(*head_dims: int, dtype: str = "float32") -> KVLayout:
    groups = tuple(
        LayerGroup(kind=LayerKind.FULL, first_layer=2 * i, num_layers=2, num_kv_heads=2, head_dim=d, dtype=dtype)
        for i, d in enumerate(head_dims)
    )
    last = 2 * len(head_dims)
    return KVLayout(block_size_tokens=16, groups=groups, shard=ShardRectangle(first_head=0, last_head=2, first_layer=0, last_layer=last))


@pytest.fixture
def pool() -> Iterator[PoolMemory]:
    memory = PoolMemory.create(make_layout(4, 8), 8)
    yield memory
    memory.close()


def plan(step_id: int, entries: list[tuple[int, int, int, list[int]]], *, starts: dict[int, list[int]] | None = None) -> BatchPlan:
    """entries: (sequence, start, number of tokens, blocks); all are sampled."""
    return BatchPlan(
        step_id=step_id,
        ended=(),
        starts=tuple(
            SequenceStart(sequence_id=s, token_ids=array("I", tokens), num_prompt_tokens=len(tokens), choice=0, sampling=GREEDY)
            for s, tokens in (starts or {}).items()
        ),
        block_copies=(),
        entries=Entries.of(PlanEntry(sequence_id=s, start=a, num_tokens=n, block_table=array("I", b)) for s, a, n, b in entries),
        samples=Samples.of(SampleEntry(entry_index=i, sequence_id=e[0]) for i, e in enumerate(entries)),
    )


def tokens_of(model: HashModel, *plans: BatchPlan) -> list[int]:
    return [s.token_ids[0] for p in plans for s in model.run(p)]


PROMPT = list(range(100, 120))


def two_steps(model: HashModel, blocks: list[int], sequence: int = 0) -> list[int]:
    return tokens_of(
        model,
        plan(0, [(sequence, 0, 20, blocks)], starts={sequence: PROMPT}),
        plan(1, [(sequence, 20, 1, blocks)]),
    )


def test_tokens_do_not_depend_on_blocks_or_chunks(pool: PoolMemory) -> None:
    memory = RegionMemory(pool.region)
    whole = two_steps(HashModel(memory, vocab_size=97), [0, 1])
    moved = two_steps(HashModel(memory, vocab_size=97), [6, 2], sequence=4)
    model = HashModel(memory, vocab_size=97)
    chunks = [(0, 7), (7, 9), (16, 4)]
    for start, count in chunks[:-1]:
        chunk = plan(0, [(0, start, count, [3, 4])], starts={0: PROMPT} if start == 0 else None)
        model.run(replace(chunk, samples=()))
    chunked = tokens_of(model, plan(2, [(0, 16, 4, [3, 4])]), plan(3, [(0, 20, 1, [3, 4])]))
    assert whole == moved == chunked


@pytest.mark.parametrize("damage", ["zeroed block", "one row", "swapped blocks"])
def test_wrong_kv_changes_the_tokens(pool: PoolMemory, damage: str) -> None:
    """The negative control of everything that is judged by paced tokens."""
    memory = RegionMemory(pool.region)
    right = HashModel(memory, vocab_size=50_000)
    expected = two_steps(right, [0, 1])
    assert right.num_wrong_reads == 0
    model = HashModel(memory, vocab_size=50_000)
    first = tokens_of(model, plan(0, [(0, 0, 20, [2, 3])], starts={0: PROMPT}))
    size = pool.region.layout.block_bytes
    blocks = [2, 3]
    if damage == "zeroed block":
        pool.region.blocks[2 * size : 3 * size] = bytes(size)
    elif damage == "one row":
        pool.region.blocks[2 * size : 2 * size + 16] = bytes(16)  # token 0, first layer, K, head 0
    else:
        blocks = [3, 2]
    second = tokens_of(model, plan(1, [(0, 20, 1, blocks)]))
    assert first == expected[:1] and second != expected[1:] and model.num_wrong_reads == 1


def test_every_layer_is_touched_by_a_context(pool: PoolMemory) -> None:
    """A transfer that lost one layer is seen. Seen to fail reading row 0 only."""
    memory = RegionMemory(pool.region)
    words = prefix_words(0, array("I", range(32)))
    table = array("I", [0, 1])
    memory.write(table, 0, words)
    assert memory.read(table, 32) == words.tobytes()
    block = pool.region.layout.block_bytes
    offset = 0
    for group in pool.region.layout.groups:
        for _ in range(2 * group.num_layers * group.num_kv_heads):
            row_bytes = 16 * group.head_dim * 4
            saved = [bytes(pool.region.blocks[b * block + offset : b * block + offset + row_bytes]) for b in (0, 1)]
            for b in (0, 1):
                pool.region.blocks[b * block + offset : b * block + offset + row_bytes] = bytes(row_bytes)
            assert memory.read(table, 32) != words.tobytes()
            for b in (0, 1):
                pool.region.blocks[b * block + offset : b * block + offset + row_bytes] = saved[b]
            offset += row_bytes
    assert offset == block and memory.read(table, 32) == words.tobytes()


def test_seeded_choices_differ_and_greedy_ones_do_not() -> None:
    read = read_of(prefix_words(0, array("I", PROMPT)).tobytes())

    def draw(choice: int, **sampling: object) -> int:
        return next_token(read, SamplingParams(max_tokens=9, **sampling), choice=choice, position=0, vocab_size=50_000)  # type: ignore[arg-type]

    assert draw(0, temperature=0.0) == draw(1, temperature=0.0)
    assert len({draw(0, seed=1), draw(1, seed=1), draw(0, seed=2)}) == 3


def test_eos_comes_only_where_it_was_asked_for() -> None:
    read = read_of(prefix_words(0, array("I", PROMPT)).tobytes())
    sampling = SamplingParams(max_tokens=9, temperature=0.0, eos_token_ids=(0, 1), min_tokens=50, stop_token_ids=(2,))

    def tokens(**kind: int) -> list[int]:
        return [next_token(read, sampling, choice=0, position=p, vocab_size=4, **kind) for p in range(200)]

    assert set(tokens()[:50]) == {3} and set(tokens()[50:]) == {2, 3}
    assert 0 not in tokens(eos_period=2)[:50] and 60 < tokens(eos_period=2)[50:].count(0) < 90


def test_rows_must_be_whole_words() -> None:
    memory = PoolMemory.private(make_layout(2, dtype="bfloat16"), 2, 0)
    with pytest.raises(ConfigError, match="head_dim makes 4 bytes"):
        RegionMemory(memory.region)
    memory.close()


def test_steps_are_done_in_order_at_the_models_pace(pool: PoolMemory) -> None:
    results: list[StepResult] = []
    done = threading.Event()

    def on_done(result: StepResult) -> None:
        results.append(result)
        if len(results) == 3:
            done.set()

    executor = PacedExecutor(pool.region, LinearStepTime(prefill_token_s=0.001, decode_sequence_s=0.01), vocab_size=97)
    executor.start(on_done)
    executor.submit(plan(0, [(0, 0, 20, [0, 1])], starts={0: PROMPT}))
    executor.submit(plan(1, [(0, 20, 1, [0, 1])]))
    executor.submit(plan(2, [(7, 0, 1, [0, 1])]))
    assert done.wait(10.0)
    executor.close()
    assert [r.step_id for r in results] == [0, 1, 2]
    assert results[0].duration_s >= 0.02 and results[1].duration_s >= 0.01
    assert results[2].error is not None and not results[2].sampled, "a plan that cannot be computed fails alone"
    assert executor.num_wrong_reads == 0


def test_close_drops_what_waits_and_does_not_sleep_on(pool: PoolMemory) -> None:
    results: list[StepResult] = []
    executor = PacedExecutor(pool.region, LinearStepTime(prefill_token_s=10.0, decode_sequence_s=10.0), vocab_size=97)
    executor.start(results.append)
    for step in range(4):
        executor.submit(plan(step, [(step, 0, 20, [0, 1])], starts={step: PROMPT}))
    executor.close()
    assert len(results) <= 1
