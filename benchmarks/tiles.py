"""Measure large pictures in blended and exact tiles: time, memory, and the cost beyond the engine, beside MONAI's sliding window.

    python benchmarks/tiles.py [--preset hybrid-xs] [--tile 512] [--overlap 128] [--exact-tile 1024] [--threads N] [--streams N]
                               [--gigapixel] [--output runs/benchmark-tiles] [--json]

The preset is trained for 30 steps (speed does not depend on the weights) and exported in W4A8. Pictures are the demonstration's photograph,
mirrored at its edges up to the size: 5400 x 2700, 10800 x 5400, with --gigapixel also 32768 x 32768. Ways, each in a process of its own:
    array     an array in memory to an array of labels
    raster    a tiled BigTIFF (deflate), read by window, to a GeoTIFF of labels with overviews (`open_source`, `open_sink`)
    monai     MONAI's `sliding_window_inference` on the same artefact and engine (`pip install monai`), one tile a call, blending
              "gaussian", float32 tensors in memory, `argmax` at the end; not for a gigapixel, whose scores alone are 24 GiB
    exact        as `raster`, in exact tiles (`exact=True`) with temporary files; `exact float` the same of the float32 export
`array` and `raster` compute several tiles at once (--streams, as many as threads), each on its share of the threads. MONAI calls the engine
tile by tile, so all threads work on one.
Columns:
    s            seconds from the opened source to the finished labels
    Mpixel/s     pixels of the picture a second
    computed     pixels that the engine computed a second: each tile counts whole
    of untiled   computed, over the pixels a second of one call on 2048 x 2048 pixels with all threads, afterwards in the same process
    MiB          largest resident memory beyond that of the loaded model, which has computed one tile; of `array` and `monai` with the
                 picture and the result
    disk         MiB of temporary files
`exact` and `exact float` count the picture's pixels as computed, without the surroundings of tiles and repeated passes. At the smallest
size their scores are compared with those of one call: the share of equal labels, and for floats the largest difference of a score and the
labels that differ where the two highest scores of the one call are further apart than 2e-4.
Goals: raster: a gigapixel within 1 GiB; array and raster: 95 % of untiled; array: 1.2 times as fast as MONAI; exact: 99.99 % equal labels
in integers, scores within 1e-4 and no such label in floats.
A row that is there already is not measured again. Time on two cores: a minute to train, then three minutes; with --gigapixel half an hour
more, and 30 GB of disk. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import muntin
from kept import Row, kept_row, now
from muntin.data.earth import EarthSource
from muntin.images import open_sink, open_source
from muntin.models import PRESETS
from muntin.runtime import Session, describe_hardware
from muntin.runtime.blending import tile_origins
from muntin.runtime.exact_tiles.run import exact_tiles
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.host.memory import watch_memory
from options import at_least
from resumed import demo_recipe, float_artifact, integer_artifact, network_of, print_machines, trained

STEPS = 30
SIZES = {"5400x2700": (2700, 5400), "10800x5400": (5400, 10800)}
GIGAPIXEL = {"32768x32768": (32768, 32768)}
WAYS = ("array", "raster", "monai", "exact", "exact float")
UNTILED = 2048
CALLS = 5
ROWS = 1024
GOALS = {"of_untiled": 0.95, "gigapixel_bytes": 1 << 30, "over_monai": 1.2, "equal_labels": 0.9999, "largest_difference": 1e-4}
MARGIN = 2e-4


def mirrored(indices: NDArray[np.intp], size: int) -> NDArray[np.intp]:
    """Places in an axis of `size` pixels that is mirrored at its ends."""
    places = indices % (2 * size)
    return np.minimum(places, 2 * size - 1 - places)


def write_raster(path: Path, size: tuple[int, int]) -> None:
    """Write a picture of (height, width) as a tiled BigTIFF, row of tiles by row of tiles."""
    import rasterio
    from rasterio.windows import Window

    photograph, _ = EarthSource("cover").picture()
    height, width = size
    columns = mirrored(np.arange(width), photograph.shape[1])
    layout = {
        "driver": "GTiff",
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
        "compress": "deflate",
        "predictor": 2,
        "bigtiff": "YES",
    }
    place = {"crs": "EPSG:4326", "transform": rasterio.transform.from_bounds(-180, -90, 180, 90, width, height)}
    draft = path.with_suffix(".draft")
    with rasterio.open(draft, "w", height=height, width=width, count=3, dtype="uint8", photometric="rgb", **layout, **place) as dataset:
        for top in range(0, height, ROWS):
            rows = mirrored(np.arange(top, min(top + ROWS, height)), photograph.shape[0])
            pixels = photograph[rows][:, columns]
            dataset.write(pixels.transpose(2, 0, 1), window=Window(0, top, width, len(rows)))
    draft.replace(path)


def monai_labels(session: Session, image_HWC: NDArray[np.uint8], tile: int, overlap: int) -> NDArray[Any]:
    import torch
    from monai.inferers import sliding_window_inference

    def predictor(images_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session(np.ascontiguousarray(images_BCHW.permute(0, 2, 3, 1).to(torch.uint8).numpy())))

    pixels = torch.from_numpy(image_HWC).permute(2, 0, 1)[None].float()
    scores = sliding_window_inference(pixels, (tile, tile), 1, predictor, overlap=overlap / tile, mode="gaussian")
    assert isinstance(scores, torch.Tensor)
    labels: NDArray[Any] = scores.argmax(1)[0].to(torch.uint8).numpy()
    return labels


def untiled_rate(session: Session, image_1HWC: NDArray[np.uint8]) -> float:
    """Pixels a second of one call."""
    session(image_1HWC)
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        session(image_1HWC)
        times.append(time.perf_counter() - started)
    return image_1HWC.shape[1] * image_1HWC.shape[2] / median(times)


def compared(artifact: Path, raster: Path, tile: int, threads: int) -> Row:
    """Scores of exact tiles beside those of one call."""
    session = muntin.load(artifact, threads=threads, precision="f32", shapes=(), cache=False)
    image = open_source(raster)[:, :]
    tiled = muntin.predict(session, image, exact=True, tile=tile, output="scores")
    whole = muntin.predict(session, image, output="scores")
    second, first = np.partition(whole, -2, axis=0)[-2:]
    differ = tiled.argmax(0) != whole.argmax(0)
    return {
        "equal_labels": float(1 - differ.mean()), "largest_difference": float(np.abs(tiled - whole).max()), "std": float(whole.std()),
        "clear_labels_that_differ": int((differ & (first - second > MARGIN)).sum()),
    }  # fmt: skip


def measure(way: str, artifact: Path, raster: Path, tile: int, overlap: int, threads: int, streams: int) -> Row:
    """Measure one way. Called in a process of its own."""
    if way.startswith("exact"):
        return measure_exact(artifact, raster, tile, threads)
    session = muntin.load(artifact, threads=threads, streams=1 if way == "monai" else streams, shapes=((1, tile, tile),))
    assert isinstance(session, Session)
    source = open_source(raster)
    height, width = source.shape[:2]
    if way == "monai":
        try:
            import monai  # noqa: F401
        except ImportError:
            return {"cannot": "monai is not installed: pip install monai"}
        monai_labels(session, np.ascontiguousarray(source[:tile, :tile]), tile, overlap)  # its first call imports much
    result = raster.with_name(f"{raster.stem}.{way}.tif")
    with watch_memory() as memory:
        image = source[:, :] if way != "raster" else None
        started = time.perf_counter()
        if way == "raster":
            with open_sink(result, like=source, classes=session.signature.classes) as sink:
                muntin.predict(session, source, tile=tile, overlap=overlap, into=sink)
        elif image is not None and way == "array":
            muntin.predict(session, image, tile=tile, overlap=overlap)
        elif image is not None:
            monai_labels(session, image, tile, overlap)
        seconds = time.perf_counter() - started
    corner = np.ascontiguousarray(source[:UNTILED, :UNTILED])[None]
    untiled = untiled_rate(muntin.load(artifact, threads=threads, shapes=(corner.shape[:3],)), corner)
    result.unlink(missing_ok=True)
    count = len(tile_origins(height, tile, overlap)) * len(tile_origins(width, tile, overlap))
    computed = count * tile**2 / seconds
    return {
        "seconds": seconds, "pixels_per_s": height * width / seconds, "computed_per_s": computed, "tiles": count,
        "untiled_per_s": untiled, "of_untiled": computed / untiled, "bytes": memory.peak,
    }  # fmt: skip


def measure_exact(artifact: Path, raster: Path, tile: int, threads: int) -> Row:
    """Measure exact tiles."""
    session = muntin.load(artifact, threads=threads, precision="f32", shapes=((1, tile, tile),))
    source = open_source(raster)
    height, width = source.shape[:2]
    result = raster.with_name(f"{raster.stem}.exact.tif")
    with watch_memory() as memory:
        started = time.perf_counter()
        with open_sink(result, like=source, classes=session.signature.classes) as sink:
            muntin.predict(session, source, exact=True, tile=tile, into=sink)
        seconds = time.perf_counter() - started
    result.unlink(missing_ok=True)
    corner = np.ascontiguousarray(source[:UNTILED, :UNTILED])[None]
    untiled = untiled_rate(muntin.load(artifact, threads=threads, precision="f32", shapes=(corner.shape[:3],)), corner)
    row = {
        "seconds": seconds, "pixels_per_s": height * width / seconds, "computed_per_s": height * width / seconds,
        "untiled_per_s": untiled, "of_untiled": height * width / seconds / untiled, "bytes": memory.peak,
        "disk": exact_tiles(session, tile).disk_bytes(height, width),
    }  # fmt: skip
    return row | (compared(artifact, raster, tile, threads) if (height, width) == next(iter(SIZES.values())) else {})


def alone(*arguments: Any) -> Row:
    """Measure in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def rows_of(given: argparse.Namespace, hardware: Row) -> list[Row]:
    folder = given.output / given.preset
    checkpoint = trained(demo_recipe({"training.steps": STEPS, "model.name": given.preset}), folder / "trained")
    integers, floats = integer_artifact(checkpoint, folder / "int8").path, float_artifact(checkpoint, folder / "float").path
    settings = {
        **network_of(given.preset),
        "tile": given.tile,
        "overlap": given.overlap,
        "threads": given.threads,
        "streams": given.streams,
    }
    rows = []
    for name, size in {**SIZES, **(GIGAPIXEL if given.gigapixel else {})}.items():
        raster = given.output / f"{name}.tif"
        for way in ("raster", "exact") if name in GIGAPIXEL else WAYS:
            place = folder / f"{way.replace(' ', '-')}-{name}.json"
            artifact = floats if way == "exact float" else integers
            tile = given.exact_tile if way.startswith("exact") else given.tile
            if not place.is_file() and not raster.is_file():
                write_raster(raster, size)
            arguments = (way, artifact, raster, tile, given.overlap, given.threads, given.streams)
            kept = kept_row(place, {**settings, "tile": tile}, partial(alone, *arguments), hardware=hardware)
            rows.append({"size": name, "way": way, **kept})
    return rows


def goals(rows: list[Row]) -> dict[str, str]:
    """Judge each goal; rows that could not be measured do not count."""
    usable = [row for row in rows if "cannot" not in row]
    ours = [row["of_untiled"] for row in usable if row["way"] in ("array", "raster")]
    seconds = {(row["size"], row["way"]): row["seconds"] for row in usable}
    ratios = [seconds[size, "monai"] / seconds[size, "array"] for size in SIZES if {(size, "monai"), (size, "array")} <= set(seconds)]
    memory = [row["bytes"] for row in usable if row["size"] in GIGAPIXEL and row["way"] == "raster" and row["bytes"] is not None]
    equal = [row["equal_labels"] for row in usable if row["way"] == "exact" and "equal_labels" in row]
    floats = [row for row in usable if row["way"] == "exact float" and "equal_labels" in row]
    values = {
        "of_untiled": (min(ours), min(ours) >= GOALS["of_untiled"]) if ours else None,
        "over_monai": (min(ratios), min(ratios) >= GOALS["over_monai"]) if ratios else None,
        "equal_labels": (min(equal), min(equal) >= GOALS["equal_labels"]) if equal else None,
        "largest_difference": (
            floats[0]["largest_difference"],
            floats[0]["largest_difference"] <= GOALS["largest_difference"] and not floats[0]["clear_labels_that_differ"],
        )
        if floats
        else None,
        "gigapixel_bytes": (max(memory), max(memory) <= GOALS["gigapixel_bytes"]) if memory else None,
    }
    return {
        name: "not measured" if value is None else f"{value[0]:.3g}, {'met' if value[1] else 'MISSED'}" for name, value in values.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="hybrid-xs")
    parser.add_argument("--tile", type=at_least(64), default=512, help="side of a tile, pixels")
    parser.add_argument("--overlap", type=at_least(0), default=128, help="pixels that neighbouring tiles share")
    parser.add_argument("--exact-tile", type=at_least(64), default=1024, help="side of an exact tile, pixels")
    parser.add_argument("--threads", type=at_least(1), default=physical_cores())
    parser.add_argument("--streams", type=at_least(1), help="tiles that are computed at once; as many as threads by default")
    parser.add_argument("--gigapixel", action="store_true", help="also 32768 x 32768 pixels")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-tiles"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    given = parser.parse_args()
    given.streams = given.streams or given.threads
    warnings.filterwarnings("ignore", category=UserWarning, module="monai")
    hardware = describe_hardware()
    rows = rows_of(given, hardware)
    if given.json:
        print(json.dumps({
            "benchmark": "tiles", "hardware": {**hardware, "created": now()}, "rows": rows, "goals": GOALS, "met": goals(rows),
        }, indent=1))  # fmt: skip
        return
    print(f"{given.preset}, W4A8, tiles of {given.tile}, overlap {given.overlap}, {given.threads} threads, {given.streams} streams")
    print(f"{'size':<14}{'way':<13}{'s':>8}{'Mpixel/s':>10}{'computed':>10}{'of untiled':>12}{'MiB':>8}{'disk':>8}")
    for row in rows:
        if "cannot" in row:
            print(f"{row['size']:<14}{row['way']:<13} {row['cannot']}")
            continue
        memory = "–" if row["bytes"] is None else f"{row['bytes'] / 2**20:.0f}"
        rates = f"{row['pixels_per_s'] / 1e6:>10.2f}{row['computed_per_s'] / 1e6:>10.2f}{row['of_untiled']:>12.1%}"
        disk = f"{row['disk'] / 2**20:.0f}" if "disk" in row else ""
        print(f"{row['size']:<14}{row['way']:<13}{row['seconds']:>8.2f}{rates}{memory:>8}{disk:>8}")
        if "equal_labels" in row:
            print(
                f"{'':<14}equal labels {row['equal_labels']:.6f}, largest difference {row['largest_difference']:.3g} "
                f"(standard deviation {row['std']:.3g}), clear labels that differ {row['clear_labels_that_differ']}"
            )
    for name, word in goals(rows).items():
        print(f"{name}: {word} (goal {GOALS[name]:g})")
    print()
    print_machines([row for row in rows if "cannot" not in row])


if __name__ == "__main__":
    main()
