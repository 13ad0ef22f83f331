"""From a PyTorch model to an artefact: quantise if asked to, emit, write, open in the real runtime, and record what it does there.

    model -> (quantize) -> to_onnx -> artefact -> OpenVINO, f32 and 16-bit; ONNX Runtime -> deviation from the model -> recorded tolerance

The golden scores are the PyTorch model's own, so replaying them later checks the whole way from the model that was evaluated
to the kernels that answer.

Axes: B images, H W map, C channels.
"""

from __future__ import annotations

import copy
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
from muntin.compression.rewrite import named
from muntin.deployment.counting import PRODUCTS, WEIGHTED, bias_count, layer_macs, weight_count
from muntin.deployment.graph import COMPUTE, answer_to, to_onnx
from muntin.errors import ExportError
from muntin.runtime import Session, describe_hardware, load
from muntin.runtime.session import check_shape
from muntin.runtime.verification import find_fallbacks, replay

Limits = Mapping[FloatPrecision, GoldenTolerance]
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
) -> Artifact:
    """Write `model` as an artefact directory that runs without PyTorch; an artefact that is there is replaced, and only as a whole.

    `example`: raw pixels `(B, C, H, W)`, 0-255, real ones: the golden pairs are cut from them. `calibration`: input batches; with them the
    model is quantised first (a copy; yours is left as it is), without them muntin's own norms and gates are folded. Channels that gates
    have closed are cut out before that. `signature`: task and classes; without it they follow from the shape of the answer and the classes
    are numbered. `changes`: what earlier passes did, kept in the manifest. `measured`: plain figures to keep there. `shape`: the (B, H, W)
    that `load` compiles for unasked, one image of the example's size unless given.
    Every batch size, height and width will work. Raises `ExportError` when the model cannot be exported, or
    when the runtime does not compute what PyTorch does; nothing is left behind then.
    """
    check_target(path)
    _check_example(example)
    opened_for = (1, *example.shape[2:]) if shape is None else check_shape(shape)
    model, example = copy.deepcopy(model).cpu().eval(), example.cpu()  # what is written is checked against runtimes on the CPU
    if isinstance(model, WEIGHTED):
        model = nn.Sequential(model).eval()  # a layer goes by its name in the model, and the model itself has none
    signature = signature or infer_signature(model, example)
    changes = list(changes)
    changes += (
        remove_closed_channels(model) + fold(model) if calibration is None else quantize([batch.cpu() for batch in calibration])(model)
    )
    golden = golden_pairs(model, example)  # first: it is quick, and finds a model that does not take every size
    proto = to_onnx(model, example, signature)
    content: dict[str, Any] = {
        "model": proto,
        "signature": signature,
        "packing": packing_of(proto),
        "golden": golden,
        "layers": [_in_graph(record, proto) for record in layer_records(model, example, changes)],
        "passes": [{"pass": c.pass_, "layer": c.layer, "done": c.done, "reason": c.reason, "sqnr_db": _finite(c.sqnr_db)} for c in changes],
        "measured": {"hardware": describe_hardware(), **(measured or {})},
        "example": opened_for,
    }
    return _write_checked(Path(path), content)


def _write_checked(path: Path, content: dict[str, Any]) -> Artifact:
    """Write elsewhere, open in the runtime, compare, and only then write in place with the precision that was measured.

    What OpenVINO computes has to be what PyTorch does. Where ONNX Runtime does not agree, its tolerance is left out and a note says why.
    """
    limits = LIMITS if any(record.activation_bits for record in content["layers"]) else FLOAT_LIMITS
    with tempfile.TemporaryDirectory(prefix="muntin-") as scratch:
        draft = Path(scratch) / "draft"
        write_artifact(draft, **content, golden_tolerance={"openvino": limits}, precision="bf16")
        exact, recorded = (
            load(draft, precision=asked, shapes=(), cache=False) for asked in ("f32", "recorded")
        )  # the second in bf16 where there is any
        problems = [*deviations(exact, content["golden"], limits), *_floating(exact, content["layers"])]
        if problems:
            raise ExportError(f"{exact.engine} does not compute what PyTorch does: {problems[0]}; nothing was written")
        notes = deviations(recorded, content["golden"], limits) if recorded.precision != exact.precision else []
        precision: FloatPrecision = precision_of(exact if notes else recorded)
        recorded.warm_up([content["example"]])
        portable = load(draft, engine="onnxruntime", shapes=(), cache=False)
        unlike = deviations(portable, content["golden"], limits)
    content["measured"]["notes"] = [f"recorded in {precision}, for {note}" for note in notes] + [
        f"{portable.engine} is not checked against: in it, {line}" for line in unlike
    ]
    tolerances: dict[EngineFamily, Limits] = {"openvino": limits} if unlike else {"openvino": limits, "onnxruntime": limits}
    return write_artifact(path, **content, golden_tolerance=tolerances, precision=precision)


def precision_of(session: Session) -> FloatPrecision:
    """What a session's float layers run in, as the manifest names it."""
    return next(name for name in LIMITS if name == session.precision)


def deviations(session: Session, golden: Iterable[tuple[NDArray[np.uint8], NDArray[np.float32]]], limits: Limits) -> list[str]:
    """Where a session's answers leave `limits`, a line for each golden pair that does."""
    tolerance = limits[precision_of(session)]
    lines = []
    for images, scores in golden:
        result = replay(session, images, scores, tolerance, classes=session.signature.task != "restore")
        if not result.passed:
            agreement = "" if result.label_agreement is None else f" and {result.label_agreement:.2%} of equal labels"
            lines.append(
                f"{session.precision} gives an error of {result.max_error:.2g} standard deviations{agreement} on a golden image (allowed: "
                f"{tolerance.max_error:g}, {tolerance.label_agreement:.0%})"
            )
    return lines


def _floating(session: Session, layers: Iterable[LayerRecord]) -> list[str]:
    _, reasons = find_fallbacks(tuple(layers), tuple(session.layers()))
    advice = "name it in quantization.keep (`muntin export --set`; of a compressed model in compression.keep, `muntin compress --set`)"
    return [f"{len(reasons)} of the quantised layers not on integers: {reasons[0]}: {advice}"] if reasons else []


def infer_signature(model: nn.Module, example: Tensor) -> Signature:
    """Task and number of classes from the shape of the answer: `(B, K)` is classify, `(B, K, H, W)` segment."""
    _check_example(example)
    answer = answer_to(model, example[:1])
    if answer.ndim not in (2, 4):
        raise ExportError(f"the model answers {tuple(answer.shape)}; (B, K) or (B, K, H, W) is expected: wrap it")
    classes = tuple(ClassInfo(name=f"class-{k}", color=_shade(k)) for k in range(answer.shape[1]))
    try:
        return Signature(task="classify" if answer.ndim == 2 else "segment", channels=example.shape[1], classes=classes)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ExportError(f"the model takes {example.shape[1]} channels and gives {len(classes)} classes: {first['msg']}") from error


def _check_example(example: Tensor) -> None:
    if example.ndim != 4 or 0 in example.shape:
        raise ExportError(f"example of shape {tuple(example.shape)}: give raw pixels (B, C, H, W)")


def _shade(k: int) -> tuple[int, int, int]:
    return (97 * k + 60) % 256, (57 * k + 120) % 256, (151 * k + 30) % 256


def packing_of(proto: onnx.ModelProto) -> dict[str, Any]:
    """How each initializer is stored: integers in as few bits as hold them, floats in FP16 where that loses nothing, others as they are."""
    packing: dict[str, Any] = {}
    for initializer in proto.graph.initializer:
        if initializer.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) and initializer.dims:
            packing[initializer.name] = _bits_for(onnx.numpy_helper.to_array(initializer))
        elif initializer.data_type == onnx.TensorProto.FLOAT and np.prod(initializer.dims) > 64:
            values = onnx.numpy_helper.to_array(initializer)
            if np.abs(values).max() <= np.finfo(np.float16).max and np.array_equal(values, values.astype(np.float16).astype(np.float32)):
                packing[initializer.name] = "f16"
    return packing


def _bits_for(values: NDArray[Any]) -> int:
    """The least width, 2 to 8, that holds every value."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    signed = values.dtype.kind == "i"
    return next(bits for bits in BITS if low >= value_range(bits, signed)[0] and high <= value_range(bits, signed)[1])


def golden_pairs(model: nn.Module, example: Tensor) -> list[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
    """Two crops of the example's first image and what the model answers to them: two sizes, so that one that was baked in is found."""
    height, width = example.shape[2:]
    pairs = []
    for rows, columns in golden_sizes(height, width):
        images_BCHW = example[:1, :, :rows, :columns].to(torch.float32).round().clamp(0, 255).to(torch.uint8)
        scores = answer_to(model, images_BCHW)
        pairs.append((np.ascontiguousarray(images_BCHW.permute(0, 2, 3, 1).numpy()), scores.numpy()))
    return pairs


def layer_records(model: nn.Module, example: Tensor, changes: Iterable[Change]) -> list[LayerRecord]:
    """One record a layer with weights, and a quantised product: bits, parameters, multiply-adds at the example's size, and why those bits.

    The 8 `weight_bits` of a product are those of its second operand.
    """
    macs = layer_macs(model, example)
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
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return bool(torch.equal(weight, weight.to(torch.float16).to(weight.dtype)))


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None
