"""`baton serve`: from the command line to a ClusterConfig, and the start shown as it goes."""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from baton.banner import phase_line, ready_headline, ready_snippets
from control.config import load_config
from control.flags import FLAGS, MODEL, Flag
from control.startup import Notice, Phase, PhaseBegan, PhaseDone, ServerReady, ServerStopping, StartupEvent

if TYPE_CHECKING:
    from rich.console import Console

EPILOGUE = "Each flag can also be set as BATON_NAME in the environment, and everything else in the file given with --config."


def serve_command() -> Callable[..., None]:
    """The function behind `baton serve`; its parameters are the rows of control/flags.py."""

    def serve(**given: Any) -> None:
        file: Path | None = given.pop("config")
        config = load_config(flags=given, file=file, environ=os.environ)
        from cluster.build import serve as serve_cluster

        with StartupDisplay() as display:
            serve_cluster(config, report=display.show)

    model = inspect.Parameter(
        MODEL.parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Argument(None, metavar="MODEL", help=f"{MODEL.help} [{MODEL.default}]", show_default=False),
        annotation=str | None,
    )
    config = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(None, "--config", metavar="FILE", help="YAML file; flags win over it."),
        annotation=Path | None,
    )
    parameters = [model, *map(_parameter, FLAGS), config]
    serve.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    serve.__annotations__ = {p.name: p.annotation for p in parameters}
    serve.__doc__ = f"Serve MODEL behind an OpenAI-compatible endpoint until Ctrl-C.\n\n{EPILOGUE}"
    return serve


def _parameter(flag: Flag) -> inspect.Parameter:
    """All values come as text: the configuration converts them, and words one error for flag, file and environment."""
    names = [f"{flag.name}/--no-{flag.name[2:]}"] if flag.is_switch else [flag.name]
    option = typer.Option(
        None,
        *names,
        metavar=None if flag.is_switch else flag.metavar,
        help=f"{flag.help} [{flag.default}]" if flag.default else flag.help,
        show_default=False,
    )
    return inspect.Parameter(
        flag.parameter, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=bool | None if flag.is_switch else str | None
    )


class StartupDisplay:
    """Draws what the starting cluster reports: a spinner on a terminal, plain lines elsewhere. Progress on stderr, the rest on stdout."""

    def __init__(self) -> None:
        from rich.console import Console

        self._progress: Console = Console(stderr=True, highlight=False)
        self._out: Console = Console(highlight=False)
        self._started_s = time.monotonic()
        self._began_s: dict[Phase, float] = {}
        self._going: dict[Phase, str] = {}
        self._exits = ExitStack()
        self._spinner = self._progress.status("starting") if self._progress.is_terminal else None

    def __enter__(self) -> StartupDisplay:
        if self._spinner is not None:
            self._exits.enter_context(self._spinner)
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def show(self, event: StartupEvent) -> None:
        now_s = time.monotonic()
        match event:
            case PhaseBegan():
                self._began_s[event.phase] = now_s
                self._going[event.phase] = event.detail
                if self._spinner is not None:
                    self._spinner.update(", ".join(f"{phase.value}: {detail}" for phase, detail in self._going.items()))
            case PhaseDone():
                self._going.pop(event.phase, None)
                elapsed_s = now_s - self._began_s.get(event.phase, self._started_s)
                self._progress.print(phase_line(event.phase, event.detail, elapsed_s), markup=False, soft_wrap=True)
            case Notice():
                self._progress.print(event.text, style="yellow", markup=False, soft_wrap=True)
            case ServerReady():
                self._exits.close()
                self._announce(event, now_s - self._started_s)
            case ServerStopping():
                self._exits.close()
                self._progress.print(f"stopping ({event.reason})", markup=False)
        sys.stdout.flush()

    def _announce(self, ready: ServerReady, elapsed_s: float) -> None:
        """The headline in a panel; the snippets bare, so that they can be copied."""
        from rich.panel import Panel
        from rich.text import Text

        self._out.print(Panel(Text("\n".join(ready_headline(ready, elapsed_s))), title="baton", title_align="left", expand=False))
        self._out.print(ready_snippets(ready), markup=False, soft_wrap=True)
