"""From a PyTorch model to an ONNX graph that any engine runs: bytes of an image in, scores out, every size.

The graph takes uint8 `(B, H, W, C)` with all of B, H, W free; normalisation and layout are inside. Quantised layers become
QuantizeLinear / DequantizeLinear around the integers themselves, and each layer's product carries the layer's name, so that
what an engine made of it can be found again.

Axes: B images, H W map, C channels.
"""

from __future__ import annotations

import ast
import io
import logging
import operator
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import opset20 as op
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from muntin.artifact import Signature
from muntin.deployment.model_contract import answer_to, reason_of
from muntin.deployment.shape_guards import check_bounds, check_conditions
from muntin.errors import ExportError

OPSET = 20
COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ALONE = Lock()
"""Held while PyTorch exports: what is put in the place of things of the process's meanwhile would not come out in any order."""
_DEFERRED = "prefer_deferred_runtime_asserts_over_guards"
_SCOPES = "pkg.torch.onnx.name_scopes"
_ADAPTIVE = tuple(getattr(torch.ops.aten, f"adaptive_{kind}_pool{axes}d").default for kind in ("avg", "max") for axes in (1, 2, 3))


class PixelInput(nn.Module):
    """A model that takes the bytes of images as they lie in memory, uint8 `(B, H, W, C)`, and answers in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.model(images.permute(0, 3, 1, 2).to(torch.float32))
        return scores.to(torch.float32)


def _quantize_dequantize(x, scale, zero_point):  # type: ignore[no-untyped-def]  # ONNX Script reads this source
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)


def _dequantize_weight(q, scale, axis: int):  # type: ignore[no-untyped-def]
    return op.DequantizeLinear(q, scale, axis=axis)


def _floor_divide(a, b):  # type: ignore[no-untyped-def]
    # ONNX's Div of integers rounds towards zero, as ONNX Runtime does it, and Python down: -(-height // 2) is how sizes are rounded up
    return op.Div(op.Sub(a, op.Mod(a, b)), b)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    return {
        torch.ops.muntin.quantize_dequantize.default: _quantize_dequantize,
        torch.ops.muntin.dequantize_weight.default: _dequantize_weight,
        operator.floordiv: _floor_divide,
    }


_ADVICE = {
    "Could not guard on data-dependent": "it goes by the values of the pixels: compute both ways, and choose with torch.where",
    "code specialized it to be a constant": (
        "the size was taken for a number: compute positions by torch.arange(H) / (H - 1), not torch.linspace, and no int() of a side"
    ),
    "builtins.round": "a size is rounded: compute sizes from sizes with //",
}
"""What to do, by what the exporter says."""


def to_onnx(model: nn.Module, example: Tensor, signature: Signature) -> onnx.ModelProto:
    """The model as ONNX (opset 20) with input `images` uint8 `(B, H, W, C)` and output `scores` float32.

    `example`: `(B, C, H, W)` raw pixels; its batch and sides only have to be typical, none is baked in. Raises `ExportError`
    for a model that cannot be traced or whose answer is not what its signature says. `model` is put in `eval` mode.
    """
    _check(model.eval(), example, signature)
    images = _traced_example(example)
    free = torch.export.Dim.DYNAMIC
    try:
        with _ALONE, _quiet_exporter(), _captures(partial(_look, model, example)) as found:
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
        text = str(error.__cause__ or error)
        advice = next((f"; {advice}" for part, advice in _ADVICE.items() if part in text), "")
        raise ExportError(f"the model cannot be exported for every size: {reason_of(error.__cause__ or error)}{advice}") from error
    if program is None or program.exported_program is None:
        raise ExportError("the exporter returned no graph for this model")
    if not found:
        check_bounds(program.exported_program)
    elif found[-1] is not None:
        raise found[-1]
    proto: onnx.ModelProto = program.model_proto
    _name_layers(proto, canonical_names(model))
    _whole_windows(proto)
    _signed_concats(proto)
    return proto


def _look(model: nn.Module, example: Tensor, program: torch.export.ExportedProgram) -> None:
    """Raises `ExportError` for a program that is no graph for every size, or of types that engines choose by themselves."""
    for module in program.graph_module.modules():
        nodes = module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ()
        if any(getattr(node.meta.get("val"), "dtype", None) is torch.bfloat16 for node in nodes):
            raise ExportError(
                "the model's forward computes in bfloat16 (torch.autocast, or .bfloat16()): leave that out of it, and put autocast around "
                "the model where it is trained; engines choose 16 bits by themselves"
            )
    check_conditions(model, program, example)


@contextmanager
def _captures(look: Callable[[torch.export.ExportedProgram], None]) -> Iterator[list[ExportError | None]]:
    """Shows `look` each program that PyTorch captures meanwhile, and keeps what it raises.

    The exporter decomposes the program in place, which no longer knows then what was asked of the sizes; and who captures a program first
    by himself spoils the exporter's capture of some models (PyTorch 2.13; a GRU).
    """
    capture = torch.export.export
    found: list[ExportError | None] = []

    def looked_at(*arguments: Any, **options: Any) -> torch.export.ExportedProgram:
        if _DEFERRED in options:  # or conditions would be assertions in the graph, and no guards
            options[_DEFERRED] = False
        program = capture(*arguments, **options)
        try:
            look(program)
        except ExportError as error:  # once the exporter has ended: it takes what is raised for its own failure, and tries other ways
            found.append(error)
        else:
            found.append(None)
        return program

    torch.export.export = looked_at
    try:
        yield found
    finally:
        torch.export.export = capture


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """No warnings, logs and dumps while exporting: they are PyTorch's own deprecations, and what fails is an exception."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _RefuseAdaptivePooling(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Adaptive pooling to more than one value: the exporter's graph of it reads outside the map at other sizes, without a warning.

    Pooling to one value is a mean, which PyTorch computes as such. Source: pytorch issue 42653.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _ADAPTIVE and any(side != 1 for side in args[1]):
            size = " x ".join(str(side) for side in args[1])
            raise ExportError(
                f"adaptive pooling to {size} has no form that works for every size: pool to 1 x 1, take an axis' mean, or interpolate"
            )
        return func(*args, **(kwargs or {}))


def _check(model: nn.Module, example: Tensor, signature: Signature) -> None:
    if example.ndim != 4 or example.shape[1] != signature.channels:
        raise ExportError(f"example of shape {tuple(example.shape)}: give raw pixels (B, {signature.channels}, H, W)")
    with _RefuseAdaptivePooling():  # type: ignore[no-untyped-call]
        answer = answer_to(model, example)
    expected = signature.scores_shape(example.shape[0], example.shape[2], example.shape[3])
    if tuple(answer.shape) != expected:
        raise ExportError(
            f"the model answers {tuple(answer.shape)} to an example of {tuple(example.shape)}; "
            f"for task '{signature.task}' it must be {expected}"
        )


def _traced_example(example: Tensor) -> Tensor:
    """Two images with sides that no stride divides: what a model does to sizes that need it, padding for one, has to be in the graph.

    The height is odd whenever it is halved and rounded down, the width whenever it is rounded up.
    """
    height, width = (max(96, side) // 32 * 32 for side in example.shape[2:])
    generator = torch.Generator().manual_seed(0)  # of its own: the caller's random numbers stay what they were
    return torch.randint(0, 256, (2, height + 31, width + 65, example.shape[1]), dtype=torch.uint8, generator=generator)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """The name that each module goes by (`named_modules`' first), by every name that it has."""
    first = {module: name for name, module in model.named_modules()}
    return {name: first[module] for name, module in model.named_modules(remove_duplicate=False)}


def _name_layers(proto: onnx.ModelProto, canonical: Mapping[str, str]) -> None:
    """Give each layer's product the layer's dotted name; a layer's further products get a number behind a `/`.

    Only nodes are named: the names of values could clash.
    """
    uses: dict[str, int] = {}
    for node in proto.graph.node:
        scope = _scope(node)
        scope = canonical.get(scope, scope)
        if node.op_type in COMPUTE and scope:
            uses[scope] = uses.get(scope, 0) + 1
            node.name = scope if uses[scope] == 1 else f"{scope}/{uses[scope]}"


def _whole_windows(proto: onnx.ModelProto) -> None:
    """Pooling that counts a last, partial window (`ceil_mode`) becomes pooling over a map that is padded to whole windows, exactly.

    stride - 1 more below and to the right: floor((H + stride - 1 - kernel) / stride) = ceil((H - kernel) / stride), and a mean without its
    padding is over the pixels that are there. With `ceil_mode` OpenVINO refuses a map that is smaller than the window, or where sizes are
    dynamic reads outside it. Left as it is where a window could begin outside the map, which PyTorch drops, or where padding counts in a
    mean.
    """
    for node in proto.graph.node:
        if node.op_type not in ("AveragePool", "MaxPool"):
            continue
        found = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        kernel = found["kernel_shape"]
        strides, pads = found.get("strides", [1] * len(kernel)), found.get("pads", [0] * 2 * len(kernel))
        before, after = pads[: len(kernel)], pads[len(kernel) :]
        counted = node.op_type == "AveragePool" and found.get("count_include_pad", 0) and any(pads)
        plain = before == after and all(side == 1 for side in found.get("dilations", []))
        inside = all(pad + stride <= size for pad, stride, size in zip(after, strides, kernel, strict=True))
        if not found.get("ceil_mode", 0) or counted or not plain or not inside:
            continue
        found |= {"ceil_mode": 0, "pads": [*before, *(pad + stride - 1 for pad, stride in zip(after, strides, strict=True))]}
        found |= {"count_include_pad": 0} if node.op_type == "AveragePool" else {}
        del node.attribute[:]
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in found.items())


def _signed_concats(proto: onnx.ModelProto) -> None:
    """A clip before what quantises joined maps with a sign for a convolution: it changes no integer, and OpenVINO computes them rightly.

    OpenVINO 2026.4 moves such a quantiser before the Concat, through sums and products with constants, computes in unsigned integers there
    and loses half of the range. A clip to what lies inside the outermost steps (-127.51 rounds to -128) is not taken for a part of the
    quantiser, and stays between them. The maps are joined in floats then.
    """
    constants = {entry.name: entry for entry in proto.graph.initializer}
    made = {output: node for node in proto.graph.node for output in node.output}
    convolved = {node.input[0] for node in proto.graph.node if node.op_type in ("Conv", "ConvTranspose")}
    quantized = {node.input[0] for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.output[0] in convolved}
    for index, node in reversed(list(enumerate(proto.graph.node))):
        if node.op_type != "QuantizeLinear" or node.output[0] not in quantized or not _joined(made.get(node.input[0]), made, constants):
            continue
        scale, zero = (onnx.numpy_helper.to_array(constants[name]) for name in node.input[1:3])
        if zero.dtype != np.int8:
            continue
        names = [f"{node.output[0]}/{end}" for end in ("low", "high", "clipped")]
        ends = [scale * (end - zero.astype(np.float32)) for end in (-127.51, 126.51)]
        proto.graph.initializer.extend(
            onnx.numpy_helper.from_array(np.asarray(end, np.float32), name) for end, name in zip(ends, names, strict=False)
        )
        proto.graph.node.insert(index, onnx.helper.make_node("Clip", [node.input[0], *names[:2]], [names[2]]))
        node.input[0] = names[2]


def _joined(node: onnx.NodeProto | None, made: Mapping[str, onnx.NodeProto], constants: Container[str]) -> bool:
    """Whether a value is a Concat, or one that constants were added to or multiplied with, as a norm does."""
    while node is not None and node.op_type in ("Add", "Sub", "Mul", "Div", "BatchNormalization"):
        variable = [name for name in node.input if name not in constants]
        node = made.get(variable[0]) if len(variable) == 1 else None
    return node is not None and node.op_type == "Concat"


def _scope(node: onnx.NodeProto) -> str:
    """Dotted name, in the model, of the module that a node comes from; empty if unknown."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            *modules, _ = ast.literal_eval(entry.value)  # the last is the operation itself
            inner = [str(scope) for scope in modules if str(scope).startswith("model.")]
            return inner[-1].removeprefix("model.") if inner else ""
    return ""
