"""Quality and deployed latency by task, beside peers that are trained for the same minutes.

    python benchmarks/tasks.py [--only encoders classify restore] [--seeds 3] [--minutes 2]

Tables: segmentation from one ImageNet encoder, classification from random weights, and restoration of photographs; the modules of
`task_tables` say how. Models whose names begin with `hybrid` are ours. Needs `pip install '.[bench]'` from a checkout. Time: in encoders
and classify a model takes twice --minutes (two learning rates) for each data set and seed, and some minutes for export. Run it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import packages_distributions
from operator import sub, truediv
from pathlib import Path

from documents import Column, Document, Goal, Row, Table, columns, grouped, mean, seeds_of, spread
from harness import Benchmark, Options, Run, main, option
from pretrained import LITE0
from task_tables import recognition, restoration

TABLES: dict[str, tuple[Callable[[int, float, Path], list[Row]], tuple[str, ...]]] = {
    "encoders": (recognition.encoders, ("segmentation-models-pytorch", "timm", LITE0)),
    "classify": (recognition.classify, ("mlxtend", "timm")),
    "restore": (restoration.restore, ("scikit-image",)),
}
"""By name, what measures a table and the packages that it needs."""
PROTOCOL = 1
"""Version of the rows."""


@dataclass(frozen=True, kw_only=True)
class TasksOptions(Options):
    only: tuple[str, ...] = option(tuple(TABLES), "tables", choices=tuple(TABLES), selects=True)
    seeds: int = option(3, "number of seeds", least=1, selects=True)
    minutes: float = option(2.0, "wall-clock minutes of training of each model")

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"--minutes {self.minutes:g}: give more than 0")


def rows(run: Run) -> Iterator[Row]:
    installed = {name.replace("_", "-") for names in packages_distributions().values() for name in names}
    for name in dict.fromkeys(run.options.only):
        measure, packages = TABLES[name]
        if missing := " ".join(package for package in packages if package not in installed):
            raise SystemExit(f"tasks.py: {name} needs {missing}: pip install {missing}, or leave it out by --only")
        for seed in range(run.options.seeds):
            make = partial(measure, seed, run.options.minutes, run.folder / name / str(seed))
            kept = run.row(f"{name}/{seed}", lambda make=make: {"rows": make()}, protocol=PROTOCOL, table=name, seed=seed)  # type: ignore[misc]
            yield from ({"table": name, "seed": seed, **row, "created": kept["created"]} for row in kept["rows"])


def summary(rows: list[Row]) -> Iterator[Row]:
    """A row for each data set and model over the seeds. One that failed with a seed says why."""
    failed = {(row["data"], row["model"]): row for row in rows if "cannot" in row}
    for key, mine in grouped(rows, "data", "model").items():
        if key not in failed:
            first, ms = mine[0], {side: mean(mine, f"ms.{side}") for side in mine[0]["ms"]}
            yield {
                **{name: first.get(name) for name in ("table", "data", "model", "learning_rate")}, "mb": mean(mine, "mb"), "ms": ms,
                "quality": {name: spread([row["quality"][name] for row in mine]) for name in first["quality"]},
                "score": mean(mine, f"quality.{next(iter(first['quality']))}"), "latency": next(iter(ms.values())),
                "millions": first["parameters"] / 1e6, "deployed": " or ".join(sorted({row["deployed"] for row in mine})),
                "steps": ", ".join(str(row["steps"]) for row in mine if "steps" in row) or None,
            }  # fmt: skip
    yield from failed.values()


def all_columns(document: Document) -> tuple[Column, ...]:
    found = [row for row in summary(document.rows) if "cannot" not in row]
    names, sides = (dict.fromkeys(name for row in found for name in row[key]) for key in ("quality", "ms"))
    figures = [f"{name}=quality.{name}" for name in names] + [f"ms at {side}=ms.{side}:.3g" for side in sides]
    return columns(f"data, model, {', '.join(figures)}, M=millions:.2f, MB=mb:.2f, deployed, rate=learning_rate, steps")


def judged(document: Document) -> Iterator[tuple[str, Row, Row]]:
    """For each data set with both: our fastest model with the best peer's quality, or the one of the best quality, and that peer."""
    for (data,), found in grouped(summary(document.rows), "data").items():
        ours, peers = ([row for row in found if row["model"].startswith("hybrid") is kind] for kind in (True, False))
        if ours and peers:
            peer = max(peers, key=lambda row: float(row["score"]))
            good = [row for row in ours if row["score"] >= peer["score"]]
            yield data, min(good, key=lambda row: float(row["latency"])) if good else max(ours, key=lambda row: float(row["score"])), peer


def compared(figure: str, how: Callable[[float, float], float]) -> Callable[[Document], dict[str, float]]:
    return lambda document: {data: how(ours[figure], peer[figure]) for data, ours, peer in judged(document)}


def newest(document: Document) -> str:
    def told(row: Row) -> str:
        return f"{row['model']} {row['score']:.4g} in {row['latency']:.3g} ms"

    return "; ".join(f"{data}: {told(ours)}, {told(peer)}" for data, ours, peer in judged(document))


def pair(documents: list[Document], data: str, *names: str) -> tuple[list[float], list[float]]:
    """Scores and latencies of two models on a data set, in the newest document that has them."""
    for each in reversed(documents):
        found = {row["model"]: row for row in summary(each.rows) if row["data"] == data and "cannot" not in row}
        if set(names) <= set(found):
            scores, latencies = ([float(found[name][figure]) for name in names] for figure in ("score", "latency"))
            return scores, latencies
    raise LookupError(f"no document has {names} on {data}")


def last_stage(documents: list[Document]) -> str:
    scores, ms = pair(documents, "noise 25", "hybrid-xs, to half", "hybrid-xs, to a quarter")
    return f"{scores[0]:.1f} dB for {scores[1]:.1f} in {ms[0]:.1f} and {ms[1]:.1f} ms"


def denoising(documents: list[Document]) -> str:
    (nafnet, quarter), _ = pair(documents, "noise 25", "nafnet-16", "hybrid-xs, to a quarter")
    return f"{nafnet - quarter:.1f} dB behind a small NAFNet"


def double_size(documents: list[Document]) -> str:
    scores, ms = pair(documents, "double size", "nafnet-16", "hybrid-xs, to half")
    return f"{scores[0] - scores[1]:.2f} dB behind it, in {100 * ms[1] / ms[0]:.0f} % of its time"


def small_images(documents: list[Document]) -> str:
    times = (pair(documents, data, "hybrid-xxs", "resnet18")[1] for data in ("mnist-5k", "digits"))
    shares = sorted(100 * ours / peer for ours, peer in times)
    return f"{shares[0]:.0f} to {shares[1]:.0f} % of a resnet18's time"


BENCHMARK = Benchmark(
    name="tasks", options=TasksOptions, measure=rows, newest=newest, n=seeds_of,
    about="""Each model is trained for the same minutes (at each of its learning rates) and deployed in the form that is fastest within half
a point (0.1 dB) on validation. The first quality column is of the deployed form on the test split: mIoU, top-1 or PSNR in dB (± standard
deviation over seeds); ms is one image, all models of a seed in turns; steps are those of each seed. The hybrids of restoration are no
presets: the first was the best of seven structures on validation. Goals: for each data set at least the best peer's quality at no more
than half of its latency; ours is the fastest model with that quality, or the one of the best quality if there is none.""",
    variant=lambda document: f"{', '.join(dict.fromkeys(row['table'] for row in document.rows))}, {document.settings['minutes']:g} min",
    tables=(Table(columns=all_columns, rows=summary),),
    goals=(
        Goal(name="quality ahead of the best peer", values=compared("score", sub), at_least=0),
        Goal(name="latency over the best peer's", values=compared("latency", truediv), at_most=0.5, form="{:.0%}"),
    ),
    blocks={"M5": last_stage, "denoising": denoising, "double_size": double_size, "small_images": small_images},
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
