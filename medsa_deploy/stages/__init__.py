"""One function per command: what combines the modules below it, and nothing about a terminal.

checkpoints.py   inspect a checkpoint          segmentation.py  run a bundle on images
export.py        checkpoint → bundle           verification.py  a bundle against its checkpoint
proof.py         what export and verify share  doctor.py        what this machine has
volumes.py       run a bundle on a volume      prompt_file.py   prompts in a JSON file
demo.py          the first five minutes        demo_litemedsam.py  the same with LiteMedSAM
template.py      the demonstrations' image
"""

from medsa_deploy.runtime import VolumeOptions

from .checkpoints import Inspection, inspect
from .demo import Demonstration, demonstrate
from .demo_litemedsam import LiteMedSAMDemonstration, demonstrate_litemedsam
from .doctor import Diagnosis, diagnose
from .export import Export, export
from .segmentation import Outputs, Prompts, Segmentation, run
from .verification import Verification, verify_bundle
from .volumes import (
    VolumeSegmentation,
    run_volume,
    structures_of,
    takes_volume,
)

__all__ = [
    "Demonstration",
    "Diagnosis",
    "Export",
    "Inspection",
    "LiteMedSAMDemonstration",
    "Outputs",
    "Prompts",
    "Segmentation",
    "Verification",
    "VolumeOptions",
    "VolumeSegmentation",
    "demonstrate",
    "demonstrate_litemedsam",
    "diagnose",
    "export",
    "inspect",
    "run",
    "run_volume",
    "structures_of",
    "takes_volume",
    "verify_bundle",
]
