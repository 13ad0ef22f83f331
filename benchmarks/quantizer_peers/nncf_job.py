"""NNCF's post-training quantisation of an OpenVINO model, for the interpreter that has NNCF: python nncf_job.py JOB INTO.

JOB is JSON: `model` (an .xml), `inputs` (an .npz of named inputs), `output` (an .xml), `options` of nncf.quantize by name, and `control`,
None or `inputs` (an .npz with their `target`: classes, or vectors) and `max_drop`: layers go back to floats until the share of these
classes, or the mean cosine, falls by no more. INTO gets JSON: the seconds of reading, quantising and writing without imports, or `refused`,
the error; for an empty JOB the versions.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

os.environ["NNCF_DISABLE_TELEMETRY"] = "1"

import nncf
import numpy as np
import openvino


def quantise(job: dict) -> dict:  # type: ignore[type-arg]
    inputs = dict(np.load(job["inputs"]))
    count = len(next(iter(inputs.values())))
    options = {
        name: {"preset": nncf.QuantizationPreset, "model_type": nncf.ModelType}[name](value) for name, value in job["options"].items()
    }
    started = time.perf_counter()
    model = openvino.Core().read_model(job["model"])
    rows = rows_of(model, inputs)
    if job.get("control"):
        judge = dict(np.load(job["control"]["inputs"]))
        quantised = nncf.quantize_with_accuracy_control(
            model, nncf.Dataset(rows), nncf.Dataset(list(zip(rows_of(model, judge), judge["target"], strict=True)), lambda pair: pair[0]),
            validation_fn=score, max_drop=job["control"]["max_drop"], subset_size=count, **options,
        )  # fmt: skip
    else:
        quantised = nncf.quantize(model, nncf.Dataset(rows), subset_size=count, **options)
    openvino.save_model(quantised, job["output"], compress_to_fp16=False)
    return {"seconds": time.perf_counter() - started}


def rows_of(model: openvino.Model, inputs: dict) -> list:  # type: ignore[type-arg]
    """Single rows as the model takes them."""
    names = [port.get_any_name() for port in model.inputs]
    rows = [{name: inputs[name][row : row + 1] for name in names} for row in range(len(inputs[names[0]]))]
    return [row[names[0]] for row in rows] if len(names) == 1 else rows


def score(model: openvino.CompiledModel, pairs: Iterable) -> tuple:  # type: ignore[type-arg]
    """The mean score, and that of each row: 1 for the right class, or the cosine with the vector."""
    scores = []
    for row, target in pairs:
        output = model(row)[0][0]
        equal = output @ target / np.linalg.norm(output) / np.linalg.norm(target) if np.ndim(target) else output.argmax() == target
        scores.append(float(equal))
    return sum(scores) / len(scores), scores


def main() -> None:
    logging.getLogger("nncf").setLevel(logging.ERROR)
    job = json.loads(sys.argv[1])
    try:
        answer = quantise(job) if job else {"nncf": nncf.__version__, "openvino": openvino.__version__}
    except Exception as error:  # noqa: BLE001 - a row of its own says so
        answer = {"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
