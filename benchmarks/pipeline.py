"""Measure `muntin predict` of a folder: how much of the time the engine works, while other threads decode and encode.

    python benchmarks/pipeline.py [--preset hybrid-s] [--pictures 200] [--size 1024x768] [--streams 1 2] [--threads N] [--rounds 3]

The images are random crops of the demonstration's photograph, as JPEG. The artifact is the preset in INT8, trained for 30 steps. Time on
two cores: a minute to train and export, then about a minute a row. Run it alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from documents import Document, Goal, Row, Table, columns
from harness import Benchmark, Options, Run, at_least, main, option, threads_option
from muntin.artifact import Artifact
from muntin.data.earth import EarthSource
from muntin.images import MAX_PIXELS, encode_png, overlay, read_image, write_image, write_whole
from muntin.models import PRESETS
from muntin.runtime import load, predict
from muntin.runtime.bulk.files import common_shapes, compute_files, item_sizes
from muntin.runtime.bulk.items import PredictOptions
from muntin.runtime.host.hardware import usable_cores
from muntin.runtime.pipeline import ordered
from muntin.runtime.short_memory import Parts
from muntin.runtime.tiles import allowed_tile
from resumed import demo_recipe, integer_artifact, network_of, trained

STEPS = 30
QUALITY = 90


def checked_size(text: str) -> str:
    width, height = map(at_least(64), text.split("x"))
    return f"{width}x{height}"


class PipelineOptions(Options):
    preset: str = option("hybrid-s", "network", choices=tuple(PRESETS))
    pictures: int = option(200, "images", least=1)
    size: str = option("1024x768", "width x height of the images, pixels", parse=checked_size)
    streams: tuple[int, ...] = option((1, 2), "numbers of streams, a row each", least=1, selects=True)
    threads: int = threads_option()
    rounds: int = option(3, "timed rounds", least=1)


def cut_images(folder: Path, count: int, size: str) -> list[Path]:
    """Return the crops as files, written where they are missing."""
    width, height = map(int, size.split("x"))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04}.jpg" for number in range(count)]
    if not all(path.exists() for path in paths):
        photograph, _ = EarthSource("cover").picture()
        rng = np.random.default_rng(0)
        for path in paths:
            top, left = (int(rng.integers(0, side - part + 1)) for side, part in zip(photograph.shape[:2], (height, width), strict=True))
            Image.fromarray(photograph[top : top + height, left : left + width]).save(path, quality=QUALITY)
    return paths


def measure(artifact: Artifact, paths: list[Path], folder: Path, painted: bool, streams: int, threads: int, rounds: int) -> Row:
    session = load(artifact.path, threads=threads, streams=streams, shapes=(), dynamic=True)
    side = max((artifact.manifest.shape or (1, 512, 512))[1:])
    options = PredictOptions(tiles=Parts(tile=allowed_tile(session.signature, side), overlap=None), max_pixels=MAX_PIXELS, painted=painted)
    sizes = item_sizes(paths, max_pixels=MAX_PIXELS, streams=session.streams)
    session.warm_up(common_shapes(sizes.values(), session.signature, options.tiles))
    classes, tile, cores = session.signature.classes, options.tiles.tile, usable_cores()
    images = [read_image(path) for path in paths]
    answers = [predict(session, image, tile=tile) for image in images]

    def encode(number: int) -> None:
        write_whole(folder / f"{number}.mask.png", encode_png(answers[number], [entry.color for entry in classes]))
        if painted:
            write_image(folder / f"{number}.overlay.jpg", overlay(images[number], answers[number], classes))

    targets: dict[Path, Path | None] = {path: folder / path.stem for path in paths}
    steps: dict[str, Callable[[], Iterable[Any]]] = {
        "decode": lambda: ordered(read_image, paths, workers=cores, window=2 * cores),
        "infer": lambda: ordered(lambda image: predict(session, image, tile=tile), images, workers=session.streams),
        "encode": lambda: ordered(encode, range(len(paths)), workers=cores),
        "pipeline": lambda: compute_files(session, options, targets, record=lambda outcome: None, progress=lambda done, total: None),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, work in steps.items():
            folder.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            deque(work(), maxlen=0)
            times[name].append(time.perf_counter() - began)
            rmtree(folder)
    rates = {name: len(paths) / median(values) for name, values in times.items()}
    together = 1 / sum(1 / rates[name] for name in ("decode", "infer", "encode"))
    slower = min(rates["decode"], rates["infer"])
    return {"rates": rates, "of_goal": rates["pipeline"] / slower, "of_cores": rates["pipeline"] / together, "seconds": times}


def rows(run: Run) -> Iterator[Row]:
    given, folder = run.options, run.folder / run.options.preset
    recipe = demo_recipe({"training.steps": STEPS, "model.name": given.preset})
    artifact = integer_artifact(trained(recipe, folder / "trained"), folder / "int8")
    paths = cut_images(run.folder / f"pictures-{given.size}", given.pictures, given.size)
    for painted, streams in product((False, True), given.streams):
        name = f"{given.preset}/{given.size}-{given.pictures}-{'overlay' if painted else 'mask'}-{streams}"
        arguments = (artifact, paths, run.folder / "results", painted, streams, given.threads, given.rounds)
        row = run.row(name, measure, *arguments, **network_of(given.preset))
        yield {"preset": given.preset, "overlay": painted, "streams": streams, **row}


def of_goal(document: Document) -> dict[str, float]:
    return {f"{'overlays' if row['overlay'] else 'masks'}, {row['streams']} streams": row["of_goal"] for row in document.rows}


def newest(document: Document) -> str:
    rates = [f"{row['rates']['pipeline']:.1f} {'with overlays' if row['overlay'] else 'masks'}" for row in document.rows]
    return f"{document.settings['pictures']} JPEG files of {document.settings['size']}, images a second: {', '.join(rates)}"


def claim(documents: list[Document]) -> str:
    masks, overlays = (100 * share for share in sorted(of_goal(documents[-1]).values(), reverse=True))
    count = documents[-1].settings["pictures"]
    return f"`predict` of {count} images: {masks:.0f} % of the slower of decoding and engine, with overlays {overlays:.0f} %"


BENCHMARK = Benchmark(
    name="pipeline",
    options=PipelineOptions,
    measure=rows,
    about="""Images a second; each step alone has all cores. Goal: the whole reaches 90 % of the slower of decode and infer. On a CPU
decoding and encoding take cores from the engine: then `of cores` says whether any time is lost, and the goal can only be reached where they
are small beside the engine's work.""",
    newest=newest,
    n=lambda rows: f"median of {len(rows[0]['seconds']['pipeline'])} rounds",
    variant=lambda document: str(document.settings["preset"]),
    tables=(
        Table(
            columns=columns(
                "preset, overlay, streams, decode=rates.decode:.1f, infer=rates.infer:.1f, encode=rates.encode:.1f, "
                "pipeline=rates.pipeline:.1f, of goal=of_goal:.2f, of cores=of_cores:.2f"
            ),
        ),
    ),
    goals=(Goal(name="of the slower of decode and infer", values=of_goal, at_least=0.9, form="{:.0%}"),),
    blocks={"M10": claim},
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
