"""Work of child processes: exports by muntin, OpenVINO's conversion, and NNCF's jobs in an interpreter of their own.

Each begins without anything compiled or captured, as a command does. Imports are not counted in the seconds.
Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import contextlib
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

import torch
from numpy.typing import NDArray
from torch import nn

import muntin
from muntin.runtime.host.quiet_imports import openvino
from quantizer_peers.data import draw
from quantizer_peers.networks import NETWORKS

CALIBRATION = "calibration.npz"
BATCH = 8
NNCF_JOB = Path(__file__).parent / "nncf_job.py"
WAITING = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
"""How PyTorch's threads wait, as in muntin's commands."""


def run(form: str, name: str, packages: Path, folder: Path, path: Path, count: int, seed: int) -> dict[str, Any]:
    """Make a form of a network: `muntin int8` or `muntin float`, or `openvino`, its conversion, which NNCF reads.

    `folder`: has the weights or the ONNX file. `path`: of the artifact. `count`, `seed`: calibration inputs. Returns the seconds, without
    imports, and what the artifact says of itself.
    """
    network = next(network for network in NETWORKS if network.name == name)
    inputs = draw(packages, name, count, seed=seed)
    source = network.source(packages, folder)
    with contextlib.redirect_stdout(sys.stderr):
        started = time.perf_counter()
        if form == "openvino":
            convert(source, inputs, folder)
            return {"seconds": time.perf_counter() - started}
        if isinstance(source, nn.Module):
            batches = list(torch.from_numpy(inputs["images"]).permute(0, 3, 1, 2).float().contiguous().split(BATCH))
            artifact: Any = muntin.export(source, batches[0], path, calibration=batches if form == "muntin int8" else None)
        else:
            rows = [{key: value[start : start + BATCH] for key, value in inputs.items()} for start in range(0, count, BATCH)]
            given: dict[str, Any] = {"calibration": rows} if form == "muntin int8" else {"example": rows[0]}
            artifact = muntin.export_onnx(source, path, **given)
    seconds, measured = time.perf_counter() - started, artifact.manifest.measured
    return {"seconds": seconds, "recorded": artifact.manifest.precision, "coverage": measured.get("integer_coverage", 0.0),
            "notes": list(measured.get("notes", ()))}  # fmt: skip


def convert(source: nn.Module | Path, inputs: dict[str, NDArray[Any]], folder: Path) -> Path:
    """Write OpenVINO's model of an ONNX file or a module, for any number of rows, into `folder`/converted. Returns the file.

    A module of images gets uint8 pixels (B, H, W, C) as its input.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing makes constant
        if isinstance(source, Path):
            converted = openvino.Core().read_model(source)
        elif "images" in inputs:
            example = torch.from_numpy(inputs["images"][:1]).permute(0, 3, 1, 2).float()
            converted = openvino.convert_model(source, example_input=example, input=[openvino.PartialShape([-1, *example.shape[1:]])])
            pixels = openvino.preprocess.PrePostProcessor(converted)
            pixels.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
            pixels.input().model().set_layout(openvino.Layout("NCHW"))
            converted = pixels.build()
            converted.input().get_tensor().set_names({"images"})  # otherwise the name in the module's forward
        else:
            rows = {name: torch.from_numpy(value[:2]) for name, value in inputs.items()}
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
    path.parent.mkdir(parents=True, exist_ok=True)
    job = {"model": str(source), "inputs": str(inputs), "output": str(path), "options": options, "control": control}
    return ask([python, str(NNCF_JOB), json.dumps(job)])


def ask(command: Sequence[str]) -> dict[str, Any]:
    """Run a child process that writes its answer, JSON, into the file that is its last argument. Its messages go to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.json"
        subprocess.run([*command, str(file)], check=True, stdout=sys.stderr, env=os.environ | WAITING)  # noqa: S603 - our own command
        answer: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return answer
