"""One model, exported, verified and compared with PyTorch. Runs in a process of its own.

Axes: B images, C channels, H W map, K scores.
"""

from __future__ import annotations

import importlib
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import muntin
from architecture_sweep import hugging_face
from documents import Row
from muntin.artifact import Artifact
from muntin.errors import DependencyError, MuntinError
from muntin.runtime.engines.onnx_nodes import is_node_of
from muntin.runtime.host.hardware import physical_cores
from quantizer_peers.artifacts import CALIBRATION as FILE
from quantizer_peers.artifacts import PlainModel, Scores, answers_of, convert, decibels, nncf_job, reference
from quantizer_peers.data import Pixels, batches, real_pictures
from segmentation_peers.deployment import bytes_of

SEED = 0
CALIBRATION, HELD_OUT = 24, 32
BATCH = 8
AGREES_DB = 10.0
"""Signal over noise of an artifact that agrees."""
PHASES = {f"muntin.deployment.export.{name}": "check" for name in ("write_checked_images", "graph_pairs", "check_independence")}
PHASES |= {f"muntin.graph.artifacts.export.{name}": "check" for name in ("write_checked", "golden_pairs")}
PHASES |= {f"muntin.{module}.export.calibrate": "quantise" for module in ("deployment", "graph.artifacts")}
PHASES |= {"muntin.deployment.export.to_onnx": "capture"}
"""Functions of an export that are timed. The remaining time is the search for sizes, and PyTorch's own calls."""


def measure(source: str, size: int | None, folder: Path, nncf_python: str | None = None) -> Row:
    """Return the row of a model: `outcome` is exported, or refused, failed or missing with the reason as `cannot`.

    `nncf_python`: interpreter with NNCF, which quantises the image models that do not agree, as a second opinion.
    """
    started, seconds = time.perf_counter(), dict[str, float]()
    try:
        with _timed(seconds):
            row = (
                _of_tensors(source, folder, seconds)
                if source.startswith("onnx:")
                else _of_images(source, size, folder, seconds, nncf_python)
            )
    except DependencyError as error:
        row = {"outcome": "missing", "cannot": str(error)}
    except MuntinError as error:
        row = {"outcome": "refused", "cannot": f"{type(error).__name__}: {error}"}
    except (MemoryError, Exception) as error:  # noqa: BLE001 - a traceback is what this benchmark looks for
        places = [f"{each.filename}:{each.lineno} {each.name}" for each in traceback.extract_tb(error.__traceback__)]
        at = [*[place for place in places if "/muntin/" in place][-3:], places[-1]]
        row = {"outcome": "failed", "cannot": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}", "at": at}
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rounded = {name: round(value, 1) for name, value in seconds.items()}
    return {**row, "seconds": rounded | {"all": round(time.perf_counter() - started, 1)}, "peak_mib": peak_kib // 1024}


@contextmanager
def _timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the seconds that the functions of `PHASES` take inside the block."""
    with ExitStack() as stack:
        for name, phase in PHASES.items():
            path, _, function = name.rpartition(".")
            module = importlib.import_module(path)
            stack.enter_context(patch.object(module, function, _stopwatch(getattr(module, function), phase, seconds)))
        yield


def _stopwatch(function: Callable[..., Any], phase: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started

    return run


def as_trained(model: nn.Module, images: list[Tensor]) -> nn.Module:
    """Give random weights what training gives: statistics of real images, and no constant parameters near zero.

    Packages begin with scales of (nearly) zero in residual branches and some last layers, which switches them off.
    """
    torch.manual_seed(SEED)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            constant = bool((parameter == parameter.flatten()[0]).all()) and abs(float(parameter.flatten()[0])) < 0.01
            if constant and not name.rpartition(".")[2].endswith("bias"):
                if parameter.squeeze().ndim <= 1:
                    parameter.uniform_(0.2, 0.6)
                else:
                    parameter.normal_(0, parameter[0].numel() ** -0.5)
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over the batches
            norm.train()
        for batch in images if norms else ():
            model(batch)
    return model.eval()


def _of_images(source: str, size: int | None, folder: Path, seconds: dict[str, float], nncf_python: str | None) -> Row:
    torch.manual_seed(SEED)
    started = time.perf_counter()
    kind, _, name = source.partition(":")
    if kind == "hf":
        hugging_face.write_folder(name, folder / "model", SEED)
        source = f"hf:{folder / 'model'}"
    opened = muntin.open_model(source, size=size, classes=6 if kind == "smp" else None)
    H, W = opened.size
    images = real_pictures(CALIBRATION, H, W, SEED)
    calibration = batches({"images": images}, BATCH)
    model = as_trained(opened.model, calibration)
    seconds["open"] = time.perf_counter() - started
    started = time.perf_counter()
    artifact = muntin.export(model, calibration[0], folder / "artifact", calibration=calibration, signature=opened.signature)
    seconds["export"] = time.perf_counter() - started
    held_out = real_pictures(HELD_OUT, H, W, SEED + 1)
    exact_BK = reference(model, folder, {"images": held_out})
    noise = np.random.default_rng(SEED).integers(-1, 2, held_out.shape, np.int16)
    noisy_BK = reference(model, folder, {"images": (held_out + noise).clip(0, 255).astype(np.uint8)})
    row: Row = {"noise_db": compare_scores(exact_BK, noisy_BK)["db"], "size": [H, W], "task": opened.signature.task}
    row |= {"sizes": artifact.manifest.signature.sizes.text, **_facts(artifact, model)}
    row |= _compared(artifact, lambda session: compare_scores(exact_BK, np.concatenate([session(image[None]) for image in held_out])))
    if row["db"] < AGREES_DB and nncf_python is not None:
        row["nncf"] = _by_nncf(model, images, held_out, exact_BK, folder, nncf_python)
    return row | _verified(artifact) | {"outcome": "exported"}


def _of_tensors(source: str, folder: Path, seconds: dict[str, float]) -> Row:
    started = time.perf_counter()
    described, model = hugging_face.build(source.partition(":")[2], SEED)
    file = folder / "model.onnx"
    hugging_face.write_onnx(described, model, file)
    seconds["open"] = time.perf_counter() - started
    calibration = [described.inputs(BATCH, SEED + number) for number in range(CALIBRATION // BATCH)]
    started = time.perf_counter()
    artifact = muntin.export_onnx(file, folder / "artifact", calibration=calibration)
    seconds["export"] = time.perf_counter() - started
    held_out = described.inputs(HELD_OUT, SEED + 100)
    with torch.inference_mode():
        exact = dict(zip(described.outputs, model(*(torch.from_numpy(value) for value in held_out.values())), strict=True))

    def worst_output(session: Any) -> Row:
        outputs = session(held_out)
        return min((compare_tensors(value.numpy(), outputs[name], held_out) for name, value in exact.items()), key=lambda row: row["db"])

    row = {"task": "tensors", "sizes": artifact.manifest.signature.text, **_facts(artifact, model)}
    return row | _compared(artifact, worst_output) | _verified(artifact) | {"outcome": "exported"}


def _compared(artifact: Artifact, compare: Callable[[Any], Row]) -> Row:
    """Figures of an artifact in its recorded precision and, with `_f32`, with float layers in f32."""
    session = muntin.load(artifact.path, cache=False)
    row = compare(session)
    if session.precision != "f32":
        row |= {f"{key}_f32": value for key, value in compare(muntin.load(artifact.path, precision="f32", cache=False)).items()}
    return row


def _by_nncf(model: nn.Module, calibration: Pixels, held_out: Pixels, exact_BK: Scores, folder: Path, python: str) -> Row:
    """`compare_scores` of NNCF's artifact (its defaults, float layers in f32) with the same calibration, or `refused`."""
    np.savez(folder / FILE, images=calibration)
    source, path = convert(model, {"images": calibration}, folder), folder / "nncf" / "model.xml"
    answer = nncf_job(python, source, folder / FILE, path, {})
    if "refused" in answer:
        return answer
    network = PlainModel(path, {"images": held_out[:1]}, precision="f32", threads=physical_cores())
    return compare_scores(exact_BK, answers_of(network, {"images": held_out}))


def _facts(artifact: Artifact, model: nn.Module) -> Row:
    values = sum(tensor.numel() for tensor in model.state_dict().values() if tensor.is_floating_point())
    manifest = artifact.manifest
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": bytes_of(artifact.path), "bytes_fp32": 4 * values,
        "precision": manifest.precision, "coverage_planned": manifest.measured.get("integer_coverage", 0.0),
        "notes": list(manifest.measured.get("notes", ())),
    }  # fmt: skip


def _verified(artifact: Artifact) -> Row:
    """The result of `muntin.verify`, and the share of multiply-adds that OpenVINO computes on integer kernels."""
    result, inside = muntin.verify(artifact.path), 0
    counted = sorted((record for record in artifact.manifest.layers if record.macs), key=lambda record: -(record.macs or 0))
    for record in counted:
        ran = {layer.precision for layer in result.layers if layer.compute and is_node_of(layer.name, record)}
        inside += record.macs or 0 if ran == {"i8"} else 0
    total = sum(record.macs or 0 for record in counted)
    floats = dict.fromkeys(record.note for record in counted if record.note and not record.integer_activations)
    return {
        "verified": result.passed, "problems": list(result.problems)[:4], "macs": total,
        "coverage": round(inside / total, 4) if total else 0.0, "in_floats": list(floats)[:4],
    }  # fmt: skip


def compare_scores(exact_BK: Scores, scores_BK: Scores) -> Row:
    """Return `db`, `db_whole`: signal over noise of the scores without and with their mean over the images (and pixels), which hides the
    differences of random weights; `labels`, `labels_centred`: share of equal labels, with and without that mean."""
    mean_K = exact_BK.mean((0, *range(2, exact_BK.ndim)), keepdims=True)
    centred = exact_BK - mean_K, scores_BK - mean_K
    return {
        "db": decibels(*centred), "db_whole": decibels(exact_BK, scores_BK),
        "labels": round(float((exact_BK.argmax(1) == scores_BK.argmax(1)).mean()), 4),
        "labels_centred": round(float((centred[0].argmax(1) == centred[1].argmax(1)).mean()), 4),
    }  # fmt: skip


def compare_tensors(exact: NDArray[Any], output: NDArray[Any], inputs: Mapping[str, NDArray[Any]]) -> Row:
    """Return the same of one output, and `cosine`: the smallest of its rows. Tokens that the mask leaves out do not count."""
    mask = inputs.get("attention_mask")
    if mask is not None and exact.ndim == 3 and exact.shape[:2] == mask.shape:
        exact, output = exact[mask > 0], output[mask > 0]
    rows, other = (value.reshape(len(value), -1).astype(np.float64) for value in (exact, output))
    cosine = (rows * other).sum(1) / np.maximum(np.linalg.norm(rows, axis=1) * np.linalg.norm(other, axis=1), 1e-12)
    mean = rows.mean(0, keepdims=True)
    return {"db": decibels(rows - mean, other - mean), "db_whole": decibels(rows, other), "cosine": round(float(cosine.min()), 5)}
