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

from medsa_deploy.evaluation.latency_worker import LatencyOptions
from medsa_deploy.runtime import VolumeOptions

from .build_engine.build import EngineBuild, build_engines
from .build_engine.plan import EnginePlan, EngineRequest
from .build_kernels import KernelBuild, build_kernels
from .demo.litemedsam import LiteMedSAMDemonstration, demonstrate_litemedsam
from .demo.medsa import Demonstration, demonstrate
from .doctor.diagnose import Diagnosis, diagnose
from .doctor.tune import Tuning, tune
from .export import Export, export_checkpoint
from .inspect import Inspection, inspect_checkpoint
from .profile import ProfileTargets, profile_bundle
from .quantize.quantize import Quantization, quantize_bundle
from .run.images import MaskTargets, Prompts, Segmentation, segment_images
from .run.volumes import VolumeSegmentation, segment_volume_file, structures_of, takes_volume
from .verify.accuracy import Accuracy, measure_accuracy
from .verify.drawn_prompts import PromptKind
from .verify.engine_check import EngineState
from .verify.verify import Verification, verify_bundle

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
    "LatencyOptions",
    "LiteMedSAMDemonstration",
    "MaskTargets",
    "ProfileTargets",
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
    "export_checkpoint",
    "inspect_checkpoint",
    "measure_accuracy",
    "profile_bundle",
    "quantize_bundle",
    "segment_images",
    "segment_volume_file",
    "structures_of",
    "takes_volume",
    "tune",
    "verify_bundle",
]
