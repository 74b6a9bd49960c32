"""The whole cluster under faults by seed: gateway sessions, router, workers and hand-off of the product, every law looked at as it runs.

How: simulator/fault_run.py draws a small crowded cluster, its requests and its faults from a seed. Bugs planted one at a time are found by
the same seeds (test_planted_faults.py); `baton sim --faults --seeds 0:10000 --jobs 2` runs them by the thousand.
"""

from __future__ import annotations

import json
import logging

import pytest
from typer.testing import CliRunner

from baton.__main__ import app
from baton.sim_faults import seeds_of
from gateway.session import Session
from protocol.errors import ConfigError
from simulator.fault_campaign import Campaign, kinds_of, repeat_command, run_campaign
from simulator.fault_run import NUM_REQUESTS, run_seed
from simulator.faults import NUM_KINDS, REACHABLE, UNREACHABLE, Kind

pytestmark = pytest.mark.pure

NUM_SEEDS = 200
SEEDS_A_TEST = 20
REQUESTS_A_SEED = 40  # a fifth of a campaign's, so that all seeds fit a minute

RARE = {"corrupt/prefilling"}  # an early offer, spoilt before it is complete

SO_FAR = Campaign(tuple(Kind))


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Lost workers are what these runs are about."""
    caplog.set_level(logging.CRITICAL, logger="baton")


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_A_TEST))
def test_laws_hold_under_faults(first: int) -> None:
    for seed in range(first, first + SEEDS_A_TEST):
        outcome = run_seed(seed, num_requests=REQUESTS_A_SEED)
        assert outcome.law is None, f"{outcome.text}\n{repeat_command(seed, num_requests=REQUESTS_A_SEED)}"
        SO_FAR.add(outcome)


def test_every_fault_met_requests_in_every_state_it_can() -> None:
    """Else the seeds above would prove little. Seen to fail with a fault that is never performed."""
    if SO_FAR.num_seeds < NUM_SEEDS:
        pytest.skip("runs after all the seeds")
    met = {cell for cell, count in SO_FAR.hits.items() if count}
    assert not {f"{kind.value}/{state.value}" for kind, state in REACHABLE} - met - RARE
    assert not {f"{kind.value}/{state.value}" for kind, state in UNREACHABLE} & met
    assert SO_FAR.num_retried > 1000
    assert SO_FAR.ends["failed"] < 0.001 * SO_FAR.num_requests, "who was accepted is served"
    assert SO_FAR.ends["refused"] < 0.05 * SO_FAR.num_requests, "the router was away, and so was every decode worker"


def test_a_seed_is_a_run_and_hits_at_least_three_kinds() -> None:
    """Seen to fail with faults drawn from the system."""
    first, again = run_seed(1), run_seed(1)
    assert first == again and first.num_requests == NUM_REQUESTS and first.num_kinds >= NUM_KINDS
    assert run_seed(2).duration_s != first.duration_s


def test_only_the_faults_that_were_asked_for_come() -> None:
    chosen = kinds_of("kill,cancel")
    outcome = run_seed(3, kinds=chosen, num_requests=60)
    assert outcome.law is None and set(outcome.effects) == {"kill", "cancel"}
    assert repeat_command(3, chosen, 60) == "baton sim --faults --seed 3 --kinds kill,cancel --requests 60"
    with pytest.raises(ConfigError, match="there is no fault 'fire'"):
        kinds_of("kill,fire")


def test_processes_share_seeds_and_the_result_is_the_same() -> None:
    """Seen to fail with processes that pass over a seed."""
    alone, shared = (run_campaign(range(4), num_requests=20, num_jobs=jobs) for jobs in (1, 2))
    assert alone.document() == shared.document() and alone.num_seeds == 4


def test_a_failing_seed_prints_the_command_that_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """How: a request does not end with its last token, and the command is run twice. Seen to fail with a repeat that leaves out --kinds."""
    monkeypatch.setattr(Session, "_finish_if_complete", lambda self, now: None)
    asked = ["sim", "--faults", "--seed", "5", "--kinds", "slow"]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 1 and "seed 5: " in told.stderr and "baton sim --faults --seed 5 --kinds slow" in told.stderr
    again = CliRunner().invoke(app, [*asked, "--json"])
    (failure,) = json.loads(again.stdout)["failures"]
    assert failure["seed"] == 5 and failure["repeat"] == "baton sim --faults --seed 5 --kinds slow" and failure["text"] in told.stderr


def test_the_command_prints_a_matrix_and_a_document() -> None:
    told = CliRunner().invoke(app, ["sim", "--faults", "--seeds", "0:2"])
    assert told.exit_code == 0 and "2 seeds, 400 requests" in told.stdout and "every law holds" in told.stdout
    assert seeds_of("3:7", 0) == range(3, 7) and seeds_of("", 4) == range(4, 5)
    for text in ("7:3", "x", "1", "1:1"):
        with pytest.raises(ConfigError, match="FIRST:LAST"):
            seeds_of(text, 0)
