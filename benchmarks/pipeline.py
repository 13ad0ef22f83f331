"""Measure `muntin predict` of a folder: how much of the time the engine works, while other threads decode and encode.

    python benchmarks/pipeline.py [--preset hybrid-s] [--pictures 200] [--size 1024x768] [--streams 1 2] [--threads N] [--rounds 3]
                                  [--output runs/benchmark-pipeline] [--json]

The pictures are crops of the demonstration's photograph of the Earth, cut at random places and written as JPEG of quality 90. The artefact
is the preset in INT8, trained for 30 steps. Each step alone has all cores, in turns with the others; medians of the rounds. Columns, all in
pictures a second:
    decode      read the files
    infer       labels of the decoded pictures, in the tiles that `muntin predict` takes
    encode      write the masks, in rows with overlay these, too
    pipeline    files to files, as `muntin predict FOLDER` does after it has opened the artefact
    of goal     pipeline / the slower of decode and infer. Goal: at least 0.9
    of cores    pipeline / (1 / (1/decode + 1/infer + 1/encode)): 1 where all steps together keep the same cores busy all the time

Where the engine has all cores, as on a CPU, decoding and encoding take theirs from it: then `of cores` says whether any time is lost, and
the goal can only be reached where they are small beside the engine's work.

A row that is there already is not measured again; one of another machine is refused. Time on two cores: a minute to train and export, then
about a minute a row. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from kept import Row, kept_row, now
from muntin.artifact import Artifact
from muntin.data.earth import EarthSource
from muntin.images import MAX_PIXELS, encode_png, overlay, read_image, write_image, write_whole
from muntin.models import PRESETS
from muntin.runtime import describe_hardware, load, predict
from muntin.runtime.bulk.items import PredictOptions
from muntin.runtime.bulk.run import common_shapes, compute_files, item_sizes
from muntin.runtime.bulk.smaller_tiles import Tiles
from muntin.runtime.host.hardware import physical_cores, usable_cores
from muntin.runtime.pipeline import ordered
from muntin.runtime.tiles import allowed_tile
from options import at_least
from resumed import demo_recipe, integer_artifact, network_of, print_machines, trained

STEPS = 30
QUALITY = 90
GOAL = 0.9


def cut_pictures(folder: Path, count: int, height: int, width: int) -> list[Path]:
    """Return the crops as files, written where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04}.jpg" for number in range(count)]
    if not all(path.exists() for path in paths):
        picture, _ = EarthSource("cover").picture()
        rng = np.random.default_rng(0)
        for path in paths:
            top, left = (int(rng.integers(0, side - part + 1)) for side, part in zip(picture.shape[:2], (height, width), strict=True))
            Image.fromarray(picture[top : top + height, left : left + width]).save(path, quality=QUALITY)
    return paths


def seconds(work: Iterable[object]) -> float:
    """Measure how long it takes to go through an iterable."""
    began = time.perf_counter()
    for _ in work:
        pass
    return time.perf_counter() - began


def measure(artifact: Artifact, paths: list[Path], folder: Path, painted: bool, streams: int, threads: int, rounds: int) -> Row:
    session = load(artifact.path, threads=threads, streams=streams, shapes=(), dynamic=True)
    side = max((artifact.manifest.example or (1, 512, 512))[1:])
    options = PredictOptions(tiles=Tiles(tile=allowed_tile(session.signature, side), overlap=None), max_pixels=MAX_PIXELS, painted=painted)
    sizes = item_sizes(paths, max_pixels=MAX_PIXELS, streams=session.streams)
    session.warm_up(common_shapes(sizes.values(), session.signature, options.tiles))
    classes, tile, cores = session.signature.classes, options.tiles.tile, usable_cores()
    pictures = [read_image(path) for path in paths]
    answers = [predict(session, picture, tile=tile) for picture in pictures]

    def encode(number: int) -> None:
        write_whole(folder / f"{number}.mask.png", encode_png(answers[number], [entry.color for entry in classes]))
        if painted:
            write_image(folder / f"{number}.overlay.jpg", overlay(pictures[number], answers[number], classes))

    def pipeline() -> Iterable[object]:
        targets: dict[Path, Path | None] = {path: folder / path.stem for path in paths}
        return compute_files(session, options, targets, record=lambda outcome: None, progress=lambda done, total: None)

    steps: dict[str, Callable[[], Iterable[Any]]] = {
        "decode": lambda: ordered(read_image, paths, workers=cores, window=2 * cores),
        "infer": lambda: ordered(lambda picture: predict(session, picture, tile=tile), pictures, workers=session.streams),
        "encode": lambda: ordered(encode, range(len(paths)), workers=cores),
        "pipeline": pipeline,
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, work in steps.items():
            folder.mkdir(parents=True, exist_ok=True)
            times[name].append(seconds(work()))
            rmtree(folder)
    rates = {name: len(paths) / median(values) for name, values in times.items()}
    together = 1 / sum(1 / rates[name] for name in ("decode", "infer", "encode"))
    slower = min(rates["decode"], rates["infer"])
    return {"rates": rates, "of_goal": rates["pipeline"] / slower, "of_cores": rates["pipeline"] / together, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="hybrid-s")
    parser.add_argument("--pictures", type=at_least(1), default=200)
    parser.add_argument("--size", default="1024x768", help="width x height of the pictures, pixels")
    parser.add_argument("--streams", type=at_least(1), nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=at_least(1), default=physical_cores())
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-pipeline"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    given = parser.parse_args()
    width, height = (at_least(64)(side) for side in given.size.split("x"))
    hardware, folder = describe_hardware(), given.output / given.preset
    recipe = demo_recipe({"training.steps": STEPS, "model.name": given.preset})
    artifact = integer_artifact(trained(recipe, folder / "trained"), folder / "int8")
    paths = cut_pictures(given.output / f"pictures-{given.size}", given.pictures, height, width)
    rows: list[Row] = []
    for painted, streams in product((False, True), given.streams):
        settings = {
            **network_of(given.preset), "pictures": given.pictures, "size": given.size, "overlay": painted, "streams": streams,
            "threads": given.threads, "rounds": given.rounds,
        }  # fmt: skip
        row = kept_row(
            folder / f"{given.size}-{given.pictures}-{'overlay' if painted else 'mask'}-{streams}.json",
            settings,
            partial(measure, artifact, paths, given.output / "results", painted, streams, given.threads, given.rounds),
            hardware=hardware,
        )
        rows.append({"preset": given.preset, "overlay": painted, "streams": streams, **row})
    if given.json:
        met = {f"{row['streams']}{' overlay' if row['overlay'] else ''}": row["of_goal"] >= GOAL for row in rows}
        document = {
            "benchmark": "pipeline",
            "hardware": {**hardware, "created": now()},
            "rows": rows,
            "goal": {"of_goal": GOAL, "met": met},
        }
        print(json.dumps(document, indent=1))
        return
    print(f"{given.preset}, {given.pictures} pictures of {given.size}, pictures a second")
    print(f"{'overlay':<9}{'streams':<8}{'decode':>9}{'infer':>9}{'encode':>9}{'pipeline':>9}{'of goal':>9}{'of cores':>10}")
    for row in rows:
        rates = "".join(
            f"{row['rates'][name]:>{width}.1f}" for name, width in (("decode", 9), ("infer", 9), ("encode", 9), ("pipeline", 10))
        )
        print(f"{'yes' if row['overlay'] else 'no':<9}{row['streams']:<8}{rates}{row['of_goal']:>9.2f}{row['of_cores']:>10.2f}")
    print_machines(rows)


if __name__ == "__main__":
    main()
