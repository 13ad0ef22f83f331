"""`muntin drift`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from muntin.cli.console import finite, out, print_json, print_notes, print_table
from muntin.cli.options import ArtifactArgument, EngineOption, JsonOption, PrecisionOption, ThreadsOption
from muntin.errors import ArtifactError, DataError, DriftError
from muntin.progress import progress_bar

if TYPE_CHECKING:
    from muntin.artifact import Artifact
    from muntin.runtime import Session
    from muntin.updating.drift.comparison import DriftResult
    from muntin.updating.drift.reference import DriftReference

_FolderArgument = Annotated[
    Path | None,
    typer.Argument(help="Folder of images to compare, with subfolders; masks are left out. Or that of `muntin serve --keep-samples`."),
]
_ReferenceOption = Annotated[
    Path | None,
    typer.Option(
        help="The run that the artefact was exported from, or a folder of pictures like its training pictures: their statistics are "
        "written into the artefact."
    ),
]
_NewestOption = Annotated[int | None, typer.Option(min=1, help="Compare only so many pictures, those that were changed last.")]
_ReportOption = Annotated[Path | None, typer.Option(help="HTML file with the farthest pictures; JSON is written beside it.")]
_PicturePixelsOption = Annotated[int, typer.Option(min=1, help="Pixels of one picture, checked before it is decoded.")]


def drift_command(
    artifact: ArtifactArgument,
    folder: _FolderArgument = None,
    reference: _ReferenceOption = None,
    newest: _NewestOption = None,
    report: _ReportOption = None,
    max_pixels: _PicturePixelsOption = 1 << 28,
    engine: EngineOption = "openvino",
    precision: PrecisionOption = "recorded",
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Check whether pictures are like those that an artefact was trained on, and say what changed. Exit code 1: they are not.

    Compares statistics of the pixels and of the model's answers by an effect size, which does not grow with the number of pictures. Of
    batches of the training pictures, 1 in 100 is taken for drift.
    """
    from muntin.artifact import open_artifact
    from muntin.runtime import load
    from muntin.updating.drift.reference import read_reference

    if folder is None and reference is None:
        raise typer.BadParameter("name the folder of pictures to compare, or --reference with the run", param_hint="FOLDER")
    if report is not None and (folder is None or report.suffix.lower() not in (".html", ".htm")):
        raise typer.BadParameter(f"{report}: a file that ends in .html, of a folder that is compared", param_hint="--report")
    opened = open_artifact(artifact)
    signature = opened.picture
    known = None if reference is not None else read_reference(opened, signature)
    if reference is None and known is None:
        raise ArtifactError(
            f"{artifact} has no reference to compare with: make it once by `muntin drift {artifact} --reference {_run(artifact)}`"
        )
    session = load(artifact, engine=engine, precision=precision, threads=threads)
    if reference is not None:
        known, notes = _make_reference(opened, session, reference, max_pixels)
        if folder is None or not json:
            _print_reference(artifact, known, notes, json)
    assert known is not None
    if folder is not None:
        _compare(artifact, session, known, folder, newest=newest, max_pixels=max_pixels, report=report, json=json)


def _make_reference(opened: Artifact, session: Session, source: Path, max_pixels: int) -> tuple[DriftReference, tuple[str, ...]]:
    """Describe the pictures of a run or a folder, and write their statistics into the artefact. Returns notes, too."""
    from muntin.updating.drift.comparison import describe_files, few_pictures_note, pictures_in
    from muntin.updating.drift.features import feature_list
    from muntin.updating.drift.reference import LEAST_REFERENCE, REFERENCE_PICTURES, make_reference, write_reference

    signature, notes = opened.picture, tuple[str, ...]()
    if not source.exists():
        raise DataError(
            f"--reference {source} does not exist: name a run, or a folder of pictures like those that the model was trained on"
        )
    if _is_run(source):
        from muntin.training import find_checkpoint, read_checkpoint
        from muntin.updating.drift.training_pictures import check_origin, describe_training

        checkpoint = read_checkpoint(find_checkpoint(source))
        check_origin(signature, checkpoint)
        with progress_bar("describing training pictures", "pictures/s") as advance:
            features, count = describe_training(session, checkpoint, progress=advance)
    else:
        paths, notes = pictures_in(source)
        count = min(REFERENCE_PICTURES, len(paths))
        paths = [paths[number * len(paths) // count] for number in range(count)]  # spread over all, in order of names
        windows = REFERENCE_PICTURES if count < LEAST_REFERENCE else 1
        with progress_bar("describing pictures", "pictures/s") as advance:
            features, _, skipped = describe_files(session, paths, windows=windows, max_pixels=max_pixels, progress=advance)
        if skipped:
            raise DataError(f"{len(skipped)} of {len(paths)} pictures cannot be read, such as {skipped[0][0]}: {skipped[0][1]}")
    made = make_reference(features, feature_list(signature))
    write_reference(opened, made)
    return made, (*notes, *few_pictures_note(count))


def _compare(
    artifact: Path, session: Session, known: DriftReference, folder: Path, *, newest: int | None, max_pixels: int, report: Path | None,
    json: bool,
) -> None:  # fmt: skip
    from muntin.updating.drift.comparison import compare_folder

    with progress_bar("comparing pictures", "pictures/s") as advance:
        result = compare_folder(session, known, folder, newest=newest, max_pixels=max_pixels, progress=advance)
    document = _document(artifact, folder, result)
    if report is not None:
        _write_report(report, artifact, folder, result, session, max_pixels)
        document["report"] = report
    if json:
        print_json(finite(document))
    else:
        _print(result, report)
    if result.drifted:
        raise DriftError(f"{folder}: {result.summary}; {_first(result)}")


def _print_reference(artifact: Path, made: DriftReference, notes: tuple[str, ...], json: bool) -> None:
    thresholds = dict(zip(made.batches, made.thresholds, strict=True))
    if json:
        document = {"artifact": artifact, "windows": made.pictures, "statistics": made.features, "thresholds": thresholds, "notes": notes}
        print_json(document)
        return
    out.print(f"wrote     {artifact}: the reference, {made.pictures} windows of pictures, {len(made.features)} statistics of each")
    listed = ", ".join(f"{threshold:.2f} ({size} pictures)" for size, threshold in thresholds.items())
    out.print(f"threshold {listed}, in standard deviations")
    print_notes(notes)


def _print(result: DriftResult, report: Path | None) -> None:
    out.print(f"{'drift' if result.drifted else 'no drift':<9} {result.summary.partition(': ')[2]}")
    changes = Table("statistic", "training", "now", "change", "", title="means, the largest changes in standard deviations")
    for change in result.changes:
        feature, word = change.feature, change.feature.more if change.effect > 0 else change.feature.less
        note = word if change.notable else "as by chance"
        changes.add_row(feature.name, feature.text(change.before), feature.text(change.after), f"{change.effect:+.2f}", note)
    print_table(changes)
    pictures = Table("picture", "distance", "most unusual", title="farthest pictures, 1 is usual")
    for picture in result.farthest:
        pictures.add_row(str(picture.path), f"{picture.distance:.1f}", picture.reason)
    print_table(pictures)
    print_notes([*result.notes, *(f"left out: {reason}" for _, reason in result.skipped)])
    if report is not None:
        out.print(f"wrote     {report}")


def _first(result: DriftResult) -> str:
    """Name the largest change, for the line on standard error."""
    notable = [change for change in result.changes if change.notable]
    return notable[0].text if notable else "no single statistic changed beyond chance, all together did"


def _document(artifact: Path, folder: Path, result: DriftResult) -> dict[str, Any]:
    return {
        "artifact": str(artifact), "folder": str(folder), "drift": result.drifted, "effect": result.effect, "threshold": result.threshold,
        "pictures": result.pictures, "windows": result.windows,
        "changes": [
            {"statistic": change.feature.name, "unit": change.feature.unit, "training": change.before, "now": change.after,
             "effect": change.effect, "beyond_chance": change.notable, "text": change.text}
            for change in result.changes
        ],
        "farthest": [
            {"picture": str(picture.path), "distance": picture.distance, "reason": picture.reason} for picture in result.farthest
        ],
        "skipped": [{"picture": str(path), "reason": reason} for path, reason in result.skipped], "notes": list(result.notes),
    }  # fmt: skip


def _write_report(report: Path, artifact: Path, folder: Path, result: DriftResult, session: Session, max_pixels: int) -> None:
    from datetime import UTC, datetime
    from importlib.metadata import version

    from muntin.images import open_source
    from muntin.reporting.drift.page import DriftChangeRow, DriftPicture, DriftRecord, write_drift
    from muntin.reporting.pictures import thumbnail
    from muntin.reporting.records import Hardware
    from muntin.runtime import describe_hardware
    from muntin.updating.drift.features import window

    pictures = []
    for picture in result.farthest:
        source = open_source(picture.path, session.signature.channels, max_pixels=max_pixels)
        shown = thumbnail(window(source, session.signature, picture.corner))
        name = str(picture.path.relative_to(folder))
        pictures.append(DriftPicture(name=name, distance=picture.distance, reason=picture.reason, uri=shown))
    changes = [
        DriftChangeRow(
            name=change.feature.name, before=change.feature.text(change.before), after=change.feature.text(change.after),
            effect=change.effect, words=change.feature.more if change.effect > 0 else change.feature.less, notable=change.notable,
        )
        for change in result.changes
    ]  # fmt: skip
    record = DriftRecord(
        muntin=version("muntin"), created=datetime.now(UTC).isoformat(timespec="seconds"), title=f"{folder} beside {artifact}",
        hardware=Hardware.model_validate(describe_hardware()), drifted=result.drifted, effect=result.effect, threshold=result.threshold,
        pictures=result.pictures, windows=result.windows, changes=tuple(changes), farthest=tuple(pictures),
        notes=(*result.notes, *(f"Left out: {reason}" for _, reason in result.skipped)),
    )  # fmt: skip
    write_drift(report, record)


def _is_run(path: Path) -> bool:
    """Return True for a run's folder or a checkpoint, False for a folder of pictures."""
    return path.is_file() or (path / "checkpoints").is_dir() or (path / "checkpoint.json").is_file()


def _run(artifact: Path) -> Path | str:
    """Return the folder of the run that an artefact lies in, to name it in advice; else "RUN"."""
    return next((folder for folder in list(artifact.absolute().parents)[:3] if (folder / "checkpoints").is_dir()), "RUN")
