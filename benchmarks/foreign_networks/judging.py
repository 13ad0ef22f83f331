"""Networks in their forms, as deployed, over seeds, timed in turns: what foreign.py, sparsity.py and budget.py share."""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax
from torch import nn

import muntin
from documents import Column, Document, Row, Table, columns, grouped, look_up, mean, spread
from foreign_networks.subjects import SUBJECTS, Material, Pass, Subject, parameters_of, without_padding
from harness import Run, file_name, option, threads_option
from measures import ms_in_turns
from quantizer_peers.artifacts import (
    CALIBRATION,
    Call,
    PlainModel,
    Scores,
    agreement,
    answers_of,
    convert,
    nncf_job,
    open_artifact,
    reference,
)
from quantizer_peers.data import PackagesOptions, batches, draw, held_out, parts
from segmentation_peers.deployment import bytes_of

Figures = Callable[["Judge", Mapping[str, Scores]], Row]
"""From the outputs of an artifact, by part."""
Makers = Mapping[str, Callable[[], Row]]
"""By the name of a form, what makes and judges it."""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(PackagesOptions):
    only: tuple[str, ...] = option(tuple(SUBJECTS), "networks", choices=tuple(SUBJECTS), selects=True)
    seeds: int = option(3, "number of seeds", least=1, selects=True)
    calibration: int = option(128, "calibration inputs", least=8)
    unlabelled: int = option(512, "inputs of distillation", least=16)
    steps: int = option(150, "steps of distillation", least=1)
    threads: int = threads_option()
    rounds: int = option(60, "timed calls", least=1)


class Judge:
    """One network of one seed in FP32, its inputs, and the artifacts of its forms.

    `counts`: of the held-out inputs, by the name of their part. `precision`: of float layers; None: as recorded, or as OpenVINO chooses.
    `figures`: what is measured of an artifact.
    """

    def __init__(self, subject: Subject, seed: int, run: Run, counts: Mapping[str, int], precision: str | None, figures: Figures) -> None:
        self.subject, self.seed, self.run, self.precision, self.figures = subject, seed, run, precision, figures
        self.options, packages, total = run.options, run.options.packages.resolve(), sum(counts.values())
        self.folder = (run.folder / subject.name / str(seed)).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.module: nn.Module = subject.build(packages, self.folder, seed).eval()
        self.calibration = draw(packages, subject.name, self.options.calibration, seed=seed)
        self._unlabelled = partial(draw, packages, subject.name, self.options.unlabelled, seed=seed + 1000)
        test, labels = held_out(packages, subject.name, total)
        slices = {part: slice(end - counts[part], end) for part, end in zip(counts, accumulate(counts.values()), strict=True)}
        self.inputs = {part: {name: value[rows] for name, value in test.items()} for part, rows in slices.items()}
        self.exact = {part: reference(self.module, self.folder, inputs) for part, inputs in self.inputs.items()}
        self.labels = {part: None if labels is None else labels[rows] for part, rows in slices.items()}
        self.one = parts(test)[0]

    @cached_property
    def material(self) -> Material:
        lessons, calibration = batches(self._unlabelled()), without_padding(self.calibration)
        return Material(subject=self.subject, batches=lessons, calibration=calibration, steps=self.options.steps, seed=self.seed)

    def artifact(self, name: str, form: Pass | None) -> Row:
        """Make a form (None: FP32 as it is), export it, and compare what is deployed with FP32."""
        model, material, started = copy.deepcopy(self.module), self.material, time.perf_counter()
        try:
            model = model if form is None else form(model, material)
        except muntin.MuntinError as error:
            return {"cannot": str(error)}
        seconds, path = time.perf_counter() - started, self.folder / file_name(name)
        muntin.export(model, batches(self.calibration)[0], path)
        return {"seconds": seconds, "parameters": parameters_of(model), **self.deployed(path)}

    def nncf(self, name: str, options: Mapping[str, str], control: Row | None = None) -> Row:
        """NNCF's model, the same way. `control`: of its accuracy."""
        source, path = convert(copy.deepcopy(self.module), self.calibration, self.folder), self.folder / file_name(name) / "model.xml"
        np.savez(self.folder / CALIBRATION, **self.calibration)
        job = nncf_job(self.options.nncf_python, source, self.folder / CALIBRATION, path, dict(options), control=control)
        if "refused" in job:
            return {"cannot": job["refused"]}
        return {"seconds": job["seconds"], "parameters": parameters_of(self.module), **self.deployed(path)}

    def deployed(self, path: Path) -> Row:
        call = self.opened(path)
        outputs = {part: answers_of(call, inputs) for part, inputs in self.inputs.items()}
        return {"path": str(path.relative_to(self.folder)), "bytes": bytes_of(path), **self.figures(self, outputs)}

    def opened(self, path: Path) -> Call:
        if path.suffix == ".xml":
            return PlainModel(path, self.one, precision=self.precision, threads=self.options.threads)
        return open_artifact(path, self.one, precision=self.precision or "recorded", threads=self.options.threads)[1]

    # Rows

    def facts(self) -> Row:
        """The row of the network itself."""
        labels, exact, subject = next(iter(self.labels.values())), next(iter(self.exact.values())), self.subject
        return {
            "part": "network", "network": subject.name, "description": subject.description, "judged_by": subject.judged_by,
            "fp32_bytes": 4 * parameters_of(self.module),
            "fp32_accuracy": None if labels is None else float((exact.argmax(1) == labels).mean()),
        }  # fmt: skip

    def made(self, makers: Makers) -> list[Row]:
        """A row for each form."""
        head, where = {"part": "form", "network": self.subject.name, "seed": self.seed}, f"{self.subject.name}/{self.seed}"
        return [{**head, "form": name, **self.run.row(f"{where}/{name}", make)} for name, make in makers.items()]

    def in_turns(self, calls: Mapping[str, Callable[[], Call]], **settings: Any) -> dict[str, float]:
        """Median milliseconds of one input, all calls in turns."""

        def times() -> Row:
            return {"ms": ms_in_turns({name: opened() for name, opened in calls.items()}, self.one, self.options.rounds)}

        settings |= {"calls": list(calls)}
        name = f"{self.subject.name}/{self.seed}/latency-{zlib.crc32(repr(settings).encode()):08x}"
        return dict(self.run.row(name, times, **settings)["ms"])

    def timed(self, found: list[Row]) -> list[Row]:
        """The rows of forms with `ms`, the median milliseconds of all in turns."""
        paths = {row["form"]: row["path"] for row in found if "cannot" not in row}
        ms = self.in_turns({form: partial(self.opened, self.folder / path) for form, path in paths.items()}, paths=paths)
        return [{**row, "ms": ms[row["form"]]} if "cannot" not in row else row for row in found]


def judges(run: Run, counts: Mapping[str, int], precision: str | None, figures: Figures) -> Iterator[Judge]:
    """Each network of `--only` in each seed."""
    for name in run.options.only:
        yield from (Judge(SUBJECTS[name], seed, run, counts, precision, figures) for seed in range(run.options.seeds))


# Networks beside FP32: foreign.py and sparsity.py


def agreements(judge: Judge, outputs: Mapping[str, Scores]) -> Row:
    """Agreement of an artifact with FP32: of classes also `kl`, the mean KL divergence of the probabilities in nats."""
    ((part, scores),) = outputs.items()
    exact, labels = judge.exact[part], judge.labels[part]
    figures: Row = agreement(judge.subject.judged_by, exact, scores)
    if judge.subject.judged_by == "classes":
        log_p, log_q = (log_softmax(values, 1) for values in (exact, scores))
        figures["kl"] = float((np.exp(log_p) * (log_p - log_q)).sum(1).mean())
    if labels is not None:
        figures["accuracy"] = float((scores.argmax(1) == labels).mean())
    return figures


def over_seeds(*keys: str) -> Callable[[Iterable[Row]], Iterator[Row]]:
    """From a document's rows, a row for each group of forms: `seeds`, and means over them; `agreement`: equal classes, or mean cosine."""

    def rows(found: Iterable[Row]) -> Iterator[Row]:
        found = list(found)
        fp32 = {row["network"]: row["fp32_bytes"] for row in found if row["part"] == "network"}
        forms = [row for row in found if row["part"] == "form"]
        yield from (row for row in forms if "cannot" in row and not row["seed"])
        for seeds in grouped(forms, *keys).values():
            row = {**seeds[0], "seeds": seeds, **{key: mean(seeds, key) for key in AVERAGED}}
            agreement = row["cosine"] if row["same"] is None else row["same"]
            yield {**row, "agreement": agreement, "smaller": fp32[row["network"]] / row["bytes"]}

    return rows


def over(title: str, *paths: str, digits: int = 3) -> Column:
    """Mean and spread over the seeds, of the first of these figures that they have."""

    def text(row: Row) -> str | None:
        values = next((values for path in paths if None not in (values := [look_up(seed, path) for seed in row.get("seeds", ())])), ())
        return spread(values, f"{{:z.{digits}f}}") if values else None

    return Column(title=title, value=text)


def by_form(document: Document) -> dict[str, dict[str, Row]]:
    """Means over the seeds by network and form; `best nncf`: NNCF's form that agrees best."""
    found: dict[str, dict[str, Row]] = {}
    for row in over_seeds("network", "form")(document.rows):
        if "seeds" in row:
            found.setdefault(row["network"], {})[row["form"]] = row
    for forms in found.values():
        if peers := [row for form, row in forms.items() if form.startswith("nncf")]:
            forms["best nncf"] = max(peers, key=lambda row: row["agreement"])
    return found


def cases(form: str, value: Callable[..., float], *others: str, having: str = "bytes") -> Callable[[Document], dict[str, float]]:
    """A goal's cases: a value of forms, of each network that has them all and this figure."""

    def values(document: Document) -> dict[str, float]:
        networks = {name: [forms.get(each) for each in (form, *others)] for name, forms in by_form(document).items()}
        return {name: value(*found) for name, found in networks.items() if all(row and row[having] is not None for row in found)}

    return values


def points(one: Row, other: Row) -> float:
    """Points of agreement ahead of another form."""
    return float(100 * (one["agreement"] - other["agreement"]))


AVERAGED = ("same", "cosine", "kl", "worst_cosine", "accuracy", "bytes", "ms", "seconds", "artifacts")
MEGABYTES = Column(title="MB", value=lambda row: row["bytes"] / 1e6 if "bytes" in row else None, form="{:.2f}")
NETWORKS = Table(
    title="Networks, weights in FP32",
    columns=columns("network, description, accuracy=fp32_accuracy:.3f, MB=megabytes:.2f"),
    rows=lambda found: [{**row, "megabytes": row["fp32_bytes"] / 1e6} for row in found if row["part"] == "network"],
)
TABLES = (
    NETWORKS,
    Table(
        title="Forms",
        columns=(
            *columns("network, form"), over("agreement", "same", "cosine", digits=4),
            over("KL, least cosine", "kl", "worst_cosine", digits=4), over("accuracy", "accuracy"),
            Column(title="M params", value=lambda row: row["parameters"] / 1e6 if "parameters" in row else None, form="{:.2f}"),
            MEGABYTES, *columns("smaller:.1f, ms:.2f, s=seconds:.0f"),
        ),
        rows=over_seeds("network", "form"),
    ),
)  # fmt: skip
"""Tables of foreign.py and sparsity.py."""
