"""Session: images to embeddings, prompts to masks, and what it refuses."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import accept_changes, copied, edit_manifest

from medsa_deploy import load
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.errors import BundleError, DeviceError, ImageError, PromptError, UsageError
from medsa_deploy.evaluation.cases import seeded_image
from medsa_deploy.exporters.sam import modeling
from medsa_deploy.images import Image
from medsa_deploy.runtime import Prediction, Session
from medsa_deploy.transforms import Prompt, prompts
from medsa_deploy.transforms.masks import axis_operator

HEIGHT, WIDTH = 120, 160
POINTS = np.array([[[30.0, 40.0]], [[100.5, 20.0]], [[159.0, 119.0]]])
BOXES = np.array([[10.0, 20, 90, 100], [0, 0, 160, 120], [60.5, 30, 61.5, 90]])
FOUR_BY_FOUR = np.arange(16, dtype=np.uint8).reshape(4, 4)


class FakeBackend:
    """Notes what it is given; answers with one value everywhere."""

    name = "fake"

    def __init__(self, network: Any, *, embedding: float = 1.0, logit: float = 1.0) -> None:
        self.network, self.embedding, self.logit = network, embedding, logit
        self.images: list[np.ndarray] = []
        self.prompts: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []

    def encode(self, image: np.ndarray) -> np.ndarray:
        self.images.append(image)
        g = self.network.embedding_size
        return np.full((1, 256, g, g), self.embedding, np.float32)

    def decode(self, embeddings, coords, labels, mask) -> tuple[np.ndarray, np.ndarray]:
        self.prompts.append((coords, labels, mask))
        side, k, p = 4 * self.network.embedding_size, self.network.masks, len(coords)
        masks = np.full((p, k, side, side), self.logit, np.float32)
        return masks, np.full((p, k), 0.5, np.float32)

    def facts(self) -> dict[str, Any]:
        return {"backend": self.name}

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return seeded_image(WIDTH, 5)[:HEIGHT]


@pytest.fixture(scope="module")
def session(bundle: Path) -> Iterator[Session]:
    with load(bundle, threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def two_classes(bundle_of) -> Iterator[Session]:
    with load(bundle_of("medsa_2d_box_mask_two_classes"), threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def sam(sam_bundle: Path) -> Iterator[Session]:
    with load(sam_bundle, threads=2) as opened:
        yield opened


@pytest.fixture
def faked(bundle: Path) -> Callable[..., Session]:
    """Conventions → a session with them on a fake backend."""
    manifest = load_manifest(bundle)

    def make(*, values: dict[str, float] | None = None, **conventions: Any) -> Session:
        changed = replace(manifest, conventions=replace(manifest.conventions, **conventions))
        return Session(changed, FakeBackend(manifest.network, **(values or {})))

    return make


@pytest.fixture
def shown(faked) -> Callable[..., np.ndarray]:
    """Image and options → the grey levels 0…255 the network sees, for an image of its own size."""

    def see(image: Any, *, window: Any = None, **conventions: Any) -> np.ndarray:
        with faked(**conventions) as session:
            session.encode(image, intensity_window=window)
            return session.backend.images[0][0, 0] * 255

    return see


def full_size(values: np.ndarray) -> np.ndarray:
    """(4, 4) → (256, 256), the network's own size, so that nothing is resampled."""
    return values.repeat(64, axis=0).repeat(64, axis=1)


def assert_same(one: Prediction, other: Prediction) -> None:
    """Equal up to rounding, which may move a logit that is almost 0 across it."""
    np.testing.assert_allclose(one.low_res_logits, other.low_res_logits, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    assert one.masks.shape == other.masks.shape
    assert (one.masks != other.masks).mean() <= 1e-4


# Encoding once, prompting often


def test_the_encoder_runs_once_however_many_prompts_follow(session, image, monkeypatch) -> None:
    runs = []
    encode = session.backend.encode
    monkeypatch.setattr(session.backend, "encode", lambda x: runs.append(x.shape) or encode(x))
    embedding = session.encode(image)
    for point in POINTS:
        session.segment(embedding, points=point)
    session.segment(embedding, box=BOXES)
    session.segment_sets(embedding, prompts(points=POINTS))
    assert runs == [(1, 3, 256, 256)]


@pytest.mark.parametrize(
    ("given", "sets"),
    [
        ({"points": [(30, 40)]}, 1),
        ({"points": POINTS[0], "labels": [1]}, 1),
        ({"points": POINTS[:, 0], "labels": [1, 0, 1]}, 1),
        ({"box": BOXES[0]}, 1),
        ({"box": list(BOXES[0]), "points": [(30, 40)], "labels": [0]}, 1),
        ({"mask": np.ones((64, 64))}, 1),
        ({"mask": np.ones((64, 64)), "box": BOXES[0], "points": [(1, 1), (2, 2)]}, 1),
        ({"points": POINTS}, 3),
        ({"points": POINTS, "labels": [[1], [0], [1]], "box": BOXES}, 3),
        ({"box": BOXES}, 3),
        ({"mask": np.ones((2, 64, 64)), "box": BOXES[:2]}, 2),
    ],
)
def test_prompts_of_every_kind(session, image, given: dict[str, Any], sets: int) -> None:
    prediction = session.segment(session.encode(image), **given)
    assert prediction.masks.shape == (sets, 1, HEIGHT, WIDTH)
    assert prediction.masks.dtype == np.bool_
    assert prediction.scores.shape == (sets, 1)
    assert prediction.low_res_logits.shape == (sets, 1, 64, 64)
    assert prediction.low_res_logits.dtype == np.float32
    assert set(prediction.timings_ms) == {"decode", "postprocess"}
    assert all(ms >= 0 for ms in prediction.timings_ms.values())


def test_timings_and_frame_of_an_embedding(session, image) -> None:
    embedding = session.encode(image)
    assert set(embedding.timings_ms) == {"preprocess", "encode"}
    assert all(ms > 0 for ms in embedding.timings_ms.values())
    assert embedding.frame.image_size == (HEIGHT, WIDTH)
    assert embedding.values.shape == (1, 256, 16, 16)


SETS = [
    prompts(points=POINTS[0])[0],
    prompts(box=BOXES[0])[0],
    prompts(points=POINTS[:, 0], labels=[1, 0, 1])[0],
    prompts(points=POINTS[1])[0],
    prompts(points=POINTS[1], mask=np.linspace(-4, 4, 64 * 64).reshape(64, 64))[0],
    prompts(points=POINTS[0], box=BOXES[1])[0],
    prompts(points=POINTS[2], mask=np.full((64, 64), 2.0))[0],
]


@pytest.mark.parametrize("network", ["session", "two_classes", "sam"])
def test_sets_of_different_lengths_equal_the_sets_one_by_one(
    request: pytest.FixtureRequest, network: str, image
) -> None:
    session: Session = request.getfixturevalue(network)
    embedding = session.encode(image)
    together = session.segment_sets(embedding, SETS)
    assert len(together.masks) == len(SETS)
    for i, one in enumerate(SETS):
        alone = session.segment_sets(embedding, [one])
        np.testing.assert_allclose(together.low_res_logits[i], alone.low_res_logits[0], atol=1e-5)
        np.testing.assert_allclose(together.scores[i], alone.scores[0], atol=1e-5)
        assert (together.masks[i] != alone.masks[0]).mean() <= 1e-4


@pytest.mark.parametrize(
    "given",
    [
        {"points": POINTS},
        {"box": BOXES},
        {"points": POINTS, "labels": np.array([[1], [0], [1]]), "box": BOXES},
        {"points": POINTS, "mask": np.random.default_rng(0).normal(0, 4, (3, 64, 64))},
    ],
    ids=lambda given: " + ".join(given),
)
def test_p_sets_in_one_call_equal_p_calls(session, image, given: dict[str, np.ndarray]) -> None:
    embedding = session.encode(image)
    together = session.segment(embedding, **given)
    for i in range(3):
        alone = session.segment(embedding, **{name: part[i] for name, part in given.items()})
        np.testing.assert_allclose(together.low_res_logits[i], alone.low_res_logits[0], atol=1e-5)
        np.testing.assert_allclose(together.scores[i], alone.scores[0], atol=1e-5)


def test_equal_sets_go_through_the_decoder_together_and_are_never_padded(faked) -> None:
    with faked() as session:
        embedding = session.encode(full_size(FOUR_BY_FOUR))
        session.segment_sets(embedding, [p for p in SETS if p.mask is None])
        shapes = sorted(coords.shape for coords, _, _ in session.backend.prompts)
    assert shapes == [(1, 3, 2), (1, 4, 2), (3, 2, 2)]


def test_many_sets_take_the_decoder_several_runs(faked, session, image) -> None:
    points = np.random.default_rng(0).uniform(0, HEIGHT, (19, 1, 2))
    with faked() as fake:
        found = fake.segment(fake.encode(full_size(FOUR_BY_FOUR)), points=points)
        assert [len(coords) for coords, _, _ in fake.backend.prompts] == [7, 6, 6]
    assert found.masks.shape == (19, 1, 256, 256)
    embedding = session.encode(image)
    together = session.segment(embedding, points=points)
    for i in (0, 8, 18):
        alone = session.segment(embedding, points=points[i])
        np.testing.assert_allclose(together.low_res_logits[i], alone.low_res_logits[0], atol=1e-5)


# Conventions


@pytest.mark.parametrize(
    ("order", "frame", "expected"),
    [
        ("xy", "network", [[48, 85.33333]]),
        ("yx", "network", [[85.33333, 48]]),
        ("xy", "image", [[30, 40]]),
        ("yx", "image", [[40, 30]]),
    ],
)
def test_points_go_in_as_the_manifest_says(
    faked, image, order: str, frame: str, expected: list[list[float]]
) -> None:
    with faked(point_order=order, point_frame=frame) as session:
        session.segment(session.encode(image), points=[(30, 40)])
        coords, labels, mask = session.backend.prompts[0]
    np.testing.assert_allclose(coords[0], [*expected, [0, 0]], rtol=1e-6)
    assert labels.tolist() == [[1, -1]]
    assert mask is None


def test_a_yx_network_gets_the_clicks_an_xy_network_would_get_swapped(
    bundle: Path, session, tmp_path: Path
) -> None:
    square = seeded_image(90, 2)
    copy = copied(bundle, tmp_path)
    edit_manifest(copy, conventions__point_order="xy")
    assert session.conventions.point_order == "yx"
    with load(copy) as swapped:
        given = session.segment(session.encode(square), points=[(20, 70)], box=(5, 10, 80, 60))
        same = swapped.segment(swapped.encode(square), points=[(70, 20)], box=(10, 5, 60, 80))
        other = swapped.segment(swapped.encode(square), points=[(20, 70)], box=(5, 10, 80, 60))
    assert_same(given, same)
    assert np.abs(given.low_res_logits - other.low_res_logits).max() > 1e-3


def test_a_previous_mask_is_fed_back(session, image) -> None:
    embedding = session.encode(image)
    first = session.segment(embedding, points=POINTS[0])
    logits = first.low_res_logits
    again = session.segment(embedding, points=POINTS[0], mask=logits)
    for same in (logits[0], logits[0, 0]):
        assert_same(again, session.segment(embedding, points=POINTS[0], mask=same))
    assert np.abs(again.low_res_logits - logits).max() > 1e-3
    zeros = session.segment(embedding, points=POINTS[0], mask=np.zeros((64, 64)))
    assert np.abs(zeros.low_res_logits - logits).max() > 1e-3, "an empty mask is not no mask"


# Outputs


def test_a_sam_gives_one_mask_or_three_candidates(sam, image) -> None:
    embedding = sam.encode(image)
    one = sam.segment(embedding, points=POINTS)
    three = sam.segment(embedding, points=POINTS, multimask=True)
    assert one.low_res_logits.shape == (3, 1, 64, 64)
    assert three.low_res_logits.shape == (3, 3, 64, 64)
    assert three.masks.shape == (3, 3, HEIGHT, WIDTH)
    assert not three.classes
    labels = np.array([[1, -1]] * 3, np.float32)
    points = np.concatenate([POINTS, np.zeros((3, 1, 2))], 1) * 256 / WIDTH
    every, scores = sam.backend.decode(embedding.values, points.astype(np.float32), labels, None)
    np.testing.assert_allclose(one.low_res_logits, every[:, :1], atol=1e-5)
    np.testing.assert_allclose(three.low_res_logits, every[:, 1:], atol=1e-5)
    np.testing.assert_allclose(three.scores, scores[:, 1:], atol=1e-5)
    assert three.best.tolist() == three.scores.argmax(axis=1).tolist()


def test_classes_have_no_candidates(two_classes, image) -> None:
    embedding = two_classes.encode(image)
    with pytest.raises(UsageError, match="multimask is for SAM's outputs"):
        two_classes.segment(embedding, points=[(1, 1)], multimask=True)


def test_the_threshold_is_a_probability(session, bundle: Path, image, tmp_path: Path) -> None:
    embedding = session.encode(image)
    loose, half, strict = (
        session.segment(embedding, points=POINTS[0], threshold=t) for t in (0.3, None, 0.7)
    )
    assert half.threshold == 0.5
    assert loose.masks.sum() > half.masks.sum() > strict.masks.sum() > 0
    assert (loose.masks >= half.masks).all()
    assert (half.masks >= strict.masks).all()
    copy = copied(bundle, tmp_path)
    edit_manifest(copy, conventions__threshold=0.7)
    with load(copy) as other:
        same = other.segment(other.encode(image), points=POINTS[0])
    assert same.threshold == 0.7
    assert_same(same, strict)


@pytest.mark.parametrize("threshold", [0, 1, -0.5, 2, float("nan"), float("inf")])
def test_other_thresholds_are_refused(session, image, threshold: float) -> None:
    embedding = session.encode(image)
    with pytest.raises(UsageError, match="not a probability between 0 and 1"):
        session.segment(embedding, points=[(1, 1)], threshold=threshold)


def test_a_label_map_counts_classes(two_classes, image) -> None:
    prediction = two_classes.segment(two_classes.encode(image), points=POINTS[0])
    assert prediction.classes
    masks, labels = prediction.masks[0], prediction.label_map()
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == {0, 1, 2}, "the case should show both classes"
    assert ((labels > 0) == masks.any(axis=0)).all()
    for k in (0, 1):
        alone = masks[k] & ~masks[1 - k]
        assert (labels[alone] == k + 1).all()


def test_a_label_map_of_several_sets_marks_what_their_masks_do(two_classes, image) -> None:
    """The highest logit is taken at the image's size, where masks are made too."""
    boxes = np.array([[1.0, 1, 60, 80], [20, 3, 90, 81], [70, 30, 150, 110]])
    prediction = two_classes.segment(two_classes.encode(image), box=boxes)
    marked = prediction.label_map() > 0
    np.testing.assert_array_equal(marked, prediction.masks.any(axis=(0, 1)))


def test_a_label_map_counts_prompt_sets_of_one_class(session, image) -> None:
    prediction = session.segment(session.encode(image), points=POINTS)
    labels = prediction.label_map()
    assert labels.shape == (HEIGHT, WIDTH)
    assert set(np.unique(labels)) <= {0, 1, 2, 3}
    assert ((labels > 0) == prediction.masks.any(axis=(0, 1))).all()
    number = np.argmax(prediction.masks[:, 0], axis=0) + 1
    single = prediction.masks.sum(axis=(0, 1)) == 1
    assert (labels[single] == number[single]).all()


def test_a_label_map_takes_the_best_candidate_of_each_set(sam, image) -> None:
    prediction = sam.segment(sam.encode(image), points=POINTS[0], multimask=True)
    assert (prediction.label_map() == prediction.masks[0, prediction.best[0]]).all()


@pytest.mark.parametrize("size", [(120, 160), (256, 256), (300, 90), (31, 400)])
@pytest.mark.parametrize("network", ["session", "sam"])
def test_masks_are_those_of_sams_own_postprocessing(
    request: pytest.FixtureRequest, network: str, size: tuple[int, int]
) -> None:
    session: Session = request.getfixturevalue(network)
    image = seeded_image(max(size), 7)[: size[0], : size[1]]
    embedding = session.encode(image)
    points = np.array([[[size[1] / 2, size[0] / 2]], [[3, 4]]])
    prediction = session.segment(embedding, points=points)
    encoder = SimpleNamespace(img_size=session.manifest.network.image_size)
    logits = modeling.Sam.postprocess_masks(
        SimpleNamespace(image_encoder=encoder),
        torch.from_numpy(prediction.low_res_logits),
        embedding.frame.content_size,
        size,
    ).numpy()
    expected = logits > 0
    assert prediction.masks.shape == expected.shape
    differing = prediction.masks != expected
    assert (np.abs(logits[differing]) < 1e-4).all(), "only logits that are 0 up to rounding"
    assert differing.mean() <= 1e-4


# Images


@pytest.mark.parametrize("dtype", ["u1", "u2", ">u2", "i2", "i4", "u8", "f2", "f4", "f8", "bool"])
@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (HEIGHT, WIDTH, 1), (HEIGHT, WIDTH, 3)])
def test_images_of_every_type(session, image, dtype: str, shape: tuple[int, ...]) -> None:
    values = image[..., : shape[2] if len(shape) == 3 else 1].reshape(shape)
    embedding = session.encode((values > 127 if dtype == "bool" else values).astype(dtype))
    assert embedding.values.shape == (1, 256, 16, 16)
    assert (embedding.intensity_window is None) == (dtype in ("u1", "bool"))


def test_grey_bool_and_8_bit_images_are_seen_as_they_are(shown) -> None:
    grey = full_size(FOUR_BY_FOUR * 17)
    np.testing.assert_allclose(shown(grey), grey, atol=1e-4)
    np.testing.assert_allclose(shown(grey[..., None]), grey, atol=1e-4)
    np.testing.assert_allclose(shown(grey.tolist()), grey, atol=1e-4)  # ints: min–max is 0…255
    np.testing.assert_allclose(shown(grey > 99), 255 * (grey > 99), atol=1e-4)


HOUNSFIELD = full_size(FOUR_BY_FOUR.astype(np.int16) * 100 - 500)
"""−500…1000 in steps of 100."""


def clipped(low: float, high: float) -> np.ndarray:
    return (HOUNSFIELD.clip(low, high) - low) / (high - low) * 255


@pytest.mark.parametrize("dtype", ["i2", "f4", "f8"])
@pytest.mark.parametrize(
    ("window", "conventions", "expected"),
    [
        ((-175, 250), {}, (-175, 250)),
        (None, {"intensity_window": [-175, 250]}, (-175, 250)),
        ((0, 100), {"intensity_window": [-175, 250]}, (0, 100)),
        (None, {}, (-500, 1000)),
    ],
    ids=["given", "the bundle's", "given before the bundle's", "minimum to maximum"],
)
def test_intensity_windows(shown, dtype: str, window, conventions, expected) -> None:
    seen = shown(HOUNSFIELD.astype(dtype), window=window, **conventions)
    np.testing.assert_allclose(seen, clipped(*expected), atol=1e-3)


def test_8_bit_images_are_display_values_unless_a_window_is_given(shown) -> None:
    grey = full_size(FOUR_BY_FOUR * 17)
    np.testing.assert_allclose(shown(grey, intensity_window=[0, 10]), grey, atol=1e-4)
    expected = (grey.astype(float).clip(50, 100) - 50) / 50 * 255
    np.testing.assert_allclose(shown(grey, window=(50, 100)), expected, atol=1e-3)


def test_the_files_own_rendering_goes_after_the_bundles_window(shown) -> None:
    display = full_size(FOUR_BY_FOUR * 10).astype(np.float32)
    image = Image(pixels=HOUNSFIELD, path=Path("ct.dcm"), display=display)
    np.testing.assert_allclose(shown(image), display, atol=1e-3)
    np.testing.assert_allclose(shown(image, window=(0, 100)), clipped(0, 100), atol=1e-3)
    seen = shown(image, intensity_window=[-175, 250])
    np.testing.assert_allclose(seen, clipped(-175, 250), atol=1e-3)


def test_inverted_images_are_inverted_after_the_window(shown) -> None:
    """MONOCHROME1 and TIFF MinIsWhite: the lowest intensity is the brightest."""
    raw = Image(pixels=HOUNSFIELD, path=Path("x.dcm"), inverted=True)
    np.testing.assert_allclose(shown(raw, window=(-175, 250)), 255 - clipped(-175, 250), atol=1e-3)
    np.testing.assert_allclose(shown(raw), 255 - clipped(-500, 1000), atol=1e-3)
    grey = full_size(FOUR_BY_FOUR * 17)
    eight_bit = Image(pixels=grey, path=Path("x.tif"), inverted=True)
    np.testing.assert_allclose(shown(eight_bit), 255 - grey, atol=1e-4)


def test_stretching_without_a_window_is_said_aloud(session, image, caplog) -> None:
    with caplog.at_level(logging.WARNING, "medsa_deploy"):
        embedding = session.encode(image[..., 0].astype(np.uint16) * 7)
    (record,) = caplog.records
    assert "uint16 intensities without a window were stretched" in record.getMessage()
    assert "set an intensity window" in record.getMessage()
    assert embedding.intensity_window is not None
    caplog.clear()
    session.encode(image)
    session.encode(image[..., 0].astype(np.int16), intensity_window=(0, 200))
    assert caplog.records == []


def test_min_max_profiles_stretch_without_a_warning(faked, caplog) -> None:
    with faked(preprocess="litemedsam") as session:
        session.encode(HOUNSFIELD)
        seen = session.backend.images[0][0, 0]
    np.testing.assert_allclose(seen, clipped(-500, 1000) / 255, atol=1e-6)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 5, 4), "u1"), r"array has shape \(4, 5, 4\), expected \(H, W\) or"),
        (np.zeros((3, 40, 50), "u1"), r"has shape \(3, 40, 50\), expected"),
        (np.zeros(7), r"has shape \(7,\), expected"),
        (np.zeros((1, 1, 4, 5)), r"has shape \(1, 1, 4, 5\), expected"),
        (3.0, r"has shape \(\), expected"),
        (None, r"has shape \(\), expected"),
        ([[1, 2], [3]], "rows differ in length"),
        (np.ones((4, 5), complex), "holds complex128, expected integers or floats"),
        (np.array([["a", "b"]]), "holds <U1, expected integers or floats"),
        (np.zeros((0, 5)), "no pixels"),
        (np.zeros((4, 0, 3), "u1"), "no pixels"),
        (np.full((4, 5), 7, "u2"), "every pixel is 7"),
        (np.full((4, 5, 3), 7, "u1"), "every pixel is"),
        (np.full((4, 5), True), "every pixel is 255"),
        (np.array([[0, np.nan], [1, 2]]), "1 NaN or infinite values out of 4"),
        (np.array([[0, -np.inf], [1, 2]], "f4"), "1 NaN or infinite values out of 4"),
        (np.array([[0, 1e300], [1, 2]]), "1 NaN or infinite values out of 4"),
    ],
)
def test_images_that_cannot_be_segmented(session, pixels: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        session.encode(pixels)


@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        ((5000, 6000), ImageError, "lie outside the intensity window 5000…6000.*choose another"),
        ((5, 5), UsageError, "the intensity window 5,5 cannot be used"),
        ((9, 5), UsageError, "cannot be used"),
        ((float("nan"), 5), UsageError, "cannot be used"),
        ((-np.inf, 5), UsageError, "cannot be used"),
        ((1, 2, 3), UsageError, r"cannot be used: give \(low, high\)"),
    ],
)
def test_windows_that_cannot_be_used(session, window: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        session.encode(HOUNSFIELD, intensity_window=window)


# What else it refuses


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "the prompt is empty"),
        ({"labels": [1]}, "0 points have 1 labels"),
        ({"points": np.zeros((0, 2))}, "the prompt is empty"),
        ({"points": [(160, 0)]}, "outside the 160×120 image"),
        ({"points": [(0, -1)]}, "outside the 160×120 image"),
        ({"points": [(float("nan"), 5)]}, "outside"),
        ({"points": [(5, 5)], "labels": [2]}, "label 2"),
        ({"points": [(5, 5)], "labels": [1, 0]}, "1 points have 2 labels"),
        ({"points": [5, 5]}, "should have the shape"),
        ({"box": (90, 20, 10, 100)}, "empty or inverted"),
        ({"box": (10, 20, 10, 100)}, "empty or inverted"),
        ({"box": (10, 20, 170, 100)}, "outside the 160×120 image"),
        ({"mask": np.zeros((32, 32))}, r"expected \(64, 64\)"),
        ({"mask": np.full((64, 64), np.nan)}, "NaN"),
        ({"points": POINTS, "box": BOXES[:2]}, "different numbers of sets"),
    ],
)
def test_prompts_that_cannot_be_used(session, image, given: dict[str, Any], message: str) -> None:
    embedding = session.encode(image)
    with pytest.raises(PromptError, match=message):
        session.segment(embedding, **given)


NOTHING = np.zeros((0, 2), np.float32)


@pytest.mark.parametrize(
    "sets", [[], [Prompt(points=NOTHING, labels=NOTHING[:, 0], box=None, mask=None)]]
)
def test_no_prompt_sets_and_empty_ones_are_refused(session, image, sets: list[Prompt]) -> None:
    embedding = session.encode(image)
    with pytest.raises(PromptError, match="give"):
        session.segment_sets(embedding, sets)


def test_a_closed_session_is_refused(bundle: Path, image) -> None:
    with load(bundle) as session:
        embedding = session.encode(image)
    session.close()
    for use in (
        lambda: session.encode(image),
        lambda: session.segment(embedding, points=[(1, 1)]),
        lambda: session.backend,
    ):
        with pytest.raises(UsageError, match="this session is closed: load the bundle again"):
            use()


@pytest.mark.parametrize("part", ["values", "frame"])
def test_an_embedding_of_another_network_is_refused(session, image, part: str) -> None:
    embedding = session.encode(image)
    frame = replace(embedding.frame, network_size=512)
    other = {"values": embedding.values[..., :8, :8], "frame": frame}[part]
    with pytest.raises(UsageError, match="encode the image with this session"):
        session.segment(replace(embedding, **{part: other}), points=[(1, 1)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"embedding": np.nan}, "fake gave an embedding with NaN or Inf"),
        ({"embedding": np.inf}, "fake gave an embedding with NaN or Inf"),
        ({"logit": np.nan}, "fake gave masks with NaN or Inf"),
        ({"logit": -np.inf}, "fake gave masks with NaN or Inf"),
    ],
)
def test_nan_from_a_backend_never_becomes_a_mask(
    faked, values: dict[str, float], message: str
) -> None:
    session = faked(values=values)
    with pytest.raises(DeviceError, match=message):
        session.segment(session.encode(full_size(FOUR_BY_FOUR)), points=[(1, 1)])


def test_a_failing_backend_is_a_device_error(session, image) -> None:
    embedding = session.encode(image)
    coords = np.zeros((1, 2, 3), np.float32)  # three coordinates a point
    with pytest.raises(DeviceError, match=r"ONNX Runtime failed: .+"):
        session.backend.decode(embedding.values, coords, coords[..., 0], None)


# Bundles


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "cuda"}, UsageError, "unknown backend 'cuda'; there are: onnxruntime"),
        ({"precision": "int8"}, BundleError, "has no encoder in int8; it has: fp32"),
        ({"threads": 0}, UsageError, "threads is 0, expected a whole number from 1 to 1024"),
        ({"threads": -2}, UsageError, "threads is -2, expected a whole number from 1 to 1024"),
    ],
)
def test_options_that_cannot_be_used(bundle: Path, options, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        load(bundle, **options)


def test_threads_change_the_speed_not_the_masks(bundle: Path, image) -> None:
    predictions = []
    for threads in (1, 2, None):
        with load(bundle, threads=threads) as session:
            assert session.backend.facts()["threads"] == threads or "all"
            predictions.append(session.segment(session.encode(image), box=BOXES))
    assert_same(predictions[0], predictions[1])
    assert_same(predictions[0], predictions[2])


def test_two_threads_on_one_session_get_their_own_masks(session) -> None:
    images = [seeded_image(64, seed) for seed in range(4)]

    def segment(i: int) -> np.ndarray:
        return session.segment(session.encode(images[i]), points=[(10, 20)]).low_res_logits

    expected = [segment(i) for i in range(4)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(segment, [i % 4 for i in range(32)]))
    for i, logits in enumerate(found):
        np.testing.assert_allclose(logits, expected[i % 4], atol=1e-5)


def test_a_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nothing\.medsa does not exist: make a bundle with"):
        load(tmp_path / "nothing.medsa")
    (tmp_path / "file.medsa").write_text("x")
    with pytest.raises(BundleError, match="is a file, not a bundle folder"):
        load(tmp_path / "file.medsa")
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx"])
def test_a_changed_byte_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = copied(bundle, tmp_path)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} is not the file the manifest describes"):
        load(copy)


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx"])
@pytest.mark.parametrize("content", [b"not a graph", b"", b"\x08\x09\x12\x00" + bytes(200)])
def test_a_file_that_is_no_graph_is_refused(bundle, tmp_path, name: str, content: bytes) -> None:
    copy = copied(bundle, tmp_path)
    (copy / name).write_bytes(content)
    accept_changes(copy)
    with pytest.raises(BundleError, match=f"{name} is not a graph ONNX Runtime can load: .+"):
        load(copy)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("encoder", "decoder", "low_res_masks is absent, the manifest says float32"),
        ("two classes", "decoder", r"iou_predictions is float32 \(\*, 2\), the manifest says"),
    ],
)
def test_another_graph_is_refused(
    bundle: Path, bundle_of, tmp_path: Path, source: str, target: str, message: str
) -> None:
    copy = copied(bundle, tmp_path)
    two = bundle_of("medsa_2d_box_mask_two_classes") / "decoder.onnx"
    other = bundle / "encoder.onnx" if source == "encoder" else two
    (copy / f"{target}.onnx").write_bytes(other.read_bytes())
    accept_changes(copy)
    with pytest.raises(BundleError, match=message):
        load(copy)


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx", "manifest.json"])
def test_a_missing_file_is_named(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = copied(bundle, tmp_path)
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        load(copy)


def test_another_schema_version_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path)
    version = json.loads((copy / "manifest.json").read_text())["schema"]
    edit_manifest(copy, schema=version + 1)
    with pytest.raises(BundleError, match=f"schema version {version + 1}; this medsa-deploy reads"):
        load(copy)


def test_what_the_first_click_needs_is_built_while_the_image_is_encoded(session: Session) -> None:
    axis_operator.cache_clear()
    rng = np.random.default_rng(0)
    embedding = session.encode(rng.integers(0, 255, (211, 307), np.uint8))
    built = axis_operator.cache_info().misses
    assert built == 2
    session.segment(embedding, points=[(100, 50)])
    assert axis_operator.cache_info().misses == built
