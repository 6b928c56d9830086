"""Cubins of the kernels: every architecture, the cache, and ahead of time in a bundle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import call, contents, copied

from medsa_deploy.errors import BuildError, BundleError, MissingDependencyError
from medsa_deploy.kernels import compilers, cubins
from medsa_deploy.kernels.compilers import Compiler, Nvcc, Nvrtc

NVCC = compilers.find_nvcc()
NVRTC = compilers.find_nvrtc()
assert NVRTC, "tests need NVRTC: pip install 'medsa-deploy[kernels]'"

QUICK = ("-Werror", "all-warnings", "-Ofc=max")
"""Options of CUDA 13's nvcc to see that a source compiles: warnings fail, little is optimised."""

EM_CUDA = 190
"""Machine of an ELF file."""


def architectures() -> list[tuple[str, Compiler, str]]:
    """(name, compiler, target) of every architecture of every compiler that is here."""
    known_compilers: list[Compiler] = [Nvrtc(NVRTC)]
    if NVCC:
        known_compilers.append(Nvcc(path=NVCC, options=QUICK))
    return [
        (f"{compiler.name.split()[0]}-{target}", compiler, target)
        for compiler in known_compilers
        for target in compiler.targets
    ]


ALL = architectures()
SLOW_HERE = ("NVRTC",)
"""Compilers without a quick mode: all their architectures are for the slow tests."""


def marked(name: str, compiler: Compiler, target: str) -> object:
    slow = name.startswith(SLOW_HERE) and target not in ("sm75", "sm87")
    return pytest.param(compiler, target, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("compiler", "target"), [marked(*case) for case in ALL])
@pytest.mark.parametrize("source", cubins.SOURCES)
def test_every_architecture_compiles_without_a_warning(source, compiler, target) -> None:
    cubin, messages = compiler.cubin(cubins.source_path(source), target)
    assert messages == ""
    assert cubin[:4] == b"\x7fELF"
    assert int.from_bytes(cubin[18:20], "little") == EM_CUDA
    text = cubins.source_path(source).read_text(encoding="utf-8")
    named = set(re.findall(r"^extern \"C\" __global__ void (\w+)\(", text, flags=re.MULTILINE))
    for name in re.findall(r"^ENTRIES\((\w+)", text, flags=re.MULTILINE):
        named |= {f"preprocess_{name}", f"resize_{name}"}
    assert len(named) == {"preprocess": 12, "postprocess": 2}[source]
    assert all(f".text.{name}\0".encode() in cubin for name in named)


def test_the_usual_targets_are_known_to_every_compiler() -> None:
    for compiler in {id(known): known for _, known, _ in ALL}.values():
        *usual, ptx = cubins.TARGETS
        assert {"sm103", "sm110", "sm121"} < set(usual) <= set(compiler.targets)
        assert ptx.replace("compute", "sm") in compiler.targets


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """A compiler that is found, and a cache of its own; what is compiled, as it is."""
    compiled: list[tuple[str, str]] = []
    real: Compiler = Nvcc(path=NVCC, options=QUICK) if NVCC else Nvrtc(NVRTC)

    class Counting:
        name, targets, cuda = real.name, real.targets, real.cuda

        def cubin(self, source: Path, target: str) -> tuple[bytes, str]:
            compiled.append((source.stem, target))
            return real.cubin(source, target)

    monkeypatch.setattr(cubins, "find_compiler", lambda *options: Counting())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return compiled


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither nvcc nor NVRTC, and an empty cache."""
    monkeypatch.setattr(compilers, "find_nvcc", lambda: None)
    monkeypatch.setattr(compilers, "find_nvrtc", lambda driver_cuda: None)
    monkeypatch.setattr(cubins, "find_compiler", compilers.find_compiler.__wrapped__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))


def test_a_cubin_is_compiled_once(quick, tmp_path: Path, monkeypatch) -> None:
    first = cubins.cubin("postprocess", "sm86")
    assert cubins.cubin("postprocess", "sm86") == first
    assert quick == [("postprocess", "sm86")]
    cubins.cubin("postprocess", "sm89")
    assert len(quick) == 2
    names = [path.name for path in (tmp_path / "cache/medsa-deploy/kernels").iterdir()]
    assert sorted(name.split("-")[1] for name in names) == ["sm86", "sm89"]
    monkeypatch.setattr(cubins, "STANDARD", "c++20")
    cubins.cubin("postprocess", "sm86")
    assert len(quick) == 3


def test_without_a_cache_it_is_compiled_each_time(quick, tmp_path: Path, caplog) -> None:
    (tmp_path / "cache").write_text("a file")
    assert cubins.cubin("postprocess", "sm86") == cubins.cubin("postprocess", "sm86")
    assert len(quick) == 2
    assert "compiled each time" in caplog.text


def test_a_bundles_cubins_need_no_compiler(
    quick, bundle: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    mine = copied(bundle, tmp_path)
    kernels = cubins.build(mine, ["sm87"])
    assert [file.path for file in kernels.files] == [
        "preprocess-sm87.cubin",
        "postprocess-sm87.cubin",
    ]
    assert cubins.load(mine) == kernels
    request.getfixturevalue("no_compiler")
    cubin = cubins.cubin("preprocess", "sm87", bundle=mine)
    assert cubin == (mine / "kernels/preprocess-sm87.cubin").read_bytes()
    with pytest.raises(MissingDependencyError, match=r"medsa-deploy\[kernels\]"):
        cubins.cubin("preprocess", "sm90", bundle=mine)


def test_changed_or_foreign_cubins_are_not_used(
    quick, bundle: Path, tmp_path: Path, caplog
) -> None:
    mine = copied(bundle, tmp_path)
    assert cubins.load(mine) is None
    cubins.build(mine, ["sm87"])
    folder = mine / "kernels"
    path = folder / "kernels.json"
    content = path.read_text()
    (folder / "postprocess-sm87.cubin").write_bytes(b"else")
    with pytest.raises(BundleError, match="not the file that kernels"):
        cubins.cubin("postprocess", "sm87", bundle=mine)
    (folder / "postprocess-sm87.cubin").unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        cubins.cubin("postprocess", "sm87", bundle=mine)
    described = json.loads(content)
    described["files"][1]["sources_sha256"] = "0" * 64
    path.write_text(json.dumps(described))
    assert cubins.cubin("postprocess", "sm87", bundle=mine)[:4] == b"\x7fELF"
    assert "another medsa-deploy's sources" in caplog.text
    for text, message in [
        ("{", "cannot be read"),
        ('{"schema": 99}', "schema"),
        (content.replace("preprocess-sm87.cubin", "../a.cubin"), "other folders"),
        (content.replace('"compiler"', '"other"'), "unknown fields"),
    ]:
        path.write_text(text)
        with pytest.raises(BundleError, match=message):
            cubins.cubin("postprocess", "sm87", bundle=mine)


def test_build_kernels_on_the_command_line(quick, bundle: Path, tmp_path: Path) -> None:
    mine = copied(bundle, tmp_path)
    done = call("build-kernels", mine, "--target", "sm_87", "--target", "sm87", "--json")
    assert done.code == 0, done.err
    kernels = json.loads(done.out)
    assert {file["target"] for file in kernels["files"]} == {"sm87"}
    assert (mine / "kernels" / kernels["files"][0]["path"]).stat().st_size == kernels["files"][0][
        "bytes"
    ]
    before = contents(mine)
    done = call("build-kernels", mine, "--target", "sm1")
    assert (done.code, contents(mine)) == (2, before)
    assert "does not compile for sm1; it does for: sm75" in done.err
    assert call("build-kernels", tmp_path).code == 2


def test_a_failed_build_leaves_the_bundle(quick, bundle: Path, tmp_path: Path, monkeypatch) -> None:
    mine = copied(bundle, tmp_path)
    cubins.build(mine, ["sm87"])
    before = contents(mine)
    broken = tmp_path / "postprocess.cu"
    shutil.copy(cubins.source_path("postprocess").with_name("device.cuh"), tmp_path)
    broken.write_text("not C++")
    real = cubins.source_path
    monkeypatch.setattr(
        cubins, "source_path", lambda source: broken if source == "postprocess" else real(source)
    )
    with pytest.raises(BuildError, match=r"postprocess\.cu"):
        cubins.build(mine, ["sm87"])
    assert contents(mine) == before


@pytest.mark.parametrize("compiler", {known.name: known for _, known, _ in ALL}.values())
def test_what_a_compiler_says_of_a_broken_source_is_passed_on(compiler, tmp_path: Path) -> None:
    shutil.copy(cubins.source_path("postprocess").with_name("device.cuh"), tmp_path)
    source = tmp_path / "broken.cu"
    source.write_text('#include "device.cuh"\nextern "C" __global__ void f() { missing(); }\n')
    with pytest.raises(BuildError, match="missing"):
        compiler.cubin(source, "sm87")
    with pytest.raises(BuildError, match="does not compile for 'sm12345'"):
        compiler.cubin(source, "sm12345")


def test_a_compiler_that_knows_the_target_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho compute_75\necho 'release 11.5, V11.5.119'\n")
    old.chmod(0o755)
    monkeypatch.setattr(compilers, "find_nvcc", lambda: str(old))
    compilers.find_compiler.cache_clear()
    assert compilers.find_compiler().name == "nvcc 11.5.119"
    assert compilers.find_compiler("sm75").name == "nvcc 11.5.119"
    assert compilers.find_compiler("sm87").name.startswith("NVRTC")
    with pytest.raises(BuildError, match=r"nvcc 11\.5\.119 does not compile for 'sm9'"):
        compilers.find_compiler("sm9").cubin(cubins.source_path("preprocess"), "sm9")
    compilers.find_compiler.cache_clear()


def test_another_compilers_cubins_are_not_used(quick, monkeypatch: pytest.MonkeyPatch) -> None:
    cubins.cubin("postprocess", "sm86")
    compiler = type(cubins.find_compiler())
    monkeypatch.setattr(compiler, "name", "nvcc 12.6.1")
    cubins.cubin("postprocess", "sm86")
    assert len(quick) == 2
    assert len(list(cubins.cache_folder().glob("*-sm86-nvcc_12.6.1-*"))) == 1


class Driver:
    """Takes the code that `accepts` says, and notes what it was offered."""

    def __init__(self, accepts: Callable[[bytes], bool]) -> None:
        self.accepts, self.offered = accepts, list[bytes]()

    def load(self, content: bytes) -> bytes:
        self.offered.append(content)
        if not self.accepts(content):
            raise BuildError("the driver does not take the kernels")
        return content


class NamedCompiler:
    """Its code says who compiled it, for what and how often."""

    name, cuda, targets = "named 12.6", 12, ("sm75", "sm80", "sm86", "sm87", "sm120")
    count = 0

    def cubin(self, source: Path, target: str) -> tuple[bytes, str]:
        NamedCompiler.count += 1
        return f"{target} {self.count}".encode(), ""


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(NamedCompiler, "count", 0)
    monkeypatch.setattr(cubins, "find_compiler", lambda *options: NamedCompiler())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_refused_cubin_is_dropped_and_compiled(named, bundle: Path, tmp_path: Path) -> None:
    """A bundle's, and one that is cached: by a driver that takes what is compiled now."""
    mine = copied(bundle, tmp_path)
    cubins.build(mine, ["sm86"])  # 1 and 2
    driver = Driver(lambda content: content == b"sm86 3")
    for _ in range(2):
        assert cubins.load_kernels("preprocess", "sm86", driver.load, bundle=mine) == b"sm86 3"
    assert driver.offered == [b"sm86 1", b"sm86 3", b"sm86 1", b"sm86 3"]
    later = Driver(lambda content: content == b"sm86 4")
    assert cubins.load_kernels("preprocess", "sm86", later.load) == b"sm86 4"
    assert later.offered == [b"sm86 3", b"sm86 4"]
    (cached,) = cubins.cache_folder().iterdir()
    assert cached.read_bytes() == b"sm86 4"


def test_a_driver_that_takes_nothing_leaves_an_empty_cache(named) -> None:
    driver = Driver(lambda content: False)
    with pytest.raises(BuildError, match="does not take the kernels"):
        cubins.load_kernels("preprocess", "sm86", driver.load)
    assert driver.offered == [b"sm86 1", b"compute86 2"]
    assert not list(cubins.cache_folder().glob("*"))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("sm86", ["sm86", "sm80", "sm86", "compute75", "compute86"]),
        ("sm89", ["sm86", "sm80", "compute75", "compute87"]),
        ("sm87", ["sm87", "sm87", "compute75", "compute87"]),
        ("sm121", ["sm120", "compute75", "compute120"]),
        ("sm103", ["compute75", "compute87"]),
        ("sm90", ["compute75", "compute87"]),
    ],
)
def test_forms_are_offered_best_first(
    named, bundle: Path, tmp_path: Path, target: str, expected: list[str]
) -> None:
    """Its own cubin, lower minors of its capability unless one is a Jetson's, and PTX last."""
    mine = copied(bundle, tmp_path)
    cubins.build(mine)
    driver = Driver(lambda content: False)
    with pytest.raises(BuildError):
        cubins.load_kernels("postprocess", target, driver.load, bundle=mine)
    assert [content.decode().split()[0] for content in driver.offered] == expected


def test_what_a_compiler_does_not_know_is_left_out_of_the_usual_targets(
    named, bundle: Path, tmp_path: Path
) -> None:
    mine = copied(bundle, tmp_path)
    kernels = cubins.build(mine)
    assert [file.path for file in kernels.files if file.source == "preprocess"] == [
        *(f"preprocess-{target}.cubin" for target in NamedCompiler.targets),
        "preprocess-compute75.ptx",
    ]
    done = call("build-kernels", mine, "--target", "sm_103")
    assert done.code == 2
    assert "named 12.6 does not compile for sm103" in done.err


@pytest.mark.parametrize("compiler", {known.name: known for _, known, _ in ALL}.values())
def test_ptx_is_text_that_ends(compiler) -> None:
    """For a driver, which looks for its end."""
    ptx, messages = compiler.cubin(cubins.source_path("postprocess"), "compute75")
    assert messages == ""
    assert b".target sm_75" in ptx
    assert b".entry threshold_masks" in ptx
    assert ptx.endswith(b"\0")


def test_a_compiler_no_newer_than_the_driver_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "nvcc"
    new.write_text("#!/bin/sh\necho compute_75\necho 'release 14.1, V14.1.7'\n")
    new.chmod(0o755)
    monkeypatch.setattr(compilers, "find_nvcc", lambda: str(new))
    compilers.find_compiler.cache_clear()
    assert compilers.find_compiler("sm75").cuda == 14
    assert compilers.find_compiler("sm75", 14).cuda == 14
    assert compilers.find_compiler("sm75", 13).name.startswith("NVRTC 13")
    assert compilers.find_compiler("sm75", 12).cuda == 14  # both are too new: the first
    compilers.find_compiler.cache_clear()


def test_the_newest_nvrtc_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc.so.13"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(compilers, "find_spec", lambda name: spec)
    newest = compilers.find_nvrtc()
    assert newest is not None
    assert newest.endswith("libnvrtc.so.13")
    chosen = [compilers.find_nvrtc(driver_cuda) for driver_cuda in (11, 12, 13, 14)]
    assert [str(path)[-2:] for path in chosen] == ["13", "12", "13", "13"]


def test_without_a_compiler_the_extra_is_named(no_compiler, bundle: Path, tmp_path: Path) -> None:
    mine = copied(bundle, tmp_path)
    done = call("build-kernels", mine)
    assert done.code == 2
    assert "pip install 'medsa-deploy[kernels]'" in done.err
    assert not (mine / "kernels").exists()
