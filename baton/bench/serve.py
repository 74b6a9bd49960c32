"""`baton bench serve`: open-loop load against any OpenAI endpoint, and what its users would have seen."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baton.bench.report import Row, make_document, percentile
from baton.connection import find_server
from protocol.errors import ConfigError, ServiceError
from protocol.request import Slo
from protocol.timeline import Timeline, goodput_requests_per_s

if TYPE_CHECKING:
    from rich.console import RenderableType

    from baton.bench.load import LoadRun

SCHEMA = "baton.bench.serve.v1"
CONNECT_TIMEOUT_S = 3.0
NUM_WARMUPS = 1

# What a timeline gives, in seconds; protocol/timeline.py says what each is.
LATENCIES: Mapping[str, Callable[[Timeline], Iterable[float | None]]] = {
    "ttft": lambda t: [t.ttft_s],
    "tpot": lambda t: [t.tpot_s],
    "itl": lambda t: t.itl_s,
    "itl_worst": lambda t: [max(t.itl_s, default=None)],  # of each request: the longest pause
    "e2e": lambda t: [t.e2e_s],
}
STATISTICS: Mapping[str, Callable[[list[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "p50": lambda values: percentile(values, 0.5),
    "p90": lambda values: percentile(values, 0.9),
    "p99": lambda values: percentile(values, 0.99),
    "max": max,
}


def bench_serve(
    url: Annotated[str | None, typer.Option("--url", "--base-url", help="Endpoint; the server running here when left out.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to name; the endpoint's first when left out.")] = None,
    num_requests: Annotated[int, typer.Option("--num-requests", "--num-prompts", min=1, help="How many.")] = 32,
    rate: Annotated[float, typer.Option("--rate", "--request-rate", min=0.0, help="Requests a second (Poisson); inf: all at once.")] = 1.0,
    input_len: Annotated[int, typer.Option("--input-len", "--random-input-len", min=1, help="Tokens of a prompt.")] = 1024,
    output_len: Annotated[int, typer.Option("--output-len", "--random-output-len", min=1, help="Tokens of an answer.")] = 64,
    shared_prefix: Annotated[int, typer.Option(min=0, help="First tokens that all prompts have in common.")] = 0,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", "--max-concurrency", min=1, help="Most requests in flight; later ones wait.")
    ] = None,
    slo: Annotated[str | None, typer.Option("--slo", "--goodput", help="Milliseconds: ttft=500,tpot=50. Goodput counts by it.")] = None,
    vocab_size: Annotated[int, typer.Option(min=20, help="Prompts are drawn from the token ids below it.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")] = 0,
    num_warmups: Annotated[int, typer.Option(min=0, help="Requests before the first that counts.")] = NUM_WARMUPS,
    extra_body: Annotated[str | None, typer.Option(help="JSON object for every request; a null takes a field out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the JSON document to this file too.")] = None,
    detailed: Annotated[
        bool, typer.Option("--detailed", "--save-detailed", help="Every delivery of every request in the document.")
    ] = False,
    api_key: Annotated[str | None, typer.Option(envvar="BATON_API_KEY", help="Key the endpoint asks for.")] = None,
) -> None:
    """Send requests at a given rate, without waiting for answers, and print the latencies they had."""
    from baton.bench.load import Endpoint, Workload, drive
    from baton.chat import first_model

    if shared_prefix > input_len:
        raise ConfigError(f"--shared-prefix is {shared_prefix}, --input-len {input_len}: a prompt cannot be shorter than its beginning")
    if rate == 0:
        raise ConfigError("--rate is 0: no request would ever come; give requests a second, or inf")
    objective = None if slo is None else parse_slo(slo)
    server, _ = find_server(url, api_key, os.environ, timeout_s=CONNECT_TIMEOUT_S)
    workload = Workload(
        num_requests=num_requests,
        request_rate=rate,
        input_len=input_len,
        output_len=output_len,
        shared_prefix=shared_prefix,
        vocab_size=vocab_size,
        seed=seed,
        max_concurrency=concurrency,
    )
    endpoint = Endpoint(url=server.url, model=model or first_model(server), api_key=api_key, extra_body=_object(extra_body))
    shown = sys.stderr.isatty()
    run = drive(endpoint, workload, num_warmups=num_warmups, on_progress=_progress_line if shown else None)
    if shown:
        sys.stderr.write("\r\x1b[K")
    document = serve_document(run, objective, url=endpoint.url, model=endpoint.model, detailed=detailed)
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(document))
    else:
        _print(latency_table(run), *notes_of(run, objective))
    if not run.well:
        raise ServiceError(f"none of {num_requests} requests ended well: {error_counts(run)}")


def serve_document(run: LoadRun, slo: Slo | None, *, url: str, model: str, detailed: bool = False) -> dict[str, object]:
    """What a run came to. Rows are figures; `errors` counts the requests that ended badly, by kind."""
    workload = run.workload
    lateness_s = run.lateness_s
    sections: dict[str, object] = {
        "endpoint": {"url": url, "model": model},
        "workload": {
            "num_requests": workload.num_requests,
            "rate_requests_per_s": workload.request_rate if workload.request_rate != float("inf") else "inf",
            "input_len": workload.input_len,
            "output_len": workload.output_len,
            "shared_prefix": workload.shared_prefix,
            "max_concurrency": workload.max_concurrency,
        },
        "duration_s": run.duration_s,
        "completed": len(run.well),
        "failed": len(run.requests) - len(run.well),
        "errors": error_counts(run),
        "first_error": next((r.error_text for r in run.requests if r.error is not None), None),
        "num_waited_for_concurrency": run.num_waited,
        "client": {"cpu_s": run.cpu_s, "cpu_share": run.cpu_s / run.duration_s, "lateness_s_max": max(lateness_s, default=0.0)},
    }
    if slo is not None:
        sections["slo"] = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}
    if detailed:
        sections["requests"] = [_request_record(run, index) for index in range(len(run.requests))]
    return make_document(SCHEMA, seed=workload.seed, rows=figures(run, slo), sections=sections)


def figures(run: LoadRun, slo: Slo | None) -> list[Row]:
    """Throughput, goodput where there is an objective, and every statistic of every latency: `itl/p99` in ms."""
    timelines = [r.timeline for r in run.well]
    num_tokens = sum(t.num_tokens for t in timelines)
    rows = [
        Row(name="throughput/requests", value=len(timelines) / run.duration_s, unit="requests/s"),
        Row(name="throughput/output", value=num_tokens / run.duration_s, unit="tokens/s"),
    ]
    if slo is not None:
        rows.append(Row(name="goodput", value=goodput_requests_per_s(timelines, slo, run.duration_s), unit="requests/s"))
    for name in LATENCIES:
        values_s = latencies_s(timelines, name)
        for statistic, of in STATISTICS.items():
            rows.append(Row(name=f"{name}/{statistic}", value=of(values_s) * 1e3 if values_s else None, unit="ms"))
    return rows


def latencies_s(timelines: Iterable[Timeline], name: str) -> list[float]:
    """All values of one of LATENCIES, those that there are."""
    return [value for timeline in timelines for value in LATENCIES[name](timeline) if value is not None]


def error_counts(run: LoadRun) -> dict[str, int]:
    return dict(Counter(r.error.value for r in run.requests if r.error is not None))


def parse_slo(text: str) -> Slo:
    """ "ttft=500,tpot=50", in milliseconds; ":" does for "=" as in vLLM.

    Raises:
        ConfigError: another name, or no number above 0.
    """
    found: dict[str, float] = {}
    for part in text.replace(" ", ",").split(","):
        name, _, value = part.replace(":", "=").partition("=")
        try:
            found[name] = float(value) / 1e3
        except ValueError:
            found[name] = 0.0
        if name not in ("ttft", "tpot") or not found[name] > 0:
            raise ConfigError(f"--slo {text}: {part!r} is not an objective; write milliseconds such as ttft=500,tpot=50")
    return Slo(ttft_s=found.get("ttft"), tpot_s=found.get("tpot"))


def latency_table(run: LoadRun) -> RenderableType:
    """Rows of latencies in ms, columns of statistics."""
    from rich.table import Table

    table = Table(title="milliseconds", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for statistic in STATISTICS:
        table.add_column(statistic, justify="right")
    timelines = [r.timeline for r in run.well]
    for name in LATENCIES:
        values_s = latencies_s(timelines, name)
        table.add_row(name.replace("_", " "), *(f"{of(values_s) * 1e3:.1f}" if values_s else "-" for of in STATISTICS.values()))
    return table


def notes_of(run: LoadRun, slo: Slo | None) -> list[str]:
    """A line each: what was done, what went wrong, and what the measuring itself cost."""
    timelines = [r.timeline for r in run.well]
    num_tokens = sum(t.num_tokens for t in timelines)
    lines = [
        f"{len(timelines)} of {len(run.requests)} requests in {run.duration_s:.1f} s: "
        f"{len(timelines) / run.duration_s:.2f} requests/s, {num_tokens / run.duration_s:.1f} output tokens/s"
    ]
    if slo is not None:
        met = sum(t.meets(slo) for t in timelines)
        lines.append(f"goodput {goodput_requests_per_s(timelines, slo, run.duration_s):.2f} requests/s: {met} met the objective")
    if errors := error_counts(run):
        first = next(r.error_text for r in run.requests if r.error is not None)
        lines.append(f"failed: {', '.join(f'{count} {kind}' for kind, count in errors.items())}; first: {first}")
    if run.num_waited:
        lines.append(f"{run.num_waited} requests waited for one of {run.workload.max_concurrency} places; their TTFT says so")
    late_s = max(run.lateness_s, default=0.0)
    lines.append(
        f"this client: {run.cpu_s:.2f} s CPU, {100 * run.cpu_s / run.duration_s:.1f} % of a core; latest request {late_s * 1e3:.1f} ms late"
    )
    return lines


def _request_record(run: LoadRun, index: int) -> dict[str, object]:
    """One request of --detailed; moments in seconds from the start of the run."""
    request = run.requests[index]
    timeline = request.timeline
    return {
        "arrival_s": timeline.arrival_s - run.started_s,
        "sent_s": None if request.sent_s is None else request.sent_s - run.started_s,
        "delivery_s": [moment - run.started_s for moment in timeline.token_times_s],
        "delivery_tokens": timeline.token_counts,
        "prompt_tokens": request.num_prompt_tokens,
        "error": None if request.error is None else request.error.value,
    }


def _progress_line(run: LoadRun) -> None:
    over = sum(r.is_over for r in run.requests)
    ttfts_s = latencies_s([r.timeline for r in run.requests], "ttft")
    ttft = f", TTFT p50 {percentile(ttfts_s, 0.5) * 1e3:.0f} ms" if ttfts_s else ""
    sys.stderr.write(f"\r\x1b[K{over} of {run.workload.num_requests} done, {run.num_in_flight} in flight{ttft}")
    sys.stderr.flush()


def _print(*parts: RenderableType) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for part in parts:
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)


def _object(text: str | None) -> dict[str, object]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"--extra-body {text} is not a JSON object")
    return value


__all__ = ["bench_serve", "figures", "latencies_s", "parse_slo", "serve_document"]
