"""Work of child processes of muntin's interpreter: each begins without anything compiled or captured, as a command does.

Imports are not counted in the seconds. Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import muntin
from muntin.errors import MuntinError
from muntin.runtime.host.quiet_imports import openvino
from quantizer_peers.networks import NETWORKS, Network

JOBS = ("int8", "float", "convert")
"""int8 and float: muntin's artefacts. convert: OpenVINO's model of the same start, which NNCF reads."""
CALIBRATION, HELD_OUT = "calibration.npz", "held-out.npz"
BATCH = 8
NNCF_JOB = Path(__file__).parent / "nncf_job.py"
WAITING = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
"""How PyTorch's threads wait, as in muntin's commands."""


def network_of(name: str) -> Network:
    return next(network for network in NETWORKS if network.name == name)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do one of `JOBS` for a network, and return its seconds and, of an artefact, what it says of itself.

    `job`: kind, network, packages, folder.
    """
    network, packages, folder = network_of(job["network"]), Path(job["packages"]), Path(job["folder"])
    inputs = dict(np.load(folder / CALIBRATION))
    model = network.module(packages, folder) if network.module is not None else None
    if job["kind"] == "convert":
        started = time.perf_counter()
        convert(folder / "model.onnx" if model is None else model, inputs, folder)
        return {"seconds": time.perf_counter() - started}
    started = time.perf_counter()
    if model is not None:
        batches = list(torch.from_numpy(inputs["images"]).permute(0, 3, 1, 2).float().contiguous().split(BATCH))
        calibration = batches if job["kind"] == "int8" else None
        artifact: Any = muntin.export(model, batches[0], folder / job["kind"], calibration=calibration)
    else:
        rows = _in_batches(inputs)
        given: dict[str, Any] = {"calibration": rows} if job["kind"] == "int8" else {"example": rows[0]}
        artifact = muntin.export_onnx(folder / "model.onnx", folder / job["kind"], **given)
    seconds = time.perf_counter() - started
    measured = artifact.manifest.measured
    return {"seconds": seconds, "coverage": measured.get("integer_coverage", 0.0), "precision": artifact.manifest.precision,
            "notes": list(measured.get("notes", ()))}  # fmt: skip


def _in_batches(inputs: dict[str, NDArray[Any]]) -> list[dict[str, NDArray[Any]]]:
    count = len(next(iter(inputs.values())))
    return [{name: value[start : start + BATCH] for name, value in inputs.items()} for start in range(0, count, BATCH)]


def convert(source: nn.Module | Path, inputs: dict[str, NDArray[Any]], folder: Path) -> Path:
    """Write OpenVINO's model of an ONNX file or a module, for any number of rows, into `folder`/converted. Returns the file.

    A module of pictures gets uint8 pixels (B, H, W, C) as its input.
    """
    if isinstance(source, Path):
        converted = openvino.Core().read_model(source)
    elif "images" in inputs:
        example = torch.from_numpy(inputs["images"][:1]).permute(0, 3, 1, 2).float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what tracing makes constant
            converted = openvino.convert_model(source, example_input=example, input=[openvino.PartialShape([-1, *example.shape[1:]])])
        pixels = openvino.preprocess.PrePostProcessor(converted)
        pixels.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
        pixels.input().model().set_layout(openvino.Layout("NCHW"))
        converted = pixels.build()
        converted.input().get_tensor().set_names({"images"})  # otherwise the name in the module's forward
    else:
        rows = {name: torch.from_numpy(value[:2]) for name, value in inputs.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = openvino.convert_model(source, example_input=rows)
    path = folder / "converted" / "model.xml"
    path.parent.mkdir(exist_ok=True)
    openvino.save_model(converted, path, compress_to_fp16=False)
    return path


def nncf_job(
    python: str, source: Path, inputs: Path, path: Path, options: dict[str, str], *, control: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Quantise OpenVINO's model by NNCF, in NNCF's own interpreter, into `path`. Returns the seconds, or why it was `refused`.

    `control`: of its accuracy, see `nncf_job.py`.
    """
    path.parent.mkdir(exist_ok=True)
    job = {"model": str(source), "inputs": str(inputs), "output": str(path), "options": options, "control": control}
    return ask([python, str(NNCF_JOB), json.dumps(job)])


def ask(command: Sequence[str]) -> dict[str, Any]:
    """Run a child process that writes its answer, JSON, into the file that is its last argument. Its messages go to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.json"
        subprocess.run([*command, str(file)], check=True, stdout=sys.stderr, env=os.environ | WAITING)  # noqa: S603 - our own command
        answer: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return answer


def main(text: str, into: Path) -> None:
    """Do the job that is given as JSON, and write the answer; `refused` is muntin's message."""
    try:
        answer = run(json.loads(text))
    except MuntinError as error:
        answer = {"refused": str(error)}
    into.write_text(json.dumps(answer), encoding="utf-8")
