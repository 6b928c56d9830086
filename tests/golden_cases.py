"""Golden cases → checkpoint tensors, inputs and expected outputs (see `golden/seeded.py`)."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "golden"

_spec = importlib.util.spec_from_file_location("seeded", FOLDER / "seeded.py")
assert _spec is not None
assert _spec.loader is not None
seeded = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(seeded)

VIT_2D = (
    "medsa_2d",
    "medsa_2d_relpos",
    "medsa_2d_box_mask_two_classes",
    "medsa_2d_points_and_boxes",
    "medsa_hyp_2d",
    "medsa_hyp_2d_public_decoder",
    "sam_plain",
)


VIT_3D = ("medsa_3d_chunk6", "medsa_3d_no_chunk", "medsa_hyp_3d")

TABLELESS_2D = ("medsa_lora", "medsa_mobile", "medsa_efficient_adalora")
"""Cases whose checkpoints do not show their image size."""

ADAPTED_SAMS = (
    "efficientsam_official",
    "sam_med2d",
    "finetune_sam_adapter",
    "finetune_sam_lora",
    "samed",
)
"""Cases of other code than the public Med-SA code."""
UNSIZED_SAMS = ("efficientsam_official", "samed")

CASES_2D = (*VIT_2D, "medsa_efficient", *TABLELESS_2D)


@dataclass(frozen=True)
class GoldenCase:
    """One golden case: settings, seeded weights and inputs, expected outputs."""

    name: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        return json.loads((FOLDER / f"{self.name}.json").read_text())

    @cached_property
    def state_dict(self) -> dict[str, np.ndarray]:
        s = self.settings
        return seeded.state_dict(s["keys"], s["seed"], rel_pos_scale=s["rel_pos_scale"])

    @cached_property
    def base(self) -> dict[str, np.ndarray] | None:
        """The checkpoint that the case's file goes over, if any."""
        base = self.settings.get("base")
        if base is None:
            return None
        return seeded.state_dict(base["keys"], base["seed"], rel_pos_scale=base["rel_pos_scale"])

    @cached_property
    def expected(self) -> dict[str, np.ndarray]:
        with np.load(FOLDER / f"{self.name}.npz") as data:
            return dict(data)

    @property
    def size(self) -> int:
        return self.settings["image_size"]

    @property
    def shown_size(self) -> int | None:
        """What `--image-size` has to be given, if anything."""
        return self.size if self.name in TABLELESS_2D + UNSIZED_SAMS else None

    @property
    def efficient(self) -> bool:
        """Whether it is efficient_sam: no padding point, no mask prompt, SAM's outputs."""
        return self.settings.get("network") == "efficient_sam"

    @property
    def classes(self) -> int:
        return self.settings.get("num_multimask_outputs", 1)

    @property
    def image(self) -> np.ndarray:
        """(B, 3, S, S) float32, 0…1."""
        return seeded.image(
            self.settings["seed"], (self.settings["batch"], 3, self.size, self.size)
        )

    @property
    def coords_and_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Points, then box corners, then SAM's padding point where there is no box.

        Nothing at all for a case without a prompt.
        """
        s = self.settings
        boxes = s.get("boxes")
        if not s["points"] and not boxes:
            return np.zeros((1, 0, 2), np.float32), np.zeros((1, 0), np.float32)
        sets = len(s["points"] or boxes)
        coords = np.array(s["points"] or np.zeros((sets, 0, 2)), np.float32)
        labels = np.array(s["labels"] or np.zeros((sets, 0)), np.float32)
        if boxes:
            more = np.array(boxes, np.float32).reshape(sets, 2, 2)
            more_labels = np.tile(np.array([2, 3], np.float32), (sets, 1))
        elif self.efficient:
            more, more_labels = np.zeros((sets, 0, 2), np.float32), np.zeros((sets, 0), np.float32)
        else:
            more = np.zeros((sets, 1, 2), np.float32)
            more_labels = np.full((sets, 1), -1, np.float32)
        return np.concatenate([coords, more], 1), np.concatenate([labels, more_labels], 1)

    @property
    def mask_input(self) -> np.ndarray | None:
        """(1, 1, S/4, S/4) float32 logits, or None."""
        if not self.settings.get("mask_input"):
            return None
        return seeded.mask_input(self.settings["seed"], self.size // 4)


def export_options(name: str) -> dict[str, Any]:
    """What a case's checkpoint does not say, as fields of `Overrides`."""
    case = GoldenCase(name)
    options: dict[str, Any] = {}
    if name != "medsa_mobile" and not case.efficient and name not in ADAPTED_SAMS:
        options["classes"] = case.classes
    if name not in VIT_3D:
        return options | ({} if case.shown_size is None else {"image_size": case.shown_size})
    if case.settings["chunk"]:
        return options | {"depth_chunk": case.settings["chunk"]}
    return options | {"depth_chunk": "none", "slices": case.settings["batch"]}


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    difference = np.asarray(actual, np.float64) - np.asarray(expected, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(expected, np.float64)))
