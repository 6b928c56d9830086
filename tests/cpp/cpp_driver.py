"""g++ → programs of the C++ runtime; the test driver's requests and replies as numpy arrays."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from filelock import FileLock

from medsa_deploy.transforms import Frame, Prompt

HEADERS = Path(__file__).parents[2] / "medsa_deploy" / "cpp" / "include"
WARNINGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wshadow", "-pedantic")
SANITIZERS = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
"""A finding ends the program. -O1 takes twice the time to compile, and its tests take as long."""
TYPES = {"uint8": "u8", "uint16": "u16", "int16": "i16", "float32": "f32"}


def library() -> Path:
    """ONNX Runtime's shared library in the installed wheel."""
    (path,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1.*")
    return path


def compile_program(source: Path, program: Path, *options: str, compiler: str = "g++") -> Path:
    """Compile a program, once a run of the tests; warnings are errors."""
    with FileLock(program.with_suffix(".lock")):
        if not program.exists():
            command = [compiler, *WARNINGS, *options, f"-I{HEADERS}", source, "-o", program, "-ldl"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    return program


class Refusal(Exception):
    """An error of the C++ runtime: its name, its exit code and its message."""

    def __init__(self, reply: str) -> None:
        name, code, message = reply.split(" ", 2)
        super().__init__(message)
        self.name, self.code, self.message = name, int(code), message


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """The arrays of one `segment`."""

    masks: np.ndarray
    scores: np.ndarray
    logits: np.ndarray
    regions: np.ndarray
    labels: np.ndarray
    timings_ms: np.ndarray


class Driver:
    """A running driver; a context manager."""

    def __init__(self, program: Path, runner: Sequence[str] = (), **variables: str) -> None:
        environment = os.environ | {"MEDSA_ONNXRUNTIME": str(library())} | variables
        self.process = subprocess.Popen(
            [*runner, program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *error: object) -> None:
        """A finding of a sanitizer, a leak included, is a failure."""
        _, messages = self.process.communicate()
        if error[0] is None:
            assert self.process.returncode == 0, messages.decode()

    def ask(self, request: str, *arrays: bytes) -> list[bytes]:
        """Send a request and the bytes that follow; the arrays of the reply."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"".join([request.encode() + b"\n", *arrays]))
        self.process.stdin.flush()
        reply = self.process.stdout.readline().decode()
        if not reply:
            _, messages = self.process.communicate()
            raise AssertionError(f"{request}: {messages.decode()}")
        word, _, payload = reply.strip("\n").partition(" ")
        if word == "error":
            raise Refusal(payload)
        return [self.process.stdout.read(int(size)) for size in payload.split()]

    def image(
        self, pixels: np.ndarray, *, gap: int = 0, upwards: bool = False, **flags: Any
    ) -> None:
        """Give an image whose rows have `gap` bytes between them, and may be stored upwards."""
        height, width = pixels.shape[:2]
        rows = np.ascontiguousarray(pixels).view(np.uint8).reshape(height, -1)
        stored = np.pad(rows, ((0, 0), (0, gap)), constant_values=0xA5)
        pitch = stored.shape[1]
        offset = 0
        if upwards:
            stored, offset, pitch = stored[::-1], (height - 1) * pitch, -pitch
        channels = 1 if pixels.ndim == 2 else 3
        data = stored.tobytes()
        self.ask(
            f"image {TYPES[str(pixels.dtype)]} {width} {height} {channels} {pitch} "
            f"{int(flags.get('inverted', False))} {offset} {len(data)}",
            data,
        )

    def preprocess(self, spec: str, size: int, window: Any = None) -> tuple[np.ndarray, tuple]:
        """The last image as (3, S, S), and the (h, w) that it covers."""
        values, content = self.ask(f"preprocess {spec} {size} {_window(window)}")
        image = np.frombuffer(values, np.float32).reshape(3, size, size)
        return image, tuple(np.frombuffer(content, np.int32).tolist())

    def masks(self, logits: np.ndarray, frame: Frame, rule: Any) -> np.ndarray:
        """Logits (K, 4g, 4g) as masks (n, H, W)."""
        count, side = logits.shape[:2]
        sizes = (frame.network_size, *frame.image_size, *frame.content_size)
        words = (rule.postprocess, float(rule.probability), int(rule.exclusive), count, side)
        (masks,) = self.ask(" ".join(map(str, ("masks", *words, *sizes))), logits.tobytes())
        return np.frombuffer(masks, np.uint8).reshape(-1, *frame.image_size).astype(bool)

    def open(
        self, bundle: Path, *, threads: int = 1, precision: str = "fp32", sha256: str = "any"
    ) -> list[str]:
        """Open a bundle; the names of its classes."""
        (names,) = self.ask(f"open {threads} {precision} {sha256} {bundle}")
        return names.decode().splitlines()

    def encode(self, *images: np.ndarray, window: Any = None, slices: bool = False, **how: Any):
        """Encode one image, or the slices of chunks; their embeddings, flat."""
        self.ask("clear")
        for pixels in images:
            self.image(pixels, **how)
        kind = "slices" if slices else "image"
        values = self.ask(f"encode {_window(window)} {kind}")
        return [np.frombuffer(value, np.float32) for value in values]

    def segment(
        self,
        prompts: Sequence[Prompt],
        *,
        place: int = 0,
        multimask: bool = False,
        threshold: float | None = None,
    ) -> Segmented:
        """Masks of prompt sets on an embedding."""
        words, arrays = [], []
        for prompt in prompts:
            mask = np.zeros(0) if prompt.mask is None else prompt.mask
            words.append(f"{len(prompt.points)} {int(prompt.box is not None)} {mask.size}")
            parts = [np.column_stack([prompt.points, prompt.labels]), prompt.box, mask]
            arrays += [np.asarray(p, np.float32).tobytes() for p in parts if p is not None]
        limit = "none" if threshold is None else repr(threshold)
        request = f"segment {place} {int(multimask)} {limit} {len(prompts)} {' '.join(words)}"
        reply = self.ask(request, *arrays)
        types = (np.uint8, np.float32, np.float32, np.int32, np.uint8, np.float64)
        names = ("masks", "scores", "logits", "regions", "labels", "timings_ms")
        arrays_of = zip(names, reply, types, strict=True)
        return Segmented(**{name: np.frombuffer(data, dtype) for name, data, dtype in arrays_of})


def _window(window: Any) -> str:
    return "none" if window is None else " ".join(repr(float(v)) for v in window)
