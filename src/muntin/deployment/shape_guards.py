"""What a model's code asked of the sizes of its images while it was traced, and whether it computes otherwise where the answer is another.

A graph holds one branch of every condition. Most conditions are the tracer's own (whether a map is of one pixel) and change nothing: each
is tried with images that do not meet it.

Axes: B images, H W map, C channels.
"""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from muntin.deployment.model_contract import answer_to, mean_error, reason_of
from muntin.errors import ExportError
from muntin.runtime.host.memory import no_memory

SMALLEST = 65
"""Sides that a traced graph may begin at, pixels: one more than all strides of a model multiplied, above which no map is of one pixel."""
LARGEST = 1 << 20
"""Pixels of an image that is computed to compare answers."""
ALIKE = 1e-3
"""Standard deviations, in the mean, up to which what was traced and the model answer alike: PyTorch computes both, by the same steps."""
_SIDES = (SMALLEST, 96, 128, 257, 416, 600, 1024, 2048)
_ASKED = (
    *((1, H, W) for H in _SIDES for W in _SIDES),
    *((1, *sides) for side in range(SMALLEST, SMALLEST + 16) for sides in ((side, 96), (97, side), (side, side))),
    *((B, 96, 128) for B in (3, 4, 5, 8, 9, 16, 17, 32, 33)),
)
"""Images, rows and columns for which every condition is looked at; and those that follow from the numbers in it."""

Shape = tuple[int, int, int]


def check_bounds(program: torch.export.ExportedProgram) -> None:
    """Raises `ExportError` where what was traced holds for some heights or widths alone: a condition on the size took one of its branches.

    For programs whose conditions are not known. The tracer bounds every size from below by itself, since it keeps maps of one pixel apart.
    """
    for side, size in zip(("height", "width"), _images(program).shape[1:3], strict=True):
        bounds = program.range_constraints[size.node.expr]
        where = f"from {bounds.upper + 1} on" if bounds.upper.is_Integer else f"below {bounds.lower}" if bounds.lower > SMALLEST else ""
        if where:
            raise ExportError(
                f"the model computes otherwise where the {side} is {where}, and an artefact has one graph for every size: "
                "leave out the condition on the size, or write both of its branches in one (torch.where)"
            )


def check_conditions(model: nn.Module, captured: torch.export.ExportedProgram, example: Tensor) -> None:
    """Raises `ExportError` where the model computes otherwise at a size at which its code's conditions on the sizes come out otherwise, or
    where that cannot be told, at more than `LARGEST` pixels alone.

    `captured`: the program before it is decomposed, which alone knows them. Costs two forward passes for each of the smallest images at
    which a condition comes out otherwise: a handful of some thousand pixels, for most models.
    """
    traced: Any = None
    for (B, H, W), conditions in _elsewhere(captured).items():
        if H * W > LARGEST:
            raise ExportError(_told(conditions, (B, H, W), "may compute"))
        images_BHWC = _tiled(example, B, H, W)
        due = answer_to(model, images_BHWC.permute(0, 3, 1, 2))
        if traced is None:
            traced = captured.module(check_guards=False)
            traced.validate_inputs = False  # or it would refuse what is outside of the bounds that conditions put on the sizes
        if _is_alike(traced, images_BHWC, due):
            continue
        if not torch.equal(due, answer_to(model, images_BHWC.permute(0, 3, 1, 2))):
            return  # it draws numbers, which is told where the engine's answers are compared
        raise ExportError(_told(conditions, (B, H, W), "computes"))


def _is_alike(traced: Any, images_BHWC: Tensor, due: Tensor) -> bool:
    try:
        with torch.inference_mode():
            answer = traced(images_BHWC)
    except Exception as error:
        if no_memory(error):
            shape = tuple(images_BHWC.shape)
            raise ExportError(f"no memory for the model's answer to pixels of shape {shape}: {reason_of(error)}") from error
        return False
    return answer.shape == due.shape and mean_error(answer.numpy(), due.numpy()) <= ALIKE * max(float(due.std(correction=0)), 1e-6)


def _told(conditions: Iterable[str], shape: Shape, how: str) -> str:
    return (
        f"the model was traced where {' and '.join(conditions)[:400]}, and {how} otherwise elsewhere, as for {' x '.join(map(str, shape))} "
        "pixels; an artefact has one graph for every size: leave out the condition on the size, or write both of its branches in one "
        "(torch.where); compute sizes from sizes with // instead of int() and round()"
    )


def _elsewhere(captured: torch.export.ExportedProgram) -> dict[Shape, list[str]]:
    """For each condition on the sizes that the tracer took for granted the smallest image (B, H, W) that does not meet it, and the smallest
    square one; what each of them does not meet, and where the code asks it. That a size is the same for all images is one, too."""
    images = _images(captured)
    sides = [side.node.expr for side in images.shape[:3]]
    names = dict(zip(sides, sympy.symbols("batch height width", integer=True, positive=True), strict=True))
    found: dict[Shape, dict[str, bool]] = {}
    for guard in images.shape[1].node.shape_env.guards:
        if not set(sides).issuperset(guard.expr.free_symbols):
            continue
        shapes = sorted({*_ASKED, *_named_in(guard.expr)}, key=lambda shape: (math.prod(shape), shape))
        unmet = [s for s in shapes if guard.expr.xreplace(dict(zip(sides, map(sympy.Integer, s), strict=True))) != sympy.true]
        square = (shape for shape in unmet if shape[1] == shape[2])  # where what is asked of both sides comes out otherwise
        place, own = _asked_at(guard.sloc.framework_loc)
        for shape in (*unmet[:1], *itertools.islice(square, 1)):
            found.setdefault(shape, {})[f"{guard.expr.subs(names)}{place}"] = own
    computed = [shape for shape in sorted(found, key=math.prod) if shape[1] * shape[2] <= LARGEST]
    known = {condition for shape in computed for condition in found[shape]}
    beyond = {shape: [c for c in conditions if c not in known] for shape, conditions in found.items() if shape not in computed}
    own_first = {shape: sorted(found[shape], key=found[shape].__getitem__, reverse=True) for shape in computed}
    return own_first | {shape: new for shape, new in beyond.items() if new}


def _named_in(expression: Any) -> Iterable[Shape]:
    """Images about as long, or of about as many pixels, as the numbers that a condition names."""
    for number in expression.atoms(sympy.Integer):
        for side in range(int(number) - 1, int(number) + 2):
            if SMALLEST <= side <= LARGEST // 128:
                yield from ((1, side, 96), (1, 97, side), (1, side, side))
            elif LARGEST // 128 < side <= LARGEST * 64:
                yield 1, math.isqrt(side) + 1, math.isqrt(side) + 1


def _asked_at(frame: Any) -> tuple[str, bool]:
    """Where a condition is asked, in words, and whether that is the model's own code and not PyTorch's."""
    if not isinstance(frame, traceback.FrameSummary):
        return "", False
    file = Path(frame.filename)
    return f" ({file.name}:{frame.lineno} in {frame.name})", Path(torch.__file__).parent not in file.parents


def _images(program: torch.export.ExportedProgram) -> Any:
    """The images that a program takes, as the tracer knows them: (B, H, W, C), symbols of sizes."""
    (name,) = program.graph_signature.user_inputs
    return next(node.meta["val"] for node in program.graph.nodes if node.name == name)


def _tiled(example: Tensor, B: int, H: int, W: int) -> Tensor:
    """Images (B, H, W, C) of a size, uint8, cut from the example or its repetitions."""
    rows, columns = (torch.arange(size) % side for size, side in zip((H, W), example.shape[2:], strict=True))
    image_CHW = example[0][:, rows][:, :, columns].to(torch.float32).round().clamp(0, 255).to(torch.uint8)
    return image_CHW.permute(1, 2, 0)[None].expand(B, -1, -1, -1).contiguous()
