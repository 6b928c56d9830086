"""medsa-deploy cpp: the C++ runtime → a folder to build a program with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from medsa_deploy import stages

from . import console
from .options import Json


def cpp(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write")] = Path(
        "medsa-cpp"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier copy")] = False,
    json: Json = False,
) -> None:
    """Copy the C++17 runtime: headers, a CMake project and two examples.

    medsa-deploy cpp -o medsa-cpp

    cmake -S medsa-cpp -B build && cmake --build build
    """
    project = stages.copy_cpp(output, force=force)
    console.print_json(project) if json else _print_project(project)


def _print_project(project: stages.CppProject) -> None:
    folder = escape(str(project.folder))
    console.out.print(f"[bold green]{folder}[/]  {len(project.files)} files, {project.version}")
    console.out.print(f"\ncmake -S {folder} -B {folder}/build && cmake --build {folder}/build")
