"""What is measured of the results: agreement with FP32, latency in turns, executed precisions.

Axes: B images or sentences, C channels, H W map, K scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

import muntin
from architecture_sweep.measure import decibels
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.host.signal_stack import signal_stack_kept

Named = Mapping[str, NDArray[Any]]
Call = Callable[[Named], NDArray[np.float32]]
THRESHOLD = 0.3
"""Value of a detector's map above which a pixel is marked, RapidOCR's own."""
MULTIPLY = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul", "Deconvolution")


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

    def __call__(self, inputs: Named) -> NDArray[np.float32]:
        values = [_of(port, inputs) for port in self._ports]
        output: NDArray[np.float32] = self._request.infer(values, share_inputs=True, share_outputs=True)[0]
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


def reference(module: nn.Module | None, file: Path, inputs: Named) -> NDArray[np.float32]:
    """Outputs in FP32: of PyTorch, or of ONNX Runtime for a file."""
    if module is not None:
        with torch.inference_mode():
            if "images" in inputs:
                batches = torch.from_numpy(inputs["images"]).split(16)
                return np.concatenate([module(batch.permute(0, 3, 1, 2).float()).numpy() for batch in batches])
            rows = [{name: torch.from_numpy(value) for name, value in row.items()} for row in each(inputs)]
            return np.concatenate([module(**row).numpy() for row in rows])
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, dict(row))[0] for row in each(inputs)])


def each(inputs: Named) -> list[dict[str, NDArray[Any]]]:
    """The rows of named inputs, one by one."""
    count = len(next(iter(inputs.values())))
    return [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(count)]


def answers_of(call: Call, inputs: Named) -> NDArray[np.float32]:
    return np.concatenate([np.array(call(row)) for row in each(inputs)])


def agreement(judged_by: str, exact: NDArray[np.float32], answers: NDArray[np.float32]) -> dict[str, float]:
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


def bytes_of(path: Path) -> int:
    """Size on disk: an artifact's folder, or an .xml and its .bin."""
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
