"""`baton explain REQUEST_ID`: why a request went to the workers it went to, what was expected of that, and what came."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from baton.connection import Json, find_server

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

TIMEOUT_S = 2.0
PIPE_COLUMNS = 160
SLOW_RATIO = 2.0  # actual over predicted: worth a second look


def explain(
    request_id: Annotated[
        str, typer.Argument(metavar="REQUEST_ID", help="Id of an answer (chatcmpl-..., cmpl-...), or the X-Request-Id it was sent with.")
    ],
    url: Annotated[str | None, typer.Option(help="Server to ask; the one running here when left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="BATON_API_KEY", help="Key the server asks for.")] = None,
) -> None:
    """Show why a request was placed where it was, and how that came out."""
    server, others = find_server(url, api_key, os.environ, timeout_s=TIMEOUT_S)
    document = server.get(f"/explain/{quote(request_id, safe='')}")
    if as_json:
        print(json.dumps(document, indent=2))
        return
    if others:
        print(f"asking {server.url}, the newest; also running: {', '.join(others)} (--url picks one)", file=sys.stderr)
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_COLUMNS)
    for attempt in document.get("attempts") or []:
        console.print(attempt_view(attempt))
    if document.get("left_out"):
        print(f"{document['left_out']} older attempts of this name are left out")


def attempt_view(attempt: Json) -> RenderableType:
    """One attempt: a sentence, the candidates with every cost term, what was predicted beside what came, and what is odd about it."""
    from rich.console import Group
    from rich.text import Text

    head = Text(f"request {attempt.get('request_id')}, attempt {attempt.get('attempt')}", style="bold")
    head.append(f", {attempt.get('num_tokens'):,} tokens, decided {attempt.get('age_s')} s ago by {attempt.get('by')}", style="not bold")
    refusal, placed = attempt.get("refusal"), attempt.get("assignment")
    if refusal is not None:
        again = f"; retry after {refusal['retry_after_s']:g} s" if refusal.get("retry_after_s") is not None else ""
        return Group(head, Text(f"refused with {refusal['status']}: {refusal['message']}{again}", style="yellow"), "")
    if placed is None:
        return Group(head, "")
    outcome = attempt.get("outcome") or {}
    parts: list[RenderableType] = [head, Text(sentence(placed)), ""]
    for title, chosen, scores in _pools(placed):
        parts += [_candidates(title, chosen, scores), ""]
    return Group(*parts, _comparison(placed, outcome), *(Text(line, style="yellow") for line in oddities(placed, outcome)), "")


def sentence(placed: Json) -> str:
    """Where, by whom, why."""
    prefill, decode = placed["prefill_worker"], placed["decode_worker"]
    where = f"{prefill} computes the prompt and decodes" if prefill == decode else f"{prefill} computes the prompt, {decode} decodes"
    source = placed.get("prefix_source")
    pulled = ""
    if source is not None:
        times = f"{_ms(source['pull_s'])} ms, computing them {_ms(source['compute_s'])} ms"
        pulled = f"; it pulls the first {source['num_tokens']:,} tokens from {source['worker_id']} (expected {times})"
    return f"{where}, by {placed['policy']}: {placed['reason']}{pulled}"


def oddities(placed: Json, outcome: Json) -> list[str]:
    """What came out otherwise than it should, a line each."""
    lines = []
    expected, found = placed["cached_tokens"], outcome.get("found_tokens")
    if found is not None and 2 * found < expected:
        told = placed["confirmed_tokens"]
        lines.append(
            f"expected {expected:,} cached tokens ({told:,} of them told of by {placed['prefill_worker']} itself) and found {found:,}"
        )
    predicted_s, actual_s = placed.get("predicted_ttft_s"), outcome.get("ttft_s")
    if predicted_s and actual_s is not None and actual_s > SLOW_RATIO * predicted_s:
        lines.append(f"the first token took {actual_s / predicted_s:.1f} times as long as predicted")
    if outcome.get("transfer_error"):
        lines.append(f"the KV did not arrive ({outcome['transfer_error']}): {placed['decode_worker']} computed the prompt itself")
    if outcome.get("state") is None:
        lines.append("not over yet, or its end was not heard of")
    chosen = {placed["prefill_worker"], placed["decode_worker"]}
    shown = {score["worker_id"] for score in placed["prefill_scores"] + placed["decode_scores"]}
    if not chosen <= shown:
        lines.append(f"{', '.join(sorted(chosen - shown))}: not among the cheapest, chosen for the reason above")
    return lines


def _pools(placed: Json) -> list[tuple[str, str, list[Json]]]:
    """(title, chosen worker, scores) of each choice that was made."""
    prefill, decode = placed["prefill_scores"], placed["decode_scores"]
    if prefill == decode:
        return [("prompt and decode", placed["decode_worker"], decode)] if decode else []
    pools = [("prefill", placed["prefill_worker"], prefill), ("decode", placed["decode_worker"], decode)]
    return [pool for pool in pools if pool[2]]


def _candidates(title: str, chosen: str, scores: list[Json]) -> Table:
    from rich.table import Table

    names = list(dict.fromkeys(name for score in scores for name in score["terms"]))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f"{title}, cheapest first", no_wrap=True)
    for name in ("cached tokens", "heard ms ago", *names, "cost ms"):
        table.add_column(name, justify="right")
    for score in scores:
        is_chosen = score["worker_id"] == chosen
        table.add_row(
            f"{'>' if is_chosen else ' '} {score['worker_id']}",
            f"{score['cached_tokens']:,}",
            f"{1e3 * score['signal_age_s']:.0f}" if score["signal_age_s"] < 1e6 else "never",
            *(_ms(score["terms"].get(name)) for name in names),
            _ms(score["seconds"]),
            style="green" if is_chosen else None,
        )
    return table


def _comparison(placed: Json, outcome: Json) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in ("expected", "came"):
        table.add_column(name, justify="right")
    table.add_column("")
    is_split = placed["prefill_worker"] != placed["decode_worker"]
    waited = f"{_ms(placed['waited_s'])} ms of it waited at the router"
    table.add_row("time to first token, ms", _ms(placed["predicted_ttft_s"]), _ms(outcome.get("ttft_s")), waited)
    if is_split:
        path = f"over {outcome['handoff_path']}, {outcome['handoff_bytes']:,} bytes" if outcome.get("handoff_path") else ""
        table.add_row("hand-off, ms", _ms(placed["predicted_handoff_s"]), _ms(outcome.get("handoff_s")), path)
    found = outcome.get("found_tokens")
    told = f"{placed['confirmed_tokens']:,} told of by the worker itself"
    table.add_row("cached tokens", f"{placed['cached_tokens']:,}", "-" if found is None else f"{found:,}", told)
    state, tokens, took_s = outcome.get("state"), outcome.get("output_tokens"), outcome.get("duration_s")
    table.add_row("end", "", state or "-", "" if state is None else f"{tokens:,} tokens, {took_s:.3f} s after it was placed")
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"
