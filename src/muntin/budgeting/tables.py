"""The table of all forms of all layers, from which plans are chosen, in a CSV file that a person can read.

    # {"format": 3, "model": digest, "calibration": digest, "latency": hardware, "complete": true, "reasons": {layer: [why ...]}}
    layer,rank,bits,parameters,bytes,macs,harm,ms

An empty rank: not factored. Bits 16: floats. An empty ms: not measured; 0 of embeddings, whose rows are looked up.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from muntin.artifact.atomic_files import write_files
from muntin.budgeting.budget import Objective
from muntin.budgeting.forms.harm import BLIND, measure_harm
from muntin.budgeting.forms.latency import latency_settings, measured_latencies
from muntin.budgeting.forms.layer_forms import KEPT, FormCost, FormLayers, embedding_forms, layer_forms
from muntin.budgeting.forms.plans import Form, Plan
from muntin.compression.allocation import Option, allocate
from muntin.compression.calibration import calibration_list
from muntin.compression.rewrite import is_kept
from muntin.errors import DataError, MuntinError
from muntin.models.eager import ModelInputs, check_eager, tensors_of

FILE = "tables.csv"
FORMAT = 3
TableProgress = Callable[[str, int, int], None]
"""Called with what is being measured, the steps done and their number."""
BYTES_SHARE = 0.05
"""Milliseconds for which all bytes of the float layers stand, a share of those layers' time: of forms as fast, the smaller one is taken."""
COLUMNS = ("layer", "rank", "bits", "parameters", "bytes", "macs", "harm", "ms")


@dataclass(frozen=True, kw_only=True)
class FormRow:
    """One form of one layer. `macs`: for one row of inputs. `harm`: of `measure_harm`. `ms`: in the engine, None if not measured."""

    form: Form
    parameters: int
    bytes: int
    macs: float
    harm: float
    ms: float | None = None

    def cost(self, objective: Objective) -> float:
        """Bytes, or milliseconds, which must have been measured."""
        if objective == "size":
            return self.bytes
        if self.ms is None:
            raise ValueError('the table has no milliseconds: build it with objective="latency"')
        return self.ms


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The forms of each layer and embedding by dotted name. `reasons`: why a layer has no integer form or no factored one.

    `model`, `calibration`: digests of what was measured. `latency`: hardware and engine of the milliseconds, None without them.
    `complete`: False while layers are missing.
    """

    layers: Mapping[str, tuple[FormRow, ...]]
    reasons: Mapping[str, tuple[str, ...]]
    model: str
    calibration: str
    latency: Mapping[str, Any] | None = None
    complete: bool = False

    def options(self, objective: Objective) -> dict[str, list[Option]]:
        """Harm and cost of each layer's forms, in the order of `layers`; for latency with `BYTES_SHARE` for bytes."""
        each = 0.0
        if objective == "latency":
            layers = self.layers.values()
            most_ms = sum(max(row.cost(objective) for row in rows) for rows in layers)
            each = BYTES_SHARE * most_ms / max(1, sum(max(row.bytes for row in rows) for rows in layers))
        return {name: [Option(row.cost(objective) + each * row.bytes, (row.harm,)) for row in rows] for name, rows in self.layers.items()}

    def without(self, keep: Sequence[str], dense: Sequence[str]) -> Self:
        """The table with one form, unfactored and in 16 bits, of the layers named in `keep`, and without ranks of those in `dense`."""
        present = Form(None, KEPT)
        layers = {
            name: tuple(
                row
                for row in rows
                if row.form == present or not (is_kept(name, keep) or (row.form.rank is not None and is_kept(name, dense)))
            )
            for name, rows in self.layers.items()
        }
        return replace(self, layers=layers)

    def write(self, folder: Path) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        head = {
            "format": FORMAT,
            "model": self.model,
            "calibration": self.calibration,
            "latency": self.latency,
            "complete": self.complete,
            "reasons": {name: list(reasons) for name, reasons in self.reasons.items()},
        }
        text = io.StringIO()
        text.write(f"# {json.dumps(head)}\n")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, rows in self.layers.items():
            for row in rows:
                rank, ms = "" if row.form.rank is None else row.form.rank, "" if row.ms is None else repr(row.ms)
                writer.writerow([name, rank, row.form.bits, row.parameters, row.bytes, repr(row.macs), repr(row.harm), ms])
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, {FILE: text.getvalue().encode()})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the file. Raises DataError if it is missing or not of this format."""
        file = folder / FILE
        try:
            first, _, rest = file.read_text(encoding="utf-8").partition("\n")
            head = json.loads(first.removeprefix("#"))
            if head["format"] != FORMAT:
                raise DataError(f"{file}: format {head['format']}; this version reads {FORMAT}: delete the file to measure again")
            layers: dict[str, list[FormRow]] = {}
            for entry in csv.DictReader(io.StringIO(rest)):
                layers.setdefault(entry["layer"], []).append(_row(entry))
            return cls(
                layers={name: tuple(rows) for name, rows in layers.items()},
                reasons={name: tuple(reasons) for name, reasons in head["reasons"].items()},
                model=head["model"],
                calibration=head["calibration"],
                latency=head["latency"],
                complete=head["complete"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file}: not a table of forms ({error}): delete the file to measure again") from error


def _row(entry: Mapping[str, str]) -> FormRow:
    return FormRow(
        form=Form(int(entry["rank"]) if entry["rank"] else None, int(entry["bits"])),
        parameters=int(entry["parameters"]),
        bytes=int(entry["bytes"]),
        macs=float(entry["macs"]),
        harm=float(entry["harm"]),
        ms=float(entry["ms"]) if entry["ms"] else None,
    )


def build_tables(
    model: nn.Module,
    batches: Iterable[ModelInputs],
    folder: Path | str,
    *,
    objective: Objective,
    threads: int | None = None,
    progress: TableProgress | None = None,
) -> Tables:
    """Measure the forms of every Linear, Conv2d and Embedding of a model, or read them from `folder` if they were measured there.

    The file is written after each layer, and an interrupted measurement goes on from it. The model is not changed. For "latency" also the
    milliseconds on this machine, with `threads` of the engine (None: the usable physical
    cores); they are measured again on another one. Costs those of `layer_forms`, `measure_harm` and `measured_latencies`. Raises
    `MuntinError` if the folder has the table of another model or other calibration batches.
    """
    check_eager(model)
    calibration = calibration_list(batches)
    report = progress or (lambda step, done, total: None)
    digests = {"model": model_digest(model), "calibration": _digest(tensor for batch in calibration for tensor in tensors_of(batch))}
    folder = Path(folder)
    tables = Tables(layers={}, reasons={}, model=digests["model"], calibration=digests["calibration"])
    if (folder / FILE).exists():
        tables = Tables.read(folder)
        _check_same(tables, digests, folder)
    engine = latency_settings(threads)
    if tables.complete and (objective == "size" or tables.latency == engine):
        return tables
    report("forms", 0, 1)
    layers = layer_forms(model, calibration)
    if not tables.complete:
        tables = _measure(layers, tables, folder, report)
    if objective == "latency":
        latencies = measured_latencies(layers.layers, threads=threads, progress=lambda done, total: report("latency", done, total))
        timed = {
            name: tuple(replace(row, ms=0.0 if name in layers.embeddings else latencies[name][row.form]) for row in rows)
            for name, rows in tables.layers.items()
        }
        tables = replace(tables, layers=timed, latency=engine)
        tables.write(folder)
    return tables


def _check_same(tables: Tables, digests: Mapping[str, str], folder: Path) -> None:
    what = {"model": "another model, or other weights", "calibration": "other calibration batches"}
    different = [what[key] for key, digest in digests.items() if getattr(tables, key) != digest]
    if different:
        raise MuntinError(f"{folder / FILE} was measured with {' and '.join(different)}: give another folder, or delete the file")


def _measure(layers: FormLayers, tables: Tables, folder: Path, report: TableProgress) -> Tables:
    """Measure the layers that a table lacks, and write it after each of them."""
    costs: dict[str, Mapping[Form, FormCost]] = {name: one.forms for name, one in layers.layers.items()}
    costs |= {name: embedding_forms(table) for name, table in layers.embeddings.items()}
    rows, reasons = dict(tables.layers), dict(tables.reasons)

    def written(*, complete: bool = False) -> Tables:
        table = replace(tables, layers=rows, reasons={name: given for name, given in reasons.items() if given}, complete=complete)
        table.write(folder)
        return table

    for name, harms in measure_harm(layers, measured=tables.layers, progress=lambda done, total: report("harm", done, total)):
        rows[name] = tuple(
            FormRow(form=form, parameters=cost.parameters, bytes=cost.bytes, macs=cost.macs, harm=harms[form])
            for form, cost in costs[name].items()
            if form in harms
        )
        if (one := layers.layers.get(name)) is not None:
            reasons[name] = (*one.reasons, *([BLIND] if len(harms) < len(one.forms) else []))
        written()
    return written(complete=True)


def assign_forms(tables: Tables, limit_of_harm: float, objective: Objective) -> Plan:
    """The forms of least total cost, as in `Tables.options`, whose total harm is within the limit. Raises the errors of `allocate`."""
    found = allocate(tables.options(objective), [limit_of_harm])
    forms = {name: tables.layers[name][index].form for name, index in found.picked.items()}
    return Plan(forms=forms, harm=found.used[0], cost=found.cost, gap=found.gap)


def uniform_plan(tables: Tables, bits: int, objective: Objective) -> Plan:
    """Return the plan of these bits for each layer that has them, unfactored; other layers stay as they are."""
    names = {name: {row.form: row for row in rows} for name, rows in tables.layers.items()}
    chosen = {name: rows.get(Form(None, bits), rows[Form(None, KEPT)]) for name, rows in names.items()}
    harm, cost = sum(row.harm for row in chosen.values()), sum(row.cost(objective) for row in chosen.values())
    return Plan(forms={name: row.form for name, row in chosen.items()}, harm=harm, cost=cost)


class TablePlans:
    """The plans of least cost of one width, by the tables of the forms of its layers, which are measured if the folder has none.

    Bytes include those of the other parameters, in 16 bits: widths differ in them, too. `keep`, `dense`: as of `compress`.
    """

    def __init__(
        self, width: float, model: nn.Module, batches: Sequence[ModelInputs], folder: Path, objective: Objective, report: TableProgress,
        *, keep: Sequence[str] = (), dense: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.width, self.objective = width, objective
        self.tables = build_tables(model, batches, folder, objective=objective, progress=report).without(keep, dense)
        rows = self.tables.layers.values()
        self._least, self._most = (sum(which(row.harm for row in layer) for layer in rows) for which in (min, max))
        chosen = sum(next(row.parameters for row in layer if row.form == Form(None, KEPT)) for layer in rows)
        others = sum(parameter.numel() for parameter in model.parameters()) - chosen
        self._fixed = 2 * others if objective == "size" else 0

    def propose(self, limit: float) -> Plan | None:
        limit = min(limit, self._most)
        if limit < self._least:
            return None
        plan = assign_forms(self.tables, limit, self.objective)
        return replace(plan, width=self.width, cost=plan.cost + self._fixed)

    def int8(self) -> Plan:
        plan = uniform_plan(self.tables, 8, self.objective)
        return replace(plan, width=self.width, cost=plan.cost + self._fixed)


def model_digest(model: nn.Module) -> str:
    """A digest of a model's modules and of the values of its parameters and buffers."""
    return _digest(model.state_dict().values(), str(model), *model.state_dict())


def _digest(tensors: Iterable[Tensor], *texts: str) -> str:
    digest = hashlib.sha256("\n".join(texts).encode())
    for tensor in tensors:
        digest.update(f"\n{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
