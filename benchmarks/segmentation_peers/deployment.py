"""Every model in the forms that it can be deployed in, each form scored on several splits and timed beside the others.

    way             forms
    nncf            float: OpenVINO's own conversion; int8 and the like: NNCF post-training quantisation of it, by each of the entry's
                    schemes
    post-training   float: the artifact of `muntin export`; int8: the same after muntin's post-training quantisation
    compressed      float: the artifact of the FP32 model; compressed: the one that `muntin compress` chose

Each form runs with its float layers in f32 and, where the CPU has it, in bf16: a variant, for example "int8 bf16". For all alike, pixels
go in unchanged (uint8, B H W C), scores come out in float32, and normalisation is part of the graph.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import shutil
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import muntin
from documents import Row
from measures import ms_in_turns
from muntin.artifact import Signature
from muntin.compression import load_model
from muntin.data import EarthSource, Source, calibration_batches
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.models import DividedSides
from muntin.runtime.host.quiet_imports import import_without_telemetry, openvino
from muntin.runtime.host.signal_stack import signal_stack_kept
from muntin.runtime.inputs import check_images
from muntin.runtime.tiles import Predictor
from muntin.training import Checkpoint
from muntin.training.checkpoint import source_of
from muntin.training.evaluation import tile_of
from segmentation_peers.models import STRIDE, Entry, Scheme
from segmentation_peers.training import admission

REFERENCE = "float f32"
"""The variant that the others' scores are compared with."""
LOSS = 0.005
"""Largest loss of score against it with which a variant is admitted."""
CALIBRATION = 300
"""Training crops that NNCF is given: its own default. muntin takes 64, its own."""
CHECKED = ((1, 4 * STRIDE, 6 * STRIDE), (2, 8 * STRIDE, 5 * STRIDE))
"""Shapes that a converted peer is compared with PyTorch in. PAN takes no side below 128."""
ALLOWED_ERROR = 0.01
"""Allowed error in standard deviations of the scores: in f32 only the order of sums differs."""
SIGNATURE = "signature.json"
Name = tuple[str, str]
"""A model and its variant."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A form on disk (an artifact, or an OpenVINO model with its signature beside it) and the precision of its float layers."""

    path: Path
    precision: str

    def open(self, threads: int) -> Predictor:
        """Open it without a compilation cache, which could hold another model."""
        if self.path.suffix == ".xml":
            return PeerSession(self.path, precision=self.precision, threads=threads)
        return muntin.load(self.path, precision=self.precision, threads=threads, shapes=(), cache=False)


class PeerSession:
    """A peer in OpenVINO with the options of muntin's own sessions: compiled for each size, nothing copied on the way in or out.

    The scores are valid until the next call.
    """

    def __init__(self, path: Path, *, precision: str, threads: int) -> None:
        self.signature = Signature.model_validate_json((path.parent / SIGNATURE).read_text(encoding="utf-8"))
        self._options = {
            "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1
        }  # fmt: skip
        self._core = openvino.Core()
        self._model = self._core.read_model(path)
        self._compiled: dict[tuple[int, ...], _Compiled] = {}

    def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]:
        check_images(images_BHWC, self.signature)
        B, H, W, C = shape = images_BHWC.shape
        if shape not in self._compiled:
            with signal_stack_kept():
                model = self._model.clone()
                model.reshape([B, H + -H % STRIDE, W + -W % STRIDE, C])
                if H % STRIDE or W % STRIDE:
                    _pad(model, shape)
                self._compiled[shape] = _Compiled(self._core.compile_model(model, "CPU", self._options))
        scores: NDArray[np.float32] = self._compiled[shape].request.infer([images_BHWC], share_inputs=True, share_outputs=True)[0]
        return scores[:, :, :H, :W]


def _pad(model: Any, shape: tuple[int, ...]) -> None:
    """Pad images of `shape` in the graph by repeating the last row and column."""
    opset, (inside,) = openvino.opset13, model.get_parameters()
    outside = opset.parameter(list(shape), inside.get_element_type())
    missing = [target - given for target, given in zip(inside.shape, shape, strict=True)]
    inside.output(0).replace(opset.pad(outside, [0, 0, 0, 0], missing, "edge").output(0))
    model.replace_parameter(0, outside)


class _Compiled:
    def __init__(self, model: Any) -> None:
        self.model, self.request = model, model.create_infer_request()

    def __del__(self) -> None:
        with signal_stack_kept():  # deleting a model restores the signal stack that it found, which may be another model's
            self.__dict__.clear()


def precisions() -> tuple[str, ...]:
    """Precisions that this CPU's float layers can run in."""
    return ("f32", "bf16") if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else ("f32",)


def deploy(entry: Entry, checkpoint: Checkpoint, compressed: Path | None, folder: Path) -> dict[str, Path]:
    """Write every form of a trained model below `folder`, also those that exist, and return their paths."""
    if entry.way == "nncf":
        return _deploy_peer(entry, checkpoint, folder)
    forms = {"float": export_checkpoint(checkpoint, folder / "float", integer=False).path}
    if compressed is not None:
        return forms | {"compressed": shutil.copytree(compressed, folder / "compressed", dirs_exist_ok=True)}
    return forms | {"int8": export_checkpoint(checkpoint, folder / "int8").path}


def score_variants(forms: dict[str, Path], checkpoint: Checkpoint, *, threads: int) -> dict[str, Row]:
    """Each variant's mean IoU on validation, test and admission data, its test IoU of each class, and its bytes on disk."""
    source, tile = source_of(checkpoint), tile_of(checkpoint.recipe.data.crop)
    splits = {"validation": source.split("validation"), "test": source.split("test"), "admission": admission(source)}
    rows = {}
    for form, path in forms.items():
        for precision in precisions():
            session = Variant(path=path, precision=precision).open(threads)
            scores = {name: muntin.evaluate(session, split, tile=tile) for name, split in splits.items()}
            figures = {**{name: score.miou for name, score in scores.items()}, "iou": scores["test"].iou, "bytes": bytes_of(path)}
            rows[f"{form} {precision}"] = {"form": form, "precision": precision, **figures}
    return rows


def admitted(scores: Mapping[str, float]) -> list[str]:
    """The variants that may be deployed: within LOSS of f32, by their score on data that is not the test split."""
    return [name for name, score in scores.items() if score >= scores[REFERENCE] - LOSS]


def parameters_of(checkpoint: Checkpoint) -> int:
    return sum(parameter.numel() for parameter in load_model(checkpoint).parameters())


def bytes_of(path: Path) -> int:
    folder = path.parent if path.suffix == ".xml" else path
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _deploy_peer(entry: Entry, checkpoint: Checkpoint, folder: Path) -> dict[str, Path]:
    source, recipe = source_of(checkpoint), checkpoint.recipe
    model = load_model(checkpoint)
    assert isinstance(model, DividedSides)
    crops = calibration_batches(
        source.split("train"), task=recipe.task, crop=recipe.data.crop, count=CALIBRATION, batch_size=1, seed=recipe.seed
    )
    images = [np.ascontiguousarray(crop_BCHW.permute(0, 2, 3, 1).numpy()) for crop_BCHW in crops]
    signature = recipe.signature(source.classes)
    paths = {"float": _write(_converted(model.model, signature.channels), folder / "float", signature)}
    _check(paths["float"], model)
    nncf = import_without_telemetry("nncf")
    nncf.set_log_level(logging.ERROR)
    for form in entry.schemes:
        # NNCF compiles models to calibrate them, and prints progress to where this benchmark may print a JSON document.
        with signal_stack_kept(), contextlib.redirect_stdout(sys.stderr):
            floats, data = openvino.Core().read_model(paths["float"]), nncf.Dataset(images)
            quantised = nncf.quantize(floats, data, subset_size=len(images), **_options(nncf, form))
            paths[form] = _write(quantised, folder / form, signature)
            del quantised, floats
    return paths


def _converted(model: nn.Module, channels: int) -> Any:
    """The peer in OpenVINO for images of every size, without padding: the session pads in its graph."""
    example = torch.zeros(1, channels, 4 * STRIDE, 4 * STRIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values that tracing makes constant; `_check` finds those that matter
        converted = openvino.convert_model(model, example_input=example, input=[openvino.PartialShape([-1, channels, -1, -1])])
    pixels = openvino.preprocess.PrePostProcessor(converted)
    pixels.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    pixels.input().model().set_layout(openvino.Layout("NCHW"))
    return pixels.build()


def _options(nncf: Any, scheme: Scheme) -> dict[str, Any]:
    options: dict[str, Any] = {"model_type": nncf.ModelType.TRANSFORMER} if "attention" in scheme else {}
    if "tensor" in scheme:
        advanced = importlib.import_module("nncf.quantization.advanced_parameters")
        whole = advanced.QuantizationParameters(per_channel=False)
        options["advanced_parameters"] = advanced.AdvancedQuantizationParameters(activations_quantization_params=whole)
    return options


def _write(model: Any, folder: Path, signature: Signature) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SIGNATURE).write_text(signature.model_dump_json(), encoding="utf-8")
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    return folder / "model.xml"


def _check(path: Path, model: nn.Module) -> None:
    """Raises RuntimeError unless a converted peer computes the scores that PyTorch does, at each of the shapes."""
    session = PeerSession(path, precision="f32", threads=torch.get_num_threads())
    random = np.random.default_rng(0)
    for shape in CHECKED:
        images_BHWC = random.integers(0, 256, (*shape, session.signature.channels), dtype=np.uint8)
        with torch.inference_mode():
            expected = model(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float()).numpy()
        error = float(np.abs(session(images_BHWC) - expected).max() / expected.std())
        if not error <= ALLOWED_ERROR:
            raise RuntimeError(f"{path}: at {shape} it differs from PyTorch by {error:.2g} standard deviations (allowed: {ALLOWED_ERROR})")


def measure_latency(variants: Mapping[Name, Variant], image_HWC: NDArray[np.uint8], *, threads: int, rounds: int) -> dict[Name, float]:
    """Median ms of each variant on one image: all in one new process, which has nothing left over from training, in turns."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        return process.submit(_measured, dict(variants), image_HWC, threads, rounds).result()


def _measured(variants: dict[Name, Variant], image_HWC: NDArray[np.uint8], threads: int, rounds: int) -> dict[Name, float]:
    return ms_in_turns({name: variant.open(threads) for name, variant in variants.items()}, image_HWC[None], rounds)


def image_of(source: Source, side: int) -> NDArray[np.uint8]:
    """The middle `side` x `side` pixels of the photograph or of the first validation image, which is repeated where it is smaller."""
    image_HWC = source.picture()[0] if isinstance(source, EarthSource) else source.split("validation")[0].image
    missing = [max(0, side - length) for length in image_HWC.shape[:2]]
    if any(missing):
        image_HWC = np.pad(image_HWC, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="wrap")
    top, left = ((length - side) // 2 for length in image_HWC.shape[:2])
    return np.ascontiguousarray(image_HWC[top : top + side, left : left + side])
