"""The schema of `report.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from muntin.artifact.answers import ANSWERS, Task
from muntin.artifact.classes import ClassInfo
from muntin.reporting.front.schema import FrontRecord
from muntin.reporting.records import Amount, Count, Hardware, IsoTime, PositiveCount, Record, Share, Text, check_unique, parse_record
from muntin.runtime.profiling.contention import BUSY

FORMAT = 1


def _relative(path: str) -> str:
    # The page links these files and may be opened on another machine: a path out of its folder would break there or lead to other files.
    if "\\" in path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError("a picture's path is relative to the report's folder, with forward slashes and without '..'")
    return path


RelativePath = Annotated[str, Field(min_length=1), AfterValidator(_relative)]


class StepRecord(Record):
    """One stage of the model. `miou` is the task's metric: mean IoU, accuracy (classify) or PSNR in dB (restore); `iou` is per class.

    `weights`: bytes of the packed weights alone, comparable from step to step. `bytes`: bytes of all files that the model needs on the
    disk, for a deployed model with its graph and golden pairs; null for a step that exists only in memory.
    """

    name: Text
    miou: float
    iou: dict[str, float | None] = Field(default_factory=dict)
    params: Count
    weights: Count | None = None
    bytes: Count | None
    gmacs: Amount
    latency_ms: Amount | None = None
    engine: Text


class LatencyRow(Record):
    """One timed model, in milliseconds a call."""

    name: Text
    engine: Text
    median_ms: Amount
    p90_ms: Amount


class TimingsRecord(Record):
    """Timings at one size (pixels), interleaved over `rounds`.

    `others`: cores' worth of CPU time that other processes used meanwhile; null where unknown.
    """

    height: PositiveCount
    width: PositiveCount
    rounds: PositiveCount
    others: Amount | None = None

    @property
    def disturbed(self) -> bool:
        """Return whether other processes used so much of the CPUs that times are too long and ratios doubtful."""
        return self.others is not None and self.others >= BUSY


class LatencyRecord(TimingsRecord):
    """Timings of one run; the first row is the baseline."""

    rows: Annotated[tuple[LatencyRow, ...], Field(min_length=1)]


class ArtifactRow(Record):
    """One deployed artefact, or the FP32 model that the artefacts are compared with.

    `validation`, `test`: the task's metric on these splits. `same_labels`: share of the test labels that equal those of FP32. `bytes`: of
    all its files. `peak_mib`: added memory of opening it and a first call, null where it was not measured.
    """

    name: Text
    path: Text
    engine: Text
    validation: float
    test: float
    same_labels: Share
    bytes: Count
    median_ms: Amount
    p90_ms: Amount
    peak_mib: Amount | None = None


class ArtifactsRecord(TimingsRecord):
    """The deployed artefacts of a run after the FP32 model, measured together at one size, which was chosen for the `size_reason`.

    `take`: the name of the one to take, chosen by the `rule`, in which the test score has no part. `samples`: of each split.
    """

    size_reason: Text
    samples: dict[str, Count]
    rows: Annotated[tuple[ArtifactRow, ...], Field(min_length=2)]
    take: Text
    rule: Text

    @model_validator(mode="after")
    def _named(self) -> Self:
        names = [row.name for row in self.rows]
        check_unique("artifacts.rows", names)
        if self.take not in names[1:]:
            raise ValueError(f"artifacts.take is {self.take!r}; the artefacts are {names[1:]}")
        return self


class TrainingRow(Record):
    """One logged optimiser step."""

    step: Count
    seconds: Amount | None = None
    loss: float
    learning_rate: Amount
    images_per_s: Amount | None = None
    waiting: Share | None = None
    """Share of the time spent waiting for batches."""


class ValidationRow(Record):
    """One validation; `miou` and `iou` as in `StepRecord`."""

    step: Count
    miou: float
    iou: dict[str, float | None] = Field(default_factory=dict)


class RankRow(Record):
    """One Linear or Conv2d of the original model: its `full` rank and the `ranks` it was cut to, one number each, or two for Tucker-2.

    `ranks` is empty where the layer was kept dense, for the `reason`.
    """

    name: Text
    kind: Text
    full: Annotated[tuple[PositiveCount, ...], Field(min_length=1, max_length=2)]
    ranks: Annotated[tuple[PositiveCount, ...], Field(max_length=2)] = ()
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


class InputHistogram(Record):
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
    """One layer: the requested bits of weights and activations (null: not quantised), and the precision that the engine reports.

    `clipped` is the share of the calibration's input values outside the 8-bit grid; only a few of the worst layers have a `histogram` of
    these values. `note` says why a layer has more bits than the others.
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
    histogram: InputHistogram | None = None
    note: str = ""


class Example(Record):
    """Pictures of one example, each a path relative to the report's folder."""

    name: Text
    image: RelativePath
    truth: RelativePath | None = None
    prediction: RelativePath | None = None
    difference: RelativePath | None = None


class Baseline(Record):
    """Scores to compare restored pictures with: of the input as it is, or enlarged. `score`: PSNR, dB; SSIM null where not computed."""

    name: Text
    score: float
    ssim: float | None = None
    deployed_ssim: float | None = None


class ReportPictures(Record):
    """The pictures of a report: one of the whole data, examples, and the worst mistakes."""

    overlay: RelativePath | None = None
    examples: tuple[Example, ...] = ()
    worst: tuple[Example, ...] = ()


class Mistake(Record):
    """Pixels or pictures of a class that were predicted as another one."""

    truth: Text
    predicted: Text
    count: PositiveCount


class ConfusionRecord(Record):
    """The mistakes of the deployed model on the test split. `counts`: pixels or pictures by true class (rows) and predicted class, in the
    order of the report's classes; null for many classes. `mistakes`: the most frequent ones."""

    counts: tuple[tuple[Count, ...], ...] | None = None
    mistakes: tuple[Mistake, ...] = ()


class SplitRecord(Record):
    """The pictures of a split: their number, and the names of the first ones."""

    count: Count
    names: tuple[Text, ...] = ()


class Report(Record):
    """A whole report. The first step is the FP32 model, which `ranks` describe; the last is the deployed model, which `layers` describe.

    `counted`: height and width of the picture for which multiply-adds are counted. `search`: the models that were tried within an accuracy
    budget.
    """

    format: Literal[1] = 1
    title: Text
    created: IsoTime
    muntin: Text
    hardware: Hardware
    task: Task
    seconds: dict[str, Amount] = Field(default_factory=dict)
    classes: tuple[ClassInfo, ...] = ()
    steps: Annotated[tuple[StepRecord, ...], Field(min_length=1)]
    baseline: Baseline | None = None
    artifacts: ArtifactsRecord | None = None
    latency: LatencyRecord | None = None
    agreement: Share | None = None
    training: tuple[TrainingRow, ...] = ()
    validation: tuple[ValidationRow, ...] = ()
    ranks: tuple[RankRow, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    counted: tuple[PositiveCount, PositiveCount] | None = None
    pictures: ReportPictures | None = None
    confusion: ConfusionRecord | None = None
    search: FrontRecord | None = None
    splits: dict[str, SplitRecord] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    recipe: str | None = None

    @property
    def disturbed(self) -> bool:
        """Return whether the latencies were measured beside other work (`LatencyRecord.disturbed`)."""
        return self.latency is not None and self.latency.disturbed

    @property
    def ends(self) -> tuple[StepRecord, ...]:
        """The steps of the headline: the first and the last."""
        return (self.steps[0], self.steps[-1]) if len(self.steps) > 1 else self.steps

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [entry.name for entry in self.classes]
        check_unique("classes", names)
        check_unique("steps", [step.name for step in self.steps])
        check_unique("ranks", [row.name for row in self.ranks])
        counts = None if self.confusion is None else self.confusion.counts
        if counts is not None and {len(counts), *map(len, counts)} != {len(names)}:
            raise ValueError(f"confusion.counts is no table of {len(names)} by {len(names)}, which are the classes")
        rows: list[tuple[str, StepRecord | ValidationRow]] = [(f"steps[{index}]", step) for index, step in enumerate(self.steps)]
        rows += [(f"validation[{index}]", row) for index, row in enumerate(self.validation)]
        for where, row in rows:
            unknown = sorted(row.iou.keys() - set(names))
            if unknown:
                raise ValueError(f"{where}.iou names the class {unknown[0]!r}; the report's classes are {names}")
            figures = {f"{where}.miou": row.miou} | {f"{where}.iou[{name!r}]": value for name, value in row.iou.items()}
            for place, value in figures.items():
                if ANSWERS[self.task].score.share and value is not None and not 0 <= value <= 1:
                    raise ValueError(f"{place} is {value}; the metric of a {self.task} report lies in 0 to 1")
        return self


def parse_report(report: Report | Mapping[str, Any]) -> Report:
    """Return the report as checked values.

    Raises MuntinError, one line: the place of the first mistake, the values allowed at that place and the number of other mistakes.
    """
    return parse_record(Report, report, what="report", newest=FORMAT)


def report_values(report: Report) -> dict[str, Any]:
    """Return the report as plain values for `report.json`, in the schema's order.

    `recipe` is left out where it is null. Keys that were added to the schema later (`artifacts`, `baseline`, `counted`, `ranks`,
    `confusion`, `search`, `splits`, `worst` of pictures, a step's `weights`, `others` of timings, a layer's `clipped`, `histogram` and
    `note`) are left out where they were not given, so that older reports keep their content.
    """
    values = report.model_dump(mode="json")
    if report.recipe is None:
        del values["recipe"]
    for key in {"artifacts", "baseline", "counted", "ranks", "confusion", "search", "splits"} - report.model_fields_set:
        del values[key]
    if report.pictures is not None and "worst" not in report.pictures.model_fields_set:
        del values["pictures"]["worst"]
    for key, record in (("latency", report.latency), ("artifacts", report.artifacts)):
        if record is not None and "others" not in record.model_fields_set:
            del values[key]["others"]
    for row, step in zip(values["steps"], report.steps, strict=True):
        if "weights" not in step.model_fields_set:
            del row["weights"]
    for row, layer in zip(values["layers"], report.layers, strict=True):
        for key in {"clipped", "histogram", "note"} - layer.model_fields_set:
            del row[key]
    return values
