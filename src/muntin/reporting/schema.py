"""The shape of `report.json`, and the one line a report that has another shape is answered with.

Everything measured is a finite number or null: a report with a NaN in it is a bug to see now, not an empty cell to explain later.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from muntin.artifact.classes import ClassInfo
from muntin.errors import MuntinError

FORMAT = 1

Task = Literal["segment", "classify", "restore"]


def _relative(path: str) -> str:
    # The page links these and may be opened anywhere: a path out of its folder would break there, or lead to a stranger's file.
    if "\\" in path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError("a picture's path is relative to the report's folder, with forward slashes and without '..'")
    return path


def _iso(moment: str) -> str:
    try:
        datetime.fromisoformat(moment)
    except ValueError:
        raise ValueError("a moment is written as in 2026-11-24T16:30:00+00:00 (ISO 8601)") from None
    return moment


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
Rank = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
RelativePath = Annotated[str, Field(min_length=1), AfterValidator(_relative)]
Moment = Annotated[str, AfterValidator(_iso)]


class Record(BaseModel):
    """What every part of a report is: frozen, without unknown keys, without NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Hardware(Record):
    """The machine that measured, and the versions it measured with; keys beyond these four are free, plain values."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, str | int | float | bool | None]

    cpu: Text
    cores: Annotated[int, Field(ge=1)]
    memory_gib: Amount
    features: tuple[str, ...]


class Step(Record):
    """One stage of the model. `miou` is the task's metric: mean IoU, accuracy (classify) or PSNR in dB (restore)."""

    name: Text
    miou: float
    iou: dict[str, float | None] = Field(default_factory=dict)
    params: Count
    bytes: Count
    gmacs: Amount
    latency_ms: Amount | None = None
    engine: Text


class LatencyRow(Record):
    """One thing timed, in milliseconds a call."""

    name: Text
    engine: Text
    median_ms: Amount
    p90_ms: Amount


class Latency(Record):
    """Timings taken in one run, at one size (pixels), interleaved over `rounds`; the first row is the baseline."""

    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    rounds: Annotated[int, Field(ge=1)]
    rows: Annotated[tuple[LatencyRow, ...], Field(min_length=1)]


class TrainingRow(Record):
    """One logged optimiser step."""

    step: Count
    loss: float
    learning_rate: Amount
    images_per_s: Amount | None = None


class ValidationRow(Record):
    """One validation; `miou` and `iou` as in `Step`."""

    step: Count
    miou: float
    iou: dict[str, float | None] = Field(default_factory=dict)


class RankRow(Record):
    """One Linear or Conv2d of the original model: its `full` rank and the `ranks` it was cut to, one number each, or two for Tucker-2.

    `ranks` is empty where the layer was kept dense, for the `reason`.
    """

    name: Text
    kind: Text
    full: Annotated[tuple[Rank, ...], Field(min_length=1, max_length=2)]
    ranks: Annotated[tuple[Rank, ...], Field(max_length=2)] = ()
    parameters_before: Count
    parameters_after: Count
    reason: str = ""

    @model_validator(mode="after")
    def _cut(self) -> Self:
        if self.ranks and len(self.ranks) != len(self.full):
            raise ValueError(f"ranks {list(self.ranks)} and full {list(self.full)} have different lengths; ranks has as many, or none")
        if any(rank > full for rank, full in zip(self.ranks, self.full, strict=False)):
            raise ValueError(f"ranks {list(self.ranks)} exceed full {list(self.full)}; a rank is at most the full one")
        return self


class Histogram(Record):
    """The input values of a layer in bins of equal width from `low` to `high`, and the range that its 8-bit grid covers."""

    low: float
    high: float
    counts: Annotated[tuple[Count, ...], Field(min_length=2, max_length=128)]
    grid_low: float
    grid_high: float

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        if not self.grid_low < self.grid_high:
            raise ValueError(f"grid_low {self.grid_low} is not below grid_high {self.grid_high}")
        return self


class LayerRow(Record):
    """One layer: what was asked for (bits of weights and activations, null = not quantised) and what the engine says it ran in.

    `clipped` is the share of the calibration's input values outside the 8-bit grid; only a few of the worst layers carry a `histogram`
    of them. `note` says why a layer has more bits than the others.
    """

    name: Text
    kind: Text
    weight_bits: Annotated[int, Field(ge=1, le=64)]
    activation_bits: Annotated[int, Field(ge=1, le=64)] | None = None
    executed: str | None = None
    parameters: Count
    macs: Count | None = None
    sqnr_db: float | None = None
    clipped: Share | None = None
    histogram: Histogram | None = None
    note: str = ""


class Example(Record):
    """Pictures of one example, each a path relative to the report's folder."""

    name: Text
    image: RelativePath
    truth: RelativePath | None = None
    prediction: RelativePath | None = None
    difference: RelativePath | None = None


class Pictures(Record):
    """The pictures of a report: one of the whole, and examples."""

    overlay: RelativePath | None = None
    examples: tuple[Example, ...] = ()


class Report(Record):
    """A whole report: the first step is the FP32 model, the last one what is deployed; `ranks` are of the first, `layers` of the last."""

    format: Literal[1] = 1
    title: Text
    created: Moment
    muntin: Text
    hardware: Hardware
    task: Task
    seconds: dict[str, Amount] = Field(default_factory=dict)
    classes: tuple[ClassInfo, ...] = ()
    steps: Annotated[tuple[Step, ...], Field(min_length=1)]
    latency: Latency | None = None
    agreement: Share | None = None
    training: tuple[TrainingRow, ...] = ()
    validation: tuple[ValidationRow, ...] = ()
    ranks: tuple[RankRow, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    pictures: Pictures | None = None
    notes: tuple[str, ...] = ()
    recipe: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [entry.name for entry in self.classes]
        _unique("classes", names)
        _unique("steps", [step.name for step in self.steps])
        _unique("ranks", [row.name for row in self.ranks])
        rows: list[tuple[str, Step | ValidationRow]] = [(f"steps[{index}]", step) for index, step in enumerate(self.steps)]
        rows += [(f"validation[{index}]", row) for index, row in enumerate(self.validation)]
        for where, row in rows:
            unknown = sorted(row.iou.keys() - set(names))
            if unknown:
                raise ValueError(f"{where}.iou names the class {unknown[0]!r}; the report's classes are {names}")
            figures = {f"{where}.miou": row.miou} | {f"{where}.iou[{name!r}]": value for name, value in row.iou.items()}
            for place, value in figures.items():
                if self.task != "restore" and value is not None and not 0 <= value <= 1:
                    raise ValueError(f"{place} is {value}; the metric of a {self.task} report lies in 0 to 1")
        return self


def parse_report(report: Report | Mapping[str, Any]) -> Report:
    """The report as checked values.

    Raises MuntinError, in one line, with the place of the first mistake, what is allowed there and how many more mistakes there are.
    """
    if isinstance(report, Report):
        return report
    if not isinstance(report, Mapping):
        raise MuntinError(f"a report is an object with the keys {', '.join(Report.model_fields)}; this one is a {type(report).__name__}")
    came = report.get("format", FORMAT)
    if isinstance(came, int) and came > FORMAT:
        raise MuntinError(f"report format {came} is newer than this muntin reads ({FORMAT}): upgrade muntin")
    try:
        return Report.model_validate(dict(report))
    except ValidationError as error:
        raise MuntinError(_one_line(error)) from None


def report_values(report: Report) -> dict[str, Any]:
    """The report as plain values for `report.json`, in the schema's order.

    A recipe only where there is one; `ranks` and a layer's `clipped`, `histogram` and `note` only where they were given, so that a report
    without them stays the file that it was before there were such keys.
    """
    values = report.model_dump(mode="json")
    if report.recipe is None:
        del values["recipe"]
    if "ranks" not in report.model_fields_set:
        del values["ranks"]
    for row, layer in zip(values["layers"], report.layers, strict=True):
        for key in {"clipped", "histogram", "note"} - layer.model_fields_set:
            del row[key]
    return values


def _unique(where: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where} holds the name {twice[0]!r} twice; names are unique")


def _one_line(error: ValidationError) -> str:
    found = error.errors(include_url=False)
    first, more = found[0], len(found) - 1
    location, came = first["loc"], _short(first["input"])
    if first["type"] == "missing":
        text = f"{_place(location)} is missing"
    elif first["type"] == "extra_forbidden":
        allowed = list(_record_at(location[:-1]).model_fields)
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed here: {', '.join(allowed)}"
        text = f"{_place(location)} is an unknown key; {hint}"
    elif first["type"] == "finite_number":
        text = f"{_place(location)} is {came}; a report holds finite numbers only, and null for what was not measured"
    elif first["type"] == "value_error" and not location:
        text = first["msg"].removeprefix("Value error, ")
    else:
        reason = first["msg"].removeprefix("Value error, ")
        text = f"{_place(location)} is {came}; {reason[:1].lower()}{reason[1:]}"
    suffix = f" (and {more} more)" if more else ""
    return " ".join(f"the report does not fit: {text}{suffix}".split())


def _place(location: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" if part.isidentifier() else f"[{part!r}]" for part in location]
    return "".join(parts).removeprefix(".") or "the report"


def _record_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    record: type[BaseModel] = Report
    for part in location:
        if isinstance(part, str) and part in record.model_fields:
            record = _record_in(record.model_fields[part].annotation) or record
    return record


def _record_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((record for part in get_args(annotation) if (record := _record_in(part))), None)


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
