"""Forms of a network, made in child processes, and what is measured of them: agreement with FP32, executed precisions, bytes.

A child process begins without anything compiled or captured, as a command does. Imports are not counted in the seconds.
Axes: B images or sentences, C channels, H W map, K scores.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

import muntin
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.host.signal_stack import signal_stack_kept
from quantizer_peers.data import Named, batches, draw, parts
from quantizer_peers.networks import NETWORKS

Scores = NDArray[np.float32]
Call = Callable[[Named], Scores]
CALIBRATION = "calibration.npz"
BATCH = 8
NNCF_JOB = Path(__file__).parent / "nncf_job.py"
WAITING = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
"""How PyTorch's threads wait, as in muntin's commands."""
THRESHOLD = 0.3
"""Value of a detector's map above which a pixel is marked, RapidOCR's own."""
MULTIPLY = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul", "Deconvolution")


# Made


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
            images = batches(inputs, BATCH)
            artifact: Any = muntin.export(source, images[0], path, calibration=images if form == "muntin int8" else None)
        else:
            rows = parts(inputs, BATCH)
            artifact = muntin.export_onnx(source, path, **({"calibration": rows} if form == "muntin int8" else {"example": rows[0]}))
    seconds, measured = time.perf_counter() - started, artifact.manifest.measured
    return {"seconds": seconds, "recorded": artifact.manifest.precision, "coverage": measured.get("integer_coverage", 0.0),
            "notes": list(measured.get("notes", ()))}  # fmt: skip


def convert(source: nn.Module | Path, inputs: Named, folder: Path) -> Path:
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


# Measured


class PlainModel:
    """An OpenVINO model with the options of muntin's sessions, compiled for the sizes of the inputs. One output.

    `precision`: of float layers; None: the engine's choice. `options`: more.
    """

    def __init__(self, path: Path, inputs: Named, *, precision: str | None, threads: int, options: Mapping[str, Any] | None = None) -> None:
        with signal_stack_kept():
            core = openvino.Core()
            model = core.read_model(path)
            model.reshape({port.get_any_name(): list(_of(port, inputs).shape) for port in model.inputs})
            usual: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
            hint = {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
            self.compiled = core.compile_model(model, "CPU", {**usual, **hint, **(options or {})})
        self._ports = self.compiled.inputs
        self._request = self.compiled.create_infer_request()

    def __call__(self, inputs: Named) -> Scores:
        values = [_of(port, inputs) for port in self._ports]
        output: Scores = self._request.infer(values, share_inputs=True, share_outputs=True)[0]
        return output

    def kernels(self) -> dict[str, int]:
        """Number of operations that multiply, by the precision that they run in."""
        facts = [operation.get_rt_info() for operation in self.compiled.get_runtime_model().get_ordered_ops()]
        ran = [fact["runtimePrecision"].astype(str) for fact in facts if "layerType" in fact and fact["layerType"].astype(str) in MULTIPLY]
        return {precision: ran.count(precision) for precision in dict.fromkeys(ran)}


def _of(port: Any, inputs: Named) -> NDArray[Any]:
    """The input of a port: by its name, or the only one, which conversion may have named otherwise."""
    return inputs[port.get_any_name()] if len(inputs) > 1 else next(iter(inputs.values()))


def open_artifact(path: Path, inputs: Named, *, precision: str, threads: int) -> tuple[Any, Call]:
    """Open an artifact of muntin for the sizes of the inputs: the session, and a call that returns its only output."""
    options: dict[str, Any] = {"precision": precision, "threads": threads, "cache": False}
    if muntin.load(path, **options, shapes=(), dims=()).signature.task != "tensors":
        images = inputs["images"]
        session: Any = muntin.load(path, **options, shapes=[images.shape[:3]])
        return session, lambda named: session(named["images"])
    session = muntin.load(path, **options, dims=())
    (output,) = (spec.name for spec in session.signature.outputs)
    session(dict(inputs))
    return session, lambda named: session(named)[output]


def reference(module: nn.Module | None, file: Path, inputs: Named) -> Scores:
    """Outputs in FP32: of PyTorch, or of ONNX Runtime for a file."""
    if module is None:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(None, dict(row))[0] for row in parts(inputs)])
    with torch.inference_mode():
        outputs = [module(batch) for batch in batches(inputs)] if "images" in inputs else [module(**row) for row in batches(inputs, 1)]
    return np.concatenate([output.numpy() for output in outputs])


def answers_of(call: Call, inputs: Named) -> Scores:
    return np.concatenate([np.array(call(row)) for row in parts(inputs)])


def agreement(judged_by: str, exact: Scores, answers: Scores) -> dict[str, float]:
    """Return `db`, signal over noise of the outputs, and what tells more, by the kind of output.

    classes (B, K, ...): `same`, share of equal ones. text (B, positions, K): `same`, share of equal ones where one of both writes a
    character. vectors (B, C): `cosine` and `worst_cosine`. mask (B, C, H, W): `iou` of the first channel's pixels above the threshold,
    and `same`, share of equal ones.
    """
    figures = {"db": decibels(exact, answers)}
    if judged_by == "vectors":
        cosine = (exact * answers).sum(1) / (np.linalg.norm(exact, axis=1) * np.linalg.norm(answers, axis=1))
        return figures | {"cosine": float(cosine.mean()), "worst_cosine": float(cosine.min())}
    if judged_by == "mask":
        marked, other = exact[:, 0] > THRESHOLD, answers[:, 0] > THRESHOLD
        union = float((marked | other).sum())
        return figures | {"iou": float((marked & other).sum()) / union if union else 1.0, "same": float((marked == other).mean())}
    axis = -1 if judged_by == "text" else 1
    classes, others = exact.argmax(axis), answers.argmax(axis)
    written = (classes != 0) | (others != 0) if judged_by == "text" else slice(None)  # class 0 of a recogniser writes nothing
    return figures | {"same": float((classes == others)[written].mean())}


def decibels(exact: NDArray[Any], approximation: NDArray[Any]) -> float:
    """Signal over noise, dB; -99 if the approximation is not finite."""
    exact, approximation = exact.astype(np.float64), approximation.astype(np.float64)
    if not np.isfinite(approximation).all():
        return -99.0
    noise, signal = float(np.square(exact - approximation).sum()), float(np.square(exact).sum())
    return round(min(99.0, 10 * float(np.log10(max(signal, 1e-300) / max(noise, 1e-300)))), 1)
