"""The program of docs/cpp.md, compiled and run as it stands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from cpp_driver import compile_program, library

PAGE = Path(__file__).parents[2] / "docs" / "cpp.md"


def test_the_program_runs_as_written(bundle: Path, tmp_path: Path) -> None:
    (program,) = re.findall(r"^```cpp\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    source = tmp_path / "page.cpp"
    source.write_text(program)
    executable = compile_program(source, tmp_path / "page", "-O0")
    shutil.copytree(bundle, tmp_path / "ckpt.medsa")
    done = subprocess.run(
        executable,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MEDSA_ONNXRUNTIME": str(library())},
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[01] \d+\.\d\d ms\n", done.stdout)
