"""Checks of the conditions on image sizes that a model's code evaluated while it was traced.

A graph holds one branch of each condition. Most conditions are the tracer's own (a map of one pixel) and change nothing, so each is tried
with images that do not meet it.

Axes: B images, H W map, C channels.
"""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from muntin.artifact import Sizes
from muntin.deployment.capture.model_contract import SizeError, answer_to, mean_error, reason_of
from muntin.errors import ExportError
from muntin.runtime.host.memory import no_memory
from muntin.runtime.inputs import Shape

SMALLEST = 65
"""Largest lower bound of a side, pixels: one above the product of a model's strides, so that no map has one pixel."""
LARGEST = 1 << 20
"""Maximum number of pixels of an image that is computed."""
ALIKE = 1e-3
"""Root mean square error, in standard deviations, allowed between the traced program and the model in PyTorch."""
_SIDES = (SMALLEST, 96, 128, 257, 416, 600, 1024, 2048)
_TRIED_SHAPES = (
    *((1, H, W) for H in _SIDES for W in _SIDES),
    *((1, *sides) for side in range(SMALLEST, SMALLEST + 16) for sides in ((side, 96), (97, side), (side, side))),
    *((B, 96, 128) for B in (3, 4, 5, 8, 9, 16, 17, 32, 33)),
)
"""Shapes (B, H, W) for which every condition is evaluated, beside those near the numbers in it."""


def check_bounds(program: torch.export.ExportedProgram, sizes: Sizes) -> None:
    """Raise `SizeError` where a traced program holds for some of the allowed heights or widths only.

    For programs without known conditions. The tracer itself bounds every size from below, because it excludes maps of one pixel.
    """
    for name, sides, size in zip(("height", "width"), (sizes.height, sizes.width), _images(program).shape[1:3], strict=True):
        if isinstance(size, int):
            continue
        bounds = program.range_constraints[size.node.expr]
        bounded = bounds.upper.is_Integer and (sides.max is None or bounds.upper < sides.max)
        where = f"from {bounds.upper + 1} on" if bounded else f"below {bounds.lower}" if bounds.lower > sides.at_least(SMALLEST) else ""
        if where:
            raise SizeError(
                f"the model computes otherwise where the {name} is {where}, and an artefact has one graph for {sizes.text}: "
                "leave out the condition on the size, or write both of its branches in one (torch.where)"
            )


def check_conditions(model: nn.Module, captured: torch.export.ExportedProgram, example: Tensor, sizes: Sizes) -> None:
    """Raise `SizeError` where the model computes otherwise at an allowed size that does not meet a condition of the traced program.

    The same where a condition differs only above `LARGEST` pixels, which is not tried. `captured`: the program before it is decomposed,
    which keeps the conditions. Costs two forward passes for each tried image, a handful of some thousand pixels for most models.
    """
    traced: Any = None
    for (B, H, W), conditions in _unmet_conditions(captured, sizes).items():
        if _largest(sizes) < H * W:
            raise SizeError(_message(conditions, (B, H, W), "may compute", sizes))
        images_BHWC = _tiled(example, B, H, W)
        expected = answer_to(model, images_BHWC.permute(0, 3, 1, 2))
        if traced is None:
            traced = captured.module(check_guards=False)
            traced.validate_inputs = False  # otherwise it refuses sizes outside the conditions' bounds
        if _equals(traced, images_BHWC, expected):
            continue
        if not torch.equal(expected, answer_to(model, images_BHWC.permute(0, 3, 1, 2))):
            return  # random numbers, refused when the engine's answers are compared
        raise SizeError(_message(conditions, (B, H, W), "computes", sizes))


def _equals(traced: Any, images_BHWC: Tensor, expected: Tensor) -> bool:
    try:
        with torch.inference_mode():
            answer = traced(images_BHWC)
    except Exception as error:
        if no_memory(error):
            shape = tuple(images_BHWC.shape)
            raise ExportError(f"no memory for the model's answer to pixels of shape {shape}: {reason_of(error)}") from error
        return False
    return answer.shape == expected.shape and mean_error(answer.numpy(), expected.numpy()) <= ALIKE * max(
        float(expected.std(correction=0)), 1e-6
    )


def _message(conditions: Iterable[str], shape: Shape, how: str, sizes: Sizes) -> str:
    return (
        f"the model was traced where {' and '.join(conditions)[:400]}, and {how} otherwise elsewhere, as for {' x '.join(map(str, shape))} "
        f"pixels; an artefact has one graph for {sizes.text}: leave out the condition on the size, or write both of its branches in one "
        "(torch.where); compute sizes from sizes with // instead of int() and round()"
    )


def _unmet_conditions(captured: torch.export.ExportedProgram, sizes: Sizes) -> dict[Shape, list[str]]:
    """Return the smallest allowed images (B, H, W), one of them square, that do not meet each condition, with these conditions in words.

    A fixed size is a condition, too. Conditions of the model's own code come first.
    """
    images = _images(captured)
    symbols = sympy.symbols("batch height width", integer=True, positive=True)
    names = {side.node.expr: name for side, name in zip(images.shape[:3], symbols, strict=True) if not isinstance(side, int)}
    unmet_by_shape: dict[Shape, dict[str, bool]] = {}
    for guard in images.shape[0].node.shape_env.guards:
        if not set(names).issuperset(guard.expr.free_symbols):
            continue
        allowed = (
            (B, *nearest(H, W)) for B, H, W in (*_TRIED_SHAPES, *_shapes_near(guard.expr)) for nearest in (sizes.at_least, sizes.at_most)
        )
        shapes = sorted(set(allowed), key=lambda shape: (math.prod(shape), shape))
        unmet = [shape for shape in shapes if _with_sizes(guard.expr, names, dict(zip(symbols, shape, strict=True))) != sympy.true]
        square = (shape for shape in unmet if shape[1] == shape[2])  # for conditions on both sides
        place, own = _place_of(guard.sloc.framework_loc)
        for shape in (*unmet[:1], *itertools.islice(square, 1)):
            unmet_by_shape.setdefault(shape, {})[f"{guard.expr.subs(names)}{place}"] = own
    computed = [shape for shape in sorted(unmet_by_shape, key=math.prod) if shape[1] * shape[2] <= _largest(sizes)]
    known = {condition for shape in computed for condition in unmet_by_shape[shape]}
    beyond = {shape: [c for c in conditions if c not in known] for shape, conditions in unmet_by_shape.items() if shape not in computed}
    own_first = {shape: sorted(unmet_by_shape[shape], key=unmet_by_shape[shape].__getitem__, reverse=True) for shape in computed}
    return own_first | {shape: new for shape, new in beyond.items() if new}


def _largest(sizes: Sizes) -> int:
    """Return the maximum number of pixels of an image that is computed: `LARGEST`, or those of the smallest allowed image."""
    return max(LARGEST, math.prod(sizes.at_least(1, 1)))


def _with_sizes(expression: Any, names: Mapping[Any, Any], values: Mapping[Any, int]) -> Any:
    """Return a condition with numbers for its symbols. `names`: of the symbols; `values`: by name."""
    return expression.xreplace({symbol: sympy.Integer(values[name]) for symbol, name in names.items()})


def _shapes_near(expression: Any) -> Iterable[Shape]:
    """Yield shapes with sides, or numbers of pixels, near the numbers in a condition."""
    for number in expression.atoms(sympy.Integer):
        for side in range(int(number) - 1, int(number) + 2):
            if SMALLEST <= side <= LARGEST // 128:
                yield from ((1, side, 96), (1, 97, side), (1, side, side))
            elif LARGEST // 128 < side <= LARGEST * 64:
                yield 1, math.isqrt(side) + 1, math.isqrt(side) + 1


def _place_of(frame: Any) -> tuple[str, bool]:
    """Return the place of a condition in the code, in words, and True for the model's own code, False for PyTorch's."""
    if not isinstance(frame, traceback.FrameSummary):
        return "", False
    file = Path(frame.filename)
    return f" ({file.name}:{frame.lineno} in {frame.name})", Path(torch.__file__).parent not in file.parents


def _images(program: torch.export.ExportedProgram) -> Any:
    """Return a program's input (B, H, W, C) with symbolic sizes."""
    (name,) = program.graph_signature.user_inputs
    return next(node.meta["val"] for node in program.graph.nodes if node.name == name)


def _tiled(example: Tensor, B: int, H: int, W: int) -> Tensor:
    """Return uint8 images (B, H, W, C), cut from the example or its repetitions."""
    rows, columns = (torch.arange(size) % side for size, side in zip((H, W), example.shape[2:], strict=True))
    image_CHW = example[0][:, rows][:, :, columns].to(torch.float32).round().clamp(0, 255).to(torch.uint8)
    return image_CHW.permute(1, 2, 0)[None].expand(B, -1, -1, -1).contiguous()
