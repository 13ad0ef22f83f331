"""One model, exported, verified and compared with PyTorch. Runs in a process of its own.

Axes: B images, C channels, H W map, K scores.
"""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import muntin
from architecture_sweep import hugging_face
from architecture_sweep.entries import Entry
from architecture_sweep.pictures import real_pictures
from muntin.artifact import AnyArtifact
from muntin.errors import DependencyError, MuntinError
from muntin.runtime.engines.onnx_nodes import is_node_of
from muntin.runtime.host.quiet_imports import openvino

SEED = 0
CALIBRATION, HELD_OUT = 24, 32
BATCH = 8
PHASES = {
    "muntin.deployment.export": {
        "to_onnx": "capture", "calibrate": "quantise", "write_checked": "check", "graph_pairs": "check", "check_independence": "check",
    },
    "muntin.graph.artifacts.export": {"calibrate": "quantise", "write_checked_tensors": "check", "golden_pairs": "check"},
}  # fmt: skip
"""Functions of an export that are timed, by module. What they leave is the search for sizes, and PyTorch's own calls."""
NNCF_JOB = Path(__file__).parents[1] / "quantizer_peers" / "nncf_job.py"
AGREES_DB = 10.0
"""Signal over noise of an artefact that agrees."""
Array = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Row = dict[str, Any]


def measure(entry: Entry, folder: Path, nncf_python: str | None = None) -> Row:
    """Return the row of a model: `outcome` is exported, refused, failed or missing; the others have figures or a `reason`.

    `nncf_python`: interpreter with NNCF, which quantises the image models that do not agree, as a second opinion.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    try:
        with _timed(seconds):
            row = _measure_tensors(entry, folder, seconds) if entry.kind == "onnx" else _measure_images(entry, folder, seconds, nncf_python)
    except DependencyError as error:
        row = {"outcome": "missing", "reason": str(error)}
    except MuntinError as error:
        row = {"outcome": "refused", "reason": f"{type(error).__name__}: {error}"}
    except (MemoryError, Exception) as error:  # noqa: BLE001 - a traceback is what this benchmark looks for
        row = {"outcome": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}", "at": _place(error)}
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rounded = {name: round(value, 1) for name, value in seconds.items()}
    return {**row, "seconds": rounded | {"all": round(time.perf_counter() - started, 1)}, "peak_mib": peak_kib // 1024}


def _place(error: BaseException) -> list[str]:
    """The last places in muntin, and the last one, as file:line function."""
    places, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    own = [place for place in places if "/muntin/" in place]
    return [*own[-3:], places[-1]]


@contextmanager
def _timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the seconds that the functions of `PHASES` take inside the block."""
    replaced = []
    for module_name, functions in PHASES.items():
        module = importlib.import_module(module_name)
        for name, phase in functions.items():
            replaced.append((module, name, getattr(module, name)))
            setattr(module, name, _stopwatch(getattr(module, name), phase, seconds))
    try:
        yield
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


def _stopwatch(function: Callable[..., Any], phase: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started

    return run


def as_trained(model: nn.Module, images: list[torch.Tensor]) -> nn.Module:
    """Give random weights what training gives: statistics of real pictures, and no parameters of zeros that switch branches off.

    Packages set the scale of residual branches (and some last layers) to zero or nearly so at first: then nothing in them is tested.
    """
    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2].endswith("bias") or not bool((parameter == parameter.flatten()[0]).all()):
                continue
            if abs(float(parameter.flatten()[0])) < 0.01:
                if parameter.squeeze().ndim <= 1:
                    parameter.uniform_(0.2, 0.6)
                else:
                    parameter.normal_(0, parameter[0].numel() ** -0.5)
        norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over the batches
        model.eval()
        for norm in norms:
            norm.train()
        if norms:
            for batch in images:
                model(batch)
    return model.eval()


def _measure_images(entry: Entry, folder: Path, seconds: dict[str, float], nncf_python: str | None) -> Row:
    torch.manual_seed(SEED)
    source = entry.source
    started = time.perf_counter()
    if entry.kind == "hf":
        hugging_face.write_folder(source.partition(":")[2], folder / "model", SEED)
        source = f"hf:{folder / 'model'}"
    opened = muntin.open_model(source, size=entry.size, classes=6 if entry.kind == "smp" else None)
    H, W = opened.size
    calibration = _batches(real_pictures(CALIBRATION, H, W, SEED))
    model = as_trained(opened.model, calibration)
    seconds["open"] = time.perf_counter() - started
    started = time.perf_counter()
    artifact = muntin.export(model, calibration[0], folder / "artifact", calibration=calibration, signature=opened.signature)
    seconds["export"] = time.perf_counter() - started
    held_out = real_pictures(HELD_OUT, H, W, SEED + 1)
    exact_BK = _answers(model, held_out)
    noise = np.random.default_rng(SEED).integers(-1, 2, held_out.shape, np.int16)
    noisy_BK = _answers(model, (held_out + noise).clip(0, 255).astype(np.uint8))
    row = {
        "noise_db": compare_scores(exact_BK, noisy_BK)["db"],
        "size": [H, W],
        "task": opened.signature.task,
        "sizes": artifact.manifest.signature.sizes.text,
        **_artifact_facts(artifact, model),
    }
    sessions = {"recorded": muntin.load(artifact.path, cache=False)}
    if sessions["recorded"].precision != "f32":
        sessions["f32"] = muntin.load(artifact.path, precision="f32", cache=False)
    for name, session in sessions.items():
        scores_BK = np.concatenate([session(image[None]) for image in held_out])
        row |= {f"{key}{'' if name == 'recorded' else '_f32'}": value for key, value in compare_scores(exact_BK, scores_BK).items()}
    if row["db"] < AGREES_DB and nncf_python is not None:
        row["nncf"] = _by_nncf(model, torch.cat(calibration), held_out, exact_BK, folder, nncf_python)
    return row | _verified(artifact) | {"outcome": "exported"}


def _by_nncf(model: nn.Module, calibration_BCHW: Tensor, held_out: Pixels, exact_BK: Array, folder: Path, python: str) -> Row:
    """Return what `compare_scores` says of NNCF's artefact (its defaults, float layers in f32) with the same calibration, or `refused`."""
    converted = openvino.convert_model(model, example_input=calibration_BCHW[:1], input=[-1, *calibration_BCHW.shape[1:]])
    openvino.save_model(converted, folder / "converted.xml", compress_to_fp16=False)
    np.savez(folder / "inputs.npz", **{converted.input().get_any_name(): calibration_BCHW.numpy()})
    job = {"model": "converted.xml", "inputs": "inputs.npz", "output": "nncf.xml", "options": {}}
    subprocess.run([python, str(NNCF_JOB), json.dumps(job), "answer.json"], cwd=folder, check=True, capture_output=True)  # noqa: S603
    answer: Row = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    if "refused" in answer:
        return answer
    network = openvino.Core().compile_model(folder / "nncf.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    scores = [network(images.numpy())[0] for images in _batches(held_out)]
    return compare_scores(exact_BK, np.concatenate(scores))


def _measure_tensors(entry: Entry, folder: Path, seconds: dict[str, float]) -> Row:
    started = time.perf_counter()
    described, model = hugging_face.build(entry.source.partition(":")[2], SEED)
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
    row = {"task": "tensors", "sizes": artifact.manifest.signature.text, **_artifact_facts(artifact, model)}
    sessions = {"recorded": muntin.load(artifact.path, cache=False)}
    if sessions["recorded"].precision != "f32":
        sessions["f32"] = muntin.load(artifact.path, precision="f32", cache=False)
    for name, session in sessions.items():
        answers = session(held_out)
        by_output = {output: compare_tensors(value.numpy(), answers[output], held_out) for output, value in exact.items()}
        worst = min(by_output.values(), key=lambda figures: figures["db"])
        row |= {f"{key}{'' if name == 'recorded' else '_f32'}": value for key, value in worst.items()}
    return row | _verified(artifact) | {"outcome": "exported"}


def _answers(model: nn.Module, images_BHWC: Pixels) -> Array:
    with torch.inference_mode():
        return np.concatenate([model(batch).numpy() for batch in _batches(images_BHWC)])


def _batches(images_BHWC: Pixels) -> list[torch.Tensor]:
    return list(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float().contiguous().split(BATCH))


def _artifact_facts(artifact: AnyArtifact, model: nn.Module) -> Row:
    values = sum(tensor.numel() for tensor in model.state_dict().values() if tensor.is_floating_point())
    size = sum(path.stat().st_size for path in artifact.path.rglob("*") if path.is_file())
    manifest = artifact.manifest
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()), "bytes": size, "bytes_fp32": 4 * values,
        "precision": manifest.precision, "coverage_planned": manifest.measured.get("integer_coverage", 0.0),
        "notes": list(manifest.measured.get("notes", ())),
    }  # fmt: skip


def _verified(artifact: AnyArtifact) -> Row:
    """What `muntin.verify` says, and the share of multiply-adds that OpenVINO really computes on integer kernels."""
    result = muntin.verify(artifact.path)
    counted = [record for record in artifact.manifest.layers if record.macs]
    inside = 0
    for record in counted:
        ran = [layer.precision for layer in result.layers if layer.compute and is_node_of(layer.name, record)]
        inside += record.macs or 0 if ran and set(ran) == {"i8"} else 0
    total = sum(record.macs or 0 for record in counted)
    floats = [record.note for record in sorted(counted, key=lambda record: -(record.macs or 0)) if not record.integer_activations]
    return {
        "verified": result.passed, "problems": list(result.problems)[:4], "macs": total,
        "coverage": round(inside / total, 4) if total else 0.0, "in_floats": list(dict.fromkeys(note for note in floats if note))[:4],
    }  # fmt: skip


def decibels(exact: NDArray[Any], approximation: NDArray[Any]) -> float:
    """Signal over noise, dB; -99 if the approximation is not finite."""
    exact, approximation = exact.astype(np.float64), approximation.astype(np.float64)
    if not np.isfinite(approximation).all():
        return -99.0
    noise = float(np.square(exact - approximation).sum())
    signal = float(np.square(exact).sum())
    return round(min(99.0, 10 * float(np.log10(max(signal, 1e-300) / max(noise, 1e-300)))), 1)


def compare_scores(exact_BK: Array, scores_BK: Array) -> Row:
    """Return `db`: signal over noise of the scores without their mean over the pictures (and pixels), in which random weights say much the
    same of every picture; `db_whole`: with it; `labels`: share of equal labels, `labels_centred`: of those of the scores without the mean.
    """
    others = (0, *range(2, exact_BK.ndim))
    mean_K = exact_BK.mean(others, keepdims=True)
    centred = exact_BK - mean_K, scores_BK - mean_K
    return {
        "db": decibels(*centred),
        "db_whole": decibels(exact_BK, scores_BK),
        "labels": round(float((exact_BK.argmax(1) == scores_BK.argmax(1)).mean()), 4),
        "labels_centred": round(float((centred[0].argmax(1) == centred[1].argmax(1)).mean()), 4),
    }


def compare_tensors(exact: NDArray[Any], answer: NDArray[Any], inputs: Mapping[str, NDArray[Any]]) -> Row:
    """Return the same of one output, and `cosine`: the smallest of its rows. Tokens that the mask leaves out do not count."""
    mask = inputs.get("attention_mask")
    if mask is not None and exact.ndim == 3 and exact.shape[:2] == mask.shape:
        exact, answer = exact[mask > 0], answer[mask > 0]
    rows, other = (value.reshape(len(value), -1).astype(np.float64) for value in (exact, answer))
    cosine = (rows * other).sum(1) / np.maximum(np.linalg.norm(rows, axis=1) * np.linalg.norm(other, axis=1), 1e-12)
    mean = rows.mean(0, keepdims=True)
    return {"db": decibels(rows - mean, other - mean), "db_whole": decibels(rows, other), "cosine": round(float(cosine.min()), 5)}
