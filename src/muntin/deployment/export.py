"""From a PyTorch model to an artefact: quantise if asked to, emit, write, open in the real runtime, and record what it does there.

    model -> (quantize) -> to_onnx -> artefact -> OpenVINO, f32 and 16-bit; ONNX Runtime -> deviation from the model -> recorded tolerance

The golden scores are the PyTorch model's own, so replaying them later checks the whole way from the model that was evaluated
to the kernels that answer.

Axes: B images, H W map, C channels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from muntin.artifact import Artifact, ClassInfo, GoldenTolerance, LayerRecord, Signature, check_target, write_artifact
from muntin.artifact.golden import golden_sizes
from muntin.artifact.manifest import EngineFamily, FloatPrecision
from muntin.artifact.packing import BITS, value_range
from muntin.compression import Change, QuantizedConv2d, QuantizedLinear, fold, quantize, remove_closed_channels
from muntin.compression.quantization.qat import check_frozen
from muntin.compression.rewrite import named
from muntin.deployment.counting import PRODUCTS, UNPACKED, WEIGHTED, bias_count, layer_macs, weight_count
from muntin.deployment.model_contract import (
    FAR_OFF,
    Pairs,
    answer_to,
    changed_buffer,
    check_batch,
    check_copy,
    check_rewritten,
    check_shapes,
    golden_pairs,
    is_steady,
    pairs_at,
)
from muntin.deployment.onnx_export import COMPUTE, to_onnx
from muntin.errors import ArtifactError, ExportError, MuntinError
from muntin.models import HybridNet
from muntin.models.eager import check_module, eager_copy
from muntin.runtime import Session, describe_hardware, load
from muntin.runtime.options import Precision
from muntin.runtime.session import check_shape
from muntin.runtime.verification.artifact import find_fallbacks, replay
from muntin.training.config import QuantizationConfig

Limits = Mapping[FloatPrecision, GoldenTolerance]
LARGEST = 1 << 20
"""Pixels of an example that is compared whole."""
OTHER_SIZES = ((192, 64), (64, 160), (256, 256))
"""Rows and columns of images that no golden pair is like: sides that strides divide, taller than wide, square, large."""
LIMITS: Limits = {
    "f32": GoldenTolerance(max_error=0.5, label_agreement=0.95),
    "bf16": GoldenTolerance(max_error=0.75, label_agreement=0.9),
    "f16": GoldenTolerance(max_error=0.5, label_agreement=0.93),
}
"""What a deployed model may differ from its PyTorch form, by the precision of its float layers (see `GoldenTolerance`)."""
FLOAT_LIMITS: Limits = {**LIMITS, "f32": GoldenTolerance(max_error=0.01, label_agreement=0.99)}
"""The same for a model without quantised layers: no value is near a rounding step, so in f32 only the order of sums differs."""


def export(
    model: nn.Module,
    example: Tensor,
    path: Path | str,
    *,
    calibration: Iterable[Tensor] | None = None,
    signature: Signature | None = None,
    changes: Iterable[Change] = (),
    measured: dict[str, Any] | None = None,
    shape: tuple[int, int, int] | None = None,
    quantization: QuantizationConfig | None = None,
) -> Artifact:
    """Write `model` as an artefact directory that runs without PyTorch; an artefact that is there is replaced, and only as a whole.

    `example`: raw pixels `(B, C, H, W)`, 0-255, real ones: the golden pairs are cut from them. `calibration`: input batches; with them the
    model is quantised first (a copy; yours is left as it is), without them muntin's own norms and gates are folded. Channels that gates
    have closed are cut out before that. `signature`: task and classes; without it they follow from the shape of the answer and the classes
    are numbered. `changes`: what earlier passes did, kept in the manifest. `measured`: plain figures to keep there. `shape`: the (B, H, W)
    that `load` compiles for unasked, one image of the example's size unless given. `quantization`: which layers stay in floats, beside
    `calibration`.
    Every batch size, height and width will work. Raises `ExportError` when the model cannot be exported, or
    when the runtime does not compute what PyTorch does; nothing is left behind then.
    """
    check_target(path)
    check_pixels(example, "example")
    if quantization is not None and calibration is None:
        raise ExportError("quantization says how to quantise, and without calibration nothing is: give input batches, or leave it out")
    opened_for = (1, *example.shape[2:]) if shape is None else check_shape(shape)
    given, model, example = model, _copied(model), example.cpu()
    check_frozen(model)
    check_copy(given, example)
    if isinstance(model, WEIGHTED):
        model = nn.Sequential(model).eval()  # a layer goes by its name in the model, and the model itself has none
    signature = signature or infer_signature(model, example)
    whole = [(H, W)] if (H := example.shape[2]) * (W := example.shape[3]) <= LARGEST else []
    sizes = dict.fromkeys((*golden_sizes(H, W), *OTHER_SIZES, *whole))
    untouched = pairs_at(model, example, sizes)  # first: it is quick, and finds a model that does not take every size
    check_shapes(untouched, signature)
    changes = list(changes)
    if calibration is None:
        changes += remove_closed_channels(model) + fold(model)
    else:
        changes += quantize(_calibration(calibration, model, example), quantization)(model)
    golden = golden_pairs(model, example)
    others = pairs_at(model, example, dict.fromkeys((*OTHER_SIZES, *whole)))
    notes: list[str] = []
    if is_steady(model, golden):  # of numbers that it draws is told where the engine's answers are compared
        notes = check_rewritten(untouched, [*golden, *others], quantized=calibration is not None)
        check_batch(model, golden)
    elif (changed := changed_buffer(model, golden)) is not None:
        raise ExportError(
            f"the model changes its buffer '{changed}' with each image, and answers by it: an artefact keeps nothing of an image: "
            "leave it as it is in eval mode, as batch norms do"
        )
    del untouched  # scores of many classes are large
    proto = to_onnx(model, example, signature)
    content: dict[str, Any] = {
        "model": proto,
        "signature": signature,
        "packing": packing_of(proto),
        "golden": golden,
        "layers": [_in_graph(record, proto) for record in layer_records(model, example[:1], changes, size=opened_for[1:])],
        "passes": [{"pass": c.pass_, "layer": c.layer, "done": c.done, "reason": c.reason, "sqnr_db": _finite(c.sqnr_db)} for c in changes],
        "measured": {"hardware": describe_hardware(), **(measured or {})},
        "example": opened_for,
    }
    return _write_checked(Path(path), content, others, notes)


def _copied(model: nn.Module) -> nn.Module:
    """A copy in FP32 on the CPU, where what is written is checked against runtimes."""
    try:
        check_module(model)
    except MuntinError as error:
        raise ExportError(str(error)) from error
    try:
        return eager_copy(model).cpu().float().eval()
    except MuntinError as error:
        raise ExportError(f"the model {error}") from error


def _calibration(batches: Iterable[Tensor], model: nn.Module, example: Tensor) -> list[Tensor]:
    if isinstance(batches, Tensor):
        raise ExportError(f"calibration is one tensor of shape {tuple(batches.shape)}: give a list of batches, [tensor]")
    found = list(batches)
    tried: set[torch.Size] = set()
    for batch in found:
        check_pixels(batch, "calibration batch")
        if batch.shape[1] != example.shape[1]:
            raise ExportError(f"calibration batch of shape {tuple(batch.shape)}: the example has {example.shape[1]} channels")
        if batch.shape[2:] not in tried:
            answer_to(model, batch[:1].cpu())
            tried.add(batch.shape[2:])
    return [batch.cpu() for batch in found]


def _write_checked(path: Path, content: dict[str, Any], others: Pairs, notes: list[str]) -> Artifact:
    """Write elsewhere, open in the runtime, compare, and only then write in place with the precision that was measured.

    What OpenVINO computes has to be what PyTorch does. Where ONNX Runtime does not agree, its tolerance is left out and a note says why.
    `others`: of sizes that are not recorded, which one engine is asked for: what is wrong at some sizes is so in the graph.
    """
    limits = LIMITS if any(record.activation_bits for record in content["layers"]) else FLOAT_LIMITS
    with tempfile.TemporaryDirectory(prefix="muntin-") as scratch:
        draft = Path(scratch) / "draft"
        write_artifact(draft, **content, golden_tolerance={"openvino": limits}, precision="bf16")
        try:
            precision, tolerances, told = _tried(draft, content, limits, others)
        except ArtifactError as error:  # of a draft, whose place is nobody's
            wraps = "padding that wraps around ('circular') has no form in engines: join rows and columns by torch.cat instead; "
            advice = wraps if "[wrap]" in str(error) else ""
            raise ExportError(
                f"{advice}an engine cannot run what was made of the model: {str(error).partition(': ')[2] or error}"
            ) from error
    content["measured"]["notes"] = [*notes, *told]
    return write_artifact(path, **content, golden_tolerance=tolerances, precision=precision)


def _tried(
    draft: Path, content: dict[str, Any], limits: Limits, others: Pairs
) -> tuple[FloatPrecision, dict[EngineFamily, Limits], list[str]]:
    """What an artefact's float layers run in, what is allowed in each engine, and notes. Raises `ExportError` where a draft of it does not
    compute what PyTorch does."""
    exact, recorded = (load(draft, precision=asked, shapes=(), cache=False) for asked in ("f32", "recorded"))  # in bf16 where there is any
    portable = load(draft, engine="onnxruntime", shapes=(), cache=False)
    problems, unlike = (deviations(session, content["golden"], limits) for session in (exact, portable))
    if not problems or (unlike and limits is FLOAT_LIMITS):  # two engines that are off alike: then it is the graph
        elsewhere = exact if unlike else portable
        _check_traced(problems or (far_off(elsewhere, others) if limits is LIMITS else deviations(elsewhere, others, limits)))
    if problems := problems or _floating(exact, content["layers"]):
        advice = "; layers that are named in quantization.keep stay in floats" if limits is LIMITS else ""
        raise ExportError(f"{exact.engine} does not compute what PyTorch does: {problems[0]}; nothing was written{advice}")
    notes: list[str] = []
    largest, example = max(others, key=lambda pair: pair[0].size), tuple(content["example"][1:])

    def free(asked: Precision) -> list[str]:
        session = load(draft, precision=asked, shapes=(), dynamic=True, cache=False)
        lines = deviations(session, content["golden"], limits) or far_off(session, [largest])
        return [f"where sizes are free {line}" for line in lines]

    if recorded.precision != exact.precision:
        # What 16 bits cost may grow with the map, and kernels are chosen by the size: of one that is large, and of the example's own.
        seen = {pair[0].shape[1:3]: pair for pair in (largest, *(pair for pair in others if pair[0].shape[1:3] == example))}
        notes = deviations(recorded, content["golden"], limits) or far_off(recorded, list(seen.values())) or free("recorded")
    if (notes or recorded.precision == exact.precision) and (problems := free("f32")):
        raise ExportError(f"{exact.engine} does not compute what PyTorch does: {problems[0]}; nothing was written")
    precision: FloatPrecision = precision_of(exact if notes else recorded)
    recorded.warm_up([content["example"]])
    told = [f"recorded in {precision}, for {note}" for note in notes]
    told += [f"{portable.engine} is not checked against: in it, {line}" for line in unlike]
    return precision, {"openvino": limits} if unlike else {"openvino": limits, "onnxruntime": limits}, told


def _check_traced(problems: list[str]) -> None:
    if problems:
        raise ExportError(
            f"what was traced does not compute what PyTorch does: {problems[0]}; it holds one branch of each condition on the size and no "
            "random numbers: leave them out, or write all branches in one (torch.where); nothing was written"
        )


def precision_of(session: Session) -> FloatPrecision:
    """What a session's float layers run in, as the manifest names it."""
    return next(name for name in LIMITS if name == session.precision)


def deviations(session: Session, pairs: Pairs, limits: Limits) -> list[str]:
    """Where a session's answers leave `limits`, a line for each pair that does."""
    tolerance = limits[precision_of(session)]
    lines = []
    for images, scores in pairs:
        result = replay(session, images, scores, tolerance, classes=session.signature.task != "restore")
        if not result.passed:
            agreement = "" if result.label_agreement is None else f", label agreement {result.label_agreement:.4f}"
            size = " x ".join(map(str, images.shape[1:3]))
            lines.append(
                f"{session.precision} gives a largest error of {result.max_error:.4g} standard deviations, root mean square "
                f"{result.rms_error:.4g}{agreement} on an image of {size} (allowed: {result.allowed})"
            )
    return lines


def far_off(session: Session, pairs: Pairs) -> list[str]:
    """Where a session's answers are not the model's at all, a line for each pair."""
    lines = []
    for images, scores in pairs:
        error = replay(session, images, scores, None, classes=False).rms_error
        if not error <= FAR_OFF:
            size = " x ".join(map(str, images.shape[1:3]))
            lines.append(f"it gives an error of {error:.2g} standard deviations in the mean on an image of {size} (allowed: {FAR_OFF:g})")
    return lines


def _floating(session: Session, layers: Iterable[LayerRecord]) -> list[str]:
    _, reasons = find_fallbacks(tuple(layers), tuple(session.layers()))
    advice = "name it in quantization.keep (`muntin export --set`; of a compressed model in compression.keep, `muntin compress --set`)"
    return [f"{len(reasons)} of the quantised layers not on integers: {reasons[0]}: {advice}"] if reasons else []


def infer_signature(model: nn.Module, example: Tensor) -> Signature:
    """Task and number of classes from the shape of the answer: `(B, K)` is classify, `(B, K, H, W)` segment, but for a `HybridNet` that
    restores. Of other models nothing tells an image from as many classes: give a `Signature(task="restore", channels=...)`."""
    check_pixels(example, "example")
    answer = answer_to(model, example[:1])
    if answer.ndim not in (2, 4):
        raise ExportError(f"the model answers {tuple(answer.shape)}; (B, K) or (B, K, H, W) is expected: wrap it")
    if isinstance(model, HybridNet) and model.config.task == "restore":
        return Signature(task="restore", channels=example.shape[1], scale=answer.shape[2] // example.shape[2])
    if answer.shape[1] == 1:
        raise ExportError(
            f"the model answers {tuple(answer.shape)}, and of one class every label is the same: give two, as torch.cat([-x, x], 1) of a "
            "logit is, or signature=Signature(task='restore', channels=1) of an image"
        )
    classes = tuple(ClassInfo(name=f"class-{k}", color=_shade(k)) for k in range(answer.shape[1]))
    try:
        return Signature(task="classify" if answer.ndim == 2 else "segment", channels=example.shape[1], classes=classes)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ExportError(f"the model takes {example.shape[1]} channels and gives {len(classes)} classes: {first['msg']}") from error


def check_pixels(images: Tensor, called: str) -> None:
    """Raises `ExportError` for what are no raw pixels."""
    if not isinstance(images, Tensor):
        raise ExportError(f"{called} is of type {type(images).__name__}: give a torch.Tensor of raw pixels (B, C, H, W)")
    if images.ndim != 4 or 0 in images.shape:
        raise ExportError(f"{called} of shape {tuple(images.shape)}: give raw pixels (B, C, H, W)")
    low, high = float(images.min()), float(images.max())
    fractions = images.is_floating_point() and bool((images != images.round()).any())
    if not (low >= 0 and high <= 255) or (fractions and high <= 1):
        raise ExportError(f"{called} from {low:.3g} to {high:.3g}: give raw pixels, 0-255; the model normalises them itself")


def _shade(k: int) -> tuple[int, int, int]:
    return (97 * k + 60) % 256, (57 * k + 120) % 256, (151 * k + 30) % 256


def packing_of(proto: onnx.ModelProto) -> dict[str, Any]:
    """How each initializer is stored: integers in as few bits as hold them, floats in FP16 where that loses nothing, others as they are."""
    packing: dict[str, Any] = {}
    for initializer in proto.graph.initializer:
        if initializer.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) and initializer.dims:
            packing[initializer.name] = _bits_for(onnx.numpy_helper.to_array(initializer))
        elif initializer.data_type == onnx.TensorProto.FLOAT and np.prod(initializer.dims) > UNPACKED:
            values = onnx.numpy_helper.to_array(initializer)
            if np.abs(values).max() <= np.finfo(np.float16).max and np.array_equal(values, values.astype(np.float16).astype(np.float32)):
                packing[initializer.name] = "f16"
    return packing


def _bits_for(values: NDArray[Any]) -> int:
    """The least width, 2 to 8, that holds every value."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    signed = values.dtype.kind == "i"
    return next(bits for bits in BITS if low >= value_range(bits, signed)[0] and high <= value_range(bits, signed)[1])


def layer_records(
    model: nn.Module, example: Tensor, changes: Iterable[Change], *, size: tuple[int, int] | None = None
) -> list[LayerRecord]:
    """One record a layer with weights, and a quantised product: bits, parameters, multiply-adds of one image, and why those bits.

    `size`: (H, W) of that image, the example's unless given. The 8 `weight_bits` of a product are those of its second operand.
    """
    macs = layer_macs(model, example if size is None else example.new_zeros(1, example.shape[1], *size))
    notes: dict[str, str] = {}
    for change in changes:  # the pass that decided comes before the one that carried it out, and knows the reason
        if change.pass_ in ("qat", "mix", "quantize") and change.reason:
            notes.setdefault(change.layer, change.reason)
    records = []
    for name, layer in named(model, *WEIGHTED):
        integer = isinstance(layer, QuantizedLinear | QuantizedConv2d)
        records.append(
            LayerRecord(
                name=name,
                kind=type(layer).__name__.removeprefix("Quantized"),
                weight_bits=layer.bits if isinstance(layer, QuantizedLinear | QuantizedConv2d) else 16 if _is_half(layer) else 32,
                activation_bits=8 if integer else None,
                parameters=weight_count(layer) + bias_count(layer),
                macs=macs.get(name),
                note=notes.get(name, ""),
            )
        )
    for name, product in named(model, *PRODUCTS):
        kind = type(product).__name__.removeprefix("Quantized")
        records.append(LayerRecord(name=name, kind=kind, weight_bits=8, activation_bits=8, macs=macs.get(name)))
    return records


def _in_graph(record: LayerRecord, proto: onnx.ModelProto) -> LayerRecord:
    """The record, or for a quantised layer that the answer does not depend on (an auxiliary head) one that says so."""
    products = (node.name for node in proto.graph.node if node.op_type in COMPUTE)
    if record.activation_bits is None or any(name == record.name or name.startswith(f"{record.name}/") for name in products):
        return record
    return record.model_copy(update={"activation_bits": None, "note": "not deployed: the answer does not depend on it"})


def _is_half(layer: nn.Module) -> bool:
    """Whether its weight is stored so (`packing_of`)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.numel() > UNPACKED and bool(torch.equal(weight, weight.to(torch.float16).to(weight.dtype)))


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None
