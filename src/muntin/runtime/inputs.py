"""Checks of what a session is given: images or named tensors, sizes to prepare for, names of outputs.

Axis letters: B images, H and W rows and columns, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import AnySignature, Signature, Sizes, TensorSignature
from muntin.errors import DataError

Shape = tuple[int, int, int]
"""(B, H, W) of a batch of images."""
Named = dict[str, NDArray[Any]]
Dims = tuple[tuple[str, int], ...]
"""Sizes of free dimensions by name, sorted. Of images `batch`, `height` and `width`."""
SCORES, LABELS = ("scores",), ("labels",)
"""Outputs of an image model."""


def image_dims(shape: Sequence[int]) -> Dims:
    """Return the dimensions of images (B, H, W)."""
    return ("batch", shape[0]), ("height", shape[1]), ("width", shape[2])


def check_inputs(inputs: object, signature: AnySignature) -> tuple[Named, Dims]:
    """Returns contiguous arrays in the model's order, and the sizes of the free dimensions. Raises DataError for others."""
    if isinstance(signature, Signature):
        if isinstance(inputs, Mapping):
            if inputs.keys() != {"images"}:
                names = ", ".join(map(repr, list(inputs)[:4])) or "none"
                raise DataError(f"inputs {names}: the model has one, 'images', {signature.dtype} (B, H, W, {signature.channels})")
            inputs = inputs["images"]
        check_images(inputs, signature)
        images_BHWC = np.ascontiguousarray(inputs)
        return {"images": images_BHWC}, image_dims(images_BHWC.shape)
    if isinstance(inputs, np.ndarray) and len(signature.inputs) == 1:
        inputs = {signature.inputs[0].name: inputs}
    if not isinstance(inputs, Mapping):
        specs = ", ".join(f"{spec.name} {spec.text}" for spec in signature.inputs)
        raise DataError(f"inputs of type {type(inputs).__name__}: give a dictionary of numpy arrays by name: {specs}")
    inputs = {name: np.asarray(tensor) if isinstance(tensor, np.generic) else tensor for name, tensor in inputs.items()}
    dims: dict[str, int] = {}
    if (problem := signature.inputs_problem(inputs, dims)) is not None:
        raise DataError(f"input {problem}" if problem.startswith("'") else problem)
    # `require` keeps arrays of no dimension, which `ascontiguousarray` would give one
    return {spec.name: np.require(inputs[spec.name], requirements="C") for spec in signature.inputs}, tuple(sorted(dims.items()))


def check_images(images: object, signature: Signature) -> None:
    """Raises DataError unless `images` is a batch that fits the signature."""
    check_pixels(images, signature)
    assert isinstance(images, np.ndarray)
    if not signature.sizes.takes(*images.shape[1:3]):
        raise DataError(size_error(images.shape[1:3], signature.sizes))


def check_pixels(images: object, signature: Signature) -> None:
    """Raises DataError unless `images` is a batch of the signature's type and channels, of any size."""
    expected = f"{signature.dtype} (B, H, W, {signature.channels})"
    if not isinstance(images, np.ndarray):
        raise DataError(f"images of type {type(images).__name__}: give a numpy array, {expected}")
    if images.dtype != np.dtype(signature.dtype):
        raise DataError(f"images of dtype {images.dtype}: give {expected}; normalisation is part of the model")
    if images.ndim != 4 or images.shape[3] != signature.channels or 0 in images.shape:
        raise DataError(f"images of shape {images.shape}: give {expected}, with no side of 0")


def size_error(size: Sequence[int], sizes: Sizes) -> str:
    """Says which size images have and which the model takes, with the nearest one."""
    height, width = sizes.at_least(*size)
    return (
        f"images of {size[0]} x {size[1]} pixels: the model takes {sizes.text}: resize or pad them to {height} x {width}, or let "
        "`muntin predict` or the server's /predict do it"
    )


def check_classes(signature: AnySignature) -> None:
    """Raises DataError for a model that answers no classes, which has no labels."""
    if not isinstance(signature, Signature) or not signature.answer.argmax:
        raise DataError(f'labels of a model for "{signature.task}": its answers are no classes, ask for its scores')


def check_outputs(outputs: Sequence[str] | None, signature: TensorSignature) -> tuple[str, ...]:
    """Returns the requested outputs, each once. Raises DataError for none and for an unknown one."""
    names = tuple(spec.name for spec in signature.outputs)
    if outputs is None:
        return names
    if isinstance(outputs, str) or not outputs or (unknown := [name for name in outputs if name not in names]):
        given = repr(outputs) if isinstance(outputs, str) or not outputs else ", ".join(map(str, unknown))
        raise DataError(f"outputs {given}: give a list of some of {', '.join(names)}, or None for all")
    return tuple(dict.fromkeys(outputs))


def check_shape(shape: object) -> Shape:
    """Returns the shape as (B, H, W). Raises DataError unless it is three whole numbers from 1."""
    if isinstance(shape, tuple | list) and len(shape) == 3 and all(isinstance(n, Integral) and not isinstance(n, bool) for n in shape):
        B, H, W = (int(n) for n in shape)
        if min(B, H, W) >= 1:
            return B, H, W
    raise DataError(f"shape {shape!r}: give (B, H, W), three whole numbers from 1")


def check_shapes(shapes: object, sizes: Sizes | None = None) -> tuple[Shape, ...]:
    """Returns each shape as (B, H, W). Raises DataError unless `shapes` is a list of shapes, of allowed `sizes` if these are given."""
    if not isinstance(shapes, Iterable):
        raise DataError(f"shapes={shapes!r}: give a list of (B, H, W), each three whole numbers from 1")
    checked = tuple(check_shape(shape) for shape in shapes)
    for shape in checked:
        if sizes is not None and not sizes.takes(*shape[1:]):
            raise DataError(size_error(shape[1:], sizes))
    return checked


def check_dims(dims: object, signature: AnySignature | None = None) -> tuple[Dims, ...]:
    """Returns each set of sizes of free dimensions, sorted by name. Raises DataError unless they are the signature's, if it is given.

    Of an image model each may also be a shape (B, H, W).
    """
    if isinstance(signature, Signature):
        shapes = dims if not isinstance(dims, Iterable) else [_shape_of(sizes) for sizes in dims]
        return tuple(map(image_dims, check_shapes(shapes, signature.sizes)))
    form = 'give a list of sizes by the names of free dimensions, as [{"batch": 8, "tokens": 128}]'
    if isinstance(dims, Mapping | str) or not isinstance(dims, Iterable):
        raise DataError(f"dims={dims!r}: {form}")
    checked = []
    for sizes in dims:
        try:
            named = dict(sizes)
        except (TypeError, ValueError):
            raise DataError(f"dims with {sizes!r}: {form}") from None
        wrong = [name for name, size in named.items() if not isinstance(name, str) or type(size) is not int or size < 1]
        problem = f"{wrong[0]} of {named[wrong[0]]!r}: give a whole number from 1" if wrong else None
        if signature is not None:
            problem = problem or signature.dims_problem(named)
        if problem:
            raise DataError(f"dims with {problem}")
        checked.append(tuple(sorted(named.items())))
    return tuple(checked)


def _shape_of(sizes: Any) -> Any:
    """Return the (B, H, W) of sizes by name; what is no such thing is returned as it is."""
    named = dict(sizes) if isinstance(sizes, Mapping) or (isinstance(sizes, tuple) and sizes and isinstance(sizes[0], tuple)) else {}
    return tuple(named[name] for name in ("batch", "height", "width")) if named.keys() == {"batch", "height", "width"} else sizes
