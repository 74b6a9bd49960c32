"""`python -m tests.kv_campaign`: does a wrong byte of KV ever reach a decode step, and does a hand-off ever leak, hang or need a restart?

python -P -m tests.kv_campaign --injections 1000000 --json > benchmarks/results/kv-corruption.json
python -P -m tests.kv_campaign --aborts 1000 --json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

from baton.bench.report import Row, make_document
from tests.kv_campaign import corruption
from tests.kv_campaign.backends import installed_backends

CORRUPTION_SCHEMA = "baton.kv_corruption.v1"
ABORTS_SCHEMA = "baton.kv_aborts.v1"
LIVE_BACKENDS = ("shm", "tcp")  # the others live too, with a tenth of the number


def main() -> int:
    options = _parse()
    rows: list[Row] = []
    sections: dict[str, object] = {}
    schema = CORRUPTION_SCHEMA
    if options.injections:
        rows, sections = _corrupt(options)
    if options.aborts:
        from tests.kv_campaign import aborts

        made, more = aborts.run(options.aborts, options.seed, on_progress=_progress("aborts", options.aborts))
        schema = schema if options.injections else ABORTS_SCHEMA
        rows, sections = rows + made, sections | more
    if options.json:
        print(json.dumps(make_document(schema, seed=options.seed, rows=rows, sections=sections), indent=1))
    else:
        for row in rows:
            print(_line(row))
    return 0 if all(row.ok is not False for row in rows) else 1


def _corrupt(options: argparse.Namespace) -> tuple[list[Row], dict[str, object]]:
    backends = tuple(b for b in installed_backends() if options.backends is None or b in options.backends)
    num_live = options.live if options.live is not None else min(1200, max(24, options.injections // 100))
    live_at_length = [b for b in LIVE_BACKENDS if b in backends]
    live_in_short = [b for b in backends if b not in (*LIVE_BACKENDS, "local")]
    num_short = -(-num_live // 10)
    started = time.monotonic()
    live = corruption.run_live_part(num_live, options.seed, live_at_length, on_progress=_progress("live", num_live * len(live_at_length)))
    live.merge(
        corruption.run_live_part(num_short, options.seed, live_in_short, on_progress=_progress("live", num_short * len(live_in_short)))
    )
    num_bulk = max(0, options.injections - live.num_injected())
    bulk = corruption.run_bulk(num_bulk, options.seed, backends, jobs=options.jobs, on_progress=_progress("bulk", num_bulk))
    demo = corruption.run_demo(options.demo, options.seed) if options.demo else []
    rows = corruption.bulk_rows(bulk) + corruption.live_rows(live, [*live_at_length, *live_in_short]) + demo
    rows.append(Row(name="corruption/all/injections", value=bulk.num_injected() + live.num_injected(), unit="injections"))
    rows.append(Row(name="corruption/all/duration", value=round(time.monotonic() - started, 1), unit="s", details={"jobs": options.jobs}))
    return rows, {"backends": list(backends), **corruption.sections(bulk, live)}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.kv_campaign", description=__doc__.partition("\n")[0])
    parser.add_argument("--injections", type=int, default=0, metavar="N", help="corruptions in all, live ones included")
    parser.add_argument("--live", type=int, default=None, metavar="N", help="of them, live over shm and tcp each (default: 1 %%, <= 1200)")
    parser.add_argument("--demo", type=int, default=3000, metavar="N", help="besides, on the demo model; 0: none (default: %(default)s)")
    parser.add_argument("--aborts", type=int, default=0, metavar="N", help="aborts, cancels and kills of hand-offs")
    parser.add_argument(
        "--backends", type=lambda text: text.split(","), default=None, metavar="A,B", help="default: all that are installed"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes of the bulk part (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one document on stdout")
    options = parser.parse_args()
    if options.injections <= 0 and options.aborts <= 0:
        parser.error("nothing to do: give --injections or --aborts")
    return options


def _progress(what: str, total: int) -> Callable[[int], None]:
    """A line on stderr that is written over; on a pipe, nothing."""
    started = time.monotonic()

    def show(done: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done >= total else ""
            print(f"\r{what}: {done:,} of {total:,}, {time.monotonic() - started:.0f} s", end=end, file=sys.stderr, flush=True)

    return show


def _line(row: Row) -> str:
    value = "-" if row.value is None else f"{row.value:,.6g}"
    target = f"  ({row.target}: {'ok' if row.ok else 'MISSED'})" if row.target is not None else ""
    more = {name: row.details[name] for name in ("of", "interval", "rate_below") if name in row.details}
    said = "  " + ", ".join(f"{name} {text}" for name, text in more.items()) if more else ""
    return f"{row.name:58} {value:>12} {row.unit}{target}{said}"


if __name__ == "__main__":
    sys.exit(main())
