"""One function for each command of the command line; none of them knows a terminal.

inspect.py       checkpoint → its network's facts
export.py        checkpoint → bundle, its parity checked; readings.py finds who trained it
quantize/        bundle → float16 or INT8 graphs in it
                 quantize.py the whole, float16.py, int8.py, calibration.py images → value ranges,
                 candidates.py compares candidate graphs with float32
build_engine/    bundle → engines in it: plan.py decides, build.py builds
build_kernels.py bundle → compiled CUDA kernels in it
cpp.py           the C++ runtime → a folder to build a program with
run/             bundle, image or volume, prompts → masks
                 run.py chooses; images.py, volumes.py, prompt_file.py prompts from JSON;
                 track.py follows a structure through a clip
verify/          bundle → parity or accuracy
                 verify.py parity, engine_check.py the same for engines, parity_report.py a page;
                 accuracy.py masks against label files, matched_files.py, drawn_prompts.py
sign.py          bundle and a private key → a signature beside it
profile.py       bundle → latencies
doctor/          diagnose.py this machine → what is installed; tune.py bundle → its fastest backend;
                 devices.py a device and a bundle → what is missing
demo/            medsa.py, automatic.py, litemedsam.py: trained weights and mni_template.py's volume
                 → Dice, timings; proved_bundle.py exports and verifies an asset
"""

from medsa_deploy.evaluation.latency_worker import LatencyOptions
from medsa_deploy.runtime import VolumeOptions

from .build_engine.build import EngineBuild, build_engines
from .build_engine.plan import EnginePlan, EngineRequest
from .build_kernels import KernelBuild, build_kernels
from .cpp import CppProject, copy_cpp
from .demo.automatic import AutomaticDemonstration, demonstrate_automatic
from .demo.litemedsam import LiteMedSAMDemonstration, demonstrate_litemedsam
from .demo.medsa import Demonstration, demonstrate
from .doctor.devices import DeviceReport, check_device
from .doctor.diagnose import Diagnosis, diagnose
from .doctor.tune import Tuning, tune
from .export import Export, export_checkpoint
from .inspect import Inspection, inspect_checkpoint
from .profile import ProfileTargets, profile_bundle
from .quantize.quantize import Quantization, quantize_bundle
from .readings import Reading
from .run.images import MaskTargets, Segmentation
from .run.run import RunRequest, RunResult, SessionOptions, run_bundle
from .run.track import FrameReport, Tracking, track_clip
from .run.volumes import VolumeSegmentation, VolumeSelection, segment_volume_file, structures_of
from .sign import Signing, sign_bundle
from .verify.accuracy import Accuracy, measure_accuracy
from .verify.drawn_prompts import PromptKind
from .verify.engine_check import EngineState
from .verify.verify import Verification, check_signed, verify_bundle

__all__ = [
    "Accuracy",
    "AutomaticDemonstration",
    "CppProject",
    "Demonstration",
    "DeviceReport",
    "Diagnosis",
    "EngineBuild",
    "EnginePlan",
    "EngineRequest",
    "EngineState",
    "Export",
    "FrameReport",
    "Inspection",
    "KernelBuild",
    "LatencyOptions",
    "LiteMedSAMDemonstration",
    "MaskTargets",
    "ProfileTargets",
    "PromptKind",
    "Quantization",
    "Reading",
    "RunRequest",
    "RunResult",
    "Segmentation",
    "SessionOptions",
    "Signing",
    "Tracking",
    "Tuning",
    "Verification",
    "VolumeOptions",
    "VolumeSegmentation",
    "VolumeSelection",
    "build_engines",
    "build_kernels",
    "check_device",
    "check_signed",
    "copy_cpp",
    "demonstrate",
    "demonstrate_automatic",
    "demonstrate_litemedsam",
    "diagnose",
    "export_checkpoint",
    "inspect_checkpoint",
    "measure_accuracy",
    "profile_bundle",
    "quantize_bundle",
    "run_bundle",
    "segment_volume_file",
    "sign_bundle",
    "structures_of",
    "track_clip",
    "tune",
    "verify_bundle",
]
