"""`baton`: one verb a module, each light to read; what is heavy (torch, Ray, tokenizers) is imported when its verb runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from baton.bench.disagg import bench_disagg
from baton.bench.engine_command import engine
from baton.bench.policies import bench_policies
from baton.bench.router import bench_router
from baton.bench.serve import bench_serve
from baton.bench.start import bench_start
from baton.bench.transfer import bench_transfer
from baton.bench.validation import bench_validation
from baton.calibrate import calibrate
from baton.chat import chat
from baton.compare import compare
from baton.explain import explain
from baton.plan import plan
from baton.replay import replay
from baton.serve import serve_command
from baton.sim import sim
from baton.status import status
from baton.trace import trace_app
from protocol.errors import BatonError, ConfigError

app = typer.Typer(
    name="baton",
    help="Serve large language models on a Ray cluster, prefill and decode on separate workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # rich's help cuts long flags on 80 columns and costs a third of the time
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.command("serve")(serve_command())
app.command("chat")(chat)
app.command("status")(status)
app.command("explain")(explain)
app.command("sim")(sim)
app.command("compare")(compare)
app.command("calibrate")(calibrate)
app.command("replay")(replay)
app.command("plan")(plan)

bench = typer.Typer(
    name="bench",
    help="Measure: the engine, latency under load, prefill and decode apart, starting, KV transfers, the router, policies, simulations.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
bench.command("engine")(engine)
bench.command("serve")(bench_serve)
bench.command("disagg")(bench_disagg)
bench.command("start")(bench_start)
bench.command("router")(bench_router)
bench.command("transfer")(bench_transfer)
bench.command("policies")(bench_policies)
bench.command("validation")(bench_validation)
app.add_typer(bench)
app.add_typer(trace_app)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"baton {version('baton-serve')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Options before the verb."""


def main() -> None:
    """Entry of the `baton` command. A caller's mistake ends with one line on stderr and status 2, trouble with status 1."""
    try:
        app(prog_name="baton")
    except BatonError as error:
        print(f"baton: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


if __name__ == "__main__":
    main()
