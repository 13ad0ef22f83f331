"""NNCF's post-training quantisation of an OpenVINO model, for the interpreter that has NNCF: python nncf_job.py JOB INTO.

JOB is JSON: `model` (an .xml), `inputs` (an .npz of named inputs), `output` (an .xml), `options` of nncf.quantize by name; or empty, to ask
for the versions. The answer, JSON as well, has the seconds of reading, quantising and writing, without imports, or `refused`: the error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
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
    names = [port.get_any_name() for port in model.inputs]
    rows = [{name: inputs[name][row : row + 1] for name in names} for row in range(count)]
    if len(names) == 1:
        rows = [row[names[0]] for row in rows]
    quantised = nncf.quantize(model, nncf.Dataset(rows), subset_size=count, **options)
    openvino.save_model(quantised, job["output"], compress_to_fp16=False)
    return {"seconds": time.perf_counter() - started}


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
