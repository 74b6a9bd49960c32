"""`baton status`: who is there and what each worker does, as a live table or one JSON document."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from baton.connection import Json, find_server

if TYPE_CHECKING:
    from rich.console import RenderableType

TIMEOUT_S = 2.0
REFRESH_S = 0.5
WIDE_COLUMNS = 120


def status(
    url: Annotated[str | None, typer.Option(help="Server to ask; the one running here when left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and end.")] = False,
    watch: Annotated[
        bool | None, typer.Option("--watch/--once", help="Keep the table up to date, as on a terminal.", show_default=False)
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="BATON_API_KEY", help="Key the server asks for.")] = None,
) -> None:
    """Show the workers of a running server and what they do."""
    server, others = find_server(url, api_key, os.environ, timeout_s=TIMEOUT_S)
    document = server.get("/status")
    if as_json:
        print(json.dumps(document, indent=2))
        return
    if others:
        print(f"showing {server.url}, the newest; also running: {', '.join(others)} (--url picks one)", file=sys.stderr)
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDE_COLUMNS)  # a pipe has no width; nothing is cut there
    is_wide = console.width >= WIDE_COLUMNS
    if not (console.is_terminal if watch is None else watch):
        console.print(status_table(document, server.url, is_wide=is_wide))
        return
    try:
        with Live(status_table(document, server.url, is_wide=is_wide), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(REFRESH_S)
                live.update(status_table(server.get("/status"), server.url, is_wide=is_wide), refresh=True)
    except KeyboardInterrupt:
        return


def status_table(document: Json, url: str, *, is_wide: bool) -> RenderableType:
    """The document as a table and a line for each note; a figure the server does not know yet shows as a dash.

    Columns of KV blocks: free + owned + leased + cached = total.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{document.get('model', '?')} at {url}", title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("worker", "role", "state", "pid", *(["host"] if is_wide else [])):
        table.add_column(name, no_wrap=True)
    for name in ("run", "wait", "free", "owned", "leased", "cached", "steps", *(["total", "age s"] if is_wide else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in document.get("workers") or []:
        queue, blocks = row.get("queue") or {}, row.get("kv_blocks") or {}
        state = _cell(row.get("state"))
        table.add_row(
            _cell(row.get("worker_id")),
            _cell(row.get("role")),
            Text(state, style={"ready": "green", "lost": "red", "unreachable": "red"}.get(state, "yellow")),
            _cell(row.get("pid")),
            *([_cell(row.get("host"))] if is_wide else []),
            _cell(queue.get("running")),
            _cell(queue.get("waiting")),
            *(_cell(blocks.get(kind)) for kind in ("free", "owned", "leased", "cached")),
            _cell(row.get("step_count")),
            *([_cell(blocks.get("total")), _cell(row.get("age_s"))] if is_wide else []),
        )
    return Group(table, *_routers_table(document), *(Text(note, style="yellow") for note in notes_of(document)))


def _routers_table(document: Json) -> list[RenderableType]:
    """A row for each router, where there are several: who is asked, what holds a router back, and how well the others are heard."""
    from rich.table import Table

    rows = document.get("routers") or []
    if len(rows) < 2:
        return []
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("router", "state", "asked", "pid", "bookings", "hears", "reason"):
        table.add_column(name, justify="right" if name in ("pid", "bookings") else "left")
    for row in rows:
        peers = row.get("peers") or []
        heard = [f"{p.get('router')} {p.get('heard_s')} s ago" + ("" if p.get("in_step") else ", not in step") for p in peers]
        state = _cell(row.get("state"))
        table.add_row(
            _cell(row.get("name")),
            ("ready" if row.get("ready") else "not ready") if state == "up" else state,
            "yes" if row.get("is_current") else "",
            _cell(row.get("pid")),
            _cell(row.get("bookings")),
            "; ".join(heard),
            _cell(row.get("reason") or ""),
        )
    return [table]


def notes_of(document: Json) -> list[str]:
    """What is not as it should be: why the server is not ready, fallbacks in force, and what workers say; each once."""
    notes = [f"not ready: {reason}" for reason in document.get("reasons_not_ready") or []]
    router = document.get("router") or {}
    if router.get("state") not in (None, "up"):
        notes.append(f"router {router['state']}: requests are placed by least_work over the last snapshots")
    notes += [f"router: {note}" for note in (router.get("detail") or {}).get("notes") or []]
    for row in document.get("routers") or []:
        if row.get("state") == "up" and not row.get("ready"):
            notes.append(f"{row.get('name')} is not ready: {row.get('reason')}")
    notes += [f"fallback {name}: {count:g}" for name, count in (document.get("fallbacks") or {}).items() if count]
    for row in document.get("workers") or []:
        told = [row["trouble"]] if row.get("trouble") else []
        notes += [f"{row.get('worker_id')}: {note}" for note in [*told, *(row.get("notes") or [])]]
    return list(dict.fromkeys(notes))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
