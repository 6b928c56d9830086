"""segment_anything's modules where torchvision is absent or broken, in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""
USE = """
import torch
from medsa_deploy.exporters import sam
print(sam.LayerNorm2d(4)(torch.zeros(1, 4, 2, 2)).shape, sam.MaskDecoder.__module__)
print("segment_anything" in sys.modules, "torchvision" in sys.modules)
"""
USED = "torch.Size([1, 4, 2, 2]) segment_anything.modeling.mask_decoder"


def run(code: str, *path: Path) -> list[str]:
    """Lines that a fresh process prints; `path` comes before everything else to import."""
    search = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys\n{code}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": search},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def package(folder: Path, name: str, init: str = "") -> Path:
    """A folder that holds one importable package."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(init)
    return folder


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A torchvision beside a torch it was not built for."""
    init = "raise RuntimeError('operator torchvision::nms does not exist')"
    return package(tmp_path / "broken", "torchvision", init)


@pytest.fixture
def working(tmp_path: Path) -> Path:
    """As much of torchvision as segment_anything imports."""
    names = "resize = to_pil_image = batched_nms = box_area = None"
    folder = package(tmp_path / "working", "torchvision")
    (folder / "torchvision/ops").mkdir()
    (folder / "torchvision/ops/__init__.py").write_text(names)
    (folder / "torchvision/ops/boxes.py").write_text(names)
    (folder / "torchvision/transforms").mkdir()
    (folder / "torchvision/transforms/__init__.py").touch()
    (folder / "torchvision/transforms/functional.py").write_text(names)
    return folder


def test_without_torchvision() -> None:
    assert run(BLOCKED.format(name="torchvision") + USE) == [USED, "False False"]


def test_with_a_torchvision_that_raises(broken: Path) -> None:
    assert run(USE, broken) == [USED, "False False"]


def test_the_real_package_can_be_imported_afterwards(working: Path) -> None:
    """No bare parent is left behind, and there is one copy of every class."""
    code = USE + (
        "from segment_anything import sam_model_registry, SamPredictor\n"
        "from segment_anything.modeling import MaskDecoder\n"
        "print(sorted(sam_model_registry), MaskDecoder is sam.MaskDecoder)\n"
    )
    registry = "['default', 'vit_b', 'vit_h', 'vit_l'] True"
    assert run(code, working) == [USED, "False False", registry]


def test_a_package_that_is_already_imported_is_reused(working: Path) -> None:
    code = (
        "import segment_anything as before\n"
        f"{USE}"
        "print(sys.modules['segment_anything'] is before)\n"
        "print(before.modeling.MaskDecoder is sam.MaskDecoder)\n"
    )
    assert run(code, working) == [USED, "True True", "True", "True"]


MISSING = """
from medsa_deploy.errors import MissingDependencyError
try:
    from medsa_deploy.exporters import sam
except MissingDependencyError as e:
    print(e)
print(sys.modules.get("segment_anything"))
"""
NAMED = (
    "reading or exporting a checkpoint needs segment-anything, which is not installed: "
    "pip install 'medsa-deploy[export]'"
)


@pytest.mark.parametrize(
    "missing",
    [
        "sys.modules['segment_anything'] = None\n",
        "import importlib.util\nimportlib.util.find_spec = lambda name: None\n",
        BLOCKED.format(name="segment_anything"),
    ],
    ids=["blocked", "absent", "finder"],
)
def test_a_missing_package_is_named_with_its_extra(missing: str) -> None:
    assert run(missing + MISSING) == [NAMED, "None"]


def test_another_package_of_that_name_is_no_help(tmp_path: Path) -> None:
    package(tmp_path / "package", "segment_anything")
    (tmp_path / "segment_anything.py").touch()
    for folder in (tmp_path, tmp_path / "package"):
        assert run(MISSING, folder) == [NAMED, "None"]
