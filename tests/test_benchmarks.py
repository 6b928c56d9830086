"""The benchmarks' harness on a tiny network, and what is computed from their results."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import precisions, scaling, tables
from benchmarks.peers import files, rounds
from benchmarks.peers.__main__ import measure_network
from benchmarks.peers.candidates import Candidate, candidates
from benchmarks.peers.names import DEFAULT_NAME, OURS, PLAIN, SWIN
from benchmarks.peers.networks import Network, demonstration, lite_med_sam
from benchmarks.peers.plot import draw
from benchmarks.peers.rounds import Limits, WorkerError, ratio, worker
from benchmarks.peers.store import environment, resumed, save
from benchmarks.peers.table import main_table, others_table, patches, targets_table, volume_table
from benchmarks.peers.targets import best, strongest_peer, targets
from benchmarks.peers.worker import agreement
from medsa_deploy.exporters.checkpoint import load_checkpoint

LIMITS = Limits(rounds=2, need_gb=0.1)
ZERO = "Med-SA ViT-B, zero tables"
BF16 = f"{OURS}, openvino bf16"
PLAIN_BF16 = "plain export, openvino bf16"


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory, checkpoint_of: Any, bundle_of: Any
) -> tuple[Network, Path]:
    """A network of four blocks, prepared; its bundle is not made again."""
    folder = tmp_path_factory.mktemp("peers")
    network = Network(
        name="Tiny",
        checkpoint=lambda path: shutil.copy(checkpoint_of("medsa_2d"), path),
        real_weights=False,
        precisions=(),
    )
    place = folder / network.slug
    shutil.copytree(bundle_of("medsa_2d"), place / "bundle.medsa")
    (place / f"bundle.{files._digest()}").touch()
    files.prepare(network, folder, again=False)
    assert files.failures(place) == {}
    return network, folder


def chosen(tiny: tuple[Network, Path]) -> list[Candidate]:
    """Of the tiny network's candidates, one of each kind that starts quickly."""
    offered = candidates(*tiny, threads=1)
    chosen_names = (PLAIN, DEFAULT_NAME, "plain export, openvino fp32")
    return [candidate for candidate in offered if candidate.name in chosen_names]


def test_candidates_are_what_the_runtime_offers_and_the_peers(tiny: tuple[Network, Path]) -> None:
    names = [candidate.name for candidate in candidates(*tiny, threads=1)]
    assert names[0] == PLAIN
    assert {DEFAULT_NAME, BF16, f"{OURS}, openvino fp32"} <= set(names)
    assert {"PyTorch eager", "torch.compile", PLAIN_BF16} <= set(names)
    assert f"{OURS}, onnxruntime bf16" not in names
    assert len(set(names)) == len(names)


def test_measured_in_turn_stored_and_taken_up_again(
    tiny: tuple[Network, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounds, "GEMM", {"kind": "gemm", "gemm": [256, 256, 256]})
    network, folder = tiny
    path = tmp_path / "peers.json"
    args = argparse.Namespace(only=None, rounds=None, threads=1, result=path)
    broken = Candidate(name="broken", spec={"kind": "onnxruntime", "encoder": "/nothing"}, files=())
    broken.spec.update(threads=1, inputs="")
    absent = Candidate(name="absent", spec={}, files=(), missing="it cannot be installed")
    contenders = [*chosen(tiny), broken, absent]
    result = resumed(path, {"networks": {}, "pairs": {}}, 1)
    place = folder / network.slug
    measure_network(network.name, contenders, place, result, args, LIMITS)
    stored = json.loads(path.read_text())["networks"]["Tiny"]
    measured = stored["candidates"]
    assert measured["absent"] == {"not_measured": "it cannot be installed"}
    assert "nothing" in measured["broken"]["not_measured"]
    assert measured[PLAIN]["ratio"] == {"encoder": 1.0, "decoder": 1.0}
    for name in (PLAIN, DEFAULT_NAME, "plain export, openvino fp32"):
        record = measured[name]
        assert record["agreement"]["mask_dice_worst"] > 0.999
        assert record["agreement"]["embeddings_relative_l2"] < 1e-4
        assert [len(record["samples_ms"][op]) for op in ("encoder", "decoder")] == [2, 2]
        assert record["peak_mb"] > 50
        assert record["file_mb"] > 1
    assert set(measured[DEFAULT_NAME]["median_ms"]) == {"encoder", "decoder", "click"}
    assert stored["gflop"]["encoder"] > stored["gflop"]["decoder"] > 0.1
    assert set(stored["groups"]["1"]["gemm_gflops"]) == {"onnxruntime", "torch"}

    before = path.read_text()
    again = resumed(path, {}, 1)
    measure_network(network.name, chosen(tiny), place, again, args, LIMITS)
    assert path.read_text() == before, "nothing was missing"
    args.only = "Tiny/medsa"
    measure_network(network.name, chosen(tiny), place, again, args, LIMITS)
    renewed = json.loads(path.read_text())["networks"]["Tiny"]["candidates"]
    assert renewed[PLAIN] == measured[PLAIN]
    assert renewed[DEFAULT_NAME]["group"] != measured[DEFAULT_NAME]["group"]
    assert "Tiny: 1 to measure" in capfd.readouterr().err


def test_a_failed_preparation_is_a_reason(tmp_path: Path) -> None:
    def no_checkpoint(path: Path) -> None:
        raise OSError("no such weights")

    network = Network(name="Absent", checkpoint=no_checkpoint, real_weights=False)
    files.prepare(network, tmp_path, again=False)
    assert files.failures(tmp_path / "absent")["checkpoint"] == "OSError: no such weights"
    assert candidates(network, tmp_path, None) == []


def test_a_worker_that_cannot_load_says_why(tmp_path: Path) -> None:
    spec = {"kind": "ours", "bundle": str(tmp_path), "backend": "onnxruntime", "precision": "fp32"}
    with (
        pytest.raises(WorkerError, match="BundleError"),
        worker(spec | {"threads": None, "inputs": ""}, tmp_path / "log"),
    ):
        pass


def test_agreement_is_of_masks_and_embeddings() -> None:
    class Half:
        """Right embeddings, and of each mask the left half."""

        def __init__(self) -> None:
            self.versions: dict[str, str] = {}

        def encode(self, image: np.ndarray) -> np.ndarray:
            return image * np.float32(1.1)

        def decode(self, embedding: np.ndarray, *prompts: np.ndarray) -> np.ndarray:
            logits = np.ones((1, 2, 4, 4), np.float32)
            logits[..., 2:] = -1
            return logits

        click = decode

    mask = np.ones((1, 1, 2, 2), np.float32)
    inputs = {"image_0": mask, "embeddings_0": mask, "slice_0_0": np.array(0)}
    inputs |= {"coords_0_0": mask, "labels_0_0": mask}
    inputs["logits_0_0"] = np.ones((1, 1, 4, 4), np.float32)
    figures = agreement(Half(), inputs)
    assert figures["embeddings_relative_l2"] == pytest.approx(0.1, rel=1e-5)
    assert figures["mask_dice_mean"] == pytest.approx(2 * 8 / (16 + 8))
    assert figures["masks"] == 1


def test_ratios_are_of_the_same_round() -> None:
    assert ratio([[10.0], [20.0], [90.0]], [[10.0], [10.0], [30.0]]) == 2.0


def test_results_of_another_machine_are_not_mixed(tmp_path: Path) -> None:
    save(environment(1) | {"machine": "another"}, tmp_path / "x.json")
    with pytest.raises(SystemExit, match="another machine"):
        resumed(tmp_path / "x.json", {}, 1)


def one_of(encoder: float, *, peak: float = 1000.0, dice: float = 1.0, **more: float) -> Any:
    """A candidate's figures, the plain export's encoder taking 1000 ms."""
    return {
        "median_ms": {"encoder": encoder, "decoder": 20.0, **more},
        "ratio": {"encoder": encoder / 1000},
        "peak_mb": peak,
        "file_mb": 100.0,
        "agreement": {"mask_dice_mean": dice, "embeddings_relative_l2": 1e-6},
        "samples_ms": {"encoder": [[encoder], [encoder + 1]]},
        "group": "1",
    }


@pytest.fixture
def invented() -> dict[str, Any]:
    """A result with figures that are easy to follow."""
    groups = {"1": {"gemm_gflops": {"torch": 400.0, "onnxruntime": 300.0}}}

    def network(gflop: float, **candidates: Any) -> dict[str, Any]:
        return {"gflop": {"encoder": gflop}, "groups": groups, "candidates": candidates}

    int8 = f"{OURS}, openvino int8-cpu"
    vit_b = {
        PLAIN: one_of(1000.0, peak=6000.0),
        PLAIN_BF16: one_of(500.0),
        "torch.compile": {"not_measured": "no | compiler"},
        DEFAULT_NAME: one_of(750.0, peak=1500.0, click=9.0),
        BF16: one_of(300.0, dice=0.7),
        int8: one_of(200.0),
    }
    demonstration = {
        DEFAULT_NAME: one_of(80.0, click=3.0),
        BF16: one_of(40.0, dice=0.995),
        int8: one_of(30.0, dice=0.98),
    }
    return environment(2) | {
        "networks": {
            ZERO: network(270.0, **vit_b),
            "Demonstration, 2D": network(1.0, **demonstration),
            "Demonstration, 3D": network(1.0, **demonstration),
            "LiteMedSAM": network(1.0, **{DEFAULT_NAME: one_of(100.0, click=16.0)}),
            SWIN: network(600.0, **{PLAIN: one_of(2000.0)}),
        },
        "pairs": {f"{ZERO} / SAM ViT-B, zero tables": {"ratio": 1.05}},
    }


def test_targets_are_ratios_of_one_run(invented: dict[str, Any]) -> None:
    depth = {"rows": [{"graph": "exported, zero tables", "image_size": 1024, "ratio": 1.2}]}
    by_name = {target.name: target for target in targets(invented, depth)}
    assert best(invented, ZERO) == BF16, "INT8 is faster, and not right on real weights"
    assert strongest_peer(invented, ZERO) == PLAIN_BF16
    expected = {
        f"{ZERO}: float32, over the plain export in ONNX Runtime": (0.75, True),
        f"{ZERO}: its peak memory, over the same": (0.25, True),
        f"{ZERO}: best precision, over the strongest peer": (0.6, True),
        f"{ZERO}: float32 throughput, over one large product's": (0.9, True),
        f"{ZERO}: adapters, over SAM without": (1.05, True),
        f"{ZERO}: a slice in 3D, over 2D": (1.2, False),
        "LiteMedSAM: the next click": (16.0, False),
    }
    for name, (measured, met) in expected.items():
        assert by_name[name].measured == pytest.approx(measured)
        assert by_name[name].met is met
    unmeasured = [target for name, target in by_name.items() if name not in expected]
    assert len(unmeasured) == 7
    assert all(target.measured is None and target.met is None for target in unmeasured)


def test_without_evidence_on_real_weights_only_nothing_is_best(invented: dict[str, Any]) -> None:
    del invented["networks"]["Demonstration, 2D"]
    assert best(invented, ZERO) is None


def test_tables_say_what_was_not_measured(invented: dict[str, Any]) -> None:
    text = main_table(invented)
    assert "| torch.compile | not measured: no / compiler | –" in text
    assert f"| {ZERO} | {DEFAULT_NAME} | 750 ms | 0.75 | 20.0 ms | 9.0 ms | 1500 MB" in text
    assert "| 90% |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 6
    assert {row.count("|") for row in rows} == {12}
    assert SWIN in others_table(invented)
    assert ZERO not in others_table(invented)
    reached = targets_table(invented, None)
    assert "| LiteMedSAM: the next click | ≤ 15 ms | 16.00 ms | **no** | onnxruntime fp32" in (
        reached
    )
    assert "| demonstration checkpoint: a slice in 3D, over 2D | ≤ 1.10 | not measured | – |" in (
        reached
    )


def test_a_volume_is_so_many_patches_or_chunks(invented: dict[str, Any]) -> None:
    assert patches((96, 96, 96), 0.25) == 1
    assert patches((197, 233, 189), 0.25) == 3**3
    assert patches((197, 233, 189), 0.5) == 4 * 4 * 3
    text = volume_table(invented)
    assert "27 patches, overlap 0.25 | 2000 ms | 54.0 s |" in text
    assert f"{DEFAULT_NAME} | 24 chunks of 8, 189 prompts" in text
    assert f"| {(24 * 80 + 189 * 20) / 1e3:.1f} s |" in text


def curve(*points: tuple[int, float]) -> list[dict[str, Any]]:
    """A line through (x, milliseconds)."""
    return [
        {"x": x, "median_ms": ms, "peak_mb": 100.0 * ms, "samples_ms": [ms, ms], "whole_ms": 2 * ms}
        for x, ms in points
    ]


def test_sentences_and_plots_are_the_curves(invented: dict[str, Any], tmp_path: Path) -> None:
    lines = {
        "image size": {"encoder": curve((256, 10.0), (512, 35.0), (1024, 200.0))},
        "depth chunk": {"a slice": curve((1, 10.0), (8, 12.0), (32, 11.0))},
        "prompts": {"one call": curve((1, 10.0), (8, 30.0), (64, 160.0))},
        "threads": {
            "LiteMedSAM": curve((1, 30.0), (2, 15.0)),
            "other": curve((1, 30.0), (2, 20.0)),
        },
    }
    result = environment(None) | {
        "curves": {name: {"what": "invented", "lines": of_name} for name, of_name in lines.items()}
    }
    words = scaling.sentences(result)
    assert "16 times the pixels, an encoding takes 20.0 times as long" in words[0]
    assert "32 takes 1.10 times as long as one alone" in words[1]
    assert "more than 1.20 times" in words[1]
    assert "64 boxes in one call take 160 ms, 0.12 of as many runs of a whole decoder" in words[2]
    assert "One by one they take 4.00 times as long" in words[2]
    assert "LiteMedSAM 2.00 times as fast as on one and other 1.50 times" in words[3]
    assert tables.scaling_text(result).count("\n- ") == 3
    scaling.draw(result, tmp_path / "scaling.png")
    draw(invented, tmp_path / "peers.png")
    for name in ("scaling.png", "peers.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_curves_are_of_the_sizes_that_were_asked_for() -> None:
    points = list(scaling.points())
    of = {name: [p.x for p in points if p.curve == name] for name in scaling.DESCRIPTIONS}
    assert (of["image size"][0], of["image size"][-1]) == (256, 1024)
    assert (of["depth chunk"][0], of["depth chunk"][-1]) == (1, 32)
    assert (of["prompts"][0], of["prompts"][-1]) == (1, 64)
    assert of["threads"][0] == 1


def test_every_document_holds_its_tables() -> None:
    for path, contents in tables.DOCUMENTS.items():
        assert tables.with_tables(path.read_text(), contents) == path.read_text()


@pytest.mark.parametrize("write", [demonstration, lite_med_sam])
def test_the_benchmarks_find_the_shipped_weights(write: Any, tmp_path: Path) -> None:
    write(tmp_path / "checkpoint.pth")
    assert load_checkpoint(tmp_path / "checkpoint.pth").tensors


def test_the_precisions_are_of_shipped_weights() -> None:
    assert all(model.checkpoint.is_file() for model in precisions.MODELS.values())
