"""The C++ session beside Python's: every golden case, and random images and prompts."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import edit_manifest
from cpp_driver import Driver, Segmented
from golden_cases import ADAPTED_SAMS, CASES_2D, VIT_3D
from random_images import RandomImage, random_image, random_prompt

from medsa_deploy import load
from medsa_deploy.images.image import Image
from medsa_deploy.runtime import Session
from medsa_deploy.runtime.prediction import Prediction
from medsa_deploy.transforms import UNPROMPTED, Prompt, class_margins, pixel_values

ON_THRESHOLD = 1e-5
"""Difference of a value to the threshold at which a pixel may differ."""
MOST_PIXELS = 1e-5
"""Share of pixels that may differ."""
MOST_TIES = 1e-4
"""Share of pixels of a label map that may differ, all of them ties."""
VARIANTS: dict[str, dict[str, Any]] = {
    "medsa, image frame, scaled": {"point_frame": "image", "point_scale": 0.5},
    "medsa, window, threshold": {"intensity_window": [100, 900], "threshold": 0.35},
    "sam, xy": {"preprocess": "sam", "point_order": "xy"},
    "medsam": {"preprocess": "medsam", "postprocess": "medsam", "threshold": 0.6},
    "litemedsam": {"preprocess": "litemedsam"},
    "efficientsam": {"preprocess": "efficientsam", "postprocess": "efficientsam"},
    "sam-med2d, padded": {"preprocess": "sam-med2d", "pad_points": 8},
    "finetune-sam, optional": {
        "preprocess": "finetune-sam",
        "postprocess": "finetune-sam",
        "prompts": "optional",
    },
    "samed, unpadded": {"preprocess": "samed", "postprocess": "samed", "pad_points": 0},
}
"""Conventions that one network is given, so that every spec and rule runs in a session."""


@pytest.fixture(autouse=True)
def _quiet_stretching(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="medsa_deploy")


def python_image(image: RandomImage) -> Image:
    return Image(pixels=image.pixels, path=Path("array"), inverted=image.inverted)


def prompts_for(session: Session, size: tuple[int, int], rng: np.random.Generator) -> list[Prompt]:
    """One to three prompt sets that the network takes; none may be a set, too."""
    need = session.conventions.prompts
    if need == "none":
        return [UNPROMPTED]
    kinds = "p" if session.conventions.pad_points == 0 else "pb"
    sets = [random_prompt(rng, size, kinds) for _ in range(int(rng.integers(1, 4)))]
    return [*sets, UNPROMPTED] if need == "optional" else sets


def margins(prediction: Prediction) -> np.ndarray:
    """(P, n, H, W): how far each pixel's value is from where the mask would change."""
    layers = []
    for of_set in prediction.low_res_logits:
        values = pixel_values(of_set, prediction.frame, prediction.rule.postprocess)
        if prediction.rule.exclusive:
            layers.append(np.abs(class_margins(values)))
        else:
            layers.append(np.abs(values - prediction.rule.threshold))
    return np.stack(layers)


def label_margins(prediction: Prediction) -> np.ndarray:
    """(H, W): how far each pixel is from another label: to the threshold, or to the second layer.

    Labels of prompt sets compete, so where two sets have one value a pixel's label is a tie.
    """
    layers = prediction.low_res_logits
    if not prediction.classes:
        layers = layers[np.arange(len(layers)), prediction.best][:, None]
    values = pixel_values(
        layers.reshape(-1, *layers.shape[-2:]), prediction.frame, prediction.rule.postprocess
    )
    highest = np.sort(values, axis=0)[::-1]
    to_second = np.abs(highest[0] - highest[1]) if len(highest) > 1 else np.inf
    if prediction.rule.exclusive:
        return np.broadcast_to(to_second, highest[0].shape)
    return np.minimum(to_second, np.abs(highest[0] - prediction.rule.threshold))


def assert_same(actual: Segmented, expected: Prediction, tolerance: float = 1e-4) -> int:
    """Logits and scores are close, masks equal but on the threshold; how many pixels differ."""
    scale = max(1.0, float(np.abs(expected.low_res_logits).max()))
    logits = actual.logits.reshape(expected.low_res_logits.shape)
    assert np.abs(logits - expected.low_res_logits).max() <= tolerance * scale
    np.testing.assert_allclose(
        actual.scores.reshape(expected.scores.shape), expected.scores, atol=1e-4
    )
    masks = actual.masks.reshape(expected.masks.shape).astype(bool)
    differing = masks != expected.masks
    assert np.all(margins(expected)[differing] <= ON_THRESHOLD * scale)
    assert differing.sum() <= max(1, MOST_PIXELS * differing.size)
    relabelled = actual.labels.reshape(expected.labels.shape) != expected.labels
    assert np.all(label_margins(expected)[relabelled] <= ON_THRESHOLD * scale)
    assert relabelled.sum() <= max(2, MOST_TIES * relabelled.size)
    regions = [(r.area, *(r.box or (0, 0, 0, 0))) for of_set in expected.regions for r in of_set]
    if not differing.any():
        assert actual.regions.reshape(-1, 5).tolist() == [list(region) for region in regions]
    return int(differing.sum())


def compare(
    driver: Driver, session: Session, seeds: range, *, largest: int = 300, **segment: Any
) -> int:
    """Random images and prompts on an open bundle; how many pixels differ in all."""
    differing = 0
    for seed in seeds:
        rng = np.random.default_rng([seed, 7])
        image = random_image(seed, largest=largest)
        embedding = session.encode(python_image(image), intensity_window=image.window)
        driver.encode(image.pixels, window=image.window, **image.layout)
        sets = prompts_for(session, embedding.frame.image_size, rng)
        expected = session.segment_sets(embedding, sets, **segment)
        differing += assert_same(driver.segment(sets, **segment), expected)
        if session.manifest.mask_prompt_size is not None and sets[0] is not UNPROMPTED:
            mask = expected.low_res_logits[0, 0]
            refined = [replace(sets[0], mask=mask), Prompt(
                points=sets[0].points[:0], labels=sets[0].labels[:0], box=None, mask=mask
            )]  # fmt: skip
            expected = session.segment_sets(embedding, refined, **segment)
            differing += assert_same(driver.segment(refined, **segment), expected)
    return differing


@pytest.mark.parametrize("name", [*CASES_2D, *ADAPTED_SAMS])
def test_golden_networks(driver: Driver, bundle_of, name: str) -> None:
    bundle = bundle_of(name)
    names = driver.open(bundle)
    with load(bundle, threads=1) as session:
        assert names == list(session.classes)
        compare(driver, session, range(1), largest=200)


@pytest.mark.parametrize("name", VIT_3D)
def test_golden_networks_in_3d(driver: Driver, bundle_of, name: str) -> None:
    bundle = bundle_of(name)
    driver.open(bundle)
    with load(bundle, threads=1) as session:
        compare_slices(driver, session, seed=3)


def compare_slices(driver: Driver, session: Session, seed: int) -> None:
    """A chunk with one window, prompts in the first and the last slice."""
    rng = np.random.default_rng(seed)
    height, width = (int(s) for s in rng.integers(20, 200, 2))
    count = session.manifest.network.chunk
    slices = [rng.integers(-1000, 1000, (height, width)).astype(np.int16) for _ in range(count)]
    window = (-500.0, 800.0)
    embeddings = session.encode_slices(slices, intensity_window=window)
    driver.encode(*slices, window=window, slices=True)
    for place in (0, count - 1):
        sets = prompts_for(session, (height, width), rng)
        expected = session.segment_sets(embeddings[place], sets)
        assert_same(driver.segment(sets, place=place), expected)


@pytest.fixture(scope="module")
def variant(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name → a bundle with those conventions; graphs are shared."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("variant") / "network.medsa"
        shutil.copytree(bundle, folder, symlinks=True)
        edit_manifest(folder, **{f"conventions__{k}": v for k, v in VARIANTS[name].items()})
        return folder

    return make


@pytest.mark.parametrize("name", VARIANTS)
def test_conventions(driver: Driver, variant, name: str) -> None:
    bundle = variant(name)
    driver.open(bundle)
    with load(bundle, threads=1) as session:
        compare(driver, session, range(10, 12))


def test_candidates(driver: Driver, sam_bundle: Path) -> None:
    driver.open(sam_bundle)
    with load(sam_bundle, threads=1) as session:
        compare(driver, session, range(3))
        compare(driver, session, range(3, 5), multimask=True)


def test_many_sets_are_decoded_in_the_groups_of_python(driver: Driver, bundle: Path) -> None:
    driver.open(bundle)
    image, rng = random_image(4), np.random.default_rng(4)
    with load(bundle, threads=1) as session:
        embedding = session.encode(python_image(image), intensity_window=image.window)
        driver.encode(image.pixels, window=image.window, **image.layout)
        sets = [random_prompt(rng, embedding.frame.image_size) for _ in range(21)]
        expected = session.segment_sets(embedding, sets, threshold=0.4)
        assert_same(driver.segment(sets, threshold=0.4), expected)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_200_random_images(
    fast_program: Path, bundle_of, sam_bundle: Path, variant, part: int
) -> None:
    """Sizes up to 700, every spec and rule; each process runs many bundles."""
    networks = [bundle_of("medsa_2d"), sam_bundle, bundle_of("efficientsam_official")]
    networks += [bundle_of(name) for name in ("samed", "finetune_sam_adapter", "medsa_efficient")]
    networks += [variant(name) for name in VARIANTS]
    differing = 0
    with Driver(fast_program) as driver:
        for i, bundle in enumerate(networks[part::4]):
            driver.open(bundle)
            with load(bundle, threads=1) as session:
                seeds = range(1000 * part + 100 * i, 1000 * part + 100 * i + 14)
                differing += compare(driver, session, seeds, largest=700)
    print(f"part {part}: {differing} pixels differ")
