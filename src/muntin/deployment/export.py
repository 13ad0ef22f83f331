"""Export of a model to an artefact: a module, an ONNX file, or a model of another package by name.

name -> opened model -+
module ---------------+-> captured graph (image_export, named_export) -+
ONNX file -------------------------------------------------------------+-> integers, checked in the engines, written (graph.artifacts)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from muntin.artifact import Artifact, ClassInfo, Signature, check_target
from muntin.compression import Change, QuantizedConv2d, QuantizedLinear
from muntin.compression.calibration import calibration_list
from muntin.compression.history import history
from muntin.compression.quantization.qat import check_frozen
from muntin.compression.sparsity.pattern import check_held
from muntin.deployment.capture.model_contract import (
    SizeError,
    answer_to,
    check_copy,
    check_example,
)
from muntin.deployment.capture.named_graph import Axes, NamedTensors
from muntin.deployment.capture.trained_grids import needed_calibration
from muntin.deployment.image_export import ImageDraft
from muntin.deployment.named_export import export_named
from muntin.deployment.sizes.probe import Probe
from muntin.deployment.sizes.requested import RequestedSizes, check_allowed, requested_sizes, usual_sizes
from muntin.deployment.sources.named_source import named_axes, open_named
from muntin.deployment.sources.opening import OpenedModel, open_model
from muntin.errors import ExportError, MuntinError
from muntin.graph import export_onnx
from muntin.models import HybridNet
from muntin.models.eager import check_module, eager_copy
from muntin.models.foreign import Statistic, takes_raw_pixels
from muntin.progress import OnStage, status
from muntin.runtime.inputs import check_shape
from muntin.tasks.classes import Classes, class_infos, specs_of
from muntin.training.config import QuantizationConfig

SOURCE = "source"
"""Key of the source among the measured figures of a manifest."""


def export(
    model: nn.Module | OpenedModel | onnx.ModelProto | Path | str,
    example: Tensor | NamedTensors | None = None,
    path: Path | str | None = None,
    *,
    calibration: Iterable[Any] | Path | None = None,
    signature: Signature | None = None,
    classes: Classes | None = None,
    changes: Iterable[Change] = (),
    measured: dict[str, Any] | None = None,
    shape: tuple[int, int, int] | None = None,
    quantization: QuantizationConfig | None = None,
    sizes: RequestedSizes | None = None,
    axes: Axes | None = None,
    mean: Statistic | None = None,
    std: Statistic | None = None,
    progress: bool | OnStage = True,
) -> Artifact:
    """Write `model` as an artefact directory that runs without PyTorch. An existing artefact is replaced as a whole.

    `model`: a module; what `open_model` opens, or its name ("timm:resnet18", "hf:FOLDER", "package.module:function"), whose `calibration`
    may be a folder of pictures; or a float ONNX file, which goes to `export_onnx`: `example` and `calibration` are arrays then, and
    `quantization` gives `keep` and `min_sqnr_db`.
    `example`: raw pixels `(B, C, H, W)`, 0-255, of real images, from which the golden pairs are cut; by default the first batch of a
    list of `calibration`. `calibration`: input batches, with which a copy of the model is quantised: a list, or a DataLoader, also of
    (x, y), as in `muntin.quantize`. Without them muntin's own norms and gates are folded. Channels with closed gates are removed
    first. `classes`: their names, `["cat", "dog"]`, or with colours `{"cat": (200, 80, 0), "dog": (0, 80, 200)}`; numbered by default.
    `signature`: task and classes in one; by default inferred from the shape of the answer. `changes`: those of earlier passes, for the
    manifest. `measured`: plain figures for the manifest. `shape`: the (B, H, W) that `load` compiles for, by
    default one image of the example's size. `quantization`: which layers stay in floats; requires `calibration`.
    `sizes`: the heights and widths that the artefact takes, beside every batch size: "any", "fixed" (the example's), {"multiple": 32,
    "min": 64, "max": 1024}, or "widest", as many as the model is found to take (`sizes.probe`), which costs a few calls of the model, and
    another attempt where one fails for a reason of sizes. By default those of the signature; "widest" where the answer is a map, "fixed"
    where it is none, since a graph of free sizes takes several times as long to make. A note says why there are no more.
    `mean`, `std`: for a model that expects `(x / 255 - mean) / std` of raw pixels x, as torchvision's do: a number, or one for each
    channel, of pixels from 0 to 1. The artifact takes raw pixels then too, and so do `example` and `calibration`. Names of layers begin
    with `model.` then.
    With a dictionary of tensors as `example`, the arguments of the model's `forward` by name, the artefact has these inputs, and as outputs
    what the model returns: a tensor, a tuple, or a dictionary. `calibration` are such dictionaries then. `axes`: the names of the free
    dimensions of each input, None for a fixed one, `{"ids": ("batch", "tokens")}`; by default a first one that all inputs share.
    `progress`: True shows the stages on a terminal, and elsewhere a line every half minute; False shows nothing; a function is called with
    the name of each stage instead.
    Raises `ExportError` when the model cannot be exported or the runtime does not compute what PyTorch does; nothing is written then.
    """
    if path is None:
        raise ExportError("path is missing: name the folder of the artefact")
    check_target(path)
    if isinstance(model, onnx.ModelProto | Path) or (isinstance(model, str) and model.endswith(".onnx")):
        of_modules = {"signature": signature, "classes": classes, "shape": shape, "sizes": sizes, "axes": axes, "mean": mean, "std": std}
        if given := [name for name, value in (of_modules | {"changes": tuple(changes) or None}).items() if value is not None]:
            raise ExportError(f"{', '.join(given)}: of PyTorch models, and this is an ONNX file: leave out")
        if isinstance(calibration, Path | str):
            raise ExportError(f"calibration '{calibration}': an ONNX file takes batches, dictionaries of arrays by the names of its inputs")
        options = {} if quantization is None else {"keep": quantization.keep, "min_sqnr_db": quantization.min_sqnr_db}
        return export_onnx(model, path, example=example, calibration=calibration, measured=measured, **options)  # type: ignore[arg-type]
    if example is None and isinstance(calibration, list | tuple) and calibration and isinstance(calibration[0], Tensor | Mapping):
        example = calibration[0]
    if isinstance(model, str):
        if isinstance(example, Mapping):
            source, axes = model, axes or named_axes(model, example)
            model, notes = open_named(source, None)
            measured = {SOURCE: source, "source_notes": list(notes)} | (measured or {})
        else:
            model, classes, mean, std = open_model(model, classes=classes, mean=mean, std=std), None, None, None
    if isinstance(model, OpenedModel):
        of_opened = {"signature": signature, "classes": classes, "mean": mean, "std": std}
        if given := [name for name, value in of_opened.items() if value is not None]:
            raise ExportError(f"{', '.join(given)}: the opened model has its own: give them to open_model")
        if isinstance(calibration, Path | str):
            calibration = model.pictures(calibration, (quantization or QuantizationConfig()).calibration_images)
        measured = {SOURCE: model.source, "source_notes": list(model.notes)} | (measured or {})
        signature, model = model.signature, model.model
    if calibration is None:
        calibration = needed_calibration(model, normalised=mean is None and std is None)
    if isinstance(calibration, Path | str):
        raise ExportError(f"calibration '{calibration}': a folder is for a model of open_model; give batches of raw pixels")
    if example is None and isinstance(calibration, list) and calibration:  # pictures of an opened model
        example = calibration[0]
    if example is None:
        raise ExportError("example is missing: give raw pixels (B, C, H, W) of real images, or a dictionary of tensors")
    if isinstance(example, Mapping):
        of_images = {"signature": signature, "classes": classes, "shape": shape, "sizes": sizes, "mean": mean, "std": std}
        if given := [name for name, value in (of_images | {"changes": tuple(changes) or None}).items() if value is not None]:
            raise ExportError(f"{', '.join(given)}: of images, and the example is a dictionary of tensors: leave out, or give axes")
        with status("exporting", progress):
            return export_named(
                _copied(model), example, path, calibration=calibration, axes=axes, quantization=quantization, measured=measured
            )
    if axes is not None:
        raise ExportError("axes are of named tensors, and the example is of images: give sizes, or the example as a dictionary")
    if signature is not None and classes is not None:
        raise ExportError("signature and classes: the signature has classes already: give one of them")
    check_pixels(example, "example")
    if quantization is not None and calibration is None:
        raise ExportError("quantization says how to quantise, and without calibration nothing is: give input batches, or leave it out")
    H, W = example.shape[2:]
    opened_for = (1, H, W) if shape is None else check_shape(shape)
    changes = tuple(changes) or history(model)
    normalised = takes_raw_pixels(model, example, mean=mean, std=std)
    if normalised is not model:
        changes = tuple(replace(change, layer=f"model.{change.layer}".removesuffix(".")) for change in changes)
    with status("exporting", progress) as stage:
        stage("checking the model")
        original, model, example = normalised, _copied(normalised), example.cpu()
        check_frozen(model)
        check_held(model)
        check_copy(original, example)
        if isinstance(model, nn.Linear | nn.Conv2d | QuantizedLinear | QuantizedConv2d):
            model = nn.Sequential(model).eval()  # layers are identified by their names, and the model itself has none
        signature = signature or infer_signature(model, example, classes)
        check_example(model, example[:1], signature)
        draft = ImageDraft(
            model=model,
            example=example,
            path=Path(path),
            signature=signature,
            calibration=None if calibration is None else _calibration(calibration, model, example),
            quantization=quantization,
            changes=changes,
            measured=dict(measured or {}),
            opened_for=opened_for,
            probe=Probe(model, example, signature),
            stage=stage,
        )
        if sizes is None and not signature.sizes.every:
            check_allowed(signature.sizes, (H, W))
            requested = signature.sizes
        elif (chosen := sizes or usual_sizes(signature.task)) == "widest":
            return draft.write_widest()
        else:
            requested = requested_sizes(chosen, (H, W))
        try:
            return draft.write(requested, [])
        except SizeError as error:
            if requested.fixed:
                raise
            advice = "leave out sizes, and fewer are tried; muntin.models.DividedSides pads and cuts to multiples of a number"
            raise ExportError(f"{error}; {advice}") from error


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy in FP32 on the CPU."""
    try:
        check_module(model)
    except MuntinError as error:
        raise ExportError(str(error)) from error
    try:
        return eager_copy(model).cpu().float().eval()
    except MuntinError as error:
        raise ExportError(f"the model {error}") from error


def _calibration(calibration: Iterable[Any], model: nn.Module, example: Tensor) -> list[Tensor]:
    """Return the batches on the CPU. Raises `ExportError` where the model does not take them."""
    if isinstance(calibration, Tensor):
        raise ExportError(f"calibration is one tensor of shape {tuple(calibration.shape)}: give a list of batches, [tensor]")
    tried: set[torch.Size] = set()
    batches: list[Tensor] = []
    for batch in calibration_list(calibration, model):
        check_pixels(batch, "calibration batch")
        assert isinstance(batch, Tensor)
        batches.append(batch.cpu())
        if batch.shape[1] != example.shape[1]:
            raise ExportError(f"calibration batch of shape {tuple(batch.shape)}: the example has {example.shape[1]} channels")
        if batch.shape[2:] not in tried:
            answer_to(model, batch[:1].cpu())
            tried.add(batch.shape[2:])
    return batches


def infer_signature(model: nn.Module, example: Tensor, classes: Classes | None = None) -> Signature:
    """Infer task and number of classes from the shape of the answer: `(B, K)` is classify, `(B, K, H, W)` segment.

    `classes`: names, or entries with name and color (`specs_of`). Raises `DataError` for those that are wrong.

    A `HybridNet` knows its task. Another model that answers images needs a `Signature(task="restore", channels=...)`.
    """
    check_pixels(example, "example")
    answer = answer_to(model, example[:1])
    if answer.ndim not in (2, 4):
        raise ExportError(f"the model answers {tuple(answer.shape)}; (B, K) or (B, K, H, W) is expected: wrap it")
    if isinstance(model, HybridNet) and not model.config.answer.has_classes:
        if classes is not None:
            raise ExportError("classes: the model restores images and has none: leave them out")
        return Signature(task=model.config.task, channels=example.shape[1], scale=answer.shape[2] // example.shape[2])
    if answer.shape[1] == 1:
        raise ExportError(
            f"the model answers {tuple(answer.shape)}, and of one class every label is the same: give two, as torch.cat([-x, x], 1) of a "
            "logit is, or signature=Signature(task='restore', channels=1) of an image"
        )
    task: Literal["classify", "segment"] = "classify" if answer.ndim == 2 else "segment"
    count = answer.shape[1]
    if classes is None:
        infos = tuple(ClassInfo(name=f"class-{k}", color=_shade(k)) for k in range(count))
    else:
        infos = class_infos(specs_of(classes), task)
        if len(infos) != count:
            raise ExportError(f"{len(infos)} classes are named, and the model gives {count} scores: name as many")
    try:
        return Signature(task=task, channels=example.shape[1], classes=infos)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ExportError(f"the model takes {example.shape[1]} channels and gives {count} classes: {first['msg']}") from error


def _shade(k: int) -> tuple[int, int, int]:
    return (97 * k + 60) % 256, (57 * k + 120) % 256, (151 * k + 30) % 256


def check_pixels(images: object, called: str) -> None:
    """Raise `ExportError` for images that are not raw pixels (B, C, H, W), 0-255."""
    if not isinstance(images, Tensor):
        raise ExportError(f"{called} is of type {type(images).__name__}: give a torch.Tensor of raw pixels (B, C, H, W)")
    if images.ndim != 4 or 0 in images.shape:
        raise ExportError(f"{called} of shape {tuple(images.shape)}: give raw pixels (B, C, H, W)")
    low, high = float(images.min()), float(images.max())
    fractions = images.is_floating_point() and bool((images != images.round()).any())
    if low >= 0 and high <= 255 and not (fractions and high <= 1):
        return
    advice = "the model normalises them itself"
    if low < 0:
        advice = "undo their normalisation, (x * std + mean) * 255, and give mean and std: the artifact normalises"
    elif high <= 1:
        advice = "multiply by 255; if the model expects pixels from 0 to 1, give mean=0 and std=1, or those of its normalisation"
    raise ExportError(f"{called} from {low:.3g} to {high:.3g}: give raw pixels, 0-255; {advice}")
