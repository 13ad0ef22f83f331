"""The record of the changes that compression made to a model: written by `compression`, stored in checkpoints and by `muntin.save`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_serializer, model_validator

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One layer under one compression pass. A pass returns a change for each layer that it examined, also for those it kept."""

    layer: str
    """Dotted name in the model."""
    pass_: str
    """The pass: `fold`, `quantize`, ..."""
    done: str
    """The layer's new form, or `kept`."""
    reason: str = ""
    """Why the layer was kept."""
    note: str = ""
    """Why the result is uncertain."""
    ranks: tuple[int, ...] = ()
    """Ranks of the factored layer."""
    sqnr_db: float | None = None
    """Signal over noise of the layer's output after the pass, on calibration images; None if it was not measured."""

    @property
    def kept(self) -> bool:
        """True if the pass left the layer as it was."""
        return self.done == "kept"


class OperationRecord(BaseModel):
    """One operation that is quantised, or in quantisation-aware training.

    In JSON: a list of the bits and a 0 or 1 for each grid; an object if there are zero points.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Annotated[int, Field(ge=0, le=8)]
    """Weight bits; 0 for a product, which has no weight."""
    unsigned: Annotated[tuple[bool, ...], Field(max_length=2)]
    """For each activation grid: True if it is unsigned. Empty where export is to calibrate the input."""
    zero_points: Annotated[tuple[Annotated[int, Field(ge=0, le=255)], ...], Field(max_length=2)] = ()
    """For each activation grid in training: the level of the value 0. Empty if all are 0, and for integers, whose tensors hold it."""

    @model_validator(mode="after")
    def _check(self) -> OperationRecord:
        if self.zero_points and len(self.zero_points) != len(self.unsigned):
            raise ValueError(f"{len(self.zero_points)} zero_points for {len(self.unsigned)} grids")
        return self

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"bits": value[0], "unsigned": value[1:]} if isinstance(value, list) and value else value

    @model_serializer
    def _to_list(self) -> list[int] | dict[str, Any]:
        if self.zero_points:
            return {"bits": self.bits, "unsigned": list(self.unsigned), "zero_points": list(self.zero_points)}
        return [self.bits, *map(int, self.unsigned)]


class TrainedRecord(OperationRecord):
    """One operation in quantisation-aware training, whose inputs have grids."""

    unsigned: Annotated[tuple[bool, ...], Field(min_length=1, max_length=2)]


class TableRecord(BaseModel):
    """One embedding of integers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Annotated[int, Field(ge=2, le=8)]
    columns: PositiveInt
    """Columns that share a scale."""


class PruningRecord(BaseModel):
    """A model before its first pruning: shares and budgets of later runs of `prune` count from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: Annotated[int, Field(ge=0)]
    macs: Annotated[int, Field(ge=0)]
    """Multiply-adds of its layers for one row of the example."""
    channels: dict[str, PositiveInt]
    """Output channels of the first layer of each group of layers."""
    heads: dict[str, dict[str, PositiveInt]] = {}
    """Attributes that were lowered with heads of attention: by module and name, their values."""
    split: tuple[str, ...] = ()
    """The attentions of PyTorch that were written with a layer for each product, by name."""

    def with_heads(self, heads: Mapping[str, Mapping[str, int]], split: Sequence[str]) -> PruningRecord:
        """The record with more lowered attributes and split attentions."""
        lowered = {name: {**self.heads.get(name, {}), **heads.get(name, {})} for name in {**self.heads, **heads}}
        return self.model_copy(update={"heads": lowered, "split": (*self.split, *split)})


class ConvolutionRecord(BaseModel):
    """A convolution with a padding or weights of its own, written as a padding and a plain one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stride: tuple[PositiveInt, PositiveInt]
    padding: tuple[int, int]
    dilation: tuple[PositiveInt, PositiveInt]
    pads: tuple[int, ...] | None = None
    """Padding before the convolution: left, right, top, bottom; empty: as much as TensorFlow's "SAME" has; None: none."""
    mode: PaddingMode = "zeros"


class Structure(BaseModel):
    """The structure that compression gave to a model, and how. Names of layers are dotted names in the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    widths: dict[str, PositiveInt] = {}
    """Hidden channels of each gated unit, after closed channels were cut. Empty in checkpoints of versions that cut none."""
    sizes: dict[str, dict[str, PositiveInt]] = {}
    """Sizes of each layer and norm of a pruned model, by the names of their attributes (`out_features`, `groups`, ...)."""
    pruning: PruningRecord | None = None
    """The model before its first pruning; None if it is not pruned."""
    convolutions: dict[str, ConvolutionRecord] = {}
    """Convolutions that were written as a padding and a plain one."""
    factors: Annotated[tuple[str, ...], Field(max_length=0, exclude=True)] = ()
    """Empty in records of earlier versions that can be read."""
    ranks: dict[str, Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=2)]]
    """Ranks of each factored layer."""
    qat: dict[str, TrainedRecord] | None = None
    """Operations in quantisation-aware training; None where there are none."""
    integers: dict[str, OperationRecord] = {}
    """Quantised operations."""
    tables: dict[str, TableRecord] = {}
    """Embeddings of integers."""
    sparsity: dict[str, str] = {}
    """Layers with a pattern of zeros: "2:4"."""
    changes: tuple[Change, ...]
    """Changes of all passes."""

    @property
    def folded(self) -> bool:
        """True if norms and gates were folded."""
        return any(change.pass_ == "fold" for change in self.changes)


class CompressionRecord(Structure):
    """The structure of a checkpoint's model, which `muntin compress` made of a run's."""

    origin: str
    """sha256 of the averaged weights that compression started from."""
    steps: PositiveInt
    """Steps of the run's training."""


class SavedRecord(Structure):
    """The structure of a model that `muntin.save` wrote."""

    format: Literal[1] = 1
    model: str
    """Class of the model, for error messages."""
    weights: str
    """sha256 of the file of weights."""
