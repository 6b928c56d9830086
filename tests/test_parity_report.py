"""`verify --report`: one page that needs nothing else, and shows where masks differ most."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from command_line import accept_changes, call, contents, copied
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from medsa_deploy.bundle.manifest import Parity, TensorParity
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.evaluation.parity import limits_of
from medsa_deploy.images.overlay import PALETTE
from medsa_deploy.reports import html
from medsa_deploy.reports import parity as parity_page
from medsa_deploy.stages.verify.parity_report import _square_around

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser would load from elsewhere, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[np.ndarray]:
        encoded = [load.removeprefix("data:image/png;base64,") for load in self.loads]
        return [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(e)))) for e in encoded]


def read(path: Path) -> Page:
    """A page that is whole, and loads nothing but what it holds."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not re.search(r"https?:|@import|url\(", text)
    assert not {"script", "link", "iframe"} & set(page.tags)
    return page


def coloured(picture: np.ndarray, label: int) -> int:
    """Pixels of a label's outline."""
    return int((picture == PALETTE[label - 1].astype(np.uint8)).all(axis=-1).sum())


def test_the_page_shows_what_was_found(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    before = contents(copy)
    document = call("verify", copy, "--report", "--json").json
    assert Path(document["report"]) == copy / "reports/parity.html"
    page = read(copy / "reports/parity.html")
    (parity,) = document["parity"]
    for name, tensor in parity["tensors"].items():
        assert name in page.text
        assert f"{tensor['relative_l2']:.1e}" in page.text
    assert f"{parity['mask_dice_mean']:.4f}" in page.text
    assert "Verified" in page.text
    assert "Not verified" not in page.text
    assert page.tags.count("svg") == 2
    assert len(page.pictures()) >= 1
    # The bundle is as it was, but for the page; it can be verified again, and the page replaced.
    after = contents(copy)
    added = {"reports", "reports/parity.html"}
    assert {path: digest for path, digest in after.items() if path not in added} == before
    again = call("verify", copy, "--report")
    assert again.code == 0
    assert "parity.html" in again.out
    assert contents(copy).keys() == after.keys()


def test_nothing_is_written_unasked(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    assert call("verify", copy, "--json").json["report"] is None
    assert not (copy / "reports").exists()


def test_another_network_is_shown_to_differ(bundle: Path, bundle_of, tmp_path: Path) -> None:
    """The bundle's reference, but the decoder of other weights."""
    copy = copied(bundle, tmp_path)
    shutil.copy(bundle_of("medsa_hyp_2d") / "decoder.onnx", copy / "decoder.onnx")
    accept_changes(copy)
    done = call("verify", copy, "--report", "--json")
    assert done.code == 1
    page = read(copy / "reports/parity.html")
    assert "Not verified" in page.text
    for failure in done.json["failures"]:
        assert failure in page.text
    worst = done.json["parity"][0]["mask_dice_worst"]
    assert worst < 0.9
    assert f"Dice {worst:.4f}" in page.text
    overview, detail = page.pictures()
    for picture in (overview, detail):
        assert coloured(picture, 2) + coloured(picture, 3) > 0


def test_a_network_that_sees_depth(bundle_3d: Path, tmp_path: Path) -> None:
    """The worst mask is shown on the slice it is of."""
    copy = copied(bundle_3d, tmp_path)
    assert call("verify", copy, "--report").code == 0
    assert len(read(copy / "reports/parity.html").pictures()) >= 1


def test_with_the_users_images(bundle: Path, checkpoint_of, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    image = tmp_path / "a & b <i>.png"
    PIL.Image.fromarray(seeded_image(130, 3)[:90]).save(image)
    arguments = ("--checkpoint", checkpoint_of("medsa_2d"), "--images", image)
    assert call("verify", copy, *arguments, "--report").code == 0
    assert (
        "1 image(s), 2 seeded image(s), 15 prompt sets" in read(copy / "reports/parity.html").text
    )


def result(precision: str, dice: tuple[float, ...], l2: float) -> parity_page.Result:
    parity = Parity(
        precision=precision,
        backend="onnxruntime",
        images=0,
        seeded_images=1,
        prompt_sets=2,
        tensors={"low_res_masks": TensorParity(relative_l2=l2, max_abs=l2)},
        mask_pixels_differing=0.1,
        mask_dice_mean=float(np.mean(dice)),
        mask_dice_worst=min(dice),
        nan_count=3 if l2 > 1 else 0,
    )
    worst = parity_page.WorstMask(
        case="<script>case</script>",
        prompt="1 click",
        dice=min(dice),
        pictures=[np.zeros((40, 3000, 3), np.uint8)],
    )
    limits = limits_of(precision)
    return parity_page.Result(parity=parity, limits=limits, mask_dice=dice, worst=worst)


@pytest.mark.parametrize("l2", [0.0, 1e-7, 3.0, float("inf"), float("nan")])
@pytest.mark.parametrize("dice", [(1.0, 1.0), (0.0,), (0.9961, 0.3)])
def test_any_figures_can_be_drawn(tmp_path: Path, l2: float, dice: tuple[float, ...]) -> None:
    results = [result("fp32", dice, l2), result("fp16", dice, l2), result("other", dice, 1e-3)]
    text = parity_page.page(
        "<b>title", {"a&b": "<i>"}, results, engines=[("engines/x", "built, not run")]
    )
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    page = read(tmp_path / "page.html")
    assert "<script>case</script>" in page.text
    assert "built, not run" in page.text
    circles = re.findall(r'cx="([^"]+)" cy="([^"]+)"', text)
    assert len(circles) == 3 * (1 + len(dice))
    assert all(0 <= float(x) <= html.WIDTH and float(y) > 0 for x, y in circles)
    assert all(max(picture.shape) <= parity_page.PICTURE_SIDE for picture in page.pictures())


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=80)).filter(np.any))
def test_the_detail_holds_what_differs(mask: np.ndarray) -> None:
    part = mask[_square_around(mask)]
    assert part.sum() == mask.sum()
    assert min(part.shape) >= min(32, *mask.shape) // 2
