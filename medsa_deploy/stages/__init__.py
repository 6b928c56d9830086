"""One function per command: what combines the modules below it, and nothing about a terminal.

checkpoints.py   inspect a checkpoint          segmentation.py  run a bundle on images
export.py        checkpoint → bundle           verification.py  a bundle against its checkpoint
proof.py         what export and verify share  doctor.py        what this machine has
quantization.py  further precisions            demo.py          the first five minutes
float16.py       float16 graphs                trials.py        candidates against float32
accuracy.py      masks against label files     labelled.py      prompts drawn from labels
pairs.py         labels matched with files     parity_report.py a page for a verification
"""

from .accuracy import Accuracy, measure
from .checkpoints import Inspection, inspect
from .demo import Demonstration, demonstrate
from .doctor import Diagnosis, diagnose
from .export import Export, export
from .labelled import PromptKind
from .quantization import Quantization, quantize
from .segmentation import Outputs, Prompts, Segmentation, run
from .verification import Verification, verify_bundle

__all__ = [
    "Accuracy",
    "Demonstration",
    "Diagnosis",
    "Export",
    "Inspection",
    "Outputs",
    "PromptKind",
    "Prompts",
    "Quantization",
    "Segmentation",
    "Verification",
    "demonstrate",
    "diagnose",
    "export",
    "inspect",
    "measure",
    "quantize",
    "run",
    "verify_bundle",
]
