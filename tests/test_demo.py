"""`medsa-deploy demo`: the README's first command, from the package's own checkpoint."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
from command_line import call

from medsa_deploy.stages.demo.medsa import HELD_OUT, TISSUES


def test_the_demonstration(tmp_path: Path) -> None:
    done = call("demo", "-o", tmp_path / "demo", "--json")
    assert done.code == 0, done.err
    document = done.json
    assert document["verified"]
    assert document["parity"]["tensors"]["image_embeddings"]["relative_l2"] <= 2e-5
    assert set(document["dice"]) >= set(TISSUES)
    assert min(document["dice"][tissue] for tissue in TISSUES) > 0.8
    assert min(document["timings_ms"].values()) > 0
    written = np.asarray(nibabel.load(document["segmentation"]).dataobj)
    assert sorted(np.flatnonzero(written.any(axis=(0, 1)))) == list(HELD_OUT)
    with PIL.Image.open(document["montage"]) as picture:
        assert picture.size[0] > 500
