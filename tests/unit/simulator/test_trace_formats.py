"""Rows of published traces as prompts; and, where the files are (BATON_TRACES_DIR), what their own descriptions say of them."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from protocol.errors import ConfigError
from simulator.traces import load_trace
from simulator.traces.catalog import KNOWN, find
from simulator.traces.trace import Run, facts_of

pytestmark = pytest.mark.pure

FOLDER = os.environ.get("BATON_TRACES_DIR")
needs_traces = pytest.mark.skipif(FOLDER is None, reason="published traces are not shipped; name their folder in BATON_TRACES_DIR")


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mooncake_blocks_become_runs_and_the_last_is_as_long_as_the_prompt(tmp_path: Path) -> None:
    """Seen to fail with the last block taken for a full one."""
    path = write(
        tmp_path / "m.jsonl",
        {"timestamp": 3000, "input_length": 1000, "output_length": 7, "hash_ids": [4, 9]},
        {"timestamp": 0, "input_length": 512, "output_length": 0, "hash_ids": [4]},
    )
    early, late = load_trace(path).requests
    assert (late.at_s, late.runs, late.output_tokens) == (3.0, (Run("4", 512), Run("9", 488)), 7)
    assert (early.at_s, early.output_tokens) == (0.0, 1), "sorted by time; a request makes a token"


def test_azure_rows_share_nothing_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,374,109"]
    path.write_bytes(gzip.compress("\r\n".join([*rows, "2023-11-16 18:15:51.0000000,0,3"]).encode()))
    trace = load_trace(path)
    assert [(round(r.at_s, 5), r.num_prompt_tokens, r.output_tokens) for r in trace.requests] == [(0.0, 374, 44), (4.31458, 374, 109)]
    assert trace.requests[0].runs != trace.requests[1].runs and trace.notes == ("1 rows without tokens left out",)


def test_ids_of_sessions_are_their_own_and_subagents_are_a_part(tmp_path: Path) -> None:
    """Seen to fail with ids shared between sessions."""
    requests = [
        {"t": 1.0, "type": "s", "in": 130, "out": 5, "hash_ids": [1, 2], "think_time": 2.5},
        {"t": 4.0, "type": "subagent", "requests": [{"t": 0.5, "in": 64, "out": 2, "hash_ids": [1]}]},
    ]
    rows = [{"id": name, "block_size": 64, "requests": requests} for name in ("x", "y")]
    one_file = load_trace(write(tmp_path / "s.jsonl", *rows))
    folder = tmp_path / "traces"
    folder.mkdir()
    for row in rows:
        write(folder / f"trace_{row['id']}.json", row)
    assert sorted(one_file.requests, key=repr) == sorted(load_trace(folder).requests, key=repr)
    own, of_agent = (r for r in one_file.requests if r.session == "x")
    assert [run.num_tokens for run in own.runs] == [64, 64, 2] and own.think_s == 2.5
    assert of_agent.runs == own.runs[:1] and of_agent.at_s == 4.5 and of_agent.think_s is None
    assert not {run for r in one_file.requests if r.session == "x" for run in r.runs} & {
        run for r in one_file.requests if r.session == "y" for run in r.runs
    }


def test_a_subagent_begins_where_it_ended_less_what_it_took(tmp_path: Path) -> None:
    """Its row comes once it is over; one that was only sent off has no duration. Seen to fail with both begun at their rows' times."""
    child = {"t": 0.5, "in": 64, "out": 2, "hash_ids": [1]}
    over = {"t": 60.0, "type": "subagent", "duration_ms": 50_000, "requests": [child]}
    sent_off = {"t": 70.0, "type": "subagent", "duration_ms": None, "requests": [child]}
    trace = load_trace(write(tmp_path / "s.jsonl", {"id": "x", "block_size": 64, "requests": [over, sent_off]}))
    assert [r.at_s for r in trace.requests] == [10.5, 70.5]


def test_ragpulse_components_have_the_lengths_of_the_side_table(tmp_path: Path) -> None:
    write(tmp_path / "rp_component_lengths.jsonl", {"sys_prompt_id": 1, "token_length": 100}, {"passage_id": 2, "token_length": 50})
    parts = {"sys_prompt": [1], "passages_ids": [2], "history": [], "web_search": [], "user_input": []}
    row = {"timestamp": "27", "input_length": 170, "output_length": 9, "hash_ids": parts, "session_id": "s"}
    trace = load_trace(write(tmp_path / "rp.jsonl", row, row | {"input_length": 120}))
    whole, cut = trace.requests
    assert [run.num_tokens for run in whole.runs] == [100, 50, 20] and whole.session == "s" and whole.at_s == 27.0
    assert [run.num_tokens for run in cut.runs] == [100, 20] and trace.notes == ("1 components were longer than their prompts and are cut",)
    with pytest.raises(ConfigError, match=r"rp2.jsonl:1: nobody says how long component 3 is"):
        load_trace(write(tmp_path / "rp2.jsonl", row | {"hash_ids": parts | {"history": [3]}}))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}, "1 hash_ids for 513 tokens; blocks of 512"),
        ({"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [1, 2]}, "2 hash_ids for 512 tokens"),
        ({"timestamp": -1, "input_length": 1, "output_length": 1, "hash_ids": [1]}, "timestamp is -1.0; a number from 0 on"),
        ({"timestamp": 0, "input_length": 1.5, "output_length": 1, "hash_ids": [1]}, "input_length is 1.5; a whole number"),
        ({"timestamp": 0, "output_length": 1, "hash_ids": [1]}, "input_length is None; a number is expected"),
    ],
)
def test_a_row_that_is_not_of_the_format_is_named(tmp_path: Path, row: dict[str, object], why: str) -> None:
    good = {"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [1]}
    with pytest.raises(ConfigError, match=rf"m.jsonl:2: {why}"):
        load_trace(write(tmp_path / "m.jsonl", good, row))


def test_what_is_no_trace_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("hello\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"timestamp": 0}\n' * 1000)[:40])
    for path, why in (("none", "there is no trace"), ("x.jsonl", "neither JSON lines nor"), ("cut.jsonl.gz", "cannot be read")):
        with pytest.raises(ConfigError, match=why):
            load_trace(tmp_path / path)
    with pytest.raises(ConfigError, match="trace format 'x' is unknown; choose from mooncake"):
        load_trace(tmp_path / "x.jsonl", format_name="x")


def test_a_name_is_found_in_the_folder_or_the_remedy_told(tmp_path: Path) -> None:
    path = write(tmp_path / "azure_2023_conv.csv", {})
    assert find("azure_2023_conv", tmp_path) == path and find(str(path), Path("elsewhere")) == path
    with pytest.raises(ConfigError, match="`baton trace fetch mooncake_conversation` gets it"):
        find("mooncake_conversation", tmp_path)
    with pytest.raises(ConfigError, match="`baton trace list` names those known"):
        find("nobody", tmp_path)
    assert all(trace.licence and trace.citation and trace.home.startswith("https://") for trace in KNOWN.values())


@needs_traces
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_requests", "num_sessions", "p50", "reuse"),
    [
        ("mooncake_conversation", 12_031, 0, (6_909, 350), 0.366),
        ("azure_2023_conv", 19_366, 0, (1_020, 129), 0.0),
        ("claude_code_sessions_a", 18_016, 287, (96_490, 208), 0.960),
        ("ragpulse_part1", 3_553, 1_974, (3_143, 220), 0.316),
    ],
)
def test_a_published_trace_is_read_as_it_is_described(
    name: str, num_requests: int, num_sessions: int, p50: tuple[int, int], reuse: float
) -> None:
    assert FOLDER is not None
    facts = facts_of(load_trace(find(name, Path(FOLDER))))
    assert (facts.num_requests, facts.num_sessions) == (num_requests, num_sessions)
    assert (facts.input_tokens[0], facts.output_tokens[0]) == p50
    assert facts.reuse_share == pytest.approx(reuse, abs=0.02)
