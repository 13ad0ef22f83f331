"""Conversion of a PyTorch model to an ONNX graph for any engine: bytes of an image in, scores out.

The graph takes uint8 `(B, H, W, C)` with free B; H and W are free unless the signature allows one only. Normalisation and layout are
inside. Each layer's product has the layer's name, by which it is found in an engine.

Axes: B images, H W map, C channels.
"""

from __future__ import annotations

import ast
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial
from threading import Lock
from typing import Any

import onnx
import torch
from onnxscript import opset20 as op
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from muntin.artifact import Signature, Sizes
from muntin.deployment.capture.model_contract import SizeError, check_example, reason_of
from muntin.deployment.capture.plain_attention import PlainAttention
from muntin.deployment.capture.shape_guards import check_bounds, check_conditions
from muntin.errors import ExportError

OPSET = 20
COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ALONE = Lock()
"""Held during an export, which replaces functions and settings of the process."""
_DEFERRED = "prefer_deferred_runtime_asserts_over_guards"
_SCOPES = "pkg.torch.onnx.name_scopes"
_ADAPTIVE = tuple(getattr(torch.ops.aten, f"adaptive_{kind}_pool{axes}d").default for kind in ("avg", "max") for axes in (1, 2, 3))


class PixelInput(nn.Module):
    """A model with uint8 input `(B, H, W, C)`, as images lie in memory, and float32 output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.model(images.permute(0, 3, 1, 2).to(torch.float32))
        return scores.to(torch.float32)


def _floor_divide(a, b):  # type: ignore[no-untyped-def]
    # ONNX's Div of integers rounds towards zero, Python's rounds down; -(-height // 2) rounds a size up
    return op.Div(op.Sub(a, op.Mod(a, b)), b)


_ADVICE = {
    "Could not guard on data-dependent": "it goes by the values of the pixels: compute both ways, and choose with torch.where",
    "code specialized it to be a constant": (
        "the size was taken for a number: compute positions by torch.arange(H) / (H - 1), not torch.linspace, and no int() of a side"
    ),
    "builtins.round": "a size is rounded: compute sizes from sizes with //",
}
"""Advice by a part of the exporter's message."""


def to_onnx(model: nn.Module, example: Tensor, signature: Signature) -> onnx.ModelProto:
    """Return the model as ONNX (opset 20) with input `images` uint8 `(B, H, W, C)` and output `scores` float32.

    `example`: raw pixels `(B, C, H, W)` of an allowed size. Raises `ExportError` for a model that does not answer by its signature, and
    `SizeError` for one that cannot be traced for its sizes. Puts `model` in `eval` mode.
    """
    sizes = signature.sizes
    with nullcontext() if sizes.fixed else _RefuseAdaptivePooling():  # type: ignore[no-untyped-call]
        check_example(model.eval(), example, signature)
    images = _traced_example(example, sizes)
    free = {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate((-1, *sizes.dims)) if dim == -1}
    try:
        with _ALONE, _captures(partial(_check_program, model, example, sizes)) as errors:
            program = _exported(
                PixelInput(model).eval(), (images,), dynamic_shapes=(free,), input_names=["images"], output_names=["scores"]
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        text = str(error.__cause__ or error)
        advice = next((f"; {advice}" for part, advice in _ADVICE.items() if part in text), "")
        raise SizeError(f"the model cannot be exported for {sizes.text}: {reason_of(error.__cause__ or error)}{advice}") from error
    if not errors:
        assert program.exported_program is not None
        check_bounds(program.exported_program, sizes)
    elif errors[-1] is not None:
        raise errors[-1]
    return _finished(program, model)


def named_tensors_to_onnx(model: nn.Module, tensors: tuple[Tensor, ...], **options: Any) -> onnx.ModelProto:
    """Return a model that takes tensors and returns a tuple of them as ONNX. `model`: a wrapper, whose `model` is the user's.

    `options`: `dynamic_shapes`, `input_names` and `output_names` of `torch.onnx.export`, whose errors are raised.
    """
    with _ALONE:
        program = _exported(model, tensors, **options)
    inner = model.model
    assert isinstance(inner, nn.Module)
    return _finished(program, inner)


def _exported(model: nn.Module, tensors: tuple[Tensor, ...], **options: Any) -> torch.onnx.ONNXProgram:
    # fused kernels for the CPU give strides to the answer with which maxvit's program cannot be decomposed (PyTorch 2.13)
    with _quiet_exporter(), sdpa_kernel(SDPBackend.MATH), PlainAttention():
        program = torch.onnx.export(
            model,
            tensors,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table={operator.floordiv: _floor_divide},
            verbose=False,
            external_data=False,
            **options,
        )
    if program is None or program.exported_program is None:
        raise ExportError("the exporter returned no graph for this model")
    return program


def _finished(program: torch.onnx.ONNXProgram, model: nn.Module) -> onnx.ModelProto:
    proto: onnx.ModelProto = program.model_proto
    _name_layers(proto, canonical_names(model))
    _whole_windows(proto)
    return proto


def _check_program(model: nn.Module, example: Tensor, sizes: Sizes, program: torch.export.ExportedProgram) -> None:
    """Raise `ExportError` for a program that computes in bfloat16, `SizeError` for one that does not hold for every allowed size."""
    for module in program.graph_module.modules():
        nodes = module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ()
        if any(getattr(node.meta.get("val"), "dtype", None) is torch.bfloat16 for node in nodes):
            raise ExportError(
                "the model's forward computes in bfloat16 (torch.autocast, or .bfloat16()): leave that out of it, and put autocast around "
                "the model where it is trained; engines choose 16 bits by themselves"
            )
    check_conditions(model, program, example, sizes)


@contextmanager
def _captures(check: Callable[[torch.export.ExportedProgram], None]) -> Iterator[list[ExportError | None]]:
    """Call `check` with each program that PyTorch captures inside the block, and collect its errors; None for a program without.

    The exporter decomposes a program in place, which removes its conditions on sizes, and a separate capture before it spoils the
    exporter's own of some models (PyTorch 2.13; a GRU).
    """
    capture = torch.export.export
    errors: list[ExportError | None] = []

    def checked_capture(*arguments: Any, **options: Any) -> torch.export.ExportedProgram:
        if _DEFERRED in options:  # otherwise conditions become assertions in the graph instead of guards
            options[_DEFERRED] = False
        program = capture(*arguments, **options)
        try:
            check(program)
        except ExportError as error:  # raised after the export, because the exporter takes it for its own failure and tries again
            errors.append(error)
        else:
            errors.append(None)
        return program

    torch.export.export = checked_capture
    try:
        yield errors
    finally:
        torch.export.export = capture


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppress the exporter's warnings and logs; its failures are exceptions."""
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
    """Refuse adaptive pooling to more than one value: the exporter's graph of it reads outside the map at other sizes.

    Pooling to one value is a mean. Source: pytorch issue 42653.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _ADAPTIVE and any(side != 1 for side in args[1]):
            size = " x ".join(str(side) for side in args[1])
            raise SizeError(
                f"adaptive pooling to {size} has no form that works for every size: pool to 1 x 1, take an axis' mean, or interpolate"
            )
        return func(*args, **(kwargs or {}))


def _traced_example(example: Tensor, sizes: Sizes) -> Tensor:
    """Return two images with sides that no stride divides, so that padding is part of the graph, or of the nearest allowed size.

    The height stays odd when halved and rounded down, the width when halved and rounded up.
    """
    height, width = (max(96, side) // 32 * 32 for side in example.shape[2:])
    generator = torch.Generator().manual_seed(0)  # keeps the caller's random state
    shape = (2, *sizes.at_least(height + 31, width + 65), example.shape[1])
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Return the canonical name of each module (the first of `named_modules`) by each of its names."""
    first = {module: name for name, module in model.named_modules()}
    return {name: first[module] for name, module in model.named_modules(remove_duplicate=False)}


def _name_layers(proto: onnx.ModelProto, canonical: Mapping[str, str]) -> None:
    """Give each layer's product the layer's dotted name, and further products of the layer a number after a `/`.

    The layer is that of the weight: a convolution into which the exporter folded a norm has the norm's scope. Only nodes are renamed,
    because names of values could clash.
    """
    uses: dict[str, int] = {}
    for node in proto.graph.node:
        layer = node.input[1].removesuffix(".weight").removeprefix("model.") if node.op_type in COMPUTE else ""
        scope = layer if layer in canonical else _scope(node)
        scope = canonical.get(scope, scope)
        if node.op_type in COMPUTE and scope:
            uses[scope] = uses.get(scope, 0) + 1
            node.name = scope if uses[scope] == 1 else f"{scope}/{uses[scope]}"


def _whole_windows(proto: onnx.ModelProto) -> None:
    """Replace `ceil_mode` of pooling by an equal padding of stride - 1 below and to the right.

    floor((H + stride - 1 - kernel) / stride) = ceil((H - kernel) / stride). With `ceil_mode` OpenVINO refuses maps smaller than the window
    and reads outside them where sizes are dynamic. Unchanged where a window could begin outside the map, which PyTorch drops, or where
    padding counts in a mean.
    """
    for node in proto.graph.node:
        if node.op_type not in ("AveragePool", "MaxPool"):
            continue
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        kernel = attributes["kernel_shape"]
        strides, pads = attributes.get("strides", [1] * len(kernel)), attributes.get("pads", [0] * 2 * len(kernel))
        before, after = pads[: len(kernel)], pads[len(kernel) :]
        counted = node.op_type == "AveragePool" and attributes.get("count_include_pad", 0) and any(pads)
        plain = before == after and all(side == 1 for side in attributes.get("dilations", []))
        inside = all(pad + stride <= size for pad, stride, size in zip(after, strides, kernel, strict=True))
        if not attributes.get("ceil_mode", 0) or counted or not plain or not inside:
            continue
        attributes |= {"ceil_mode": 0, "pads": [*before, *(pad + stride - 1 for pad, stride in zip(after, strides, strict=True))]}
        attributes |= {"count_include_pad": 0} if node.op_type == "AveragePool" else {}
        del node.attribute[:]
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())


def _scope(node: onnx.NodeProto) -> str:
    """Return the dotted name of the module that a node comes from, or ''."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            *modules, _ = ast.literal_eval(entry.value)  # the last is the operation itself
            inner = [str(scope) for scope in modules if str(scope).startswith("model.")]
            return inner[-1].removeprefix("model.") if inner else ""
    return ""
