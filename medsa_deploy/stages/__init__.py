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

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medsa_deploy.evaluation.latency_worker import LatencyOptions as LatencyOptions
    from medsa_deploy.runtime import VolumeOptions as VolumeOptions

    from .build_engine.build import EngineBuild as EngineBuild
    from .build_engine.build import build_engines as build_engines
    from .build_engine.plan import EnginePlan as EnginePlan
    from .build_engine.plan import EngineRequest as EngineRequest
    from .build_kernels import KernelBuild as KernelBuild
    from .build_kernels import build_bundle_kernels as build_bundle_kernels
    from .cpp import CppProject as CppProject
    from .cpp import copy_cpp as copy_cpp
    from .demo.automatic import AutomaticDemonstration as AutomaticDemonstration
    from .demo.automatic import demonstrate_automatic as demonstrate_automatic
    from .demo.litemedsam import LiteMedSAMDemonstration as LiteMedSAMDemonstration
    from .demo.litemedsam import demonstrate_litemedsam as demonstrate_litemedsam
    from .demo.medsa import Demonstration as Demonstration
    from .demo.medsa import demonstrate as demonstrate
    from .doctor.devices import DeviceReport as DeviceReport
    from .doctor.devices import check_device as check_device
    from .doctor.diagnose import Diagnosis as Diagnosis
    from .doctor.diagnose import diagnose as diagnose
    from .doctor.tune import Tuning as Tuning
    from .doctor.tune import tune as tune
    from .export import Export as Export
    from .export import export_checkpoint as export_checkpoint
    from .inspect import Inspection as Inspection
    from .inspect import inspect_checkpoint as inspect_checkpoint
    from .profile import ProfileTargets as ProfileTargets
    from .profile import profile_bundle as profile_bundle
    from .quantize.quantize import Quantization as Quantization
    from .quantize.quantize import quantize_bundle as quantize_bundle
    from .readings import Reading as Reading
    from .run.images import MaskTargets as MaskTargets
    from .run.images import Segmentation as Segmentation
    from .run.run import RunRequest as RunRequest
    from .run.run import RunResult as RunResult
    from .run.run import SessionOptions as SessionOptions
    from .run.run import run_bundle as run_bundle
    from .run.track import FrameReport as FrameReport
    from .run.track import Tracking as Tracking
    from .run.track import track_clip as track_clip
    from .run.volumes import VolumeSegmentation as VolumeSegmentation
    from .run.volumes import VolumeSelection as VolumeSelection
    from .run.volumes import segment_volume_file as segment_volume_file
    from .run.volumes import structures_of as structures_of
    from .sign import Signing as Signing
    from .sign import sign_bundle as sign_bundle
    from .verify.accuracy import Accuracy as Accuracy
    from .verify.accuracy import measure_accuracy as measure_accuracy
    from .verify.drawn_prompts import PromptKind as PromptKind
    from .verify.engine_check import EngineState as EngineState
    from .verify.verify import Verification as Verification
    from .verify.verify import check_signed as check_signed
    from .verify.verify import verify_bundle as verify_bundle

_HOMES = {
    "Accuracy": ".verify.accuracy",
    "AutomaticDemonstration": ".demo.automatic",
    "CppProject": ".cpp",
    "Demonstration": ".demo.medsa",
    "DeviceReport": ".doctor.devices",
    "Diagnosis": ".doctor.diagnose",
    "EngineBuild": ".build_engine.build",
    "EnginePlan": ".build_engine.plan",
    "EngineRequest": ".build_engine.plan",
    "EngineState": ".verify.engine_check",
    "Export": ".export",
    "FrameReport": ".run.track",
    "Inspection": ".inspect",
    "KernelBuild": ".build_kernels",
    "LatencyOptions": "medsa_deploy.evaluation.latency_worker",
    "LiteMedSAMDemonstration": ".demo.litemedsam",
    "MaskTargets": ".run.images",
    "ProfileTargets": ".profile",
    "PromptKind": ".verify.drawn_prompts",
    "Quantization": ".quantize.quantize",
    "Reading": ".readings",
    "RunRequest": ".run.run",
    "RunResult": ".run.run",
    "Segmentation": ".run.images",
    "SessionOptions": ".run.run",
    "Signing": ".sign",
    "Tracking": ".run.track",
    "Tuning": ".doctor.tune",
    "Verification": ".verify.verify",
    "VolumeOptions": "medsa_deploy.runtime",
    "VolumeSegmentation": ".run.volumes",
    "VolumeSelection": ".run.volumes",
    "build_bundle_kernels": ".build_kernels",
    "build_engines": ".build_engine.build",
    "check_device": ".doctor.devices",
    "check_signed": ".verify.verify",
    "copy_cpp": ".cpp",
    "demonstrate": ".demo.medsa",
    "demonstrate_automatic": ".demo.automatic",
    "demonstrate_litemedsam": ".demo.litemedsam",
    "diagnose": ".doctor.diagnose",
    "export_checkpoint": ".export",
    "inspect_checkpoint": ".inspect",
    "measure_accuracy": ".verify.accuracy",
    "profile_bundle": ".profile",
    "quantize_bundle": ".quantize.quantize",
    "run_bundle": ".run.run",
    "segment_volume_file": ".run.volumes",
    "sign_bundle": ".sign",
    "structures_of": ".run.volumes",
    "track_clip": ".run.track",
    "tune": ".doctor.tune",
    "verify_bundle": ".verify.verify",
}
"""Public name → the module it is imported from."""

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import a stage on its first use, so that a command waits for its own modules only."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
