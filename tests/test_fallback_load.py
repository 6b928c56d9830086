"""`load` with a chain of backends, and ONNX Runtime's I/O binding, on a machine without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from medsa_deploy import errors, load
from medsa_deploy.bundle.manifest import load_manifest
from medsa_deploy.nvidia.device_array import DeviceArray
from medsa_deploy.runtime import Embedding, Session
from medsa_deploy.runtime.backends.onnxruntime_cpu import OnnxRuntimeBackend, failure
from medsa_deploy.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

IMAGE = np.random.default_rng(0).integers(0, 256, (80, 100), dtype=np.uint8)
POINTS = {"points": [(20, 30)]}


class BoundOnHost(OnnxRuntimeCudaBackend):
    """The same code with the CPU in the GPU's place: ONNX Runtime binds its memory alike."""

    name = "bound"
    device = "cpu"
    provider = "CPUExecutionProvider"
    providers = ("CPUExecutionProvider",)
    slower_fusions = OnnxRuntimeBackend.slower_fusions


def encoded(session: Session) -> Embedding:
    """The image, to be decoded by the decoder whole, as a GPU's and a chain's are."""
    return replace(session.encode(IMAGE), image_part=None)


def test_a_chain_ends_at_what_every_machine_has(bundle: Path, caplog) -> None:
    chain = ("onnxruntime-cuda", "onnxruntime")
    with load(bundle, backend="tensorrt", fallback=chain) as session, load(bundle) as plain:
        prediction = session.segment(session.encode(IMAGE), **POINTS)
        expected = plain.segment(plain.encode(IMAGE), **POINTS)
    assert_array_equal(prediction.masks, expected.masks)
    assert_array_equal(prediction.low_res_logits, expected.low_res_logits)
    assert prediction.degraded.startswith("tensorrt: ")
    assert "holds no TensorRT fp32 engines: build them with medsa-deploy build-engine" in (
        prediction.degraded
    )
    assert "; onnxruntime-cuda: the backend onnxruntime-cuda needs onnxruntime-gpu" in (
        prediction.degraded
    )
    assert expected.degraded is None
    assert "onnxruntime is used, because tensorrt" in caplog.text


def test_without_a_chain_nothing_falls_back(bundle: Path) -> None:
    with pytest.raises(errors.EngineError, match="holds no TensorRT fp32 engines"):
        load(bundle, backend="tensorrt")
    with pytest.raises(errors.MissingDependencyError, match=r"medsa-deploy\[gpu\]"):
        load(bundle, backend="onnxruntime-cuda")
    with pytest.raises(errors.UsageError, match="unknown backend 'cpu'; there are: onnxruntime, "):
        load(bundle, backend="tensorrt", fallback=("cpu",))


def test_a_chain_runs_the_decoders_parts_where_its_backend_has_them(bundle: Path) -> None:
    with (
        load(bundle, backend="openvino", fallback=("onnxruntime",)) as session,
        load(bundle, backend="openvino") as first,
        load(bundle) as second,
    ):
        embedding = session.encode(IMAGE)
        prediction = session.segment(embedding, **POINTS)
        expected = first.segment(first.encode(IMAGE), **POINTS)
        assert_array_equal(prediction.low_res_logits, expected.low_res_logits)
        assert prediction.degraded is None

        def fail(*arguments: object) -> None:
            raise errors.DeviceError("a click failed")

        in_use = session.backend._in_use
        in_use.decode_click = in_use.decode = fail
        prediction = session.segment(embedding, **POINTS)
        assert prediction.degraded == "openvino: a click failed"
        expected = second.segment(second.encode(IMAGE), **POINTS)
        np.testing.assert_allclose(prediction.low_res_logits, expected.low_res_logits, atol=1e-4)
        in_use = session.backend._in_use
        in_use.decode = fail
        session.segment(session.encode(IMAGE), **POINTS)
        assert session.degraded == "openvino: a click failed", "clicks need no whole decoder"


def test_nan_in_the_image_part_is_the_backends_that_gave_it(bundle: Path) -> None:
    with load(bundle, backend="openvino", fallback="onnxruntime") as session, load(bundle) as plain:
        in_use = session.backend._in_use
        real = in_use.decode_image
        in_use.decode_image = lambda x: {k: v * np.nan for k, v in real(x).items()}
        prediction = session.segment(session.encode(IMAGE), **POINTS)
        assert (
            prediction.degraded == "openvino: openvino gave an embedding with NaN or Inf: nothing "
            "returned"
        )
        expected = plain.segment(plain.encode(IMAGE), **POINTS)
        np.testing.assert_allclose(prediction.low_res_logits, expected.low_res_logits, atol=1e-4)


def test_a_part_that_fails_is_made_up_for_by_the_whole_decoder(bundle: Path) -> None:
    chain = ("onnxruntime", "onnxruntime-cuda")
    with load(bundle, backend="openvino", fallback=chain) as session, load(bundle) as plain:

        def fail(*arguments: object) -> None:
            raise errors.DeviceError("it failed")

        session.backend._in_use.decode_image = fail
        embedding = session.encode(IMAGE)
        assert session.degraded == "openvino: it failed"
        session.backend._in_use.splits = False
        prediction = session.segment(embedding, **POINTS)
        expected = plain.segment(encoded(plain), **POINTS)
        np.testing.assert_allclose(prediction.low_res_logits, expected.low_res_logits, atol=1e-4)


def test_bound_memory_gives_the_same_masks(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    files = (
        bundle / manifest.file("encoder").path,
        bundle / manifest.file("decoder").path,
        manifest.graphs,
    )
    with Session(manifest, BoundOnHost(*files)) as bound, load(bundle) as plain:
        embedding = bound.encode(IMAGE)
        assert isinstance(embedding.values, DeviceArray)
        expected = encoded(plain)
        assert_array_equal(np.asarray(embedding.values), expected.values)
        for prompt in (POINTS, {"box": (5, 6, 50, 60)}):
            assert_array_equal(
                bound.segment(embedding, **prompt).low_res_logits,
                plain.segment(expected, **prompt).low_res_logits,
            )
            on_host = bound.segment(expected, **prompt).low_res_logits
            assert_array_equal(on_host, plain.segment(expected, **prompt).low_res_logits)
        with pytest.raises(errors.DeviceError, match="ONNX Runtime failed"):
            bound.backend.encode(np.zeros((1, 3, 7, 7), np.float32))


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", errors.DeviceMemoryError),
        ("BFCArena: Failed to allocate memory for requested buffer", errors.DeviceMemoryError),
        ("CUDA failure 719: unspecified launch failure ; GPU=0", errors.DeviceLostError),
        ("Got invalid dimensions for input", errors.DeviceError),
    ],
)
def test_what_onnxruntime_says_has_a_name(message: str, kind: type[errors.DeviceError]) -> None:
    assert type(failure(RuntimeError(message))) is kind
