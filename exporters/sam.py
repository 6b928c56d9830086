"""The one place that imports `segment_anything`: its network modules, not its package `__init__`.

`segment_anything/__init__.py` imports torchvision, which `segment_anything.modeling` does not need
and which is often absent or broken beside a CPU build of torch. So the parent package is stood in
for while the subpackage is imported, and taken away again: a later `import segment_anything` in the
same process still runs the real one.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from medsa_deploy.errors import MissingDependencyError

PARENT = "segment_anything"


def _import_modeling() -> ModuleType:
    """`segment_anything.modeling`, imported without running `segment_anything/__init__.py`."""
    try:
        if sys.modules.get(PARENT) is not None:
            return importlib.import_module(f"{PARENT}.modeling")
        spec = importlib.util.find_spec(PARENT)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"no package {PARENT}", name=PARENT)
        sys.modules[PARENT] = importlib.util.module_from_spec(spec)
        try:
            return importlib.import_module(f"{PARENT}.modeling")
        finally:
            del sys.modules[PARENT]
    except ModuleNotFoundError as e:
        if not (e.name or "").startswith(PARENT):
            raise
        raise MissingDependencyError(
            "segment-anything", extra="export", purpose="reading or exporting a checkpoint"
        ) from e


modeling = _import_modeling()

Attention = modeling.image_encoder.Attention
LayerNorm2d = modeling.image_encoder.LayerNorm2d
MaskDecoder = modeling.mask_decoder.MaskDecoder
MLPBlock = modeling.image_encoder.MLPBlock
PatchEmbed = modeling.image_encoder.PatchEmbed
PromptEncoder = modeling.prompt_encoder.PromptEncoder
TwoWayAttention = modeling.transformer.Attention
window_partition = modeling.image_encoder.window_partition
window_unpartition = modeling.image_encoder.window_unpartition
