"""The program `medsa-deploy`: its commands, and what becomes of their errors."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer

from medsa_deploy import __version__
from medsa_deploy.errors import UsageError

from . import console
from .checkpoint import export, inspect
from .graphs import build_engine, build_kernels, quantize
from .machine import demo, doctor
from .measure import profile, verify
from .run import run

COMMANDS = (
    *(inspect, export, quantize, build_engine, build_kernels),
    *(run, verify, profile, doctor, demo),
)
"""In the order of --help."""

app = typer.Typer(
    name="medsa-deploy",
    help="From a trained Medical SAM Adapter checkpoint to masks on a scanner.",
    add_completion=False,
    rich_markup_mode="markdown",
)
for _command in COMMANDS:
    app.command()(_command)

ParserError: Any = typer.BadParameter.__bases__[0]
"""The parser's usage error: click's, or that of the copy of click that newer typers carry."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"medsa-deploy {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version", callback=_print_version, is_eager=True),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from; goes anywhere")
    ] = False,
) -> None:
    """From a trained Medical SAM Adapter checkpoint to masks on a scanner."""


def main() -> None:
    """Entry point: every error becomes one line and an exit code."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    console.prepare()
    interrupts = console.catch_interrupts()
    try:
        code = app(arguments or ["--help"], prog_name="medsa-deploy", standalone_mode=False)
    except typer.Exit as e:
        code = e.exit_code
    except (Exception, KeyboardInterrupt) as e:
        if len(arguments) < len(sys.argv[1:]):
            traceback.print_exc()
        code = None if interrupts else console.print_failure(_usage_error(e))
    if interrupts:  # whatever the libraries in between made of it
        console.print_error("interrupted: nothing half-written was left")
        sys.stdout.flush()
        os._exit(130)  # Python may end by a signal instead, if C code has seen the interrupt
    raise SystemExit(code if isinstance(code, int) else 0)


def _usage_error(error: BaseException) -> BaseException:
    """The parser's complaint as ours, with where to look; any other error as it is."""
    if not isinstance(error, ParserError):
        return error
    command = error.ctx.command_path if getattr(error, "ctx", None) else "medsa-deploy"
    return UsageError(f"{error.format_message().rstrip('.')}: see {command} --help")
