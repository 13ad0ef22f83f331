"""Requests to a model of images: one input, `images`, and the outputs of its task (`outputs`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.runtime.inputs import Named, size_error
from muntin.serving.inference.groups import Group, image_group
from muntin.serving.inference.outputs import Wanted, make_outputs, output_names, read_wanted
from muntin.serving.protocol.messages import InferOutput, InferRequest, ProtocolError, shown
from muntin.serving.protocol.metadata import TensorSpec
from muntin.serving.versions.version import Version

INPUT = "images"


class ImageRequests:
    """Reads requests of images and makes their outputs."""

    def __init__(self, max_rows: int, max_pixels: int) -> None:
        self._max_rows, self._max_pixels = max_rows, max_pixels

    def specs(self, signature: Signature) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], int]:
        """Inputs, outputs, and the maximum number of rows of a request."""
        B, K, C = -1, signature.outputs, signature.channels
        H, W = (-1 if dim == -1 else signature.scale * dim for dim in signature.sizes.dims)
        scores = (B, K) if signature.answer.one else (B, K, H, W)
        labels = (B, H, W, C) if not signature.answer.argmax else (B,) if signature.answer.one else (B, H, W)
        outputs = tuple(
            TensorSpec(name=name, datatype="FP32", shape=scores)
            if name == "scores"
            else TensorSpec(name=name, datatype=signature.label_type.name.upper(), shape=labels)
            for name in output_names(signature)
        )
        return (TensorSpec(name=INPUT, datatype="UINT8", shape=(B, *signature.sizes.dims, C)),), outputs, self._max_rows

    def read(self, request: InferRequest, version: Version, signature: Signature) -> tuple[Named, Group, Wanted]:
        """Return the images, their group and the requested answer. Raises ProtocolError."""
        images = self._images(request, signature)
        wanted = read_wanted(request, signature, images.shape)
        _, height, width, _ = images.shape
        return {INPUT: images}, image_group(version, height, width, labels=wanted.labels), wanted

    def outputs(self, answer: Named, wanted: Wanted, signature: Signature) -> tuple[InferOutput, ...]:
        (computed,) = answer.values()
        return make_outputs(computed, wanted, signature)

    def _images(self, request: InferRequest, signature: Signature) -> NDArray[np.uint8]:
        expected = f"UINT8 (rows, height, width, {signature.channels})"
        if len(request.inputs) != 1 or request.inputs[0].name != INPUT:
            names = ", ".join(shown(tensor.name) for tensor in request.inputs[:4])
            raise ProtocolError(f'inputs {names}: the model has one, "{INPUT}", {expected}')
        tensor = request.inputs[0]
        if tensor.datatype != "UINT8" or len(tensor.shape) != 4 or tensor.shape[3] != signature.channels or 0 in tensor.shape:
            raise ProtocolError(f'input "{INPUT}" is {tensor.datatype} {tensor.shape}: give {expected}, raw pixels, no side of 0')
        rows, height, width, _ = tensor.shape
        if not signature.sizes.takes(height, width):
            raise ProtocolError(f'input "{INPUT}": {size_error((height, width), signature.sizes)}')
        check_rows(rows, self._max_rows)
        if height * width > self._max_pixels:
            raise ProtocolError(
                f"images of {width}x{height} pixels: this server takes at most {self._max_pixels:,} (--max-pixels)", status=413
            )
        return tensor.data


def check_rows(rows: int, most: int) -> None:
    """Raise ProtocolError for more rows than a batch has."""
    if rows > most:
        raise ProtocolError(f"{rows} rows: this server computes at most {most} at once; send them in several requests")
