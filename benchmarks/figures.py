"""The figures of README and docs, written from benchmarks/results between two marks, and the drawings beside the results.

A test fails when a page or a drawing and the results differ.

python -m benchmarks.figures    writes pages and drawings anew
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from baton.bench.calibration import SCHEMA as CALIBRATION
from baton.bench.disagg import SCHEMA as DISAGG
from baton.bench.disagg import drawing as disagg_svg
from baton.bench.engine_rows import SCHEMA as ENGINE
from baton.bench.peers import OURS
from baton.bench.policies import SCHEMA as POLICIES
from baton.bench.policy_figure import policies_svg
from baton.bench.policy_rows import OURS as OUR_POLICY
from baton.bench.policy_rows import STATISTICS, Cell
from baton.bench.router_rows import SCHEMA as ROUTER
from baton.bench.start import SCHEMA as START
from baton.bench.transfer import digest_words
from baton.bench.transfer_rows import SCHEMA as TRANSFER
from baton.bench.validation import SCHEMA as VALIDATION
from baton.bench.validation_model import NULL
from baton.compare import SCHEMA as COMPARE
from baton.plan_told import SCHEMA as PLAN
from baton.sim_faults import SCHEMA as FAULTS
from benchmarks.tournament import tournament
from simulator.fidelity import Fidelity

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"
PAGES = {DOCS / "benchmarks.md": "all", HERE.parent / "README.md": "short", DOCS / "kv-handoff.md": "campaigns"}
CORRUPTION, ABORTS = "baton.kv_corruption.v1", "baton.kv_aborts.v1"  # of python -m tests.kv_campaign
DAMAGE = {
    "bit_flip": "bit flip",
    "wrong_block": "wrong block",
    "stale_generation": "stale generation",
    "truncated": "truncated",
    "late_writer": "late writer",
    "swapped_layers": "swapped layers",
}
BEGIN, END = "<!-- figures of benchmarks/results -->", "<!-- end of figures -->"
WORKLOADS = {  # in the order of the tables
    "one_stream": "one stream",
    "batch8": "8 x (256 in, 64 out)",
    "batch32": "32 x (256 in, 64 out)",
    "batch64": "64 x (256 in, 64 out)",
    "shared_prefix": "32 x (1,152 in, 1,024 shared, 16 out)",
    "prefill2k": "prefill of 2,048",
    "prefill8k": "prefill of 8,192",
}
ONE_TO_ONE = re.compile(r"prefill 1 x TP\d+, decode 1 x TP\d+")
MODELS = ("15m", "125m", "0.5b", "moe", None)  # the order of the tables; None: no engine's document
PEERS = {"vllm": "vLLM", "llamacpp": "llama.cpp", "transformers": "transformers"}

Document = Mapping[str, Any]
Rows = Mapping[str, Mapping[str, Any]]


def main() -> None:
    for path, text in [*drawings().items(), *pages().items()]:
        path.write_text(text, encoding="utf-8")
        print(path)


def pages() -> dict[Path, str]:
    """Of each page, what it has to say."""
    documents = read_results()
    return {page: with_figures(page.read_text(encoding="utf-8"), documents, kind) for page, kind in PAGES.items()}


def drawings() -> dict[Path, str]:
    """Of each drawing that lies beside its document."""
    drawn = {}
    for path in sorted(RESULTS.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] == DISAGG:
            drawn[path.with_suffix(".svg")] = disagg_svg(document)
        elif document["schema"] == POLICIES:
            drawn[path.with_suffix(".svg")] = policies_svg([Cell.from_record(cell) for cell in document["cells"]])
    return drawn


def read_results() -> list[Document]:
    """Every document: engines from the smallest model on, then the others by file name."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return sorted(found, key=lambda document: MODELS.index(next(iter(document.get("engines", {None: 0})))))


def with_figures(page: str, documents: Sequence[Document], kind: str) -> str:
    """The page with what stands between the marks made anew.

    Raises:
        ValueError: the page lacks a mark.
    """
    before, after = page.index(BEGIN) + len(BEGIN), page.index(END)
    text = {"short": short_figures, "all": all_figures, "campaigns": campaign_figures}[kind](documents)
    return f"{page[:before]}\n\n{text}\n\n{page[after:]}"


def short_figures(documents: Sequence[Document]) -> str:
    """Ours beside vLLM: a line a workload, a column a model."""
    of_model = dict(_engine_models(documents))
    lines = [["", *of_model]]
    for workload in ("one_stream", "batch32", "shared_prefix", "prefill2k"):
        ratios = [rows.get(f"{model}/{workload}/vs_vllm") for model, rows in of_model.items()]
        lines.append([WORKLOADS[workload], *("" if row is None else _ratio(row) for row in ratios)])
    return _table(lines)


def all_figures(documents: Sequence[Document]) -> str:
    parts = [_engine_part(document) for document in documents if document["schema"] == ENGINE]
    parts += [_disagg_part(document) for document in documents if document["schema"] == DISAGG]
    parts += [_start_part(document) for document in documents if document["schema"] == START]
    parts += [_router_part(document) for document in documents if document["schema"] == ROUTER]
    parts += [_policies_part(document) for document in documents if document["schema"] == POLICIES]
    parts += [f"{_heading(document)}\n\n{tournament(document, _table)}" for document in documents if document["schema"] == COMPARE]
    parts += [_transfer_part(document) for document in documents if document["schema"] == TRANSFER]
    parts += [_validation_part(document) for document in documents if document["schema"] == VALIDATION]
    parts += [_plan_part(document) for document in documents if document["schema"] == PLAN]
    parts += [_rows_part(document, "median error of a step") for document in documents if document["schema"] == CALIBRATION]
    parts += [_rows_part(document, "seeds of faults") for document in documents if document["schema"] == FAULTS]
    return "\n\n".join(parts)


def _engine_models(documents: Sequence[Document]) -> Iterator[tuple[str, Rows]]:
    for document in documents:
        if document["schema"] == ENGINE:
            for model in document["engines"]:
                yield model, _by_name(document)


# --- the engine -------------------------------------------------------------------------------------------------------


def _engine_part(document: Document) -> str:
    rows = _by_name(document)
    lines = [["", "Baton", "beside", "theirs", "ratio", "95 % interval", "verdict", "asked for"]]
    is_one = len(document["engines"]) == 1
    for model in document["engines"]:
        of = "" if is_one else f"{model}: "
        for workload, title in WORKLOADS.items():
            lines += _workload_lines(rows, model, workload, of + title)
        ready = rows[f"{model}/ready/{OURS}"]
        lines.append([f"{of}worker ready", _value(ready), *[""] * 5, _asked(ready)])
        memory = rows[f"{model}/memory_beyond/{OURS}"]
        lines.append([f"{of}memory beyond weights and KV pool", _value(memory), *[""] * 5, _asked(memory)])
    engines = {told["engine"] for of_model in document["engines"].values() for told in of_model.values() if "engine" in told}
    machine = []
    for model, of_model in document["engines"].items():
        of = "" if is_one else f"{model}: "
        machine.append(f"{of}stream {_value(rows[f'{model}/stream'])}, GEMM peak {_value(rows[f'{model}/gemm_peak'])}")
        for name, told in of_model.items():
            if name != OURS and told.get("tokens") is not None:
                machine.append(f"{of}tokens of {PEERS[name]} in float32 {told['tokens']}")
    who = f"{', '.join(sorted(engines))}; {document['threads']} threads, bfloat16, medians of {document['rounds']} rounds"
    about = "; ".join([who, *machine]) + "."
    return f"{_heading(document)}\n\n{about}\n\n{_table(lines)}"


def _workload_lines(rows: Rows, model: str, workload: str, title: str) -> Iterator[list[str]]:
    """Ours beside each peer, then ours beside the machine."""
    at = f"{model}/{workload}"
    ours = rows.get(f"{at}/{OURS}")
    if ours is None:
        return
    value, is_alone = _value(ours), True
    for peer, name in PEERS.items():
        ratio = rows.get(f"{at}/vs_{peer}")
        if ratio is not None:
            is_alone = False
            theirs = "" if rows[f"{at}/{peer}"]["value"] is None else _value(rows[f"{at}/{peer}"])
            yield [title, value, name, theirs, *_verdict(ratio), _asked(ratio)]
    if is_alone:
        yield [title, value, *[""] * 6]
    for share, of_what in (("stream_share", "stream bandwidth"), ("peak_share", "GEMM peak")):
        row = rows.get(f"{at}/{share}")
        if row is not None and row["target"] is not None:
            yield [title, value, of_what, "", f"{row['value']:.3f}", "", "", _asked(row)]


# --- servers ----------------------------------------------------------------------------------------------------------


def _disagg_part(document: Document) -> str:
    rows, workload = _by_name(document), document["workload"]
    figures = list(dict.fromkeys(name.rpartition("/")[0] for name in rows))
    servers = list(document["servers"])
    lines = [["ms", *servers]]
    for figure in figures:
        lines.append([_figure_title(figure), *(f"{rows[f'{figure}/{server}']['value']:,.1f}" for server in servers)])
    ratios = [["theirs / ours", "ratio", "95 % interval", "verdict", "asked for"]]
    for name, row in rows.items():
        if row["target"] is not None:
            ratios.append([_figure_title(name.replace(f"{OURS}_", "")), *_verdict(row), _asked(row)])
    threads = document["threads"]
    asked = f"{workload['rate_requests_per_s']:g} requests a second of {workload['input_len']:,} in and {workload['output_len']} out"
    about = (
        f"{document['model']}, {asked}, {document['rounds']} rounds of {workload['num_requests']}: "
        f"one prefill and one decode worker of {threads['of_each_worker']} thread each; "
        f"vLLM with {threads['of_a_colocated_engine']} threads and its `max-num-batched-tokens` behind its name."
    )
    drawing = RESULTS / f"disagg-{workload['rate_requests_per_s']:g}.svg"
    shown = f"\n\n![TTFT against pauses](../benchmarks/results/{drawing.name})" if drawing.exists() else ""
    return f"{_heading(document)}\n\n{about}\n\n{_table(lines)}\n\n{_table(ratios)}{shown}"


def _start_part(document: Document) -> str:
    rows = _by_name(document)
    lines = [[f"start of {document['model']}, 1 + 1 workers", "value", "asked for"]]
    for name, row in rows.items():
        value = f"{row['value']:.2f}x ({row['verdict']})" if "verdict" in row else _value(row)
        lines.append([name.partition("/")[2].replace("/", ": "), value, _asked(row)])
    return f"{_heading(document)}\n\n{_table(lines)}"


# --- placement --------------------------------------------------------------------------------------------------------


def _router_part(document: Document) -> str:
    """A line a figure, ours and then others'; what belongs to the thread alone stands beside."""
    rows = _by_name(document)
    others = sorted({name for told in document["subjects"].values() for name in told} - {OURS})
    lines = [["", "Baton", "thread CPU time", *others, "asked for"]]
    for name, row in rows.items():
        figure, _, subject = name.rpartition("/")
        if subject in others:
            continue
        figure = figure if subject == OURS else name
        cpu = next((f"{row[key]:,.4g}" for key in ("cpu_us", "cpu_ratio", "by_cpu_time") if key in row), "")
        value = str(row["reason"]) if row["value"] is None else _value(row)
        theirs = [rows.get(f"{figure}/{other}") for other in others]
        said = ["" if their is None else str(their["reason"]) if their["value"] is None else _value(their) for their in theirs]
        lines.append([figure.replace("/", ": ", 1).replace("/", ", ").replace("_", " "), value, cpu, *said, _asked(row)])
    who = "; ".join(sorted({told["subject"] for of_stage in document["subjects"].values() for told in of_stage.values()}))
    about = (
        f"{who}; {document['num_workers']} workers, an index of {document['num_blocks']:,} blocks, "
        f"a larger window of {document['num_live']:,} requests, medians of {document['rounds']} rounds."
    )
    return f"{_heading(document)}\n\n{about}\n\n{_table(lines)}"


def _policies_part(document: Document) -> str:
    """A table a workload: figures of each policy, and its first tokens beside those of ours in the same repeats."""
    rows, parts = _by_name(document), [_heading(document)]
    cells, num_rejected = document["cells"], len(document["rejected"])
    num_invalid = sum(bool(cell["invalid"]) for cell in cells)
    parts.append(
        f"Live, {document['cluster']['workers']['prefill_workers']} + {document['cluster']['workers']['decode_workers']} paced workers; "
        f"{document['repeats']} repeats of {document['seconds']:g} s, medians; {num_rejected} turns that did not count were taken "
        f"again, {num_invalid} of {len(cells)} do not count. A ratio is the other's time to first token over ours: above 1 ours waits less."
    )
    for workload in document["workloads"]:
        beside = [f"{s} / {OUR_POLICY}, 95 % interval" for s in STATISTICS]
        lines = [["", *(f"{s} ms" for s in STATISTICS), "hit share", *beside, "counted"]]
        for policy in document["policies"]:
            figures = [rows[f"{workload}/ttft_{s}/{policy}"] for s in STATISTICS]
            ratios = [rows.get(f"{workload}/ttft_{s}/{OUR_POLICY}_vs_{policy}") for s in STATISTICS]
            said = ["" if r is None else _beside(r) for r in ratios]
            values = ["-" if f["value"] is None else f"{f['value']:,.0f}" for f in figures]
            hits = rows[f"{workload}/hit_share/{policy}"]["value"]
            lines.append([policy, *values, "-" if hits is None else f"{hits:.2f}", *said, str(figures[0]["repeats"])])
        asked = [f"{name.removeprefix(f'{workload}/')} {_asked(row)}" for name, row in rows.items() if _is_asked(row, name, workload)]
        parts += [f"**{workload}**", _table(lines), "; ".join(asked) + "."]
    return "\n\n".join(parts)


def _plan_part(document: Document) -> str:
    """The best of each kind, what DistServe's own space of placements has for its best, and how far the draw of requests matters."""
    asked, lengths, rows = document["asked"], document["lengths"], document["rows"]
    about = (
        f"TTFT {asked['slo_ttft'] * 1e3:g} ms and TPOT {asked['slo_tpot'] * 1e3:g} ms for {asked['attainment']:.0%} of"
        f" {asked['requests']:,} requests on {asked['gpus']} GPUs; step times {document['step_times']}; {lengths['name']}, prompts of"
        f" {lengths['input_mean']:,.0f} tokens and answers of {lengths['output_mean']:,.0f} on average. Latencies are those that the same"
        f" share of requests does not exceed, each on its own; a pause is the longest time between two tokens of a request."
    )
    lines = [["placement", "GPUs", "requests/s a GPU", "in time", "TTFT ms", "TPOT ms", "pause ms"]]
    for row in rows:
        if row["attainment"] is not None:
            latencies = (f"{row['ttft_s'] * 1e3:.0f}", f"{row['tpot_s'] * 1e3:.1f}", f"{row['pause_s'] * 1e3:.0f}")
            lines.append([row["name"], str(row["gpus"]), f"{row['value']:.2f}", f"{row['attainment']:.1%}", *latencies])
    alone = max((row for row in rows if ONE_TO_ONE.fullmatch(row["name"])), key=lambda row: row["value"])
    theirs = "(DistServe's simulator: TP2 and TP1, 1.56)"
    said = [f"Of one prefill and one decode worker, {alone['name']} is the best: {alone['value']:.2f} {theirs}."]
    for kind, rates in document["draws"].items():
        said.append(f"Best {kind} under {len(rates)} seeds: {min(rates):.2f} to {max(rates):.2f}, median {median(rates):.2f}.")
    return "\n\n".join([_heading(document), about, _table(lines), " ".join([document["advice"], *said])])


def _beside(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['value']:.2f} ({low:.2f} .. {high:.2f}) {row['verdict']}"


def _is_asked(row: Mapping[str, Any], name: str, workload: str) -> bool:
    return name.startswith(f"{workload}/") and row["target"] is not None


# --- simulated beside live -----------------------------------------------------------------------------------------------


def _validation_part(document: Document) -> str:
    """A line a figure and policy: measured, said beforehand, how far apart, and how far the null model is."""
    rows = _by_name(document)
    lines = [["", "live", "simulated", "off by", "null model off by", "asked for"]]
    for name, row in rows.items():
        null = rows.get(f"{name}/{NULL}")
        if name.endswith(f"/{NULL}"):
            continue
        off = str(row["reason"]) if row["value"] is None else "" if null is None else _value(row)
        lines.append([name.replace("_error/", ": ").replace("_", " "), *_live_and_said(row), off, _null_value(null), _asked(row)])
    fitted = []
    for cluster, told in document["clusters"].items():
        known = told["calibration"]
        fitted.append(
            f"{cluster}: a step takes {known['step_s'] * 1e3:.2f} ms more than its model, one that computes prompts "
            f"{known.get('prefill_factor', 1.0):.2f} times as long, {known['first_s'] * 1e3:.1f} ms lie between "
            f"client and workers (`{known['policy']}`, {known['trace']})"
        )
    return f"{_heading(document)}\n\nFitted: {'; '.join(fitted)}.\n\n{_table(lines)}"


def _live_and_said(row: Mapping[str, Any]) -> tuple[str, str]:
    if "live_ms" in row:
        return f"{row['live_ms']:,.4g} ms", f"{row['predicted_ms']:,.4g} ms"
    if "simulated" in row:  # the order of policies
        return " < ".join(row["live"]), " < ".join(row["simulated"])
    return ("", "") if row["value"] is None else (f"{row['live']:.1%}", f"{row['predicted']:.1%}")


def _null_value(row: Mapping[str, Any] | None) -> str:
    return "" if row is None or row["value"] is None else _value(row)


# --- transfers ---------------------------------------------------------------------------------------------------------


def _transfer_part(document: Document) -> str:
    """Ratios with what was asked for, the speeds behind them, the hand-off, and who was left out."""
    rows = _by_name(document)
    ratios = [["in all", "chunks", "ours / beside", "ratio", "95 % interval", "verdict", "asked for", "digests, ms/GB: sampled, full"]]
    speeds: dict[tuple[str, str], dict[str, str]] = {}
    handoffs = [["hand-off", "prompt", "median", "95 % interval", "asked for"]]
    for name, row in rows.items():
        first, second, last = name.split("/", 2)
        if first == "handoff":
            tokens, figure = last.split("/", 1)
            low, high = row["interval"]
            handoffs.append(
                [f"{second}: {figure.replace('_', ' ').replace('/', ', ')}", tokens, _value(row), f"{low:.3g} .. {high:.3g}", _asked(row)]
            )
        elif row["unit"] == "ratio":
            ours, theirs = last.split("_vs_")
            ratios.append([first, second, f"{ours} / {theirs}", *_verdict(row), _asked(row), digest_words(row.get("digest_ms_per_gb"))])
        else:
            speeds.setdefault((first, second), {})[last] = "" if row["value"] is None else _value(row)
    paths = list(dict.fromkeys(path for of_cell in speeds.values() for path in of_cell))
    table = [["in all", "chunks", *paths], *([*cell, *(of_cell.get(path, "") for path in paths)] for cell, of_cell in speeds.items())]
    who = "; ".join(sorted({told["subject"] for told in document["subjects"].values()}))
    absent = "".join(f"; without {name} ({reason})" for name, reason in document["absent"].items())
    pool_mib = document["pool_bytes"] >> 20
    about = f"{who}; blocks scattered over pools of {pool_mib} MiB, medians of {document['rounds']} rounds{absent}."
    tables = [ratios, table, *([handoffs] if len(handoffs) > 1 else [])]
    return "\n\n".join([_heading(document), about, *map(_table, tables)])


# --- damage and aborts -------------------------------------------------------------------------------------------------


def campaign_figures(documents: Sequence[Document]) -> str:
    """What damaged KV blocks came to, and what hand-offs that were given up left behind."""
    parts = [_corruption_part(document) for document in documents if document["schema"] == CORRUPTION]
    parts += [_rows_part(document, "hand-offs given up, cancelled, killed") for document in documents if document["schema"] == ABORTS]
    return "\n\n".join(parts)


def _corruption_part(document: Document) -> str:
    rows = _by_name(document)
    lines = [["damage", "passes `sampled`", "passes `off`", "unchecked: wrong token (hash model)", "unchecked: other text (demo model)"]]
    for kind, title in DAMAGE.items():
        passed = [_passed(rows, mode, kind) for mode in ("sampled", "off")]
        wrong = [_share(rows[f"corruption/unchecked/{what}/{kind}"]) for what in ("wrong_tokens", "demo_model_text_differs")]
        lines.append([title, *passed, *wrong])
    all_of_them = rows["corruption/all/injections"]["value"]
    live = sum(row["value"] for name, row in rows.items() if name.startswith("corruption/live/injections/"))
    full = rows["corruption/full/escaped"]["value"] + rows["corruption/live/full/escaped"]["value"]
    stale = sum(rows[f"corruption/{at}{mode}/staleness_escaped"]["value"] for at in ("", "live/") for mode in ("sampled", "off"))
    hits, wrong_share = rows["corruption/unchecked/wrong_tokens"]["of"], _share(rows["corruption/unchecked/wrong_tokens"], digits=5)
    about = (
        f"{all_of_them:,} injections over {', '.join(document['backends'])}, {live:,} of them between live endpoints: {full:,} reached a "
        f"decode step with `full`, {stale:,} stale ones in any mode; unchecked, {wrong_share} of {hits:,} hits gave a wrong token."
    )
    return f"{_heading(document)}\n\n{about}\n\n{_table(lines)}"


def _passed(rows: Rows, mode: str, kind: str) -> str:
    """What the check of generations meets, which is never off, is counted over all its kinds."""
    row = rows.get(f"corruption/{mode}/escape_rate/{kind}")
    return f"{rows[f'corruption/{mode}/staleness_escaped']['value']:,} in all" if row is None else _share(row)


def _share(row: Mapping[str, Any], digits: int = 4) -> str:
    return f"{100 * row['value']:.{digits}g} %"


def _rows_part(document: Document, what: str) -> str:
    """The rows as they are."""
    lines = [[what, "", "asked for"]]
    for name, row in _by_name(document).items():
        lines.append([name.partition("/")[2].replace("_", " "), _value(row), _asked(row)])
    return f"{_heading(document)}\n\n{_table(lines)}"


# --- words ------------------------------------------------------------------------------------------------------------


def _by_name(document: Document) -> Rows:
    return {row["name"]: row for row in document["rows"]}


def _heading(document: Document) -> str:
    machine = document["machine"]
    titles = {ENGINE: "The engine", DISAGG: "Prefill and decode apart", START: "Starting", TRANSFER: "KV transfer", ROUTER: "Placement"}
    titles |= {POLICIES: "Placement policies", COMPARE: "Placement policies on the virtual clock", VALIDATION: "Simulated beside live"}
    titles |= {PLAN: "Planning", CALIBRATION: "Step times", FAULTS: "Faults on the virtual clock"}
    titles |= {CORRUPTION: "Damaged blocks", ABORTS: "Aborts and kills"}
    title = titles[document["schema"]]
    named = {
        ENGINE: "engines",
        TRANSFER: "chunks",
        CORRUPTION: "backends",
        ROUTER: "stages",
        POLICIES: "policies",
        VALIDATION: "clusters",
    }.get(document["schema"])
    subject = document.get("model", "hand-offs")
    if document["schema"] == COMPARE:
        fidelity = Fidelity(document["setting"]["fidelity"])
        subject = document["setting"]["trace"] + (", token by token" if fidelity is Fidelity.TOKEN_ACCURATE else "")
        subject += ", times reported wrong" if document["estimate_error"] else ""
    elif document["schema"] == FAULTS:
        subject = f"{document['num_seeds']:,} seeds"
    what = subject if named is None else ", ".join(document[named])
    if document["schema"] == PLAN:
        what = f"{document['asked']['model']}, {document['asked']['requests']:,} requests"
    chosen = ", ".join(machine["instructions"])
    host = f"{machine['cpu']} ({machine['num_cores']} cores, {chosen}, {machine['memory_gib']:g} GiB)"
    return f"### {title}: {what}\n\n{host}, commit `{document['commit'][:12]}`."


def _figure_title(name: str) -> str:
    words = {"ttft": "TTFT", "itl": "ITL", "itl_worst": "longest pause", "tpot": "TPOT"}
    return " ".join(words.get(part, part.replace("_", " ")) for part in name.split("/"))


def _value(row: Mapping[str, Any]) -> str:
    value = row["value"]
    return f"{value:,.0f} {row['unit']}" if value >= 1000 else f"{value:.4g} {row['unit']}"


def _verdict(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Ratio, interval, verdict; the reason where there is none."""
    if row["value"] is None:
        return "", "", str(row["reason"])
    low, high = row["interval"]
    return f"{row['value']:.2f}", f"{low:.2f} .. {high:.2f}", row["verdict"]


def _ratio(row: Mapping[str, Any]) -> str:
    return "" if row["value"] is None else f"{row['value']:.2f}x, {row['verdict']}"


def _asked(row: Mapping[str, Any]) -> str:
    if row["target"] is None:
        return ""
    return f"{row['target']}: {'undecided' if row['ok'] is None else 'met' if row['ok'] else 'missed'}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


if __name__ == "__main__":
    main()
