"""The figures of README and docs are those of benchmarks/results, and say of each row what it says.

Seen to fail with a ratio of a page edited, with a missed row shown as met, and with a document of another schema left out in silence.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import Any

import pytest

from benchmarks import figures
from benchmarks.reproduce import first_difference
from tests.comparison_document import make_comparison

pytestmark = pytest.mark.pure


def row(name: str, value: float | None, unit: str, target: str | None = None, ok: bool | None = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "target": target, "ok": ok, **more}


ENGINE: dict[str, Any] = {
    "schema": figures.ENGINE,
    "machine": {"cpu": "A CPU", "num_cores": 2, "instructions": ["avx2"], "memory_gib": 4.0},
    "commit": "0123456789abcdef",
    "threads": 2,
    "rounds": 9,
    "engines": {"15m": {"baton": {"engine": "baton 1", "tokens": None}, "vllm": {"engine": "vLLM 1", "tokens": "equal"}}},
    "rows": [
        row("15m/stream", 50.0, "GB/s"),
        row("15m/gemm_peak", 1100.0, "GFLOP/s"),
        row("15m/batch32/baton", 4000.0, "tokens/s"),
        row("15m/batch32/vllm", 2000.0, "tokens/s"),
        row("15m/batch32/vs_vllm", 2.0, "ratio", ">= 2.5", False, interval=[1.9, 2.1], verdict="wins"),
        row("15m/one_stream/baton", 0.5, "ms/token"),
        row("15m/one_stream/vllm", None, "ms/token", reason="it fell over"),
        row("15m/one_stream/vs_vllm", None, "ratio", reason="vllm: it fell over"),
        row("15m/ready/baton", 1.0, "s"),
        row("15m/memory_beyond/baton", 250.0, "MB", "<= 400", True),
    ],
}


TRANSFER: dict[str, Any] = {
    "schema": figures.TRANSFER,
    "machine": ENGINE["machine"],
    "commit": ENGINE["commit"],
    "rounds": 9,
    "pool_bytes": 512 << 20,
    "chunks": {"16KiB": 16384},
    "subjects": {"baton": {"subject": "baton 1"}},
    "absent": {"nixl": "no environment"},
    "rows": [
        row("4MiB/16KiB/copy", 10.0, "GB/s"),
        row("4MiB/16KiB/shm", 8.5, "GB/s"),
        row("4MiB/16KiB/gloo", None, "GB/s", reason="it fell over"),
        row(
            "4MiB/16KiB/shm_vs_copy", 0.85, "ratio", ">= 0.8", True, interval=[0.81, 0.9], verdict="loses",
            digest_ms_per_gb={"sampled": {"pull": 10.0, "offer": 9.0}, "full": {"pull": 100.0, "offer": 90.0}},
        ),
        row("4MiB/16KiB/tcp_vs_gloo", None, "ratio", ">= 1.8", False, reason="gloo: it fell over"),
        row("handoff/125m/1024/control", 1.5, "ms", "<= 1", False, interval=[1.25, 2.0]),
    ],
}  # fmt: skip


ROUTER: dict[str, Any] = {
    "schema": figures.ROUTER,
    "machine": ENGINE["machine"],
    "commit": ENGINE["commit"],
    "rounds": 5,
    "stages": ["index", "decide"],
    "num_workers": 64,
    "num_blocks": 1_000_000,
    "num_live": 100_000,
    "subjects": {
        "index": {"baton": {"subject": "baton 1"}, "dynamo": {"subject": "dynamo 2"}},
        "decide": {"baton": {"subject": "baton 1"}},
    },
    "rows": [
        row("hash/4k/baton", 20.5, "us", "<= 40", True, cpu_us=21.0),
        row("hash/4k/dynamo", 36.0, "us"),
        row("decide/4k/p50/baton", 120.0, "us", "<= 100", False, cpu_us=119.0),
        row("decide/4k/p50/dynamo", None, "us", reason="it fell over"),
        row("growth/1k_to_100k", 1.1, "ratio", "<= 1.3", True, cpu_ratio=1.05),
    ],
}  # fmt: skip


VALIDATION: dict[str, Any] = {
    "schema": figures.VALIDATION,
    "machine": ENGINE["machine"],
    "commit": ENGINE["commit"],
    "clusters": {
        "paced-8+8": {"calibration": {"step_s": 0.0015, "first_s": 0.008, "policy": "round_robin", "trace": "unshared"}},
    },
    "rows": [
        row("paced-8+8/order_agrees", 0.0, "yes / no", ">= 1", False, live=["a", "b"], simulated=["b", "a"]),
        row("paced-8+8/attainment_error/a", 2.5, "points", "<= 5", True, live=0.95, predicted=0.975),
        row("paced-8+8/attainment_error/a/alone", 5.0, "points", live=0.95, predicted=1.0),
        row("paced-8+8/ttft_p50_error/a", 20.0, "%", "<= 15", False, live_ms=100.0, predicted_ms=120.0),
        row("paced-8+8/ttft_p50_error/a/alone", 300.0, "%", live_ms=100.0, predicted_ms=400.0),
        row("paced-8+8/ttft_p50_error/b", None, "%", "<= 15", False, reason="no run counts"),
    ],
}  # fmt: skip


COPIED = [kind for kind in figures.DAMAGE if kind not in ("stale_generation", "late_writer")]
CORRUPTION = {
    "schema": figures.CORRUPTION,
    "commit": "0123456789abcdef",
    "machine": ENGINE["machine"],
    "backends": ["shm", "tcp"],
    "rows": [
        row("corruption/all/injections", 1000, "injections"),
        row("corruption/live/injections/shm", 100, "injections"),
        row("corruption/full/escaped", 1, "injections"),
        row("corruption/live/full/escaped", 2, "injections"),
        *(row(f"corruption/{at}{mode}/staleness_escaped", 0, "injections") for at in ("", "live/") for mode in ("sampled", "off")),
        *(row(f"corruption/sampled/escape_rate/{kind}", 0.25, "share") for kind in COPIED),
        *(row(f"corruption/off/escape_rate/{kind}", 1.0, "share") for kind in COPIED),
        *(row(f"corruption/unchecked/wrong_tokens/{kind}", 0.5, "share") for kind in figures.DAMAGE),
        *(row(f"corruption/unchecked/demo_model_text_differs/{kind}", 0.125, "share") for kind in figures.DAMAGE),
        row("corruption/unchecked/wrong_tokens", 0.5, "share", of=900),
    ],
}  # fmt: skip


def test_what_escaped_is_said_as_it_was_counted() -> None:
    """Seen to fail with the live escapes left out, and with a kind of staleness shown as a share."""
    text = figures.campaign_figures([CORRUPTION])
    assert "100 of them between live endpoints: 3 reached a decode step with `full`, 0 stale ones in any mode" in text
    assert "unchecked, 50 % of 900 hits gave a wrong token" in text
    assert "| bit flip | 25 % | 100 % | 50 % | 12.5 % |" in text and "| late writer | 0 in all | 0 in all | 50 % | 12.5 % |" in text


def test_a_simulation_that_was_off_is_said_to_be_off() -> None:
    """Seen to fail with the null model's error in the place of the simulation's, and with a row without a value left out."""
    text = figures.all_figures([VALIDATION])
    assert "a step takes 1.50 ms more than its model, one that computes prompts 1.00 times as long, 8.0 ms lie between" in text
    assert "| paced-8+8/order agrees | a < b | b < a |  |  | >= 1: missed |" in text
    assert "| paced-8+8/attainment: a | 95.0% | 97.5% | 2.5 points | 5 points | <= 5: met |" in text
    assert "| paced-8+8/ttft p50: a | 100 ms | 120 ms | 20 % | 300 % | <= 15: missed |" in text
    assert "| paced-8+8/ttft p50: b |  |  | no run counts |  | <= 15: missed |" in text and "alone" not in text


def test_pages_say_what_the_results_say() -> None:
    documents = figures.read_results()
    assert documents, "there are results"
    for page, text in figures.pages().items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name} is not what `python -m benchmarks.figures` writes"


def test_drawings_are_those_of_the_results() -> None:
    """And none lies there that nobody draws. Seen to fail with a figure of a document changed, and with a drawing of no document."""
    drawn = figures.drawings()
    assert set(drawn) == set(figures.RESULTS.glob("*.svg"))
    for path, text in drawn.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is not what `python -m benchmarks.figures` draws"


def test_each_document_says_how_it_is_made() -> None:
    """In a line of benchmarks/README.md. Seen to fail with a document of another name."""
    named = re.findall(r"[\w.*-]+\.json", (figures.HERE / "README.md").read_text(encoding="utf-8"))
    for path in figures.RESULTS.glob("*.json"):
        assert any(fnmatch(path.name, pattern) for pattern in named), path.name


def test_what_differs_is_named() -> None:
    """Seen to fail with a member that only one of them has passed over."""
    published = {"rows": [1, {"a": 0.5}], "same": None}
    assert first_difference(published, {"same": None, "rows": [1, {"a": 0.5}]}) is None
    assert first_difference(published, {"rows": [1, {"a": 0.25}], "same": None}) == "rows[1].a was 0.5 and is 0.25"
    assert first_difference(published, {**published, "more": 1}) == "more was null and is 1"
    assert first_difference(published, {"rows": [1], "same": None}) == 'rows was [1, {"a": 0.5}] and is [1]'


def test_a_tournament_has_its_verdict_its_command_and_a_line_a_policy() -> None:
    """Seen to fail with the ratio the other way round, and with an oracle called beaten."""
    document = make_comparison(4, has_oracle=True)
    text = figures.all_figures([document])
    assert "### Placement policies on the virtual clock: mooncake_conversation" in text
    assert document["verdict"] in text and document["command"] in text
    text, wrong = text.split("Mean TTFT, ms, where workers report times wrong")
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "TTFT" not in line and "---" not in line]
    assert [line[0].removeprefix("| ") for line in lines] == [standing["policy"] for standing in document["ranking"]]
    assert lines[0][3].endswith("best") and lines[-1][3] == "oracle"
    best, last = document["ranking"][0], lines[3]
    assert lines[0][1] == f"{best['figure'] * 1e3:,.0f}" and lines[0][2] == ""
    ratio, low, _, high = last[2].replace("(", "").replace(")", "").split()
    assert 1 < float(low) <= float(ratio) <= float(high), "the last waits longer"
    cells = {cell["policy"]: cell for cell in document["estimate_error"][0]["standings"]}
    for line in wrong.splitlines()[4:]:
        label, first, *_ = line.strip("| ").split(" | ")
        assert first.startswith("**") == cells[label]["best_or_tied"], "as with reports half as long"


def test_results_name_a_clean_commit_and_their_machine() -> None:
    for document in figures.read_results():
        known = (
            figures.ENGINE,
            figures.DISAGG,
            figures.START,
            figures.TRANSFER,
            figures.ROUTER,
            figures.CORRUPTION,
            figures.ABORTS,
            figures.POLICIES,
            figures.VALIDATION,
            figures.COMPARE,
            figures.PLAN,
            figures.CALIBRATION,
            figures.FAULTS,
        )
        assert document["schema"] in known
        assert len(document["commit"]) == 40, "measured in a tree as it was committed"
        assert document["machine"]["cpu"] and document["machine"]["num_cores"]


def test_each_row_has_its_ratio_verdict_and_whether_it_was_met() -> None:
    text = figures.all_figures([ENGINE])
    assert "| 32 x (256 in, 64 out) | 4,000 tokens/s | vLLM | 2,000 tokens/s | 2.00 | 1.90 .. 2.10 | wins | >= 2.5: missed |" in text
    assert "| one stream | 0.5 ms/token | vLLM |  |  |  | vllm: it fell over |  |" in text
    assert "| memory beyond weights and KV pool | 250 MB |  |  |  |  |  | <= 400: met |" in text
    assert "commit `0123456789ab`" in text and "tokens of vLLM in float32 equal" in text


def test_the_short_table_has_a_column_a_model() -> None:
    head, _, *lines = figures.short_figures([ENGINE]).splitlines()
    assert head == "|  | 15m |" and "| 32 x (256 in, 64 out) | 2.00x, wins |" in lines


def test_a_transfer_has_its_ratio_its_target_and_what_digests_cost_beside_it() -> None:
    """Seen to fail with the costs left out, and with a lost path shown as 0."""
    text = figures.all_figures([TRANSFER])
    assert "| 4MiB | 16KiB | shm / copy | 0.85 | 0.81 .. 0.90 | loses | >= 0.8: met | 10 + 9, 100 + 90 |" in text
    assert "| 4MiB | 16KiB | tcp / gloo |  |  | gloo: it fell over | >= 1.8: missed |  |" in text
    assert "| 4MiB | 16KiB | 10 GB/s | 8.5 GB/s |  |" in text
    assert "| 125m: control | 1024 | 1.5 ms | 1.25 .. 2 | <= 1: missed |" in text
    assert "### KV transfer: 16KiB" in text and "without nixl (no environment)" in text


def test_a_placement_has_what_it_costs_others_in_its_line() -> None:
    """Seen to fail with a peer's row made a line of its own, and with a lost one left empty."""
    text = figures.all_figures([ROUTER])
    assert "|  | Baton | thread CPU time | dynamo | asked for |" in text
    assert "| hash: 4k | 20.5 us | 21 | 36 us | <= 40: met |" in text
    assert "| decide: 4k, p50 | 120 us | 119 | it fell over | <= 100: missed |" in text
    assert text.count("36 us") == 1, "no line of its own"
    assert "| growth: 1k to 100k | 1.1 ratio | 1.05 |  | <= 1.3: met |" in text
    assert "### Placement: index, decide" in text and "baton 1; dynamo 2; 64 workers, an index of 1,000,000 blocks" in text


def test_a_plan_has_its_best_of_each_kind_and_distserve_s_beside() -> None:
    """Seen to fail with the best of all ratios named as the best of one to one."""
    split = {"gpus": 3, "attainment": 0.91, "ttft_s": 0.19, "tpot_s": 0.05, "pause_s": 0.07}
    document = {
        "schema": figures.PLAN,
        "machine": ENGINE["machine"],
        "commit": ENGINE["commit"],
        "asked": {
            "model": "opt-13b",
            "slo_ttft": 0.2,
            "slo_tpot": 0.1,
            "attainment": 0.9,
            "requests": 300,
            "gpus": 4,
        },
        "step_times": "published",
        "lengths": {"name": "sharegpt", "input_mean": 780.0, "output_mean": 157.0},
        "rows": [
            row("prefill 2 x TP1, decode 1 x TP1", 2.4, "requests/s/GPU", **split),
            row("prefill 1 x TP2, decode 1 x TP1", 2.03, "requests/s/GPU", **split),
            row("mixed 3 x TP1, chunks of 512", 0.0, "requests/s/GPU", gpus=3, attainment=None, ttft_s=None, tpot_s=None),
        ],
        "draws": {"apart": [1.5, 2.5, 2.0]},
        "advice": "It pays.",
    }
    text = figures.all_figures([document])
    assert (
        "### Planning: opt-13b, 300 requests" in text and "| prefill 2 x TP1, decode 1 x TP1 | 3 | 2.40 | 91.0% | 190 | 50.0 | 70 |" in text
    )
    assert "It pays. Of one prefill and one decode worker, prefill 1 x TP2, decode 1 x TP1 is the best: 2.03" in text
    assert "Best apart under 3 seeds: 1.50 to 2.50, median 2.00." in text and "mixed 3" not in text
