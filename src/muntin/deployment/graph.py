"""From a PyTorch model to an ONNX graph that any engine runs: bytes of an image in, scores out, every size.

The graph takes uint8 `(B, H, W, C)` with all of B, H, W free; normalisation and layout are inside. Quantised layers become
QuantizeLinear / DequantizeLinear around the integers themselves, and each layer's product carries the layer's name, so that
what an engine made of it can be found again.

Axes: B images, H W map, C channels.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset20 as op
from torch import Tensor, nn

from muntin.artifact import Signature
from muntin.errors import ExportError

OPSET = 20
COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SCOPES = "pkg.torch.onnx.name_scopes"


class PixelInput(nn.Module):
    """A model that takes the bytes of images as they lie in memory: uint8 `(B, H, W, C)`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.model(images.permute(0, 3, 1, 2).to(torch.float32))
        return scores


def _quantize_dequantize(x, scale, zero_point):  # type: ignore[no-untyped-def]  # ONNX Script reads this source
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)


def _dequantize_weight(q, scale, axis: int):  # type: ignore[no-untyped-def]
    return op.DequantizeLinear(q, scale, axis=axis)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    return {
        torch.ops.muntin.quantize_dequantize.default: _quantize_dequantize,
        torch.ops.muntin.dequantize_weight.default: _dequantize_weight,
    }


def to_onnx(model: nn.Module, example: Tensor, signature: Signature) -> onnx.ModelProto:
    """The model as ONNX (opset 20) with input `images` uint8 `(B, H, W, C)` and output `scores` float32.

    `example`: `(B, C, H, W)` raw pixels; its batch and sides only have to be typical, none is baked in. Raises `ExportError`
    for a model that cannot be traced or whose answer is not what its signature says.
    """
    _check(model, example, signature)
    images = _traced_example(example)
    free = torch.export.Dim.DYNAMIC
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    try:
        quiet.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations; a failure is an exception
            program = torch.onnx.export(
                PixelInput(model).eval(),
                (images,),
                dynamo=True,
                dynamic_shapes=({0: free, 1: free, 2: free},),
                opset_version=OPSET,
                input_names=["images"],
                output_names=["scores"],
                custom_translation_table=_translations(),
                verbose=False,
                external_data=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ExportError(f"the model cannot be exported for every size: {reason}") from error
    finally:
        quiet.setLevel(level)
    if program is None:
        raise ExportError("the exporter returned no graph for this model")
    proto: onnx.ModelProto = program.model_proto
    _name_layers(proto)
    return proto


def _check(model: nn.Module, example: Tensor, signature: Signature) -> None:
    if example.ndim != 4 or example.shape[1] != signature.channels:
        raise ExportError(f"example of shape {tuple(example.shape)}: give raw pixels (B, {signature.channels}, H, W)")
    with torch.inference_mode():
        answer = model.eval()(example.to(torch.float32))
    expected = signature.scores_shape(example.shape[0], example.shape[2], example.shape[3])
    if not isinstance(answer, Tensor) or tuple(answer.shape) != expected:
        came = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ExportError(
            f"the model answers {came} to an example of {tuple(example.shape)}; for task '{signature.task}' it must be {expected}"
        )


def _traced_example(example: Tensor) -> Tensor:
    """Two images with sides that are no multiples of anything: a size of 1, or one that a stride divides, could be baked in."""
    height, width = (max(96, side) // 32 * 32 + 8 for side in example.shape[2:])
    return torch.randint(0, 256, (2, height, width + 64, example.shape[1]), dtype=torch.uint8)


def _name_layers(proto: onnx.ModelProto) -> None:
    """Give each layer's product (and its output) the layer's dotted name; further products of one layer get a `/n` behind it."""
    renamed: dict[str, str] = {}
    taken: dict[str, int] = {}
    outputs = {o.name for o in proto.graph.output}
    for node in proto.graph.node:
        if node.op_type not in COMPUTE:
            continue
        scope = _scope(node)
        if not scope:
            continue
        taken[scope] = taken.get(scope, 0) + 1
        name = scope if taken[scope] == 1 else f"{scope}/{taken[scope]}"
        node.name = name
        if node.output[0] not in outputs:
            renamed[node.output[0]] = name
    for node in proto.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name in renamed:
                    names[i] = renamed[name]
    del proto.graph.value_info[:]


def _scope(node: onnx.NodeProto) -> str:
    """Dotted name, in the model, of the module that a node comes from; empty if unknown."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes: list[str] = [part.strip(" '\"[]") for part in entry.value.split(",")]
            modules = [s for s in scopes if s.startswith("model.")]
            # the last scope is the operation itself
            inner = [s for s in modules if s != scopes[-1]] or modules
            return inner[-1].removeprefix("model.") if inner else ""
    return ""
