"""`baton sim --faults`: one seed or many of the cluster's own code under faults, with every law looked at."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import typer

from baton.progress import say, say_line
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from simulator.fault_campaign import Campaign
    from simulator.fault_run import Outcome

SCHEMA = "baton.faults.v1"
WHOLE_CAMPAIGN = 10_000  # seeds that the counts of the matrix are held against
LEAST_CELL = 101


def seeds_of(text: str, seed: int) -> range:
    """`FIRST:LAST`, the last one left out; empty: `seed` alone.

    Raises:
        ConfigError: not that.
    """
    if not text:
        return range(seed, seed + 1)
    first, colon, last = text.partition(":")
    if not colon or not first.isdecimal() or not last.isdecimal() or int(first) >= int(last):
        raise ConfigError(f"--seeds is {text!r}; give FIRST:LAST, as 0:200")
    return range(int(first), int(last))


def sim_faults(seeds: range, kinds: str, *, requests: int | None, jobs: int, as_json: bool) -> None:
    """Run them and print what came of it; ends with status 1 when a law broke."""
    from simulator.fault_campaign import kinds_of, run_campaign
    from simulator.fault_run import NUM_REQUESTS

    chosen, began_s = kinds_of(kinds), time.monotonic()

    def told(campaign: Campaign, outcome: Outcome) -> None:
        if outcome.law is not None:
            say_line(f"seed {outcome.seed}: {outcome.text}\n  {campaign.repeat(outcome)}")
        took_s = time.monotonic() - began_s
        left_s = took_s / campaign.num_seeds * (len(seeds) - campaign.num_seeds)
        say(f"{campaign.num_seeds:,} of {len(seeds):,} seeds, {len(campaign.failures)} failed, {took_s:.0f} s, {left_s:.0f} s left")

    campaign = run_campaign(seeds, kinds=chosen, num_requests=requests or NUM_REQUESTS, num_jobs=jobs, on_outcome=told)
    say("")
    if as_json:
        print(json.dumps(_document(campaign, seeds, took_s=time.monotonic() - began_s), indent=1))
    else:
        _print(campaign)
    if campaign.failures:
        raise typer.Exit(1)


def _document(campaign: Campaign, seeds: range, *, took_s: float) -> dict[str, object]:
    from baton.bench.report import Row, Target, make_document
    from simulator.fault_run import NUM_REQUESTS
    from simulator.faults import NUM_KINDS

    name, count = campaign.least_cell

    def held(figure: str, value: float | None, unit: str, relation: Literal["<=", ">="], bound: float) -> Row:
        return Row(name=f"faults/{figure}", value=value, unit=unit, target=Target(relation=relation, bound=bound))

    rows = [
        Row(name="faults/seeds", value=campaign.num_seeds, unit="seeds"),
        held("broken_laws", len(campaign.failures), "seeds", "<=", 0),
        held("least_requests", campaign.least_requests, "requests of one seed", ">=", NUM_REQUESTS),
        held("least_kinds", campaign.least_kinds, "kinds that took effect in one seed", ">=", NUM_KINDS),
        replace(
            held("least_cell", count, "requests", ">=", LEAST_CELL), details={"cell": name}, is_decided=campaign.num_seeds >= WHOLE_CAMPAIGN
        ),
        Row(name="faults/seeds_per_s", value=round(campaign.num_seeds / took_s, 3), unit="1/s"),
    ]
    return make_document(SCHEMA, seed=seeds.start, rows=rows, sections=campaign.document())


def _print(campaign: Campaign) -> None:
    ends = ", ".join(f"{count:,} {end}" for end, count in sorted(campaign.ends.items()))
    print(f"{campaign.num_seeds:,} seeds, {campaign.num_requests:,} requests: {ends}; {campaign.num_retried:,} needed another attempt")
    states = ["queued", "prefilling", "waiting_kv", "decoding"]
    print(f"  requests hit by {'':12}" + "".join(f"{state:>12}" for state in states))
    for kind, row in campaign.matrix.items():
        print(f"    {kind:24}" + "".join(f"{row.get(state, '-'):>12}" for state in states))
    broken = f"{len(campaign.failures):,} seeds break a law" if campaign.failures else "every law holds"
    print(f"  {broken}")
