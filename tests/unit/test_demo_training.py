"""Training of the demo model goes on exactly where it stopped, and can be made longer while its rate is still at the peak.

Seen to fail with optimizers that are not restored, and with rows dealt anew at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from examples.demo_model.network import Network, Shape  # noqa: E402
from examples.demo_model.team import Team  # noqa: E402
from examples.demo_model.train import Recipe, Text, Training  # noqa: E402

SHAPE = Shape(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=1, max_positions=64)
RECIPE = Recipe(steps=40, tokens_per_step=128, lengths=((0.0, 16), (0.5, 64)), warmup_steps=2, decay_from=0.5)


@pytest.fixture
def team(tmp_path: Path) -> Iterator[Team]:
    alone = Team(0, 1, tmp_path / "meeting-point")
    yield alone
    alone.close()


def make_text(recipe: Recipe) -> Text:
    rng = np.random.Generator(np.random.PCG64(0))
    return Text([(np.arange(300) * rng.integers(1, 5) % 64).astype(np.uint16) for _ in range(8)], recipe)


def make_training(team: Team) -> Training:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Training(Network(SHAPE), RECIPE, team)


def run(training: Training, until: int) -> list[float]:
    text = make_text(RECIPE)
    return [training.advance(*text.batch(step)) for step in range(training.step, until)]


def test_interrupted_training_equals_an_uninterrupted_one(team: Team, tmp_path: Path) -> None:
    whole = make_training(team)
    losses = run(whole, 30)
    assert losses[-1] < 0.9 * losses[0], "it learns"
    first = make_training(team)
    run(first, 12)
    first.save(tmp_path / "state.pt")
    second = make_training(team)
    second.restore(tmp_path / "state.pt")
    assert run(second, 30) == losses[12:]
    assert all(torch.equal(a, b) for a, b in zip(whole.network.parameters(), second.network.parameters(), strict=True))


def test_more_steps_change_nothing_before_the_rate_falls() -> None:
    longer = replace(RECIPE, steps=60)
    short_text, long_text = make_text(RECIPE), make_text(longer)
    for step in range(20):
        assert RECIPE.rate_at(step) == longer.rate_at(step)
        assert all(torch.equal(a, b) for a, b in zip(short_text.batch(step), long_text.batch(step), strict=True))
    assert RECIPE.rate_at(39) == pytest.approx(1 / 20) and RECIPE.rate_at(30) == pytest.approx(1 / 2)
    assert [RECIPE.length_at(step) for step in (0, 19, 20, 39)] == [16, 16, 64, 64]


def test_an_epoch_shows_every_row_once() -> None:
    documents = [np.arange(start, start + 300, dtype=np.uint16) for start in range(0, 2400, 300)]
    text = Text(documents, RECIPE)
    batches = [text.batch(step) for step in range(text.steps_per_epoch)]
    assert text.steps_per_epoch == 2400 // 128
    shown = torch.cat([ids.reshape(-1) for ids, _ in batches]).tolist()
    assert len(shown) == len(set(shown)) == text.steps_per_epoch * 128
    assert all(torch.equal(ids[:, 1:], following[:, :-1]) for ids, following in batches)
    assert sorted(shown) != shown, "in an order of its own"
