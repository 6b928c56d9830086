"""Requests that no client should send, by a seed."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import httpx
import numpy as np

from medsa_deploy.serve.array_wire import pack
from medsa_deploy.serve.server import Server

POSTS = (
    *("/api/image", "/api/masks", "/api/export", "/set_image", "/predict", "/undo", "/infer/a"),
    *("/add_point_interaction", "/add_bbox_interaction", "/add_initial_seg_interaction"),
    *("/set_target_buffer", "/set_do_autozoom", "/reset_interactions", "/release"),
    *("/add_scribble_interaction", "/models/a/predict", "/session/"),
)
METHODS = (
    *(("PUT", "/api/files/a.nii.gz"), ("PUT", "/api/files/%2e%2e%2f.dcm"), ("PUT", "/session/")),
    *(("GET", "/api/pixels?first=0&last=9"), ("GET", "/api/pixels?first=-1&last=x")),
    *(("GET", "/api/folder?path=%00"), ("GET", "/session/../x"), ("DELETE", "/api/masks")),
)
SCALARS = (
    *(None, True, 0, -1, 1.5, 10**30, float("nan"), float("inf"), "", "a", "\x00", "é" * 300),
    *(
        "structure",
        "nifti",
        [],
        {},
        [[]],
        [1, 2, 3],
        [[1, 2, 3]],
        [[5, 5, 5, 0]],
        [0, 0, 0, 1, 1, 1],
    ),
)
KEYS = (
    *("structures", "near", "propagate", "bundle", "format", "intensity_window", "threshold"),
    *("coordinates", "include_interaction", "bbox_coords", "run_prediction", "shape", "dtype"),
    *("path", "do_autozoom", "points", "boxes", "name", "class", "colour", "codes"),
)


def document(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value: keys that mean something, with values that mean nothing."""
    if depth > 3 or rng.random() < 0.25:
        return rng.choice(SCALARS)
    if rng.random() < 0.3:
        return [document(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): document(rng, depth + 1) for _ in range(rng.randrange(6))}


def body(rng: random.Random, good: bytes) -> bytes:
    """Bytes: JSON, a packed array, either with some bytes changed or cut off, or noise."""
    content = bytearray(
        rng.choice((good, json.dumps(document(rng)).encode(), b"[" * 20_000, rng.randbytes(200)))
    )
    for _ in range(rng.randrange(4)):
        content[rng.randrange(min(60, len(content)))] = rng.randrange(256)
    return bytes(content[: rng.randrange(len(content) + 1)] if rng.random() < 0.3 else content)


def send_malformed(server: Server, count: int, seed: int) -> Counter[int]:
    """Send so many requests, each with a lease that has an image; how often each status came."""
    rng = random.Random(seed)
    array = np.zeros((1, 4, 40, 48), np.int16)
    array[:, 1:3, 8:30, 9:40] = 400
    good, seen = pack(array), Counter[int]()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        token = ""
        for number in range(count):
            if number % 50 == 0:  # some requests end a lease, or spoil its image
                token = client.post("/claim").json()["lease_token"]
                client.post("/set_image", content=good, headers={"X-Lease-Token": token})
            method, path = ("POST", rng.choice(POSTS))
            if rng.random() < 0.15:
                method, path = rng.choice(METHODS)
            headers = {"X-Lease-Token": token}
            if rng.random() < 0.3:
                headers["X-Meta"] = json.dumps(document(rng))
            if rng.random() < 0.2:
                headers["Content-Type"] = rng.choice(("multipart/form-data", "text/x", "a;b=c"))
            content = None if method in ("GET", "DELETE") else body(rng, good)
            answer = client.request(method, path, content=content, headers=headers)
            seen[answer.status_code] += 1
            if number % 50 == 49:
                client.post("/release", headers={"X-Lease-Token": token})
    return seen
