"""Measure large images in blended and exact tiles: time, memory, and the cost beyond the engine, beside MONAI's sliding window.

    python benchmarks/tiles.py [--preset hybrid-xs] [--tile 512] [--overlap 128] [--exact-tile 1024] [--streams N] [--gigapixel]

Images are the demonstration's photograph, mirrored at its edges up to the size. Ways, each in a process of its own: `array`, in memory;
`raster`, a tiled BigTIFF read by window to a GeoTIFF of labels; `exact` and `exact float`, as `raster` in exact tiles with temporary files;
`monai`, `sliding_window_inference` on the same artifact and engine, one tile a call with all threads (`pip install monai`; not for a
gigapixel, whose scores alone are 24 GiB). MiB: largest resident memory beyond the loaded model; disk: MiB of temporary files. Clear labels:
the two highest scores of one call are further apart than 2e-4.
Time on two cores: a minute to train, then three minutes; with --gigapixel half an hour more, and 30 GB of disk. Run it alone.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import muntin
from documents import Document, Goal, Row, Table, columns
from harness import Benchmark, Options, Run, apart, main, option, threads_option
from muntin.data.earth import EarthSource
from muntin.images import open_sink, open_source
from muntin.models import PRESETS
from muntin.runtime import Session
from muntin.runtime.blending import tile_origins
from muntin.runtime.exact_tiles.tiles import exact_tiles
from muntin.runtime.host.memory import watch_memory
from muntin.runtime.profiling.timing import interleaved_latency
from resumed import demo_recipe, float_artifact, integer_artifact, network_of, trained

STEPS = 30
SMALLEST, GIGAPIXEL = "5400x2700", "32768x32768"
SIZES = {SMALLEST: (2700, 5400), "10800x5400": (5400, 10800), GIGAPIXEL: (32768, 32768)}
WAYS = ("array", "raster", "monai", "exact", "exact float")
UNTILED, CALLS, ROWS = 2048, 5, 1024
MARGIN = 2e-4


class TilesOptions(Options):
    preset: str = option("hybrid-xs", "network", choices=tuple(PRESETS))
    tile: int = option(512, "side of a tile, pixels", least=64)
    overlap: int = option(128, "pixels that neighbouring tiles share", least=0)
    exact_tile: int = option(1024, "side of an exact tile, pixels", least=64)
    threads: int = threads_option()
    streams: int | None = option(None, "tiles that are computed at once; as many as threads by default", least=1)
    gigapixel: bool = option(False, "also 32768 x 32768 pixels", selects=True)


def write_raster(path: Path, size: tuple[int, int]) -> None:
    """Write an image of (height, width) as a tiled BigTIFF, row of tiles by row of tiles."""
    import rasterio
    from rasterio.windows import Window

    photograph, _ = EarthSource("cover").picture()
    height, width = size
    rows, columns = (np.pad(np.arange(old), (0, max(0, new - old)), "symmetric") for old, new in zip(photograph.shape, size, strict=False))
    layout: Row = {"driver": "GTiff", "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "predictor": 2}
    place = {"crs": "EPSG:4326", "transform": rasterio.transform.from_bounds(-180, -90, 180, 90, width, height)}
    layout |= {"bigtiff": "YES", "height": height, "width": width, "count": 3, "dtype": "uint8", "photometric": "rgb", **place}
    draft = path.with_suffix(".draft")
    with rasterio.open(draft, "w", **layout) as dataset:
        for top in range(0, height, ROWS):
            pixels = photograph[rows[top : min(top + ROWS, height)]][:, columns[:width]]
            dataset.write(pixels.transpose(2, 0, 1), window=Window(0, top, width, len(pixels)))
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


def compared(artifact: Path, image: NDArray[np.uint8], tile: int, threads: int) -> Row:
    """Scores of exact tiles beside those of one call."""
    session = muntin.load(artifact, threads=threads, precision="f32", shapes=(), cache=False)
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
    warnings.filterwarnings("ignore", category=UserWarning, module="monai")
    exact = way.startswith("exact")
    how: Row = {"threads": threads, "precision": "f32"} if exact else {"threads": threads}
    more: Row = {} if exact else {"streams": 1 if way == "monai" else streams}
    session = muntin.load(artifact, shapes=((1, tile, tile),), **how, **more)
    source = open_source(raster)
    height, width = source.shape[:2]
    if way == "monai":
        try:
            import monai  # noqa: F401
        except ImportError:
            return {"cannot": "monai is not installed: pip install monai"}
        monai_labels(session, np.ascontiguousarray(source[:tile, :tile]), tile, overlap)  # its first call imports much
    result = raster.with_name(f"{raster.stem}.{way}.tif")
    tiles: Row = {"exact": True, "tile": tile} if exact else {"tile": tile, "overlap": overlap}
    with watch_memory() as memory:
        image = source[:, :] if way in ("array", "monai") else None
        started = time.perf_counter()
        if image is None:
            with open_sink(result, like=source, classes=session.signature.classes) as sink:
                muntin.predict(session, source, into=sink, **tiles)
        elif way == "array":
            muntin.predict(session, image, **tiles)
        else:
            monai_labels(session, image, tile, overlap)
        seconds = time.perf_counter() - started
    result.unlink(missing_ok=True)
    pixels = np.ascontiguousarray(source[:UNTILED, :UNTILED])[None]
    call = muntin.load(artifact, shapes=(pixels.shape[:3],), **how)
    untiled = pixels[..., 0].size / interleaved_latency({"": call}, pixels, rounds=CALLS)[""].median_ms * 1e3
    count = len(tile_origins(height, tile, overlap)) * len(tile_origins(width, tile, overlap))
    computed = (height * width if exact else count * tile**2) / seconds
    row: Row = {"seconds": seconds, "pixels_per_s": height * width / seconds, "computed_per_s": computed, "untiled_per_s": untiled}
    row |= {"of_untiled": computed / untiled, "bytes": memory.peak}
    if not exact:
        return row | {"tiles": count}
    row["disk"] = exact_tiles(session, tile).disk_bytes(height, width)
    return row | (compared(artifact, source[:, :], tile, threads) if (height, width) == SIZES[SMALLEST] else {})


def rows(run: Run) -> Iterator[Row]:
    given, folder = run.options, run.folder / run.options.preset
    checkpoint = trained(demo_recipe({"training.steps": STEPS, "model.name": given.preset}), folder / "trained")
    integers, floats = integer_artifact(checkpoint, folder / "int8").path, float_artifact(checkpoint, folder / "float").path
    for size in SIZES if given.gigapixel else [size for size in SIZES if size != GIGAPIXEL]:
        raster = run.folder / f"{size}.tif"
        if not raster.is_file():
            write_raster(raster, SIZES[size])
        for way in ("raster", "exact") if size == GIGAPIXEL else WAYS:
            artifact, tile = floats if way == "exact float" else integers, given.exact_tile if way.startswith("exact") else given.tile
            arguments = (way, artifact, raster, tile, given.overlap, given.threads, given.streams or given.threads)
            row = run.row(f"{given.preset}/{way}-{size}", apart, measure, *arguments, **network_of(given.preset))
            yield {"size": size, "way": way, **row}


def shown(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        scaled = {"mpixels": row["pixels_per_s"] / 1e6, "computed": row["computed_per_s"] / 1e6} if "seconds" in row else {}
        yield row | scaled | {name: row[name] / 2**20 for name in ("bytes", "disk") if row.get(name) is not None}


def figures(name: str, *ways: str) -> Callable[[Document], dict[str, float | None]]:
    """A goal's cases: a figure of some ways, by size."""
    return lambda document: {f"{row['way']} {row['size']}": row.get(name) for row in shown(document.rows) if row["way"] in ways}


def over_monai(document: Document) -> dict[str, float]:
    """Seconds of MONAI over those of `array`, by size."""
    seconds = {(row["size"], row["way"]): row["seconds"] for row in document.rows if "seconds" in row}
    return {size: seconds[size, "monai"] / seconds[size, "array"] for size in SIZES if {(size, "monai"), (size, "array")} <= set(seconds)}


def told(text: str) -> Callable[[list[Document]], str]:
    """A text with the newest figures."""

    def written(documents: list[Document]) -> str:
        rows = {(row["way"], row["size"]): row for document in documents for row in shown(document.rows) if "cannot" not in row}
        named = {"blended": ("raster", GIGAPIXEL), "exact": ("exact", GIGAPIXEL), "floats": ("exact float", SMALLEST), "integers": INTEGERS}
        found = {name: defaultdict(lambda: np.nan, rows.get(key, {})) for name, key in named.items()}
        rates = [row["of_untiled"] for (way, _), row in rows.items() if way in BLENDED]
        faster = min(over_monai(documents[-1]).values(), default=np.nan)
        return text.format(**found, low=100 * min(rates), high=max(rates), faster=faster).replace("%", " %")

    return written


BLENDED = ("array", "raster")
INTEGERS = ("exact", SMALLEST)
EXACTNESS = (
    "floats: scores within {floats[largest_difference]:.1e} of one call, {floats[equal_labels]:.3%} equal labels; integers: "
    "{integers[equal_labels]:.3%} equal labels (goal 99.99)"
)
NEWEST = (
    "a gigapixel GeoTIFF to a GeoTIFF of labels in {blended[seconds]:.0f} s and {blended[bytes]:.0f} MiB (blended), in "
    "{exact[seconds]:.0f} s, {exact[bytes]:.0f} MiB and {exact[disk]:.0f} MiB of temporary files (exact); {faster:.1f} times as fast as "
    "MONAI; exact " + EXACTNESS
)
BENCHMARK = Benchmark(
    name="tiles",
    options=TilesOptions,
    measure=rows,
    about="""W4A8, 30 steps of training. Of untiled: pixels that the engine computed a second over those of one call on 2048 x 2048 pixels.
The untiled call gives scores; tiles are also blended, made labels, and from rasters decoded and written. Exact tiles of small images are
mostly compilation: 17 parts of the graph in up to four sizes. Sums over tiles differ from the engine's in the last bit of a float, which
moves a few integers behind them by one step.""",
    newest=lambda document: told(NEWEST)([document]),
    variant=lambda document: str(document.settings["preset"]),
    tables=(
        Table(
            columns=columns(
                "size, way, s=seconds:.2f, Mpixel/s=mpixels:.2f, computed:.2f, of untiled=of_untiled:.1%, MiB=bytes:.0f, disk:.0f, "
                "equal labels=equal_labels:.6f, largest difference=largest_difference:.3g, deviation of scores=std:.3g, "
                "clear labels that differ=clear_labels_that_differ"
            ),
            rows=shown,
        ),
    ),
    goals=(
        Goal(name="of the untiled rate", values=figures("of_untiled", *BLENDED), at_least=0.95, form="{:.0%}"),
        Goal(name="times as fast as MONAI", values=over_monai, at_least=1.2, form="{:.2f}"),
        Goal(name="equal labels, integers", values=figures("equal_labels", "exact"), at_least=0.9999, form="{:.3%}"),
        Goal(name="largest difference, floats", values=figures("largest_difference", "exact float"), at_most=1e-4, form="{:.1e}"),
        Goal(name="clear labels that differ, floats", values=figures("clear_labels_that_differ", "exact float"), at_most=0, form="{:.0f}"),
        Goal(
            name="MiB for a gigapixel", values=lambda document: figures("bytes", "raster")(document).get(f"raster {GIGAPIXEL}"),
            at_most=1024, form="{:.0f}",
        ),
    ),
    blocks={
        "readme_memory": told("{blended[bytes]:.0f} MiB"),
        "readme_speed": told("**{faster:.1f}× faster**"),
        "M8": told("A gigapixel GeoTIFF in {blended[bytes]:.0f} MiB (blended tiles), {exact[bytes]:.0f} MiB (exact). Exact " + EXACTNESS),
        "exact": told(EXACTNESS),
        "limits_exact": told("Exact tiles in integers: {integers[equal_labels]:.3%} of the labels are those of one call."),
        "limits_blended": told("Blended tiles reach {low:.0f} to {high:.0%} of the untiled rate."),
    },
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
