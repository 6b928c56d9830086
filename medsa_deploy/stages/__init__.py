"""One function per command: what combines the modules below it, and nothing about a terminal.

checkpoints.py   inspect a checkpoint          segmentation.py  run a bundle on images
export.py        checkpoint → bundle           verification.py  a bundle against its checkpoint
proof.py         what export and verify share  doctor.py        what this machine has
engine_plan.py   what a build would do         engines.py       bundle → engines
volumes.py       run a bundle on a volume      prompt_file.py   prompts in a JSON file
quantization.py  further precisions            float16.py       float16 graphs
trials.py        candidates against float32    template.py      the demonstrations' image
tuning.py        the fastest backend here      profile.py       how long everything takes
kernels.py       compiled CUDA kernels
accuracy.py      masks against label files     labelled.py      prompts drawn from labels
pairs.py         labels matched with files     parity_report.py a page for a verification
demo.py          the first five minutes        demo_litemedsam.py  the same with LiteMedSAM
"""

from medsa_deploy.runtime import VolumeOptions
from medsa_deploy.timing import Options as ProfileOptions

from .accuracy import Accuracy, measure
from .checkpoints import Inspection, inspect
from .demo import Demonstration, demonstrate
from .demo_litemedsam import LiteMedSAMDemonstration, demonstrate_litemedsam
from .doctor import Diagnosis, diagnose
from .engine_plan import EnginePlan, EngineRequest
from .engines import EngineBuild, EngineState, build_engines
from .export import Export, export
from .kernels import KernelBuild, build_kernels
from .labelled import PromptKind
from .profile import Outputs as ProfileOutputs
from .profile import profile_bundle
from .quantization import Quantization, quantize
from .segmentation import Outputs, Prompts, Segmentation, run
from .tuning import Tuning, tune
from .verification import Verification, verify_bundle
from .volumes import (
    VolumeSegmentation,
    run_volume,
    structures_of,
    takes_volume,
)

__all__ = [
    "Accuracy",
    "Demonstration",
    "Diagnosis",
    "EngineBuild",
    "EnginePlan",
    "EngineRequest",
    "EngineState",
    "Export",
    "Inspection",
    "KernelBuild",
    "LiteMedSAMDemonstration",
    "Outputs",
    "ProfileOptions",
    "ProfileOutputs",
    "PromptKind",
    "Prompts",
    "Quantization",
    "Segmentation",
    "Tuning",
    "Verification",
    "VolumeOptions",
    "VolumeSegmentation",
    "build_engines",
    "build_kernels",
    "demonstrate",
    "demonstrate_litemedsam",
    "diagnose",
    "export",
    "inspect",
    "measure",
    "profile_bundle",
    "quantize",
    "run",
    "run_volume",
    "structures_of",
    "takes_volume",
    "tune",
    "verify_bundle",
]
