"""The torch executor keeps the executor's promises: order, memory of sequences, shared prompts, errors of one sequence alone.

How: a small random Llama on a real pool, driven plan by plan. Seen to fail with the sampled token not appended, with block copies left
out, and with a sibling's token drawn under choice 0.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from engine.core.executor import BatchPlan, Entries, SampleEntry, Samples, StepResult  # noqa: E402
from engine.models.config import load_model_config  # noqa: E402
from engine.runner.config import RunnerConfig  # noqa: E402
from engine.runner.torch_executor import TorchExecutor  # noqa: E402
from kvtransfer.region import PoolMemory  # noqa: E402
from protocol.errors import ConfigError, ModelError  # noqa: E402
from tests.torch_driver import GREEDY, TorchDriver  # noqa: E402

PROMPT = [random.Random(3).randrange(3, 500) for _ in range(40)]
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 11, "ignore_eos": True}


@pytest.fixture(scope="module")
def model_dir(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", num_hidden_layers=2)


@pytest.fixture(params=["torch", "auto"])
def driver(model_dir: Path, request: pytest.FixtureRequest) -> Iterator[TorchDriver]:
    with TorchDriver(model_dir, kernels=request.param) as driver:
        yield driver


def continued(driver: TorchDriver, sequence_id: int, known: int, num_tokens: int) -> list[int]:
    """Decode one sequence on its own, whose first `known` tokens have KV but the last."""
    output: list[int] = []
    for step in range(num_tokens):
        (sampled,) = driver.step([driver.entry(sequence_id, known + step - 1, 1)], [(0, sequence_id)])
        output += sampled.token_ids
    return output


def test_all_choices_are_drawn_from_the_shared_prompts_logits(driver: TorchDriver, model_dir: Path) -> None:
    starts = [driver.start(i, PROMPT, choice=i, n=3, **SEEDED) for i in range(3)]
    sampled = driver.step([driver.entry(0, 0, 40)], [(0, 0), (0, 1), (0, 2)], starts=starts)
    first = [s.token_ids[0] for s in sampled]
    assert [s.sequence_id for s in sampled] == [0, 1, 2] and len(set(first)) == 3
    # Choice 1 goes on over the shared full blocks and its own copy of the last, partly filled one.
    driver.tables[1] = driver.tables[0][:]
    copy = driver._free.pop(0)
    source, driver.tables[1][2] = driver.tables[1][2], copy
    (second,) = driver.step([driver.entry(1, 40, 1)], [(0, 1)], block_copies=[(source, copy)])
    with TorchDriver(model_dir) as alone:
        alone.step(starts=[alone.start(7, PROMPT, choice=1, n=3, **SEEDED)])
        (drawn,) = alone.step([alone.entry(7, 0, 40)], [(0, 7)])
        assert list(drawn.token_ids) == [first[1]]
        assert continued(alone, 7, 41, 1) == list(second.token_ids)


def test_a_retry_goes_on_where_the_attempt_before_was_lost(driver: TorchDriver) -> None:
    """Delivered tokens come as known ones behind the original boundary: position, penalties and min_tokens count from there."""
    params: dict[str, Any] = {"temperature": 0.8, "seed": 5, "presence_penalty": 0.7, "frequency_penalty": 0.2, "min_tokens": 9}
    params["eos_token_ids"] = (2,)
    (whole,) = driver.generate([PROMPT], 10, **{**params, "ignore_eos": False})
    retry = driver.start(50, PROMPT + whole[:4], num_prompt_tokens=40, **params)
    (sampled,) = driver.step([driver.entry(50, 0, 44)], [(0, 50)], starts=[retry])
    assert [*sampled.token_ids, *continued(driver, 50, 45, 5)] == whole[4:]
    fresh = driver.start(51, PROMPT + whole[:4], num_prompt_tokens=44, **params)
    (sampled,) = driver.step([driver.entry(51, 0, 44)], [(0, 51)], starts=[fresh])
    assert [*sampled.token_ids, *continued(driver, 51, 45, 5)] != whole[4:], "as a new prompt it is drawn anew"


def test_a_preempted_sequence_is_computed_again_from_what_the_executor_remembers(driver: TorchDriver) -> None:
    (whole,) = driver.generate([PROMPT], 8)
    driver.step(starts=[driver.start(50, PROMPT, **GREEDY)])
    (sampled,) = driver.step([driver.entry(50, 0, 40)], [(0, 50)])
    output = [*sampled.token_ids, *continued(driver, 50, 41, 3)]
    driver.tables[50] = array("I")  # its blocks were taken
    (sampled,) = driver.step([driver.entry(50, 0, 44)], [(0, 50)])
    assert [*output, *sampled.token_ids, *continued(driver, 50, 45, 3)] == whole


def test_the_next_step_may_be_submitted_before_the_last_is_done(driver: TorchDriver) -> None:
    """Step k+1 computes the token step k samples; results come in order, from another thread."""
    (expected,) = driver.generate([PROMPT], 6)
    start = driver.start(9, PROMPT, **GREEDY)
    results: queue.Queue[tuple[StepResult, int]] = queue.Queue()
    driver.executor._on_done = lambda result: results.put((result, threading.get_ident()))
    for step in range(6):
        entry = driver.entry(9, 0, 40) if step == 0 else driver.entry(9, 39 + step, 1)
        plan = BatchPlan(
            step_id=step,
            ended=(),
            starts=(start,) if step == 0 else (),
            block_copies=(),
            entries=Entries.of([entry]),
            samples=Samples.of([SampleEntry(entry_index=0, sequence_id=9)]),
        )
        driver.executor.submit(plan)
    done = [results.get(timeout=30) for _ in range(6)]
    assert [result.step_id for result, _ in done] == list(range(6))
    assert [token for result, _ in done for s in result.sampled for token in s.token_ids] == expected
    assert threading.get_ident() not in {thread for _, thread in done}
    assert all(result.duration_s > 0 for result, _ in done)


def test_an_error_of_one_sequence_is_told_of_it_alone(driver: TorchDriver) -> None:
    (expected,) = driver.generate([PROMPT], 1)
    good = driver.start(50, PROMPT, **GREEDY)
    outside = driver.start(51, [5, 512, 6], **GREEDY)
    biased = driver.start(52, PROMPT, logit_bias=((9999, 1.0),), **GREEDY)
    entries = [driver.entry(51, 0, 3), driver.entry(50, 0, 40), driver.entry(52, 0, 40)]
    result = driver.step_result(entries, [(0, 51), (1, 50), (2, 52)], starts=[good, outside, biased])
    assert result.error is None
    bad_token, fine, bad_bias = result.sampled
    assert bad_token.error == "token id 512 is outside the vocabulary of 512" and not bad_token.token_ids
    assert fine.error is None and list(fine.token_ids) == expected
    assert bad_bias.error is not None and "9999" in bad_bias.error


def test_logits_that_are_not_finite_are_an_error_of_their_sequence(driver: TorchDriver) -> None:
    (expected,) = driver.generate([PROMPT], 1)
    driver.step(starts=[driver.start(i, PROMPT, **GREEDY) for i in (50, 51)])
    driver.step([driver.entry(i, 0, 39) for i in (50, 51)])
    block = driver.tables[50][1]
    driver.executor._runner.pool.blocks[block] = float("nan")
    result = driver.step_result([driver.entry(i, 39, 1) for i in (50, 51)], [(0, 50), (1, 51)])
    sick, well = result.sampled
    assert sick.error is not None and "not finite" in sick.error
    assert list(well.token_ids) == expected


def test_a_step_that_cannot_be_computed_is_an_error_and_the_next_one_goes_on(driver: TorchDriver) -> None:
    driver.tables[70] = array("I")
    result = driver.step_result([driver.entry(70, 0, 5)], [(0, 70)])
    assert result.error is not None and "KeyError" in result.error and not result.sampled
    assert len(driver.generate([PROMPT], 2)[0]) == 2


def test_an_ended_sequence_is_forgotten_and_its_id_free(driver: TorchDriver) -> None:
    driver.step(starts=[driver.start(4, PROMPT, **GREEDY)])
    again = driver.start(4, PROMPT[:5], **GREEDY)
    driver.step([driver.entry(4, 0, 5)], [(0, 4)], ended=[4], starts=[again])
    assert len(driver.executor._sequences) == 1
    driver.step(ended=[4])
    assert not driver.executor._sequences


def test_close_finishes_the_step_in_progress_drops_the_rest_and_joins(model_dir: Path) -> None:
    pool = PoolMemory.create(load_model_config(model_dir, numerics="reference").kv_layout(16), 8)
    executor = TorchExecutor(model_dir, RunnerConfig(kernels="torch"), pool.region)
    entered, leave = threading.Event(), threading.Event()
    done: list[int] = []

    def on_done(result: StepResult) -> None:
        done.append(result.step_id)
        entered.set()
        leave.wait(10)

    executor.start(on_done)
    empty: dict[str, Any] = {"ended": (), "starts": (), "block_copies": (), "entries": Entries.of(()), "samples": Samples.of(())}
    for step in range(4):
        executor.submit(BatchPlan(step_id=step, **empty))
    assert entered.wait(10)
    closing = threading.Thread(target=executor.close)
    closing.start()
    while not executor._closing:
        time.sleep(0.001)
    leave.set()
    closing.join(10)
    assert not closing.is_alive() and done == [0]
    assert "compute" not in {thread.name for thread in threading.enumerate()}
    pool.close()


def test_settings_that_contradict_each_other_are_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="1 thread, not 2"):
        RunnerConfig(numerics="reference", kernels="torch", num_threads=2)
    with pytest.raises(ConfigError, match="device 'cuda'"):
        RunnerConfig(device="cuda")
    with pytest.raises(ConfigError, match="numerics 'exact'"):
        RunnerConfig(numerics="exact")  # type: ignore[arg-type]
    monkeypatch.setattr("engine.runner.model_runner.depends_on_place", lambda _: True)
    pool = PoolMemory.create(load_model_config(model_dir, numerics="reference").kv_layout(16), 8)
    with pytest.raises(ModelError, match="use fast numerics"):
        TorchExecutor(model_dir, RunnerConfig(kernels="torch"), pool.region)
    pool.close()
