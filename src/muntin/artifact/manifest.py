"""The manifest of an artefact: `manifest.json`, its schema and its digest.

The digest is of the canonical JSON (sorted keys, no spaces) of everything but the digest: the file may be re-indented, but no value may be
changed. The digests of the other files are values of the manifest, so this digest identifies the whole artefact.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from muntin.artifact.answers import ANSWERS, Answer, Task
from muntin.artifact.classes import ClassInfo
from muntin.artifact.sizes import Sizes
from muntin.artifact.tensors import DimName, DimSize, TensorInfo, TensorSignature
from muntin.artifact.tile_plan import TilePlan
from muntin.errors import ArtifactError

FORMAT: Literal[3] = 3

FloatPrecision = Literal["f32", "bf16", "f16"]
EngineFamily = Literal["openvino", "onnxruntime"]
LARGEST_EXAMPLE = 1 << 28
"""Pixels of all images, or values of all inputs, of an example, which is computed when an artefact is opened."""
LARGEST_MANIFEST = 1 << 22
"""Bytes. A manifest is read before any digest is checked, and parsing takes up to 60 times its size."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Literal["model.onnx", "weights.safetensors", "golden.safetensors"]
OptionalFileName = Literal["drift.json"]
AnyFileName = FileName | OptionalFileName


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Signature(_Frozen):
    """Inputs and outputs of the model.

    Images are (B, H, W, channels) in `dtype`, of the allowed `sizes`; scores are float32, (B, K) or (B, K, scale*H, scale*W) as the task's
    `Answer` says. K is the number of classes, or of channels for a task without classes.
    """

    task: Task
    channels: Annotated[int, Field(ge=1, le=16)]
    scale: Annotated[int, Field(ge=1, le=16)] = 1
    classes: Annotated[tuple[ClassInfo, ...], Field(max_length=65535)] = ()
    dtype: Literal["uint8"] = "uint8"
    side: Annotated[int | None, Field(ge=1, le=1 << 14)] = None
    """Side in pixels of the square that a picture's middle is resized to, as in training, where a picture has one answer. None: pictures
    are used as they are."""
    sizes: Sizes = Sizes()

    @model_validator(mode="after")
    def _classes_fit_the_task(self) -> Self:
        if self.answer.has_classes != bool(self.classes):
            allowed = "at least one" if self.answer.has_classes else "none"
            raise ValueError(f'task "{self.task}" with {len(self.classes)} classes: it has {allowed}')
        if self.answer.one and self.scale != 1:
            raise ValueError(f'task "{self.task}" with scale {self.scale}: it has no pixels to scale, leave 1')
        if not self.answer.one and self.side is not None:
            raise ValueError(f'task "{self.task}" with side {self.side}: it takes pictures of every size, leave it out')
        if self.side is not None and not self.sizes.takes(self.side, self.side):
            raise ValueError(f"side {self.side}: the model takes {self.sizes.text}: give a side that is allowed")
        return self

    @property
    def answer(self) -> Answer:
        """Facts of the task."""
        return ANSWERS[self.task]

    @property
    def outputs(self) -> int:
        """K, the number of channels of the scores."""
        return self.answer.width(len(self.classes), self.channels)

    @cached_property
    def tensors(self) -> TensorSignature:
        """Inputs and outputs by name: `images`; `scores`, and `labels` where a class is the answer. All sizes are free dimensions."""
        images = TensorInfo(name="images", dtype="uint8", shape=("batch", "height", "width", self.channels))
        outputs = tuple(info for info in reversed(self.served) if info.name != "image")
        return TensorSignature(inputs=(images,), outputs=outputs, batch="batch")

    @cached_property
    def served(self) -> tuple[TensorInfo, ...]:
        """Outputs as clients of a server see them: those of a call, and the `image` of a model that restores it; `scores` last."""
        sides = ("height", "width")
        answer = () if self.answer.one else sides if self.scale == 1 else tuple(f"{self.scale} x {side}" for side in sides)
        outputs = [TensorInfo(name="scores", dtype="float32", shape=("batch", self.outputs, *answer))]
        if self.answer.argmax:
            outputs.insert(0, TensorInfo(name="labels", dtype=self.label_type.name, shape=("batch", *answer)))  # type: ignore[arg-type]
        elif self.answer.picture:
            outputs.insert(0, TensorInfo(name="image", dtype="uint8", shape=("batch", *answer, self.channels)))
        return tuple(outputs)

    def output_sizes(self, dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Shape of each output for images of these sizes."""
        scores = self.scores_shape(dims["batch"], dims["height"], dims["width"])
        return {"scores": scores, "labels": (scores[0], *scores[2:]), "image": (scores[0], *scores[2:], self.channels)}

    def outputs_problem(self, tensors: Mapping[str, NDArray[Any]], dims: Mapping[str, int]) -> str | None:
        """Return why `tensors` are no outputs for images of these sizes, or None."""
        sizes = self.output_sizes(dims)
        for spec in self.tensors.outputs:
            tensor = tensors.get(spec.name)
            if tensor is not None and (tensor.dtype != spec.dtype or tensor.shape != sizes[spec.name]):
                return f"'{spec.name}' is {tensor.dtype} {tensor.shape}: {spec.dtype} {sizes[spec.name]} is needed"
        return None

    @property
    def row(self) -> dict[str, int]:
        """Sizes of one image; -1 for a free one."""
        return dict(zip(("batch", "height", "width"), (1, *self.sizes.dims), strict=True))

    @property
    def text(self) -> str:
        """Task and channels in words."""
        return f"{self.task}, {self.channels} channels"

    @property
    def label_type(self) -> np.dtype[Any]:
        """Type of class numbers: uint8, or uint16 for more than 255 classes. Its highest value is no class."""
        return np.dtype(np.uint8 if len(self.classes) <= 255 else np.uint16)

    def scores_shape(self, batch: int, height: int, width: int) -> tuple[int, ...]:
        """Shape of the scores of a (batch, height, width, channels) input."""
        if self.answer.one:
            return (batch, self.outputs)
        return (batch, self.outputs, self.scale * height, self.scale * width)


class LayerRecord(_Frozen):
    """One layer as it was compressed.

    `name`: also of the layer's compute node in `model.onnx` (or its prefix before a "/"), by which verification finds it in the engine.
    `activation_bits` None: float inputs. `macs`: of one image of the manifest's `example` size. `sparsity`: the pattern of the zeros of its
    weight along the inputs, "2:4"; empty: none.
    """

    name: Annotated[str, Field(min_length=1)]
    kind: Annotated[str, Field(min_length=1)]
    weight_bits: Annotated[int, Field(ge=1, le=64)]
    activation_bits: Annotated[int, Field(ge=1, le=64)] | None = None
    parameters: Annotated[int, Field(ge=0)] = 0
    macs: Annotated[int, Field(ge=0)] | None = None
    note: str = ""
    sparsity: str = ""

    @property
    def integer_activations(self) -> bool:
        """True if the layer is to run on integer kernels."""
        return self.activation_bits is not None and self.activation_bits <= 8


class TensorRecord(_Frozen):
    """Storage of one weight: bits per value, restored shape, integers or floats."""

    bits: Annotated[int, Field(ge=1, le=64)]
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    packing: Literal["int", "f16", "f32", "f64"]


class GoldenTolerance(_Frozen):
    """Allowed difference from the golden scores, or outputs.

    `max_error`: largest difference of one score, in standard deviations of the golden scores. `label_agreement`: smallest share, 0 to 1, of
    pixels (or images) with the same label, or of equal values of an output of integers.
    """

    max_error: Annotated[float, Field(ge=0)]
    label_agreement: Annotated[float, Field(ge=0, le=1)]


AnySignature = Signature | TensorSignature
"""Signature of an image model, or of one with named inputs and outputs."""


class Manifest(_Frozen):
    """Content of `manifest.json`.

    `precision`: of the float layers in the measured figures. `golden_tolerance`: by engine, then by precision. `example`: sizes of the free
    dimensions that sessions compile for by default; of images `batch`, `height` and `width`. `sha256`: the manifest's own digest.
    """

    format: Literal[3] = FORMAT
    muntin: str
    created: str
    signature: Annotated[Signature | TensorSignature, Field(discriminator="task")]
    passes: tuple[dict[str, JsonValue], ...] = ()
    layers: tuple[LayerRecord, ...] = ()
    tensors: dict[str, TensorRecord] = {}
    tile_plan: TilePlan | None = None
    precision: FloatPrecision = "f32"
    measured: dict[str, JsonValue] = {}
    golden_tolerance: dict[EngineFamily, dict[FloatPrecision, GoldenTolerance]] = {}
    example: dict[DimName, DimSize] | None = None
    files: dict[AnyFileName, Sha256] = {}
    sha256: str = ""

    @model_validator(mode="after")
    def _example_is_allowed(self) -> Self:
        if self.example is None:
            return self
        if (problem := self.signature.tensors.dims_problem(self.example)) is not None:
            raise ValueError(f"example with {problem}")
        images = isinstance(self.signature, Signature)
        values, unit = (math.prod(self.example.values()), "pixels") if images else (self.signature.tensors.values(self.example), "values")
        if values > LARGEST_EXAMPLE:
            raise ValueError(f"example of {values:,} {unit}, more than {LARGEST_EXAMPLE:,}")
        if self.shape is not None and not self.picture.sizes.takes(*self.shape[1:]):
            raise ValueError(f"example {self.shape}: the model takes {self.picture.sizes.text}: give an allowed height and width")
        return self

    @property
    def picture(self) -> Signature:
        """The signature of an image model. Raises ArtifactError for one with named tensors."""
        if isinstance(self.signature, Signature):
            return self.signature
        raise ArtifactError(
            f"its model takes named tensors ({self.signature.text}), and an image model is needed here: call it from Python "
            "(`muntin.load`, with a dictionary of arrays), or use `muntin verify`, `bench`, `profile` or `export --standalone`"
        )

    @property
    def named(self) -> TensorSignature | None:
        """The signature of a model with named tensors; None for one of images."""
        return self.signature if isinstance(self.signature, TensorSignature) else None

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """The (B, H, W) of the example of an image model."""
        example = self.example
        images = example is not None and isinstance(self.signature, Signature)
        return (example["batch"], example["height"], example["width"]) if example is not None and images else None

    @property
    def integers(self) -> bool:
        """True if any layer is to run on integer kernels."""
        return any(layer.integer_activations for layer in self.layers)

    def tolerance(self, engine: str, precision: str) -> GoldenTolerance | None:
        """Tolerance of an engine in a precision, or None. A provider ("onnxruntime-cuda") has its family's ("onnxruntime")."""
        family = self.golden_tolerance.get(engine.partition("-")[0], {})  # type: ignore[call-overload]
        tolerance: GoldenTolerance | None = family.get(precision)
        return tolerance


def render_manifest(manifest: Manifest) -> tuple[Manifest, bytes]:
    """Returns the manifest with its digest, and the bytes of its file.

    Raises ArtifactError for a figure that JSON cannot hold (NaN, infinity), and for more than `LARGEST_MANIFEST` bytes.
    """
    content = manifest.model_dump(mode="json", exclude={"sha256"})
    try:
        digest = _content_digest(content)
    except ValueError as error:
        raise ArtifactError(
            f"the manifest holds a value that JSON cannot ({_first_line(error)}): record finite numbers, or leave the entry out"
        ) from error
    text = json.dumps(content | {"sha256": digest}, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    if len(text) > LARGEST_MANIFEST:
        raise ArtifactError(f"the manifest takes {len(text):,} bytes, more than the {LARGEST_MANIFEST:,} that are read: record less")
    return manifest.model_copy(update={"sha256": digest}), text


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Reads the content of `manifest.json`. `where`: its name in errors. Raises ArtifactError if altered, newer, or not a manifest."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: not a JSON document ({_first_line(error)}): copy or export the artefact again") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise ArtifactError(f"{where}: no artefact manifest (no `format` number in it): name a directory that muntin exported")
    if content["format"] > FORMAT:
        raise ArtifactError(f"{where}: artefact format {content['format']} is newer than this muntin reads ({FORMAT}): upgrade muntin")
    if content["format"] < FORMAT:
        raise ArtifactError(f"{where}: made by an earlier version: export again")
    recorded = content.pop("sha256", None)
    try:
        digest = _content_digest(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: altered ({_first_line(error)}): copy or export the artefact again") from error
    if digest != recorded:
        raise ArtifactError(f"{where}: its content is not what its sha256 says, so it was altered: copy or export the artefact again")
    try:
        return Manifest.model_validate_json(json.dumps(content | {"sha256": digest}))
    except ValidationError as error:
        raise ArtifactError(f"{where}: {field_error(error)}: export the artefact again") from error


def field_error(error: ValidationError) -> str:
    """Name of the first wrong field, and its error."""
    first = error.errors(include_url=False)[0]
    return f"`{'.'.join(str(part) for part in first['loc'])}`: {first['msg']}"


def _content_digest(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
