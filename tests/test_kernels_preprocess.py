"""preprocess.cu, run on the host, against what the runtime does in numpy and Pillow."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
from cuda_on_host import CONTRACTIONS, ROUNDED, address, library, run
from hypothesis import given, settings
from hypothesis import strategies as st

from medsa_deploy.errors import UsageError
from medsa_deploy.kernels.preprocess import (
    EXTREMES_BYTES,
    UNUSABLE,
    WHOLE_LEVELS,
    FrameFormat,
    Intensities,
    Parameters,
    Preprocessing,
    preprocessing,
    reference,
    shown,
)
from medsa_deploy.transforms import PREPROCESSING, resampling

TOLERANCE = 2e-6
"""As preprocess.cu states it, of display range or values, over std or max − min."""

GUARD = 64
"""Bytes before and after an output that must stay as they are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A frame in memory, and what is to become of it."""

    pixels: np.ndarray
    """(H, W) or (H, W, 3), with any pitch."""
    profile: str
    size: int
    intensities: Intensities
    half: bool = False
    seed: int = 1
    contraction: tuple[str, ...] = ROUNDED

    @property
    def format(self) -> FrameFormat:
        return FrameFormat(
            element=str(self.pixels.dtype),
            height=self.pixels.shape[0],
            width=self.pixels.shape[1],
            channels=3 if self.pixels.ndim == 3 else 1,
            pitch=self.pixels.strides[0],
        )

    def plan(self) -> Preprocessing:
        return preprocessing(self.format, self.profile, self.size, self.intensities, half=self.half)


def pitched(pixels: np.ndarray, padding: int, *, upwards: bool) -> np.ndarray:
    """The same pixels, with `padding` elements of rubbish after each row, from the last row up."""
    height, row = pixels.shape[0], pixels[0].size
    memory = np.full((height, row + padding), 77, pixels.dtype)
    memory[:, :row] = pixels[:: -1 if upwards else 1].reshape(height, row)
    strides = (memory.strides[0], *pixels.strides[1:])
    view = np.lib.stride_tricks.as_strided(memory, pixels.shape, strides)
    return view[::-1] if upwards else view


def run_case(case: Case) -> np.ndarray:
    """What the kernels give, (3, S, S)."""
    plan = case.plan()
    memory = np.full(plan.output_bytes + 2 * GUARD, 0xEE, np.uint8)
    output = memory[GUARD:-GUARD]
    tables = np.frombuffer(plan.tables, np.uint8)
    scratch = np.full(plan.scratch_bytes, 0xEE, np.uint8)
    scratch[:EXTREMES_BYTES] = 0
    addresses = {"frame": address(case.pixels), "output": address(output)}
    for launch in plan.launches(**addresses, tables=address(tables), scratch=address(scratch)):
        run(launch, seed=case.seed, contraction=case.contraction)
    assert (memory[:GUARD] == 0xEE).all()
    assert (memory[-GUARD:] == 0xEE).all()
    return output.view(np.float16 if case.half else np.float32).reshape(3, case.size, case.size)


def limit(case: Case) -> float:
    """The largest difference that preprocess.cu allows for a case, before float16."""
    values = shown(case.pixels, case.intensities)
    content = resized(case, values)
    row = PREPROCESSING[case.profile]
    spread = min(row.std) if row.std else max(float(np.ptp(content)), 1e-8)
    if values.dtype == np.uint8 and row.filter in WHOLE_LEVELS:
        return 1.01 / spread if row.filter == "area" and near_half(case, values) else 0.0
    return (TOLERANCE * max(255.0, float(np.abs(values).max())) + rescaling(case)) / spread


def rescaling(case: Case) -> float:
    """Grey levels by which the reference is off: it rounds rescaled values to float32."""
    intensities = case.intensities
    if intensities.window is None or (intensities.slope, intensities.intercept) == (1.0, 0.0):
        return 0.0
    low, high = intensities.window
    return 2**-23 * max(abs(low), abs(high)) * 255 / (high - low)


def resized(case: Case, values: np.ndarray) -> np.ndarray:
    planes = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    size = case.plan().frame.content_size
    return resampling.resize(planes, size, PREPROCESSING[case.profile].filter)


def near_half(case: Case, values: np.ndarray) -> bool:
    """Whether OpenCV's rounding of whole grey levels has a tie, which round-off decides."""
    planes = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    operators = (
        resampling.resize_operator(resampling.area_taps, n, m)
        for n, m in zip(planes.shape[1:], case.plan().frame.content_size, strict=True)
    )
    content = resampling.resample(planes, *operators)
    return bool((np.abs(content % 1 - 0.5) < 1e-9).any())


def assert_matches(case: Case) -> None:
    assert_close(case, run_case(case))


def assert_close(case: Case, image: np.ndarray) -> None:
    """What kernels gave for a case, against the reference."""
    expected = reference(case.pixels, case.profile, case.size, case.intensities, half=case.half)
    assert image.dtype == expected.dtype
    atol = limit(case)
    # a float16 may round to either side of what float32 differs by
    rtol = 2**-10 if case.half and atol else 0
    np.testing.assert_allclose(
        image.astype(np.float64), expected.astype(np.float64), atol=atol, rtol=rtol
    )


@st.composite
def cases(draw: st.DrawFn, *, side: int = 90) -> Case:
    """Frames of every element, shape and pitch, windows and rescales, for every profile."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    profile = draw(st.sampled_from(sorted(PREPROCESSING)))
    element = draw(st.sampled_from(["uint8", "uint16", "int16", "float32"]))
    shape = (draw(st.integers(1, side)), draw(st.integers(1, side)))
    shape += (3,) if draw(st.booleans()) else ()
    pixels = noise(random, element, shape, steps=draw(st.sampled_from([1, 8, 64])))
    plain = element == "uint8" and draw(st.booleans())
    unwindowed = not plain and PREPROCESSING[profile].min_max and draw(st.booleans())
    if plain:
        intensities = Intensities(inverted=draw(st.booleans()))
    else:
        rescale = draw(st.sampled_from([(1.0, 0.0), (1.0, -1024.0), (0.37, 12.5), (-2.0, 100.0)]))
        window = None if unwindowed else window_of(random, pixels * rescale[0] + rescale[1])
        inverted = window is not None and draw(st.booleans())
        intensities = Intensities(
            slope=rescale[0], intercept=rescale[1], window=window, inverted=inverted
        )
    return Case(
        pixels=pitched(pixels, draw(st.integers(0, 9)), upwards=draw(st.booleans())),
        profile=profile,
        size=draw(st.integers(1, 80)),
        intensities=intensities,
        half=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        contraction=draw(st.sampled_from(CONTRACTIONS)),
    )


def noise(
    random: np.random.Generator, element: str, shape: tuple[int, ...], *, steps: int
) -> np.ndarray:
    """White noise in steps, so that flat regions and equal pixels occur."""
    if element == "float32":
        return (np.round(random.normal(0, 1, shape) * steps) * 0.013).astype(np.float32)
    bounds = np.iinfo(element)
    values = random.integers(bounds.min, bounds.max, shape, endpoint=True)
    return (values // steps * steps).clip(bounds.min, bounds.max).astype(element)


def window_of(random: np.random.Generator, values: np.ndarray) -> tuple[float, float]:
    """A window over some of the values."""
    low, high = float(values.min()), float(values.max())
    centre, width = random.uniform(low, high), random.uniform(0.02, 1.2) * (high - low + 1)
    return centre - width / 2, centre + width / 2


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_random_frames(case: Case) -> None:
    assert_matches(case)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(case=cases(side=120))
def test_thousands_of_random_frames(case: Case) -> None:
    assert_matches(case)


@pytest.mark.parametrize("profile", sorted(PREPROCESSING))
@pytest.mark.parametrize("shape", [(480, 640, 3), (300, 41), (128, 128), (64, 64, 3), (1, 500)])
def test_uint8_frames_come_out_bit_for_bit(profile: str, shape: tuple[int, ...]) -> None:
    """Reductions, enlargements, halvings, and the tall frames that Pillow 13 resizes y first."""
    pixels = np.random.default_rng(3).integers(0, 256, shape, np.uint8)
    case = Case(pixels=pixels, profile=profile, size=64, intensities=Intensities())
    expected = reference(pixels, profile, 64, case.intensities)
    if limit(case) == 0:
        np.testing.assert_array_equal(run_case(case), expected)
    else:
        assert profile == "litemedsam" or PREPROCESSING[profile].filter not in WHOLE_LEVELS
        assert_matches(case)


@pytest.mark.parametrize("profile", ["medsam", "litemedsam"])
@pytest.mark.parametrize("element", ["uint8", "float32"])
def test_a_flat_frame_of_a_min_max_profile_is_zero(profile: str, element: str) -> None:
    pixels = np.full((37, 50), 103, element)
    case = Case(pixels=pixels, profile=profile, size=40, intensities=Intensities())
    assert not run_case(case).any()


def test_narrow_windows_far_from_zero_keep_their_grey_levels() -> None:
    """In float32, 65000.3 alone is wrong by a hundredth of this window."""
    pixels = np.arange(64990, 65012, dtype=np.uint16)[None].repeat(22, axis=0)
    case = Case(
        pixels=pixels,
        profile="medsa",
        size=22,
        intensities=Intensities(window=(65000.3, 65000.7 + 3)),
    )
    assert_matches(case)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_unusable_values_are_found(data: st.DataObject) -> None:
    draw = data.draw
    shape = (draw(st.integers(1, 90)), draw(st.integers(1, 90)), *draw(st.sampled_from([(), (3,)])))
    pixels = np.random.default_rng(0).normal(0, 1e37, shape).astype(np.float32)
    at = draw(st.integers(0, pixels.size - 1))
    value = draw(st.sampled_from([1.0, 3.4e38, np.nan, np.inf, -np.inf]))
    pixels.flat[at] = value
    pixels = pitched(pixels, draw(st.integers(0, 9)), upwards=draw(st.booleans()))
    case = Case(
        pixels=pixels,
        profile=draw(st.sampled_from(list(PREPROCESSING))),
        size=24,
        intensities=Intensities(window=(0, 1)),
    )
    plan = case.plan()
    scratch = np.zeros(plan.scratch_bytes, np.uint8)
    fields = {"frame": address(pixels), "output": 0, "tables": 0}
    first, *_ = plan.launches(**fields, scratch=address(scratch))
    assert first.entry == "find_unusable"
    run(first, seed=at)
    assert scratch[UNUSABLE : UNUSABLE + 4].view(np.uint32)[0] == (not np.isfinite(value))
    assert not scratch[:UNUSABLE].any()


def test_only_floats_are_searched_for_what_is_unusable() -> None:
    for element in ("uint8", "uint16", "int16", "float32"):
        form = FrameFormat(element=element, height=9, width=9, pitch=36)
        entries = preprocessing(form, "sam", 16, Intensities(window=(0, 9))).entries
        assert ("find_unusable" in entries) == (element == "float32")


def test_one_pass_for_profiles_with_mean_and_std() -> None:
    entries = {}
    for profile in PREPROCESSING:
        form = FrameFormat(element="uint8", height=9, width=9, pitch=9)
        entries[profile] = preprocessing(form, profile, 16, Intensities()).entries
    assert entries == {
        "medsa": ("preprocess_levels",),
        "sam": ("preprocess_levels",),
        "medsam": ("resize_levels", "normalise"),
        "litemedsam": ("resize_levels", "normalise"),
        "efficientsam": ("preprocess_u8",),
        "sam-med2d": ("preprocess_u8",),
        "finetune-sam": ("preprocess_levels",),
        "samed": ("preprocess_u8",),
    }


def test_the_order_of_threads_does_not_matter() -> None:
    pixels = np.random.default_rng(5).normal(0, 1, (70, 50)).astype(np.float32)
    outputs = [
        run_case(
            Case(
                pixels=pixels,
                profile="medsam",
                size=33,
                intensities=Intensities(),
                seed=seed,
            )
        )
        for seed in range(5)
    ]
    assert all(np.array_equal(output, outputs[0]) for output in outputs)


def test_parameters_lie_as_in_cuda() -> None:
    size = ctypes.c_ulonglong.in_dll(library(), "size_of_preprocess").value
    assert ctypes.sizeof(Parameters) == size


def frame_format(**changes: object) -> FrameFormat:
    return FrameFormat(**{"element": "uint16", "height": 4, "width": 5, "pitch": 10} | changes)


@pytest.mark.parametrize(
    ("form", "profile", "intensities", "message"),
    [
        (frame_format(pitch=8), "medsa", Intensities(window=(0, 1)), "pitch of 8 bytes"),
        (frame_format(pitch=11), "medsa", Intensities(window=(0, 1)), "pitch of 11 bytes"),
        (frame_format(height=0), "medsa", Intensities(window=(0, 1)), "at least one pixel"),
        (frame_format(), "medsa", Intensities(), "give an intensity window"),
        (frame_format(), "medsam", Intensities(inverted=True), "cannot be inverted"),
        (frame_format(), "sam", Intensities(window=(5, 5)), "the lower first"),
        (frame_format(), "sam", Intensities(window=(0, 1), slope=0), "not 0"),
    ],
)
def test_what_cannot_be_used_is_refused(form, profile, intensities, message) -> None:
    with pytest.raises(UsageError, match=message):
        preprocessing(form, profile, 16, intensities)
