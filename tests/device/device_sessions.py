"""Sessions of engines on a GPU in host memory (fake_gpu), and what they must equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fake_network import SIDE, BrightPixels
from numpy.testing import assert_array_equal

from medsa_deploy import transforms
from medsa_deploy.kernels.postprocess import region
from medsa_deploy.runtime import Prediction, Session
from medsa_deploy.runtime.backends.fallback import FallbackBackend
from medsa_deploy.runtime.backends.tensorrt import TensorRTBackend

POINT = {"points": [(20, 30)]}
BOX = {"box": (5, 8, 40, 50)}
TOLERANCE = 1e-6
"""As postprocess.cu states it, of the largest logit."""


def open_engines(plain: Session, folder: Path, **options) -> Session:
    flavor = options.pop("flavor", "tensorrt")
    return Session(plain.manifest, TensorRTBackend(folder, plain.manifest, flavor, **options))


def frame(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)


def same(session: Session, plain: Session, image: np.ndarray, **prompt) -> None:
    """The same logits with a GPU and without."""
    prediction = session.segment(session.encode(image), **prompt)
    expected = plain.segment(plain.encode(image), **prompt)
    assert_array_equal(prediction.low_res_logits, expected.low_res_logits)
    assert_array_equal(prediction.masks, expected.masks)
    assert_array_equal(prediction.scores, expected.scores)
    assert prediction.degraded is None


def assert_masks(prediction: Prediction, expected: Prediction) -> None:
    """Those that numpy makes of the logits, but where these are the threshold up to rounding."""
    assert_array_equal(prediction.low_res_logits, expected.low_res_logits)
    rule = expected.rule
    logits = transforms.pixel_values(expected.low_res_logits, expected.frame, rule.postprocess)
    cut = rule.threshold
    clear = np.abs(logits - cut) > TOLERANCE * max(float(np.abs(logits).max()), abs(cut))
    masks = np.asarray(prediction.masks)
    assert masks.dtype == np.bool_
    assert clear.mean() > 0.99
    assert_array_equal(masks[clear], expected.masks[clear])
    assert prediction.regions == [[region(mask) for mask in of_set] for of_set in masks]


def raising(error: BaseException):
    def on_wait() -> None:
        raise error

    return on_wait


def chain(session: Session, plain: Session, *, also=()) -> Session:
    """A session that falls back from the engines to the network itself."""
    openers = [
        ("tensorrt", lambda: session.backend),
        *also,
        ("plain", lambda: BrightPixels(plain.manifest.network)),
    ]
    return Session(plain.manifest, FallbackBackend(openers))
