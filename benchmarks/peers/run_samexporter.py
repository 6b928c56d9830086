"""Run a module of samexporter in its own environment: `python run_samexporter.py MODULE ARGUMENTS`.

samexporter asks for versions of torch and ONNX of its own and for torchvision, which its export of
SAM does not use. So torchvision and its MobileSAM set-up are stood in for, and the export runs with
the versions that are here.
"""

from __future__ import annotations

import runpy
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

STANDINS = (
    "torchvision",
    "torchvision.ops",
    "torchvision.ops.boxes",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "samexporter.mobile_encoder.setup_mobile_sam",
)
UNUSED = ("batched_nms", "box_area", "resize", "to_pil_image", "setup_model")


def main() -> None:
    """Register the stand-ins and run the module as a program."""
    for name in STANDINS:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        for attribute in UNUSED:
            setattr(module, attribute, None)
        sys.modules[name] = module
    script, module_name = sys.argv[0], sys.argv[1]
    sys.argv = [script, *sys.argv[2:]]
    runpy.run_module(module_name, run_name="__main__")


if __name__ == "__main__":
    main()
