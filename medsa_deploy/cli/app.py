"""The program `medsa-deploy`: its commands; an error that ends one → a line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer

from medsa_deploy import __version__
from medsa_deploy.errors import UsageError

from . import console

COMMANDS = (
    *("inspect", "export", "quantize", "build-engine", "build-kernels", "cpp", "sign"),
    *("run", "verify", "profile", "doctor", "demo", "dicom-node", "serve", "triton"),
)
"""The commands, in the order of --help; each is a function of a module of its name."""

INTERRUPTED = "interrupted; no partial output was left behind"
ParserError: Any = typer.BadParameter.__bases__[0]
"""The parser's usage error: from click, or from the copy of click in newer versions of typer."""


def _print_version(requested: bool) -> None:
    if requested:
        print(f"medsa-deploy {__version__}")
        raise typer.Exit


def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from; may stand anywhere")
    ] = False,
) -> None:
    """From a trained Medical SAM Adapter checkpoint to masks on a scanner."""


def program(commands: Sequence[str] = COMMANDS) -> typer.Typer:
    """The program with some of its commands: a command waits for the imports of no other."""
    app = typer.Typer(
        name="medsa-deploy",
        help="From a trained Medical SAM Adapter checkpoint to masks on a scanner.",
        add_completion=False,
        rich_markup_mode="markdown",
    )
    app.callback()(options)
    for command in commands:
        name = command.replace("-", "_")
        app.command()(getattr(import_module(f".{name}", __package__), name))
    return app


def main() -> None:
    """Run the command line; every error becomes one line and an exit code.

    With --json an error is also one document on stdout.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    json = "--json" in arguments
    console.prepare()
    interrupts = console.catch_interrupts()
    try:
        try:
            app = program([a for a in arguments[:1] if a in COMMANDS] or COMMANDS)
            code = app(arguments or ["--help"], prog_name="medsa-deploy", standalone_mode=False)
        except typer.Exit as e:
            code = e.exit_code
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as e:
        if len(arguments) < len(sys.argv[1:]):
            traceback.print_exc()
        code = None if interrupts else console.print_failure(_usage_error(e), json=json)
    if interrupts:  # even if a library turned the KeyboardInterrupt into another error
        console.print_fault("Interrupted", INTERRUPTED, None, json=json)
        with suppress(UsageError):
            sys.stdout.flush()
        os._exit(130)  # a plain exit may end by a signal, if C code has seen the interrupt
    raise SystemExit(code if isinstance(code, int) else 0)


def _usage_error(error: BaseException) -> BaseException:
    """A parser's error as a UsageError that names the command's --help; other errors unchanged."""
    if not isinstance(error, ParserError):
        return error
    command = error.ctx.command_path if getattr(error, "ctx", None) else "medsa-deploy"
    return UsageError(f"{error.format_message().rstrip('.')}: see {command} --help")
