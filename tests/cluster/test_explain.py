"""`baton explain` of a request of a real cluster: both workers, every term, and what was predicted beside what came.

How: 2 + 2 workers serve the demo model; other prompts fit the cost model, then one is sent again and again and asked for each time as
its user would, by the id in the answer, over a pipe.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.serving import Serving, environment

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
NUM_WARM = 12
NUM_ASKED = 5
# Predictions lean high by 1.25 and are of seconds of work; a crowded machine stretches both.
FACTOR = 5.0
OVERHEAD_S = 0.005  # sockets and turns of loops on both sides of the model's step: a prompt that is all cached takes less to compute


def baton(serving: Serving, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "baton", *arguments, "--url", serving.url],
        cwd=ROOT,
        env=environment(serving.folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def complete(serving: Serving, prompt: str, **headers: str) -> str:
    status, answer = serving.request("/v1/completions", {"prompt": prompt, "max_tokens": 8, "ignore_eos": True}, **headers)
    assert status == 200, answer
    return str(json.loads(answer)["id"])


def explained(serving: Serving, name: str) -> dict[str, Any]:
    """The newest attempt, once its end has been heard of."""
    deadline_s = time.monotonic() + 10.0
    while time.monotonic() < deadline_s:
        told = baton(serving, "explain", name, "--json")
        assert told.returncode == 0, told.stderr
        attempt: dict[str, Any] = json.loads(told.stdout)["attempts"][-1]
        if attempt["outcome"]["state"] is not None:
            return attempt
    raise AssertionError(f"no end of {name} within 10 s")


def test_a_request_is_explained_by_its_answers_id(serving: Serving) -> None:
    """Seen to fail with num_cached_tokens left out of PrefillDone, and with the prediction in milliseconds."""
    text = "def " + " ".join(f"value_{n}" for n in range(150)) + uuid.uuid4().hex
    for n in range(NUM_WARM):
        complete(serving, f"{n}{text}")
    ratios, hits, paths = [], [], set()
    for _ in range(NUM_ASKED):  # not each is placed where the prompt lies: another worker may be idle, and pull it
        time.sleep(2.1)  # what is expected is then what KV events say, no guess from the booking before
        client_id = f"job-{uuid.uuid4().hex}"
        answer_id = complete(serving, text, **{"X-Request-Id": client_id})
        attempt = explained(serving, answer_id)
        placed, outcome = attempt["assignment"], attempt["outcome"]
        assert {placed["prefill_worker"][:7], placed["decode_worker"][:6]} == {"prefill", "decode"}
        assert {"queue", "prefill", "transfer"} <= placed["prefill_scores"][0]["terms"].keys()
        assert (outcome["state"], outcome["output_tokens"]) == ("finished", 8)
        paths.add(outcome["handoff_path"])
        assert placed["cached_tokens"] == placed["confirmed_tokens"] <= outcome["found_tokens"]
        ratios.append((outcome["ttft_s"] + OVERHEAD_S) / (placed["predicted_ttft_s"] + OVERHEAD_S))
        hits += [placed["cached_tokens"]] if placed["cached_tokens"] else []
    print(f"time to first token, actual over predicted: {sorted(round(ratio, 2) for ratio in ratios)}; cached {hits}")
    assert 1 / FACTOR < median(ratios) < FACTOR
    assert hits and min(hits) > 64
    assert paths & {"shm", "tcp"} and paths <= {"shm", "tcp", "cached"}, "moved once; nothing where it decodes again"
    assert explained(serving, client_id)["request_id"] == attempt["request_id"]

    shown = baton(serving, "explain", answer_id)
    assert shown.returncode == 0 and shown.stderr == ""
    for word in (placed["prefill_worker"], placed["decode_worker"], "queue", "duplicate", "time to first token", "hand-off", "finished"):
        assert word in shown.stdout


def test_an_unknown_id_ends_in_trouble_that_says_what_is_kept(serving: Serving) -> None:
    began_s = time.monotonic()
    told = baton(serving, "explain", "chatcmpl-" + "0" * 32)
    assert told.returncode == 1 and told.stdout == "" and time.monotonic() - began_s < 3.0
    assert "raise router.num_explained to keep more" in told.stderr and told.stderr.count("\n") == 1


def test_predictions_are_judged_in_the_routers_status(serving: Serving) -> None:
    complete(serving, "x = 1")
    document = serving.status()["router"]["detail"]
    assert document["ttft_prediction"]["count"] >= 1 and document["ttft_prediction"]["actual_over_predicted"]["p50"] > 0.0
    assert document["explanations"]["kept"] >= 1
