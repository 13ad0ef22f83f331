"""`muntin export`, `muntin verify` and `muntin predict`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muntin.cli.console import SHOWN, Json, memory_advice, out, print_json, progress_bar, refuse_unwritable, say, status
from muntin.errors import ArtifactError, DataError, RecipeError, VerificationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from muntin.artifact import ClassInfo, Signature
    from muntin.runtime import Session
    from muntin.runtime.session import Shape

Engine = Annotated[str, typer.Option(help="openvino, onnxruntime, onnxruntime-cuda or onnxruntime-tensorrt.")]
Precision = Annotated[str, typer.Option(help="recorded, f32, bf16 or f16: what the float layers run in.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the engine; the usable physical cores by default.")]
TILE = 512
"""Side of the tiles that `predict` computes in, pixels, for an artefact that does not say what size it was exported with."""
COMPILED = 128
"""Tiles of one size for which `predict` lets the engine compile that size, half a second or more to save some ms each; fewer are computed
by a model of any size."""
ArtifactPath = Annotated[Path, typer.Argument(help="An artefact's folder, written by `muntin export`.")]


def export_command(
    checkpoint: Annotated[Path, typer.Argument(help="A run's folder or one of its checkpoints.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the artefact; RUN/artifact by default.")] = None,
    floating: Annotated[
        bool, typer.Option("--float", help="Do not quantise: all layers in floating point. Not for what is quantised already.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help=r"Replace a value, e.g. --set quantization.keep=\[head.conv]; repeatable.")
    ] = None,
    json: Json = False,
) -> None:
    """Quantise a checkpoint to INT8 and write it as an artefact that runs without PyTorch."""
    from muntin.compression.stages import broken_off
    from muntin.deployment.assessment import ARTIFACT, export_checkpoint, exported, other_artifact, quantized_by
    from muntin.training import find_checkpoint, read_checkpoint

    if floating and set_:
        raise RecipeError("--set says how to quantise, and --float that nothing is: give one of them")
    found = find_checkpoint(checkpoint)
    target = output or found.parent.parent / ARTIFACT
    with status("exporting"):
        trained = quantized_by(read_checkpoint(found), set_ or ())
        replaced = other_artifact(trained, target, integer=not floating)
        kept_as_it_was = exported(trained, target, integer=not floating) is not None
        artifact = export_checkpoint(trained, target, integer=not floating)
    manifest = artifact.manifest
    integers = [layer for layer in manifest.layers if layer.activation_bits == 8]
    kept = {layer.name: layer.note for layer in manifest.layers if layer.activation_bits is None}
    recorded_notes = manifest.measured.get("notes")
    notes = [*broken_off(trained), *(recorded_notes if isinstance(recorded_notes, list) else [])]
    if json:
        print_json(
            {
                "artifact": target,
                "bytes": artifact.bytes,
                "replaced": replaced,
                "written": not kept_as_it_was,
                "precision": manifest.precision,
                "int8_layers": len(integers),
                "kept": kept,
                "notes": notes,
            }
        )
        return
    done = "is there " if kept_as_it_was else "wrote    "
    out.print(
        f"{done} {target}: {artifact.bytes / 1e6:.2f} MB, {len(integers)} layers in INT8, others in {manifest.precision}",
        markup=False,
    )
    if replaced is not None:
        out.print(f"replaced  what was there, {replaced}", markup=False)
    for name, reason in {}.items() if floating else kept.items():
        out.print(f"kept      {name}: {reason or 'not quantised'}", markup=False)
    for note in notes:
        out.print(f"note      {note}", markup=False)


def verify_command(
    artifact: ArtifactPath, engine: Engine = "openvino", precision: Precision = "recorded", threads: Threads = None, json: Json = False
) -> None:
    """Check an artefact: digests, golden answers, that its quantised layers run on integers, and what each of them computes.

    The last, every layer alone, is a check of OpenVINO; with another --engine it is left out, and a note says so.
    """
    from muntin.reporting.text import percent
    from muntin.runtime import verify
    from muntin.runtime.options import DEFAULT_ENGINE, SessionOptions

    alone = engine == DEFAULT_ENGINE
    with status("verifying"):
        result = verify(artifact, SessionOptions(engine=engine, precision=precision, threads=threads), layers=alone)
    notes = [] if alone else [f"the layers were not checked one by one, which is done in {DEFAULT_ENGINE} only: leave out --engine for it"]
    integers = [layer.name for layer in result.layers if layer.compute and layer.precision == "i8"]
    if json:
        document: dict[str, Any] = {
            "artifact": artifact, "passed": result.passed, "engine": result.engine, "precision": result.precision, "files": result.digests,
            "golden": [
                {
                    "shape": g.shape, "max_error": g.max_error if isfinite(g.max_error) else None,
                    "rms_error": g.rms_error if isfinite(g.rms_error) else None, "label_agreement": g.label_agreement, "passed": g.passed,
                }
                for g in result.golden
            ],
            "integer_layers": integers if result.layers else None, "fallbacks": result.fallbacks, "problems": result.problems,
            "layers": [{"name": c.name, "error": c.error if isfinite(c.error) else None, "passed": c.passed} for c in result.checks],
            "notes": notes,
        }  # fmt: skip
        print_json(document)
    else:
        out.print(f"files     {len(result.digests)} digests agree", markup=False)
        for golden in result.golden:
            agreement = "" if golden.label_agreement is None else f", {percent(golden.label_agreement, 2)} of its labels agree"
            errors = f"largest error {golden.max_error:.2g} standard deviations, {golden.rms_error:.2g} in the mean"
            out.print(f"golden    {golden.shape}: {errors}{agreement}", markup=False)
        ran = f"{len(integers)} layers run on INT8 kernels of {result.engine}, the others in {result.precision}"
        out.print(f"integers  {ran if result.layers else f'unknown: {result.engine} does not say what its layers run in'}", markup=False)
        if result.checks:
            worst = max(result.checks, key=lambda check: check.error)
            far = f"at most {worst.error:.2g} quantisation steps off ({worst.name})" if worst.error else "exact"
            out.print(f"layers    {len(result.checks)} checked one by one: {far}", markup=False)
        if result.fallbacks and result.passed:
            named = ", ".join(result.fallbacks[:3]) + (", ..." if len(result.fallbacks) > 3 else "")
            out.print(f"note      {len(result.fallbacks)} INT8 layers run in float in {result.engine}: {named}", markup=False)
        for note in notes:
            out.print(f"note      {note}", markup=False)
    if not result.passed:
        raise VerificationError(
            f"{artifact}: {result.problems[0]}" + (f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else "")
        )


def predict_command(
    artifact: ArtifactPath,
    image: Annotated[list[Path], typer.Argument(help="Images, or folders of them.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the results; predictions by default.")] = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="A mask of class numbers, 255 ignored, or of the classes' colours: also writes a difference picture. One image."),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            min=1, help="Side of the blended tiles, pixels; by default that of the images it was exported with, which a run's score is of."
        ),
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(min=0, help="Pixels that neighbouring tiles share; a quarter of the tile by default.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Refuse pictures of more pixels; 268,435,456 by default. A .npy file is read tile by tile.")
    ] = None,
    engine: Engine = "openvino",
    precision: Precision = "recorded",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Segment, restore or classify images: a coloured mask of class numbers and an overlay for each, a restored image, or a class.

    An image that cannot be done is told, the others are done, and the exit code is 1.
    """
    from muntin.artifact import open_artifact
    from muntin.images import MAX_PIXELS, TooManyPixelsError
    from muntin.runtime.engines.registry import open_session
    from muntin.runtime.options import SessionOptions
    from muntin.runtime.tiles import check_tiles

    images = _images(image)
    if truth is not None and len(images) != 1:
        raise DataError(f"--truth goes with one image, and these are {len(images)}: name one")
    options = SessionOptions(engine=engine, precision=precision, threads=threads, shapes=(), dynamic=True)
    session = open_session(artifact, options)
    task = session.signature.task
    given = {"--output": output, "--truth": truth, "--tile": tile, "--overlap": overlap}
    _refuse_unused(task, [option for option, value in given.items() if value is not None])
    folder = output or Path("predictions")
    side = tile or max((open_artifact(artifact).manifest.example or (1, TILE, TILE))[1:])
    tiles: dict[str, Any] = {"tile": side, "overlap": overlap}
    if task != "classify":
        _refuse_same_results(images)
        refuse_unwritable(folder)
        _refuse_overwriting(image, images, folder, truth, session.signature)
        check_tiles(session, **tiles)
    limit = max_pixels or MAX_PIXELS
    session.warm_up(_common_shapes(images, session.signature, side, overlap, limit), compute=False)
    results, failures = [], []
    with progress_bar("predicting") as advance:
        for done, path in enumerate(images, 1):
            try:
                if task == "classify":
                    results.append(_classify(session, path, limit))
                else:
                    results.append(_segment(session, path, folder, truth, limit, tiles))
            except (DataError, ArtifactError, MemoryError) as error:  # of this image: the others are not worse for it
                text = f"{path}: {memory_advice(error)}" if isinstance(error, MemoryError) else str(error)
                text += ", or allow more by --max-pixels" if isinstance(error, TooManyPixelsError) else ""
                say(f"muntin: {text}")
                failures.append({"source": str(path), "error": text})
            advance(done, len(images))
    if json:
        print_json(
            {"artifact": artifact, "engine": session.engine, "precision": session.precision, "results": results, "failures": failures}
        )
    else:
        _print_results(results)
    if failures:
        raise typer.Exit(1)


def _print_results(results: Iterable[dict[str, Any]]) -> None:
    from muntin.reporting.text import percent

    for result in results:
        what = result.get("class") or ", ".join(str(v) for k, v in result.items() if k in ("mask", "image", "overlay", "difference"))
        if "probability" in result:
            what += f" (probability {result['probability']:.3f})"
        if "agreement" in result:
            what += f" ({percent(result['agreement'], 2)} of the pixels that count agree with the truth)"
        out.print(f"{result['source']} -> {what}", markup=False)
        for note in result.get("notes", ()):
            say(note)
        if "truth" in result:
            taken = [f"{number} is {name}" for number, name in result["truth"].items()]
            shown = ", ".join(taken[:SHOWN]) + (", ..." if len(taken) > SHOWN else "")
            out.print(f"the truth's numbers were taken for class numbers, not for a recipe's `value`s: {shown}", markup=False)


def _images(given: Iterable[Path]) -> list[Path]:
    """The images that were named, and those of the folders, each once. Raises DataError for a folder without."""
    from muntin.images import IMAGE_SUFFIXES

    def is_image(path: Path) -> bool:
        """A hidden file is what another system left beside an image: "._a.jpg" of macOS."""
        return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()

    found: dict[Path, Path] = {}
    for path in given:
        images = sorted(p for p in path.iterdir() if is_image(p)) if path.is_dir() else [path]
        if not images:
            raise DataError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}); name an image or a folder of them")
        for image in images:
            found.setdefault(image.parent.resolve() / image.name, image)  # not what a link leads to: it is a picture of its own name
    return list(found.values())


def _refuse_same_results(images: Iterable[Path]) -> None:
    found: dict[str, Path] = {}
    for image in images:
        other = found.setdefault(image.stem, image)
        if other is not image:
            raise DataError(
                f"{other} and {image} are several images named {image.stem}, whose results would overwrite each other: rename one, or "
                "predict them apart"
            )


def _common_shapes(images: Iterable[Path], signature: Signature, tile: int, overlap: int | None, max_pixels: int) -> list[Shape]:
    """The (B, H, W) of calls that are worth a compilation of their own: of `COMPILED` calls or more, or where all calls are of one size.

    By the images' headers; what is wrong with one is told when it is read.
    """
    from muntin.images import image_size
    from muntin.runtime.session import STATIC_SHAPES
    from muntin.runtime.tiles import tile_origins

    if signature.side is not None:
        return [(1, signature.side, signature.side)]
    calls: Counter[Shape] = Counter()
    for path in images:
        with suppress(DataError):
            height, width = image_size(path, max_pixels=max_pixels)
            if signature.task == "classify":
                calls[1, height, width] += 1
                continue
            rows, columns = (len(tile_origins(side, tile, tile // 4 if overlap is None else overlap)) for side in (height, width))
            calls[1, min(tile, height), min(tile, width)] += rows * columns
    return [shape for shape, count in calls.most_common(STATIC_SHAPES) if count >= COMPILED or len(calls) == 1]


def _results(path: Path, output: Path, signature: Signature) -> dict[str, Path]:
    """Where each result of an image goes: no image's own name, since people keep results beside their images."""
    if signature.task == "restore":
        suffix = ".png" if signature.channels in (1, 3, 4) else ".npy"  # which takes any number of channels
        return {"image": output / f"{path.stem}.restored{suffix}"}
    return {kind: output / f"{path.stem}.{kind}.png" for kind in ("mask", "overlay", "difference")}


def _refuse_unused(task: str, given: Iterable[str]) -> None:
    """Raises DataError for an option that the artefact's task has no use for."""
    useless = {"classify": ("--output", "--truth", "--tile", "--overlap"), "restore": ("--truth",)}.get(task, ())
    if unused := [option for option in given if option in useless]:
        answers = "the name of a class, which is printed" if task == "classify" else "an image, which no mask is the truth of"
        raise DataError(f"{unused[0]}: the artefact's task is {task}, and its answer {answers}: leave out {', '.join(unused)}")


def _refuse_overwriting(given: Iterable[Path], images: Iterable[Path], output: Path, truth: Path | None, signature: Signature) -> None:
    """Raises DataError, before anything is computed, where a result would replace an image or the truth, or be an image next time."""
    if any(path.is_dir() and output.resolve() == path.resolve() for path in given):
        raise DataError(f"--output {output} is the folder of the images, whose results would be taken for images next time: give another")
    kept = {path.resolve() for path in (*images, *([] if truth is None else [truth]))}
    for path in images:
        for target in _results(path, output, signature).values():
            if target.resolve() in kept:
                raise DataError(f"{target}, a result of {path}, would replace a file that was given: give another folder by --output")


def _classify(session: Session, path: Path, max_pixels: int) -> dict[str, Any]:
    import numpy as np

    from muntin.images import read_image
    from muntin.runtime import predict

    scores = predict(session, read_image(path, channels=session.signature.channels, max_pixels=max_pixels, mapped=True))
    weights = np.exp(scores - scores.max())
    best = int(scores.argmax())
    return {"source": str(path), "class": session.signature.classes[best].name, "probability": float(weights[best] / weights.sum())}


def _segment(session: Session, path: Path, output: Path, truth: Path | None, max_pixels: int, tiles: dict[str, Any]) -> dict[str, Any]:
    from muntin.images import encode_png, overlay, read_image, write_image, write_whole
    from muntin.runtime import predict

    image = read_image(path, channels=session.signature.channels, max_pixels=max_pixels, mapped=True)
    size = [side * session.signature.scale for side in image.shape[:2]]
    notes: list[str] = []
    known = None if truth is None else _read_truth(truth, size, session.signature.classes, max_pixels * session.signature.scale**2, notes)
    answer = predict(session, image, **tiles)
    output.mkdir(parents=True, exist_ok=True)
    targets = _results(path, output, session.signature)
    if session.signature.task == "restore":
        write_image(targets["image"], answer)
        return {"source": str(path), "image": str(targets["image"])}
    classes = session.signature.classes
    result: dict[str, Any] = {"source": str(path), "mask": str(targets["mask"])}
    write_whole(targets["mask"], encode_png(answer, [entry.color for entry in classes]))
    if image.shape[2] in (1, 3, 4):
        result["overlay"] = str(targets["overlay"])
        write_image(targets["overlay"], overlay(_scaled(image, session.signature.scale), answer, classes))
    else:
        notes.append(f"{path}: {image.shape[2]} channels cannot be shown: no overlay")
    if known is not None:
        result["difference"] = str(targets["difference"])
        labels, taken = known
        result["agreement"] = _write_difference(targets["difference"], answer, labels)
        if taken:
            result["truth"] = taken
    total = answer.size
    result["shares"] = {c.name: float((answer == k).sum() / total) for k, c in enumerate(classes)}
    if notes:
        result["notes"] = notes
    return result


def _scaled(image: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """The image as large as what the artefact answers for it."""
    return image if scale == 1 else image.repeat(scale, 0).repeat(scale, 1)


def _read_truth(
    path: Path, size: Sequence[int], classes: Sequence[ClassInfo], max_pixels: int, notes: list[str]
) -> tuple[NDArray[np.uint8], dict[int, str]]:
    """Its classes, and what its numbers are taken for: class numbers, which a recipe's `value`s need not be; adds to `notes`."""
    import numpy as np

    from muntin.images import IGNORED, read_mask

    mask = read_mask(path, max_pixels=max_pixels)
    allowed = f"0 to {len(classes) - 1}, and {IGNORED} for what is ignored"
    numbers = mask.ndim == 2
    if not numbers:
        mask = _numbered(path, mask, classes, allowed)
    if mask.shape != tuple(size):
        raise DataError(
            f"{path}: the mask is {mask.shape[1]}x{mask.shape[0]} and the answer {size[1]}x{size[0]}; give the mask of this image"
        )
    values = np.unique(mask)
    if values.tolist() == [IGNORED]:
        raise DataError(f"{path}: every pixel is {IGNORED}, which counts as ignored, and none is compared: allowed are {allowed}")
    if values.tolist() == [0, IGNORED] and len(classes) == 2:
        notes.append(f"{path}: {IGNORED} counts as ignored, so class 0 alone is compared; if it means {classes[1].name}, write 1 there")
    wrong = np.setdiff1d(values, [*range(len(classes)), IGNORED])
    if wrong.size:
        raise DataError(f"{path}: the mask holds the value {wrong[0]}; allowed are {allowed} (a recipe's `value`s are not in an artefact)")
    return mask.astype(np.uint8), {int(value): classes[value].name for value in values if numbers and value != IGNORED}


def _numbered(path: Path, mask_HWC: NDArray[np.uint8], classes: Sequence[ClassInfo], allowed: str) -> NDArray[np.uint8]:
    """Class numbers for the colours that the artefact paints its classes in: of a recipe's `value`s it knows no more than that."""
    import numpy as np

    numbers = {entry.color: number for number, entry in enumerate(classes)}
    colors, places = np.unique(mask_HWC.reshape(-1, 3), axis=0, return_inverse=True)
    found = [tuple(color) for color in colors.tolist()]
    strange = next((color for color in found if color not in numbers), None)
    if strange is not None or len(numbers) < len(classes):
        painted = ", ".join(f"{entry.name} {list(entry.color)}" for entry in classes[:4]) + (", ..." if len(classes) > 4 else "")
        holds = "two classes of the artefact have one colour" if strange is None else f"no class of the artefact has its {list(strange)}"
        raise DataError(
            f"{path}: the mask is a colour picture, and {holds} ({painted}; a recipe's `value`s are not in it): give it in these colours, "
            f"or as class numbers, {allowed}"
        )
    return np.array([numbers[color] for color in found], np.uint8)[places.reshape(mask_HWC.shape[:2])]


def _write_difference(path: Path, labels: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    from muntin.images import IGNORED, difference, write_image

    write_image(path, difference(labels, truth))
    counted = truth != IGNORED
    return float((labels == truth)[counted].mean())
