"""`medsa-deploy doctor`: what this machine has."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, metadata, version

import onnxruntime
import pytest
from command_line import call

from medsa_deploy import __version__
from medsa_deploy.stages.doctor import diagnose


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch):
    """Makes distributions look absent."""

    def hide(*names: str) -> None:
        def find_version(name: str) -> str:
            if name in names:
                raise PackageNotFoundError(name)
            return "1.0"

        monkeypatch.setattr(diagnose, "version", find_version)

    return hide


def test_the_diagnosis_as_json() -> None:
    done = call("doctor", "--json")
    assert (done.code, done.err) == (0, "")
    report = done.json
    assert set(report) == {
        *("medsa_deploy", "python", "system", "processor", "cores", "memory_gb"),
        *("libraries", "providers", "nvidia_driver", "tuning", "problems"),
    }
    assert report["medsa_deploy"] == __version__
    assert report["python"] == platform.python_version()
    assert platform.machine() in report["system"]
    assert 1 <= report["cores"] <= os.cpu_count()
    assert report["memory_gb"] is None or report["memory_gb"] > 0
    assert report["providers"] == onnxruntime.get_available_providers()
    assert isinstance(report["nvidia_driver"], bool)
    assert report["problems"] == []
    assert {"runtime", "export", "dicom", "demo", "gpu"} <= set(report["libraries"])
    assert report["libraries"]["runtime"]["numpy"] == version("numpy")
    for libraries in report["libraries"].values():
        assert all(v is None or v[0].isdigit() for v in libraries.values())


def test_the_diagnosis_in_words() -> None:
    done = call("doctor")
    assert (done.code, done.err) == (0, "")
    for part in (f"medsa-deploy   {__version__}", "cores", "ONNX Runtime", "CPUExecution", "numpy"):
        assert part in done.out


def test_what_an_extra_lacks_is_named_with_the_extra(not_installed) -> None:
    not_installed("pydicom", "torch")
    done = call("doctor")
    assert done.code == 0, "an extra is optional"
    assert "missing pydicom: pip install 'medsa-deploy[dicom]'" in done.out
    assert "missing torch: pip install 'medsa-deploy[export]'" in done.out


def test_what_the_plain_install_lacks_is_a_problem(not_installed) -> None:
    not_installed("nibabel")
    done = call("doctor", "--json")
    assert done.code == 1
    assert done.json["problems"] == ["nibabel is missing: pip install medsa-deploy"]
    done = call("doctor")
    assert done.code == 1
    assert "error: nibabel is missing: pip install medsa-deploy" in done.err


def test_the_gpu_build_of_onnxruntime_counts(not_installed) -> None:
    not_installed("onnxruntime")
    assert call("doctor").code == 0


def test_a_broken_onnxruntime_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = call("doctor", "--json")
    assert done.code == 1
    assert done.json["providers"] == []
    (problem,) = done.json["problems"]
    assert "onnxruntime does not load" in problem
    assert problem.endswith("reinstall it")


def test_every_extra_of_the_package_is_known() -> None:
    """An extra that doctor forgets would never be reported as missing."""
    extras = set(metadata("medsa-deploy").get_all("Provides-Extra")) - {"dev"}
    assert extras | {"runtime"} == set(diagnose.diagnose().libraries)


def test_an_extra_holds_the_libraries_of_extras_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = [
        "numpy>=1.26",
        'torch>=2.9; extra == "export"',
        "cuda-bindings ~=12.8 ; python_version >= '3.11' and extra == 'cuda.11'",
        "medsa-deploy[export, demo]; extra == 'dev'",
        'medsa-deploy[export,cuda.11]; extra == "demo"',
        'nilearn==0.14.1; extra == "demo"',
        'torch>=2.9; extra == "demo"',
        "medsa-deploy [demo]; extra == 'all'",
    ]
    monkeypatch.setattr(diagnose, "requires", lambda name: requirements)
    assert diagnose.libraries_by_extra() == {
        "runtime": ("numpy",),
        "export": ("torch",),
        "cuda.11": ("cuda-bindings",),
        "demo": ("torch", "cuda-bindings", "nilearn"),
        "all": ("torch", "cuda-bindings", "nilearn"),
    }
