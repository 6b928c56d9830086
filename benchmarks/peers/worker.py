"""One candidate in a process of its own: it loads, then answers requests, one JSON a line.

`python -m benchmarks.peers.worker SPEC`, SPEC a JSON object whose `kind` is one of KINDS. Requests:
`{"op": "encoder" | "decoder" | "click", "repeat": n, "prompts": p}` → milliseconds of n runs of p
prompt sets; `{"op": "agree"}` → how its results compare with the float32 reference network's;
`{"op": "memory"}` → its peak so far.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Spec = Mapping[str, Any]
GEMM = (4096, 3072, 4096)
"""M, K, N of the product that throughput is a share of: as large as a ViT-B's largest, twice."""


class Opened(Protocol):
    """A candidate, loaded."""

    versions: dict[str, str]

    def encode(self, image: Array) -> Array:
        """What an image costs before its first prompt, the decoder's image part left out."""
        ...

    def decode(self, embedding: Array, coords: Array, labels: Array) -> Array:
        """What the first prompt of an image costs: (1, 256, g, g), (1, N, 2), (1, N) → logits."""
        ...

    def click(self, embedding: Array, coords: Array, labels: Array) -> Array:
        """What each further prompt on the same embedding costs."""
        ...


class Ours:
    """A bundle through the runtime, which picks the graphs by itself."""

    def __init__(self, spec: Spec) -> None:
        from medsa_deploy import load
        from medsa_deploy.runtime.backends.interface import as_split_decoder

        options = {"backend": spec["backend"], "precision": spec["precision"]}
        session = load(spec["bundle"], threads=spec["threads"], **options)
        self._backend = session.backend
        self._split = as_split_decoder(self._backend)
        self._part: tuple[int, Any] | None = None
        self.versions = {spec["backend"]: str(self._backend.facts()["version"])}

    def encode(self, image: Array) -> Array:
        """See `Opened`."""
        return self._backend.encode(image)

    def decode(self, embedding: Array, coords: Array, labels: Array) -> Array:
        """See `Opened`: the decoder's image part, and its click part."""
        if self._split is None:
            return self._backend.decode(embedding, coords, labels, None)[0]
        part = self._split.decode_image(embedding)
        self._part = (id(embedding), part)
        return self._split.decode_click(part, coords, labels)[0]

    def click(self, embedding: Array, coords: Array, labels: Array) -> Array:
        """See `Opened`."""
        if self._split is None or self._part is None or self._part[0] != id(embedding):
            return self.decode(embedding, coords, labels)
        return self._split.decode_click(self._part[1], coords, labels)[0]


class _WholeDecoder:
    """A peer, whose decoder runs whole with every prompt."""

    _encoder: Callable[[dict[str, Array]], Array]
    _decoder: Callable[[dict[str, Array]], Array]

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._more = {name: np.array(v, np.float32) for name, v in spec.get("more", {}).items()}
        if mask := spec.get("mask_input"):
            self._more["mask_input"] = np.zeros(mask, np.float32)

    def encode(self, image: Array) -> Array:
        """See `Opened`."""
        return self._encoder({self._spec.get("image", "image"): image})

    def decode(self, embedding: Array, coords: Array, labels: Array) -> Array:
        """See `Opened`."""
        prompts = {"point_coords": coords, "point_labels": labels}
        return self._decoder({"image_embeddings": embedding, **prompts, **self._more})

    click = decode


class OnnxRuntime(_WholeDecoder):
    """ONNX files in ONNX Runtime, with its default options."""

    def __init__(self, spec: Spec) -> None:
        import onnxruntime

        super().__init__(spec)
        self.versions = {"onnxruntime": onnxruntime.__version__}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if spec["threads"]:
            options.intra_op_num_threads = spec["threads"]

        def opened(path: str, output: str) -> Callable[[dict[str, Array]], Array]:
            providers = ["CPUExecutionProvider"]
            session = onnxruntime.InferenceSession(path, options, providers=providers)
            place = [o.name for o in session.get_outputs()].index(output)
            return lambda inputs: session.run(None, inputs)[place]

        self._encoder = opened(spec["encoder"], "image_embeddings")
        if "decoder" in spec:
            self._decoder = opened(spec["decoder"], "low_res_masks")


class OpenVINO(_WholeDecoder):
    """ONNX files in OpenVINO, for latency, in float32 or bfloat16."""

    def __init__(self, spec: Spec) -> None:
        import openvino

        super().__init__(spec)
        self.versions = {"openvino": openvino.get_version()}
        core = openvino.Core()
        capable = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if spec["precision"] == "bf16" and "BF16" not in capable:
            raise RuntimeError("this processor does not compute in bfloat16")
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": spec["precision"],
        }
        if spec["threads"]:
            options["INFERENCE_NUM_THREADS"] = spec["threads"]

        def opened(path: str, output: str) -> Callable[[dict[str, Array]], Array]:
            model = core.compile_model(path, "CPU", options)
            request = model.create_infer_request()
            return lambda inputs: request.infer(inputs)[output].copy()

        self._encoder = opened(spec["encoder"], "image_embeddings")
        if "decoder" in spec:
            self._decoder = opened(spec["decoder"], "low_res_masks")


class Torch(_WholeDecoder):
    """The reference network in PyTorch: as it is, or through torch.compile."""

    def __init__(self, spec: Spec) -> None:
        import torch

        from benchmarks.peers.reference import modules

        super().__init__(spec)
        self.versions = {"torch": torch.__version__}
        if spec["threads"]:
            torch.set_num_threads(spec["threads"])
        encoder, decoder = modules(spec)
        if spec["kind"] == "compile":
            encoder, decoder = torch.compile(encoder), torch.compile(decoder)

        def runs(module: Any) -> Callable[[dict[str, Array]], Array]:
            def run(inputs: dict[str, Array]) -> Array:
                with torch.inference_mode():
                    result = module(*map(torch.from_numpy, inputs.values()))
                array: Array = (result[0] if isinstance(result, tuple) else result).numpy()
                return array

            return run

        self._encoder, self._decoder = runs(encoder), runs(decoder)


class Gemm:
    """One large float32 product in each library here: what the processor can do."""

    def __init__(self, spec: Spec) -> None:
        import onnx
        import onnxruntime
        import torch

        if spec["threads"]:
            torch.set_num_threads(spec["threads"])
        m, k, n = spec.get("gemm", GEMM)
        rng = np.random.default_rng(0)
        a, b = (rng.random(s, dtype=np.float32) for s in ((m, k), (k, n)))
        helper, floats = onnx.helper, onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["a", "b"], ["c"])],
            "gemm",
            [helper.make_tensor_value_info("a", floats, [m, k])],
            [helper.make_tensor_value_info("c", floats, [m, n])],
            [onnx.numpy_helper.from_array(b, "b")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        options = onnxruntime.SessionOptions()
        if spec["threads"]:
            options.intra_op_num_threads = spec["threads"]
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        tensors = torch.from_numpy(a), torch.from_numpy(b)
        self.flops = 2.0 * m * k * n
        self.versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
        self.runs: dict[str, Callable[[], object]] = {
            "onnxruntime": lambda: session.run(None, {"a": a}),
            "torch": lambda: torch.mm(*tensors),
        }

    def gflops(self) -> dict[str, float]:
        """Each library's throughput in one product."""
        throughput = {}
        for name, run in self.runs.items():
            start = perf_counter()
            run()
            throughput[name] = self.flops / (perf_counter() - start) / 1e9
        return throughput


KINDS: dict[str, Callable[[Spec], Any]] = {
    "ours": Ours,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVINO,
    "eager": Torch,
    "compile": Torch,
    "gemm": Gemm,
}


def agreement(opened: Opened, inputs: Mapping[str, Array]) -> dict[str, float | None]:
    """Its embeddings and its masks of them against the reference's: relative L2, and mean Dice.

    `inputs`: of each group k of images `image_k` and `embeddings_k`; of each prompt set j on it
    `coords_k_j`, `labels_k_j`, `slice_k_j` and, of the reference, `logits_k_j`.
    """
    embeddings, logits, dice = [], [], []
    for k in range(sum(name.startswith("image_") for name in inputs)):
        embedding = opened.encode(inputs[f"image_{k}"])
        embeddings.append((inputs[f"embeddings_{k}"], embedding))
        for j in range(sum(name.startswith(f"coords_{k}_") for name in inputs)):
            place = int(inputs[f"slice_{k}_{j}"])
            prompts = inputs[f"coords_{k}_{j}"], inputs[f"labels_{k}_{j}"]
            expected = inputs[f"logits_{k}_{j}"]
            actual = opened.decode(embedding[place : place + 1], *prompts)[:, : expected.shape[1]]
            logits.append((expected, actual))
            dice += _dice(expected > 0, actual > 0)
    return {
        "embeddings_relative_l2": max(_relative_l2(a, b) for a, b in embeddings),
        "logits_relative_l2": max((_relative_l2(a, b) for a, b in logits), default=None),
        "mask_dice_mean": float(np.mean(dice)) if dice else None,
        "mask_dice_worst": min(dice, default=None),
        "masks": len(dice),
    }


def _relative_l2(expected: Array, actual: Array) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def _dice(expected: NDArray[np.bool_], actual: NDArray[np.bool_]) -> list[float]:
    """Of each mask; two empty ones agree."""
    overlap = (expected & actual).sum(axis=(2, 3)).ravel()
    sizes = (expected.sum(axis=(2, 3)) + actual.sum(axis=(2, 3))).ravel()
    pairs = zip(overlap.tolist(), sizes.tolist(), strict=True)
    return [2 * b / s if s else 1.0 for b, s in pairs]


def peak_mb() -> float:
    """The process's largest resident memory so far."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


class _Runs:
    """An opened candidate and the inputs it is timed on."""

    def __init__(self, opened: Opened, inputs: Mapping[str, Array]) -> None:
        self.opened, self.inputs = opened, inputs
        self.image = inputs["image_0"]
        self.prompts = [inputs[name] for name in ("coords_0_0", "labels_0_0") if name in inputs]
        self.embedding = inputs["embeddings_0"][:1].copy()

    def milliseconds(self, op: str, repeat: int, prompts: int = 1) -> list[float]:
        """Of `repeat` runs. `prompts`: sets that a `click` decodes in one call."""
        coords, labels = (np.repeat(array, prompts, axis=0) for array in self.prompts or ((), ()))
        operation: dict[str, Callable[[], object]] = {
            "encoder": lambda: self.opened.encode(self.image),
            "decoder": lambda: self.opened.decode(self.embedding, coords, labels),
            "click": lambda: self.opened.click(self.embedding, coords, labels),
        }
        samples = []
        for _ in range(repeat):
            start = perf_counter()
            operation[op]()
            samples.append(1e3 * (perf_counter() - start))
        return samples


def serve(spec: Spec, say: Callable[[dict[str, Any]], None]) -> None:
    """Load, say so, and answer requests until there are no more."""
    start = perf_counter()
    opened = KINDS[spec["kind"]](spec)
    say({"load_s": perf_counter() - start, "versions": opened.versions})
    if isinstance(opened, Gemm):
        for _ in sys.stdin:
            say({"gflops": opened.gflops()})
        return
    with np.load(spec["inputs"]) as data:
        runs = _Runs(opened, dict(data))
    for line in sys.stdin:
        request = json.loads(line)
        match request["op"]:
            case "agree":
                say(agreement(opened, runs.inputs))
            case "memory":
                say({"peak_mb": peak_mb()})
            case op:
                say({"ms": runs.milliseconds(op, request["repeat"], request["prompts"])})


def main() -> None:
    """Speak on standard output; what libraries print there goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    try:
        serve(json.loads(sys.argv[1]), say)
    except Exception as e:
        traceback.print_exc()
        say({"error": f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else ''}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
