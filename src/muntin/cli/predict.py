"""`muntin predict`."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muntin.cli.console import SHOWN, memory_advice, out, print_json, progress_bar, refuse_unwritable, say
from muntin.cli.options import ArtifactArgument, EngineOption, JsonOption, PrecisionOption, ThreadsOption
from muntin.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from muntin.artifact import Signature
    from muntin.runtime.picture_results import Result
    from muntin.runtime.session import Shape

COMPILED = 128
"""Minimum number of tiles of one size for which that size is compiled: half a second or more, to save some ms a tile."""


def predict_command(
    artifact: ArtifactArgument,
    image: Annotated[list[Path], typer.Argument(help="Images, or folders of them.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the results; predictions by default.")] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="A mask of class numbers (255: ignored) or of the classes' colours: also writes a difference picture. For one image."
        ),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the blended tiles, pixels; by default the size of the export, in which a run is scored."),
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(min=0, help="Pixels that neighbouring tiles share; a quarter of the tile by default.")
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Refuse pictures of more pixels; 268,435,456 by default. Rasters, read by window, have no limit."),
    ] = None,
    value_range: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--range", metavar="LOW HIGH", help="Values read as 0 and 255, for rasters and .npy files of other numbers than uint8."
        ),
    ] = None,
    engine: EngineOption = "openvino",
    precision: PrecisionOption = "recorded",
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Segment, restore or classify images: a mask of class numbers with an overlay, a restored image, or a class for each.

    Results are named after their image: `a.mask.png` of `a.jpg`, and a GeoTIFF of the same place, `b.mask.tif`, of a GeoTIFF. Images of
    one name give `a.jpg.mask.png` and `a.png.mask.png`, or lie in folders: `x/a.mask.png` and `y/a.mask.png`. An image that fails is
    reported, the others are computed, and the exit code is 1.
    """
    from muntin.artifact import open_artifact
    from muntin.images import MAX_PIXELS
    from muntin.runtime.engines.registry import open_session
    from muntin.runtime.options import SessionOptions
    from muntin.runtime.picture_results import classify, predict_map
    from muntin.runtime.tiles import TILE, allowed_tile, check_tiles

    images = _images(image, truth)
    session = open_session(artifact, SessionOptions(engine=engine, precision=precision, threads=threads, shapes=(), dynamic=True))
    signature, folder, limit = session.signature, output or Path("predictions"), max_pixels or MAX_PIXELS
    _refuse_unused(signature.task, {"--output": output, "--truth": truth, "--tile": tile, "--overlap": overlap})
    exported_side = max((open_artifact(artifact).manifest.example or (1, TILE, TILE))[1:])
    tiles: dict[str, Any] = {"tile": tile or allowed_tile(signature, exported_side), "overlap": overlap}
    targets = {path: folder / name for path, name in _result_names(images).items()}
    if signature.task != "classify":
        for parent in {target.parent for target in targets.values()}:
            refuse_unwritable(parent)
        _refuse_overwriting(image, targets, folder, truth, signature, scaled=value_range is not None)
        check_tiles(session, **tiles)
    session.warm_up(_common_shapes(images, signature, max_pixels=limit, **tiles), compute=False)

    def compute(path: Path) -> Result:
        if signature.task == "classify":
            return classify(session, path, limit, value_range)
        return predict_map(session, path, targets[path], truth, limit, tiles, value_range)

    results, failures = _compute_all(compute, images)
    if json:
        document = {"artifact": artifact, "engine": session.engine, "precision": session.precision}
        print_json(document | {"results": results, "failures": failures})
    else:
        _print_results(results)
    if failures:
        raise typer.Exit(1)


def _compute_all(compute: Callable[[Path], Result], images: list[Path]) -> tuple[list[Result], list[dict[str, str]]]:
    """Return the results and the failures. A failure of one image is printed and does not stop the others."""
    from muntin.images import TooManyPixelsError

    results, failures = [], []
    with progress_bar("predicting") as advance:
        for done, path in enumerate(images, 1):
            try:
                results.append(compute(path))
            except (DataError, ArtifactError, MemoryError) as error:
                text = f"{path}: {memory_advice(error)}" if isinstance(error, MemoryError) else str(error)
                text += ", or allow more by --max-pixels" if isinstance(error, TooManyPixelsError) else ""
                say(f"muntin: {text}")
                failures.append({"source": str(path), "error": text})
            advance(done, len(images))
    return results, failures


def _print_results(results: Iterable[Result]) -> None:
    from muntin.reporting.text import percent

    for result in results:
        line = result.get("class") or ", ".join(result[kind] for kind in ("mask", "image", "overlay", "difference") if kind in result)
        if "probability" in result:
            line += f" (probability {result['probability']:.3f})"
        if "agreement" in result:
            line += f" ({percent(result['agreement'], 2)} of the pixels that count agree with the truth)"
        out.print(f"{result['source']} -> {line}")
        for note in result.get("notes", ()):
            say(note)
        if "truth" in result:
            names = [f"{number} is {name}" for number, name in result["truth"].items()]
            shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            out.print(f"the truth's numbers were taken for class numbers, not for a recipe's `value`s: {shown}")


def _images(paths: Iterable[Path], truth: Path | None) -> list[Path]:
    """Return the named images and those of the folders, each once. Raises DataError without images, or for several and one truth.

    Hidden files of a folder are skipped: macOS leaves "._a.jpg" beside "a.jpg".
    """
    from muntin.images import IMAGE_SUFFIXES
    from muntin.images.rasters import RASTER_SUFFIXES

    def is_image(path: Path) -> bool:
        return path.suffix.lower() in (*IMAGE_SUFFIXES, *RASTER_SUFFIXES) and not path.name.startswith(".") and path.is_file()

    images: dict[Path, Path] = {}
    for path in paths:
        candidates = sorted(filter(is_image, path.iterdir())) if path.is_dir() else [path]
        if not candidates:
            raise DataError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}); name an image or a folder of them")
        for image in candidates:
            images.setdefault(image.parent.resolve() / image.name, image)  # a symbolic link counts by its own name
    if truth is not None and len(images) != 1:
        raise DataError(f"--truth goes with one image, and these are {len(images)}: name one")
    return list(images.values())


def _common_shapes(images: Iterable[Path], signature: Signature, *, tile: int | None, overlap: int | None, max_pixels: int) -> list[Shape]:
    """Return the (B, H, W) of calls worth a compilation: of `COMPILED` calls or more, or where all calls have one size.

    Reads the images' headers. An unreadable image is skipped here and reported when it is computed.
    """
    from muntin.images.sources import source_size
    from muntin.runtime.blending import tile_origins
    from muntin.runtime.session import STATIC_SHAPES
    from muntin.runtime.tiles import tile_side

    if signature.side is not None:
        return [(1, signature.side, signature.side)]
    calls: Counter[Shape] = Counter()
    for path in images:
        with suppress(DataError):
            height, width = source_size(path, max_pixels=max_pixels)
            if signature.task == "classify":
                calls[1, *signature.sizes.at_least(height, width)] += 1
                continue
            h, w = tile_side(height, tile, signature.sizes.height), tile_side(width, tile, signature.sizes.width)
            rows, columns = (
                len(tile_origins(side, part, part // 4 if overlap is None else overlap)) for side, part in ((height, h), (width, w))
            )
            calls[1, h, w] += rows * columns
    return [shape for shape, count in calls.most_common(STATIC_SHAPES) if count >= COMPILED or len(calls) == 1]


def _result_names(images: Iterable[Path]) -> dict[Path, str]:
    """Return a name for the results of each image: the first of `a`, `a.png`, `x/a`, `x/a.png`, ... that no other image has."""
    names = {image: deque(_names(image)) for image in images}
    while True:
        users = Counter(candidates[0] for candidates in names.values())
        shared = [candidates for candidates in names.values() if users[candidates[0]] > 1 and len(candidates) > 1]
        if not shared:
            return {image: candidates[0] for image, candidates in names.items()}
        for candidates in shared:
            candidates.popleft()


def _names(image: Path) -> Iterator[str]:
    """Yield the names that the results of an image may have, the shortest first. The last is its whole path, which is no other image's."""
    folder = image.parent.resolve()
    folders = folder.relative_to(folder.anchor).parts
    for start in range(len(folders), -1, -1):
        yield "/".join((*folders[start:], image.stem))
        yield "/".join((*folders[start:], image.name))


def _refuse_unused(task: str, values: dict[str, object]) -> None:
    """Raise DataError for an option with a value that the artefact's task does not use."""
    useless = {"classify": ("--output", "--truth", "--tile", "--overlap"), "restore": ("--truth",)}.get(task, ())
    if unused := [option for option, value in values.items() if value is not None and option in useless]:
        answers = "the name of a class, which is printed" if task == "classify" else "an image, which no mask is the truth of"
        raise DataError(f"{unused[0]}: the artefact's task is {task}, and its answer {answers}: leave out {', '.join(unused)}")


def _refuse_overwriting(
    named: Iterable[Path], targets: Mapping[Path, Path], output: Path, truth: Path | None, signature: Signature, *, scaled: bool
) -> None:
    """Raise DataError where a result would replace an image or the truth, or be read as an image next time.

    `named`: images and folders as given. `targets`: images, and the paths of their results without endings.
    """
    from muntin.runtime.picture_results import result_files

    folders = {path.resolve() for path in named if path.is_dir()}
    inputs = {path.resolve() for path in (*targets, *([] if truth is None else [truth]))}
    for path, target in targets.items():
        if (folder := target.parent.resolve()) in folders:
            raise DataError(
                f"--output {output}: {folder}, where results would be written, is the folder of the images, and they would be taken for "
                "images next time: give another"
            )
        for file in result_files(path, target, signature, scaled=scaled).values():
            if file.resolve() in inputs:
                raise DataError(f"{file}, a result of {path}, would replace a file that was given: give another folder by --output")
