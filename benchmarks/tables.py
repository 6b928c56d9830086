"""`benchmarks/results/*.json` → the tables in the documents: python -m benchmarks.tables

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`. A test fails if a document's table
differs from its result. A table without a result reads "Not measured yet.".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import scaling
from benchmarks.peers import table
from benchmarks.peers.names import DEFAULT_NAME, OURS, PLAIN

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SUMMARY = (
    *("PyTorch eager", PLAIN, DEFAULT_NAME),
    *(f"{OURS}, openvino {precision}" for precision in ("fp32", "int8-bf16")),
)
"""The candidates of the README's table, on the network without relative positions."""


def _machine(result: dict[str, Any]) -> str:
    """The machine and the versions that a result was measured with."""
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v)
    return f"{result['machine']}; {versions}"


def _capitalized(sentence: str) -> str:
    """A sentence with a capital first letter; the other letters stay."""
    return f"{sentence[0].upper()}{sentence[1:]}"


def summary_table(result: dict[str, Any]) -> str:
    """Five candidates of one network: encoder, next prompt, peak memory."""
    candidates = result["networks"][table.MAIN[0]]["candidates"]
    rows = [
        "| candidate | encoder, once an image | next prompt | peak memory |",
        "|---|---|---|---|",
    ]
    for name in SUMMARY:
        times, peak_mb = candidates[name]["median_ms"], candidates[name]["peak_mb"]
        click = times.get("click", times["decoder"])
        rows.append(f"| {name} | {times['encoder']:.0f} ms | {click:.0f} ms | {peak_mb:.0f} MB |")
    return "\n".join([*rows, "", f"Measured on: {_machine(result)}."])


def export_table(result: dict[str, Any]) -> str:
    """Time and peak memory of export."""
    rows = ["| relative-position tables | time | peak memory |", "|---|---|---|"]
    for name, median in result["median"].items():
        runs = len(result["samples"][name])
        rows.append(
            f"| {name.removesuffix(' tables')} | {median['seconds']:.0f} s "
            f"| {median['peak_mb'] / 1024:.1f} GiB (medians of {runs}) |"
        )
    return "\n".join([*rows, "", f"Measured on: {_machine(result)}."])


def demo_checkpoint_table(result: dict[str, Any]) -> str:
    """Dice of the demonstration checkpoint by network, prompt and class; and how it was trained."""
    dice = result["dice"]["test"]
    classes = list(next(iter(dice["base"].values())))
    rows = [f"| network | prompt | {' | '.join(classes)} |", "|---|---|" + "---|" * len(classes)]
    for variant, kinds in dice.items():
        for kind, row in kinds.items():
            figures = " | ".join(f"{row[name]:.3f}" for name in classes)
            rows.append(f"| {variant} | {kind} | {figures} |")
    training = [
        f"{name}: {figures['steps']} steps in {figures['seconds'] / 60:.0f} minutes, "
        f"{figures['cpu_seconds'] / 60:.0f} of one processor"
        for name, figures in result["training"].items()
    ]
    return "\n".join(
        [
            *rows,
            "",
            f"Pixels the adapted network gives to classes that are not in the chunk: "
            f"{result['wrong']['test']:.2%}.",
            f"Training, on a machine that others used at the same time: {'; '.join(training)}.",
            f"Machine: {_machine(result)}.",
        ]
    )


def demo_automatic_table(result: dict[str, Any]) -> str:
    """Dice of the demonstration's SAMed by block of slices and tissue; and how it was trained."""
    blocks = result["dice"]["test"]
    tissues = list(blocks["all"])
    rows = [f"| slices | {' | '.join(tissues)} |", "|---|" + "---|" * len(tissues)]
    for block, row in blocks.items():
        figures = " | ".join(f"{row[name]:.3f}" for name in tissues)
        rows.append(f"| {block} | {figures} |")
    training = [
        f"{name}: {figures['steps']} steps in {figures['cpu_seconds'] / 60:.0f} processor minutes"
        for name, figures in result["training"].items()
    ]
    return "\n".join(
        [*rows, "", f"Training: {'; '.join(training)}.", f"Machine: {_machine(result)}."]
    )


def volume_memory_table(result: dict[str, Any]) -> str:
    """Memory of `run` on a volume, beyond what the network takes for a chunk of slices."""
    rows = [
        "| volume | image size | prompts | loaded | with a chunk | peak | beyond the network |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in result["samples"]:
        prompts = "followed from one slice" if run["propagate"] else "boxes in every slice"
        measured = [run[f"{when}_mb"] for when in ("loaded", "working", "peak", "beyond_working")]
        rows.append(
            f"| {run['volume']} → {run['output']} | {run['image_size']} | {prompts} | "
            + " | ".join(f"{megabytes} MB" for megabytes in measured)
            + " |"
        )
    return "\n".join(
        [
            *rows,
            "",
            f"{_capitalized(result['what'])}.",
            f"Measured on: {_machine(result)}.",
        ]
    )


def precisions_table(result: dict[str, Any]) -> str:
    """Size, accuracy and time of each precision."""
    rows = [
        "| model | precision | INT8 layers | encoder | decoder | Dice to labels "
        "| Dice to float32, mean (worst) | encode | decode |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, precisions in result["models"].items():
        for precision, figures in precisions.items():
            recipe = figures["recipe"] or {"quantized": (), "left_out": ()}
            layers = len(recipe["quantized"]) + len(recipe["left_out"])
            count = f"{len(recipe['quantized'])} of {layers}" if layers else "none"
            mean, worst = figures["dice_to_float32_mean"], figures["dice_to_float32_worst"]
            rows.append(
                f"| {model} | {precision} | {count} | {figures['encoder_mb']:.1f} MB "
                f"| {figures['decoder_mb']:.1f} MB | {figures['dice_to_labels_mean']:.3f} "
                f"| {mean:.4f} ({worst:.4f}) | {figures['encode_ms']['median']:.0f} ms "
                f"| {figures['decode_ms']['median']:.0f} ms |"
            )
    note = f"{result['what']}, medians."
    return "\n".join([*rows, "", note, f"Measured on: {_machine(result)}."])


def depth_table(result: dict[str, Any]) -> str:
    """Encoder time of a slice in 3D beside the same checkpoint's in 2D."""
    rows = [
        "| graph | image size | a slice in 2D | in 3D | ratio | peak memory in 2D | in 3D |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        seconds, peak = row["seconds"], row["peak_mb"]
        rows.append(
            f"| {row['graph']} | {row['image_size']} | {seconds['2D']:.2f} s "
            f"| {seconds['3D']:.2f} s | {row['ratio']:.2f} | {peak['2D'] / 1024:.1f} GiB "
            f"| {peak['3D'] / 1024:.1f} GiB |"
        )
    note = f"{_capitalized(result['what'])}."
    return "\n".join([*rows, "", note, f"Measured on: {_machine(result)}."])


def dicom_node_table(result: dict[str, Any]) -> str:
    """Throughput, delay and memory of the DICOM node."""
    rows = [
        "| series | slices | series a minute | last image → segmentation, median | longest "
        "| memory of node and worker, early | at the end |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        memory = [
            " + ".join(f"{case['memory_mb'][when][part]:.0f}" for part in ("node", "worker"))
            for when in ("early", "end")
        ]
        rows.append(
            f"| {case['series']}, {case['name']} | {case['slices']} × {case['side']}² "
            f"| {case['series_per_minute']} | {case['median_delay_s']} s "
            f"| {case['longest_delay_s']} s | {' MB | '.join(memory)} MB |"
        )
    note = f"{_capitalized(result['what'])}. Load of the machine: {result['load']}."
    return "\n".join([*rows, "", note, f"Measured on: {_machine(result)}."])


def page_latency_table(result: dict[str, Any]) -> str:
    """Percentiles of clicks in a browser."""
    figures = result["latency_ms"]
    head = " | ".join(figures)
    row = " | ".join(f"{ms:.0f} ms" for ms in figures.values())
    count, bundle, load = len(result["clicks"]), result["bundle"], result["load"]
    note = f"{count} {result['what']}, with {bundle}. Load of the machine: {load}."
    lines = [f"| {head} |", "|---" * len(figures) + "|", f"| {row} |", "", note]
    return "\n".join([*lines, f"Measured on: {_machine(result)}."])


def serve_load_table(result: dict[str, Any]) -> str:
    """Clicks, latency and memory of the server by its number of users."""
    rows = [
        "| users | clicks a second | p50 | p95 | p99 | server's processor time a click "
        "| masks compared | memory at the start | after a quarter | at the end | load |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, load in zip(result["cases"], result["load_after_each_case"], strict=True):
        latency, memory = case["latency_ms"], case["memory_mb"]
        times = " | ".join(f"{latency[p]:.0f} ms" for p in ("p50", "p95", "p99"))
        sizes = " | ".join(f"{memory[when]:.0f} MB" for when in ("start", "quarter", "end"))
        rows.append(
            f"| {case['users']} | {case['clicks_per_second']} | {times} "
            f"| {case['server_cpu_ms_a_click']:.0f} ms | {case['masks_compared']}, all equal "
            f"| {sizes} | {load} |"
        )
    seconds = result["cases"][0]["seconds"]
    note = f"{_capitalized(result['what'])}. {seconds:.0f} s each."
    return "\n".join([*rows, "", note, f"Measured on: {_machine(result)}."])


def capacity_table(result: dict[str, Any]) -> str:
    """Rates of sessions in process, `serve` and Triton; memory; loads beside the model."""
    rows = ["| 2 users that never wait | clicks a second | encodes a minute |", "|---|---|---|"]
    rows += [
        f"| {case['kind']} | {case['clicks_per_s']:.1f} | {case['encodes_per_minute']:.0f} |"
        for case in result["saturated"]
    ]
    memory = result["memory"]
    rows += [
        "",
        f"An instance takes {memory['instance_mb']:.0f} MB, and an open image "
        f"{memory['image_mb']:.1f} MB (resident: {memory['image_resident_mb']:.1f} MB).",
        "",
        "| instances | clicks + images a minute | clicks | p95 measured "
        "| p95 by calibrations around it "
        "| measured / calibrated | p95 of the model with the load's own service times | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in result["loads"]:
        cells = []
        for kind in ("calibration", "same_run"):
            predicted = case[kind]["predicted_p95_ms"]
            cells.append("never ends" if predicted is None else f"{predicted:.0f} ms")
            cells.append(f"{case[kind]['measured_over_predicted']:.2f}")
        clicks, images = (
            case["scanners"] * case[f"{kind}_per_minute"] for kind in ("clicks", "images")
        )
        rows.append(
            f"| {case['instances']} | {clicks:.0f} + {images:.0f} | {case['clicks']} "
            f"| {case['measured_p95_ms']:.0f} ms | {' | '.join(cells)} |"
        )
    load = " to ".join(map(str, result["load"]))
    note = f"{_capitalized(result['what'])}. Load of the machine: {load}."
    return "\n".join([*rows, "", note, f"Measured on: {_machine(result)}."])


def tracking_table(result: dict[str, Any]) -> str:
    """Frames a second that a tracker follows."""
    rows = [
        "| network | processor time a frame | frames a second | encoder | decoder | lost | Dice |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in result["networks"].items():
        times = figures["median_ms"]
        overlap = sum(figures["dice"]) / len(figures["dice"])
        rows.append(
            f"| {name}, {figures['image_size']}² | {figures['median_processor_ms']:.0f} ms "
            f"| {figures['frames_per_second']:.2f} "
            f"| {times['encode']:.0f} ms | {times['decode']:.0f} ms "
            f"| {figures['lost']} | {overlap:.3f} |"
        )
    note = f"Medians over {result['what']}. Load of the machine: {result['load']}."
    return "\n".join([*rows, "", note, f"Measured on: {_machine(result)}."])


def cpp_table(result: dict[str, Any]) -> str:
    """The C++ runtime beside Python: latencies, and whole processes."""
    figures, cold = result["median"]["latency_ms"], result["median"]["cold_start_ms"]
    rows = ["| warm | encode | next click |", "|---|---|---|"]
    for name, ms in figures.items():
        rows.append(f"| {name} | {ms['encode']:.1f} ms | {ms['click']:.1f} ms |")
    rows += ["", "| process, start to first mask | wall | of a processor |", "|---|---|---|"]
    for name, ms in cold.items():
        rows.append(f"| {name} | {ms['wall']:.0f} ms | {ms['cpu']:.0f} ms |")
    note = f"Medians: {result['what']}. Load of the machine: {result['load']}."
    return "\n".join([*rows, "", note, f"Measured on: {_machine(result)}."])


def targets_table(result: dict[str, Any]) -> str:
    """Targets of speed, from peers.json and depth.json."""
    depth = RESULTS / "depth.json"
    return table.targets_table(result, json.loads(depth.read_text()) if depth.exists() else None)


def scaling_text(result: dict[str, Any]) -> str:
    """A sentence for each curve, and a note of what was measured."""
    sentences = [f"- {sentence}" for sentence in scaling.sentences(result)]
    curves = "; ".join(f"{name}: {curve['what']}" for name, curve in result["curves"].items())
    note = f"Medians, onnxruntime fp32. {_capitalized(curves)}."
    return "\n".join([*sentences, "", note, f"Measured on: {_machine(result)}."])


Tables = dict[str, Callable[[dict[str, Any]], str]]
README_TABLES: Tables = {"summary": summary_table}
PERFORMANCE_TABLES: Tables = {
    "peers": table.main_table,
    "targets": targets_table,
    "precisions": precisions_table,
    "volume_memory": volume_memory_table,
    "tracking": tracking_table,
    "cpp": cpp_table,
    "depth": depth_table,
    "scaling": scaling_text,
    "export": export_table,
}
BENCHMARK_TABLES: Tables = {"peers_others": table.others_table, "peers_volume": table.volume_table}
CARD_TABLES: Tables = {
    "demo_checkpoint": demo_checkpoint_table,
    "demo_automatic": demo_automatic_table,
}
RESULT_OF = dict.fromkeys(("summary", "targets", "peers_others", "peers_volume"), "peers")
"""Table → its result, if the two names differ."""
DICOM_TABLES: Tables = {"dicom_node": dicom_node_table}
CAPACITY_TABLES: Tables = {"capacity": capacity_table}
SERVE_TABLES: Tables = {"page_latency": page_latency_table, "serve_load": serve_load_table}
CARD = ROOT / "medsa_deploy" / "assets" / "MODEL_CARD.md"
DOCUMENTS = {
    ROOT / "README.md": README_TABLES,
    ROOT / "docs" / "performance.md": PERFORMANCE_TABLES,
    ROOT / "benchmarks" / "README.md": BENCHMARK_TABLES,
    CARD: CARD_TABLES,
    ROOT / "docs" / "dicom.md": DICOM_TABLES,
    ROOT / "docs" / "serve.md": SERVE_TABLES,
    ROOT / "docs" / "scaling.md": CAPACITY_TABLES,
}


def with_tables(document: str, tables: Tables) -> str:
    """The document's text with every table generated again from its result."""
    for name, text_of in tables.items():
        result = RESULTS / f"{RESULT_OF.get(name, name)}.json"
        text = text_of(json.loads(result.read_text())) if result.exists() else "Not measured yet."
        block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
        document, count = re.subn(
            f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, document, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"there are {count} places for the table {name!r}, expected 1")
    return document


if __name__ == "__main__":
    for path, tables in DOCUMENTS.items():
        path.write_text(with_tables(path.read_text(), tables))
