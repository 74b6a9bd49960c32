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
    if not (console.is_terminal if watch is None else watch):
        console.print(status_table(document, server.url))
        return
    try:
        with Live(status_table(document, server.url), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(REFRESH_S)
                live.update(status_table(server.get("/status"), server.url), refresh=True)
    except KeyboardInterrupt:
        return


def status_table(document: Json, url: str) -> RenderableType:
    """The document as a table and a line of notes; a field the server does not tell shows as a dash."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{document.get('model_id', '?')} at {url}", title_justify="left", box=None, pad_edge=False)
    for name in ("worker", "role", "state", "pid", "host"):
        table.add_column(name)
    for name in ("running", "waiting", "KV free", "owned", "leased", "cached", "total", "steps", "age s"):
        table.add_column(name, justify="right")
    rows = [row for row in document.get("workers") or [] if isinstance(row, dict)]
    for row in rows:
        state = _cell(row, "state")
        colour = {"ready": "green", "lost": "red"}.get(state, "yellow")
        table.add_row(
            _cell(row, "worker_id"),
            _cell(row, "role"),
            Text(state, style=colour),
            _cell(row, "pid"),
            _cell(row, "hostname"),
            *(_cell(row, key) for key in ("num_running", "num_waiting", "num_blocks_free", "num_blocks_owned", "num_blocks_leased")),
            *(_cell(row, key) for key in ("num_blocks_cached", "num_blocks_total", "step_count", "age_s")),
        )
    return Group(table, *(Text(note, style="yellow") for note in notes_of(document)))


def notes_of(document: Json) -> list[str]:
    """Fallbacks in force: the server's own and each worker's, said once each."""
    notes = [str(note) for note in document.get("notes") or []]
    for row in document.get("workers") or []:
        notes += [f"{row.get('worker_id')}: {note}" for note in row.get("notes") or []]
    return list(dict.fromkeys(notes))


def _cell(row: Json, key: str) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
