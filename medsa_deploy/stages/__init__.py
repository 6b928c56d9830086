"""One function per command: what combines the modules below it, and nothing about a terminal.

checkpoints.py   inspect a checkpoint          segmentation.py  run a bundle on images
export.py        checkpoint → bundle           verification.py  a bundle against its checkpoint
proof.py         what export and verify share  doctor.py        what this machine has
engines.py       bundle → engines
quantization.py  further precisions            demo.py          the first five minutes
float16.py       float16 graphs                trials.py        candidates against float32
"""

from .checkpoints import Inspection, inspect
from .demo import Demonstration, demonstrate
from .doctor import Diagnosis, diagnose
from .engines import EngineBuild, EnginePlan, EngineRequest, EngineState, build_engines
from .export import Export, export
from .quantization import Quantization, quantize
from .segmentation import Outputs, Prompts, Segmentation, run
from .verification import Verification, verify_bundle

__all__ = [
    "Demonstration",
    "Diagnosis",
    "EngineBuild",
    "EnginePlan",
    "EngineRequest",
    "EngineState",
    "Export",
    "Inspection",
    "Outputs",
    "Prompts",
    "Quantization",
    "Segmentation",
    "Verification",
    "build_engines",
    "demonstrate",
    "diagnose",
    "export",
    "inspect",
    "quantize",
    "run",
    "verify_bundle",
]
