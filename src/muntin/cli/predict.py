"""`muntin predict`."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from muntin.cli.console import SHOWN, out, print_json, refuse_unwritable, say, say_notes
from muntin.cli.options import ArtifactArgument, EngineOption, JsonOption, PrecisionOption, ThreadsOption
from muntin.errors import DataError
from muntin.progress import progress_bar

if TYPE_CHECKING:
    from muntin.artifact import Signature
    from muntin.artifact.answers import Task
    from muntin.runtime.bulk.items import ItemOutcome
    from muntin.tasks.base import Result

RESULTS = Path("predictions")
"""Folder of the results where none is named."""
_RESULT = re.compile(r"\.(mask|overlay|difference|restored)\.\w+$")
"""The ends of their names."""


def predict_command(
    artifact: ArtifactArgument,
    image: Annotated[list[Path], typer.Argument(help="Images, folders of them with the folders inside (masks are left out), or videos.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the results; predictions by default.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep results that are there, if artefact, options and image are those that made them.")
    ] = False,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="A mask of class numbers (255: ignored) or of the classes' colours: also writes a difference picture. For one image."
        ),
    ] = None,
    no_overlay: Annotated[bool, typer.Option("--no-overlay", help="Write no overlays, masks alone.")] = False,
    tile: Annotated[
        int | None,
        typer.Option(
            min=1, help="Side of the tiles, pixels; by default the size of the export, in which a run is scored, and 1024 with --exact."
        ),
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(min=0, help="Pixels that neighbouring tiles share; a quarter of the tile by default.")
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Tiles that give the answer of one call on the whole image, by the artefact's plan; see docs/tiles.md."
        ),
    ] = False,
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
    streams: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images or tiles that the engine computes at the same time, each on its share of the threads; by default as many as "
            "threads, at most 4.",
        ),
    ] = None,
    on: Annotated[
        str | None, typer.Option(help="ray: by workers on this machine that Ray starts; ray:ADDRESS: by those of a running Ray cluster.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Segment, restore or classify images: a mask of class numbers with an overlay, a restored image, or a class for each.

    Results are named after their image: `a.mask.png` of `a.jpg`, and a GeoTIFF of the same place, `b.mask.tif`, of a GeoTIFF. Images of
    one name give `a.jpg.mask.png` and `a.png.mask.png`, or lie in folders: `x/a.mask.png` and `y/a.mask.png`. A video gives `a.mask.mkv`
    (lossless) and `a.overlay.mp4`, or `a.restored.mp4`. An image that fails is reported, the others are computed, and the exit code is 1.
    """
    from muntin.artifact import open_artifact
    from muntin.images import MAX_PIXELS
    from muntin.runtime.bulk.files import RayTarget, compute_files, usual_streams
    from muntin.runtime.bulk.items import PredictOptions
    from muntin.runtime.bulk.journal import open_journal
    from muntin.runtime.engines.registry import open_image_session
    from muntin.runtime.options import SessionOptions
    from muntin.runtime.short_memory import Parts
    from muntin.runtime.tiles import TILE, allowed_tile, check_tiles

    (images, notes), address = _images(image, truth, output or RESULTS), _ray_address(on)
    if resume and truth:
        raise DataError("--resume goes with several images, and --truth with one: leave one of them out")
    opening = SessionOptions(engine=engine, precision=precision, threads=threads, streams=streams or 1, shapes=(), dynamic=True)
    opened = open_artifact(artifact)
    manifest = opened.manifest
    signature, folder = opened.picture, output or RESULTS
    chosen = {"--output": output, "--resume": resume or None, "--truth": truth, "--no-overlay": no_overlay or None}
    _refuse_unused(signature.task, chosen | {"--tile": tile, "--overlap": overlap, "--exact": exact or None})
    usual = None if exact else allowed_tile(signature, max((manifest.shape or (1, TILE, TILE))[1:]))
    options = PredictOptions(
        tiles=(tiles := Parts(tile=tile or usual, overlap=overlap, exact=exact)), max_pixels=max_pixels or MAX_PIXELS, truth=truth,
        painted=not no_overlay, value_range=value_range,
    )  # fmt: skip
    if streams is None:
        opening = replace(opening, streams=usual_streams(images, signature, options, opening.thread_count))
    session = open_image_session(artifact, opening)
    targets: dict[Path, Path | None] = dict.fromkeys(images)
    journal = None
    if not signature.answer.one:
        names = {path: folder / name for path, name in _result_names(images).items()}
        for parent in {target.parent for target in names.values()}:
            refuse_unwritable(parent)
        _refuse_overwriting(image, names, folder, truth, signature, scaled=value_range is not None)
        check_tiles(session, tile=tiles.tile, overlap=tiles.overlap, exact=exact)
        targets.update(names)
        if resume or len(images) > 1:
            journal = open_journal(folder, manifest.sha256, session, options)
    results = {path: result | {"kept": True} for path in images if resume and journal and (result := journal.result(path))}
    left = {path: target for path, target in targets.items() if path not in results}

    def record(outcome: ItemOutcome) -> None:
        if journal is not None and outcome.result and outcome.state and not outcome.error:
            journal.add(outcome.source, outcome.state, outcome.result)

    ray = None if address is None else RayTarget(address=address, artifact=artifact, opening=opening)
    failures = {}
    if not json:
        say_notes(notes)
    with progress_bar("predicting", "images/s") as progress:
        for outcome in compute_files(session, options, left, record=record, progress=progress, ray=ray):
            if outcome.result:
                results[outcome.source] = outcome.result
            if outcome.error:
                say(f"muntin: {outcome.error}")
                failures[outcome.source] = {"source": str(outcome.source), "error": outcome.error}
    ended = [results[path] for path in images if path in results]
    if json:
        document = {"artifact": artifact, "engine": session.engine, "precision": session.precision}
        failed = [failures[path] for path in images if path in failures]
        print_json(document | {"results": ended, "failures": failed, "notes": notes})
    else:
        _print_results(ended, signature.task)
    if failures:
        raise typer.Exit(1)


def _ray_address(on: str | None) -> str | None:
    """Return the address of a Ray cluster, empty for workers of this machine; None for this process. Raises DataError for another place."""
    if on is None:
        return None
    place, _, address = on.partition(":")
    if place != "ray":
        raise DataError(f"--on {on}: give ray, or ray:ADDRESS with the address of a running cluster")
    return address


def _print_results(results: Iterable[Result], task: Task) -> None:
    from muntin.reporting.text import percent
    from muntin.tasks.answers import ANSWERING

    for result in results:
        line = ANSWERING[task].line(result)
        if "agreement" in result:
            line += f" ({percent(result['agreement'], 2)} of the pixels that count agree with the truth)"
        if "frames" in result:
            line += f" ({result['frames']} frames)"
        if result.get("kept"):
            line += " (kept)"
        out.print(f"{result['source']} -> {line}")
        for note in result.get("notes", ()):
            say(note)
        if "truth" in result:
            names = [f"{number} is {name}" for number, name in result["truth"].items()]
            shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            out.print(f"the truth's numbers were taken for class numbers, not for a recipe's `value`s: {shown}")


def _images(paths: Iterable[Path], truth: Path | None, results: Path) -> tuple[list[Path], list[str]]:
    """Return the named images and those of the folders (`images_in`), each once, and notes on what was left out.

    Results that are in the folder `results` already are skipped. Raises DataError without images, or for several and one truth.
    """
    from muntin.images import IMAGE_SUFFIXES
    from muntin.images.listing import images_in
    from muntin.images.rasters import RASTER_SUFFIXES

    images, notes = dict[Path, Path](), list[str]()
    for path in paths:
        candidates = [path]
        if path.is_dir():
            found, own_notes = images_in(path, suffixes=(*IMAGE_SUFFIXES, *RASTER_SUFFIXES))
            written = results.resolve() if results.resolve() != path.resolve() else None
            candidates = [image for image in found if not (written and _RESULT.search(image.name) and _lies_in(image, written))]
            notes += own_notes
        if not candidates:
            raise DataError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}); name an image or a folder of them")
        for image in candidates:
            images.setdefault(image.parent.resolve() / image.name, image)  # a symbolic link counts by its own name
    if truth is not None and len(images) != 1:
        raise DataError(f"--truth goes with one image, and these are {len(images)}: name one")
    return list(images.values()), notes


def _lies_in(image: Path, folder: Path) -> bool:
    return image.parent.resolve().is_relative_to(folder)


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


def _refuse_unused(task: Task, values: dict[str, object]) -> None:
    """Raise DataError for an option with a value that the artefact's task does not use."""
    from muntin.tasks.answers import ANSWERING

    answering = ANSWERING[task]
    if unused := [option for option, value in values.items() if value is not None and option in answering.useless]:
        raise DataError(f"{unused[0]}: the artefact's task is {task}, and its answer {answering.words}: leave out {', '.join(unused)}")


def _refuse_overwriting(
    named: Iterable[Path], targets: Mapping[Path, Path], output: Path, truth: Path | None, signature: Signature, *, scaled: bool
) -> None:
    """Raise DataError where a result would replace an image or the truth, or be read as an image next time.

    `named`: images and folders as given. `targets`: images, and the paths of their results without endings.
    """
    from muntin.runtime.bulk.items import item_files

    folders = {path.resolve() for path in named if path.is_dir()}
    folders |= {parent for path in targets if any((parent := path.parent.resolve()).is_relative_to(folder) for folder in folders)}
    inputs = {path.resolve() for path in (*targets, *([] if truth is None else [truth]))}
    for path, target in targets.items():
        if (folder := target.parent.resolve()) in folders:
            raise DataError(
                f"--output {output}: {folder}, where results would be written, is the folder of the images, and they would be taken for "
                "images next time: give another"
            )
        for file in item_files(path, target, signature, scaled=scaled).values():
            if file.resolve() in inputs:
                raise DataError(f"{file}, a result of {path}, would replace a file that was given: give another folder by --output")
