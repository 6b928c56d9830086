"""Keys of EfficientSAM's own weights, which may also be the base of adapters."""

from __future__ import annotations

from torch import Tensor

from medsa_deploy.exporters.families.efficient_sam import keys as efficient_sam
from medsa_deploy.exporters.layouts import FileLayout, Tensors
from medsa_deploy.exporters.shapes import Shapes

STEMS = efficient_sam.STEMS
REQUIRED = {
    key.replace(".mlp.lin1.", ".mlp.fc1."): shape for key, shape in efficient_sam.REQUIRED.items()
}


def recognises(shapes: Shapes) -> bool:
    """Whether it has EfficientSAM's prompts, and blocks by its own code's names."""
    return efficient_sam.has_prompts(shapes) and efficient_sam.has_own_blocks(shapes)


def as_base(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors by the names of the public Med-SA code, whose adapters go over them."""
    return {efficient_sam.OWN_MLP.sub(r"\1.lin\2.", key): value for key, value in tensors.items()}


LAYOUT = FileLayout(as_base=as_base)
