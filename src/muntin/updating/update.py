"""An update from beginning to end: learn, export, judge, publish, push.

    RUN/updates/1/data, checkpoints, artifact    an ordinary run folder
                  parent/artifact                the old model's, unless its run has it
                  verdict.json                   the gate's decision on `artifact`
                  pushed.json                    what a server did with it
    RUN/updates/2/...                            goes on from the newest accepted one
    RUN/versions/2                               a copy of an accepted artefact, for `muntin serve RUN/versions`

A killed update goes on: data, checkpoints, artefacts and verdict that are there are not made again. So does one that was accepted, but not
pushed since its server was away.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from muntin.artifact import Artifact
from muntin.artifact.file_lock import folder_in_use
from muntin.data.config import open_source
from muntin.deployment.checkpoint_export import ARTIFACT, export_checkpoint, exported
from muntin.errors import CheckpointError, DataError, RecipeError
from muntin.images.writing import write_whole
from muntin.tasks.classes import ClassSpec
from muntin.training.checkpoint import Checkpoint, checkpoints_in, find_checkpoint, read_checkpoint, source_of
from muntin.training.config import UpdateConfig
from muntin.training.evaluation import tile_of
from muntin.training.progress.report import FitProgress, FitReport
from muntin.training.recipe import Recipe, override_recipe
from muntin.updating.drift.training_pictures import with_training_reference
from muntin.updating.gate import GateVerdict, judge_artifact, next_steps, read_verdict, write_verdict
from muntin.updating.learner import learn
from muntin.updating.new_pictures import NewPictures
from muntin.updating.strategies import STRATEGIES
from muntin.updating.update_data import NEW, OLD, UpdatePlan, all_classes, of_kind, read_listing, windows_to_judge
from muntin.updating.versions import ServerClient, publish, push

FOLDER, PARENT_ARTIFACT, PUSHED, VERSIONS = "updates", "parent/artifact", "pushed.json", "versions"


class PushRecord(BaseModel):
    """Content of `pushed.json`: what a server did with the version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    version: str
    serves: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """Result of an update. `artifact`, `verdict`: None if training was interrupted. `advice`: what to try after a refusal."""

    directory: Path
    parent: Checkpoint
    checkpoint: Checkpoint
    artifact: Artifact | None
    verdict: GateVerdict | None
    notes: tuple[str, ...]
    advice: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        """True if the gate accepted the artefact."""
        return self.verdict is not None and self.verdict.accepted


def run_directory(run: Path) -> Path:
    """The folder of a run that is named by itself, by a checkpoint or by one of its updates' folders."""
    return find_checkpoint(run).parent.parent


def update_folders(run: Path) -> list[Path]:
    """Folders of the updates of a run, the oldest first."""
    folder = run / FOLDER
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []
    return [folder / str(number) for number in numbers]


def newest_accepted(run: Path) -> Path:
    """The newest update of a run that the gate accepted and no server sent back; the run itself if there is none."""
    for folder in reversed(update_folders(run)):
        verdict, pushed = read_verdict(folder), read_push(folder)
        if verdict is not None and verdict.accepted and (pushed is None or pushed.serves):
            return folder
    return run


def read_push(directory: Path) -> PushRecord | None:
    """Read what a server did with an update; None if it was not pushed. Raises `DataError` if the record is damaged."""
    path = directory / PUSHED
    if not path.is_file():
        return None
    try:
        return PushRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path}: damaged ({' '.join(str(error).split())[:120]}): remove it, and push again") from error


def write_push(record: PushRecord, directory: Path) -> None:
    """Write `pushed.json` into the folder of an update."""
    write_whole(directory / PUSHED, record.model_dump_json(indent=1).encode() + b"\n")


def offer_update(result: UpdateResult, repository: Path, client: ServerClient | None) -> tuple[Path, PushRecord | None]:
    """Publish an accepted update as the next version in `repository`, and offer it to a server. Returns the version's folder.

    The record of the push is written into the update's folder: a version that was sent back is no parent of later updates. Raises
    `PushError` if the server does not answer.
    """
    assert result.artifact is not None and result.verdict is not None
    version, published = publish(result.artifact, result.verdict, repository)
    if client is None:
        return published.path, None
    serves, reason = push(client, version, published.digest)
    record = PushRecord(url=client.url, version=version, serves=serves, reason=reason)
    write_push(record, result.directory)
    return published.path, record


def refuse_restore(recipe: Recipe) -> None:
    """Raise `RecipeError` for a run of restore, whose pictures have no classes to compare old and new ones by."""
    if not recipe.answer.has_classes:
        raise RecipeError(
            f"{recipe.name}: updates learn classes from labelled pictures, and task {recipe.task} has none: put the new pictures beside "
            "the old ones, and train again with `muntin fit`, beginning with model.weights"
        )


def plan_update(run: Path, folder: Path, *, added: Sequence[ClassSpec] = (), overrides: Sequence[str] = ()) -> UpdatePlan:
    """Plan an update of a run's newest accepted model with the pictures of `folder`.

    If that model is itself the update of this plan, accepted but not pushed, this is its plan again: what follows the verdict was
    interrupted. `overrides`: `update.KEY=VALUE` of the recipe. Reads every new file once, in this case twice. Raises `DataError` for
    pictures that cannot be used.
    """
    if not checkpoints_in(run / "checkpoints"):
        return _plan(read_checkpoint(run), folder, added, overrides)
    newest = newest_accepted(run)
    return _repeated(run, newest, folder, added, overrides) or _plan(read_checkpoint(newest), folder, added, overrides)


def _repeated(run: Path, newest: Path, folder: Path, added: Sequence[ClassSpec], overrides: Sequence[str]) -> UpdatePlan | None:
    """The plan that the newest accepted update was made by, if it has these pictures and settings and was not pushed."""
    verdict, listing = read_verdict(newest), read_listing(newest)
    if newest == run or verdict is None or listing is None or read_push(newest) is not None:
        return None
    for place in (*reversed(update_folders(run)), run):
        with suppress(CheckpointError):  # an update that was interrupted early has none
            parent = read_checkpoint(place, check=False)
            if parent.state.weights != listing.parent:
                continue
            try:
                plan = _plan(read_checkpoint(place), folder, added, overrides)
                return plan if plan.same(listing) and plan.config.accept == verdict.conditions else None
            except DataError:  # of pictures or classes that this update did not have
                return None
    return None


def _plan(parent: Checkpoint, folder: Path, added: Sequence[ClassSpec], overrides: Sequence[str]) -> UpdatePlan:
    refuse_restore(parent.recipe)
    config = update_config(parent.recipe, overrides)
    listing = read_listing(parent.path.parent.parent)
    known = () if listing is None else listing.known
    classes = all_classes(parent, added)
    new = NewPictures(
        folder, task=parent.recipe.task, classes=classes, ignore=parent.recipe.data.ignore, channels=parent.recipe.data.channels,
        validation=config.validation, test=config.test, known=known,
    )  # fmt: skip
    return UpdatePlan(parent=parent, old=source_of(parent), new=new, config=config, classes=classes, known=known)


def update_config(recipe: Recipe, overrides: Sequence[str]) -> UpdateConfig:
    """The `update` section of a recipe with values replaced. Raises `RecipeError` for keys of other sections."""
    if other := next((override for override in overrides if not override.startswith("update.")), None):
        raise RecipeError(f"'{other}': the model is trained already; only update.KEY=VALUE can be set here")
    return override_recipe(recipe, overrides).update


def update_run(
    run: Path,
    folder: Path,
    *,
    directory: Path | None = None,
    added: Sequence[ClassSpec] = (),
    overrides: Sequence[str] = (),
    threads: int | None = None,
    report: FitReport = lambda progress: None,
) -> UpdateResult:
    """Update a run with the pictures of `folder`, and judge the result (see the module).

    `directory`: by default the unfinished update of the same plan, or the next one of `RUN/updates`. `threads`: of the engine that judges.
    Raises kinds of `MuntinError`; a refusal is in the result.
    """
    plan = plan_update(run, folder, added=added, overrides=overrides)
    if STRATEGIES[plan.config.strategy].old == "all" and plan.parent.state.update is not None:
        parent = plan.parent.path.parent.parent
        raise RecipeError(
            f"strategy '{plan.config.strategy}' takes all old pictures, and {parent} is an update, which keeps a part of them: put "
            "the pictures of all updates into one folder, and name the first run by RUN/checkpoints; or set another update.strategy"
        )
    directory = directory or next_folder(run_directory(run), plan)
    with folder_in_use(directory, "muntin update") as notes:
        learned = learn(plan, directory, report=report)
        verdict, artifact, drift_notes = None, None, tuple[str, ...]()
        if learned.finished:
            artifact, verdict, drift_notes = _judged(plan, learned.checkpoint, directory, threads, report)
        return UpdateResult(
            directory=directory, parent=plan.parent, checkpoint=learned.checkpoint, artifact=artifact, verdict=verdict,
            notes=(*notes, *learned.notes, *(() if verdict is None else verdict.notes), *drift_notes),
            advice=() if verdict is None else next_steps(verdict, plan.config.share),
        )  # fmt: skip


def root_of(run: Path) -> Path:
    """The run that an update's folder belongs to; another run's folder is its own."""
    return run.parent.parent if run.parent.name == FOLDER else run


def next_folder(run: Path, plan: UpdatePlan) -> Path:
    """The folder of this plan's update if it has one, otherwise of the next number."""
    root = root_of(run)
    folders = update_folders(root)
    for folder in reversed(folders):
        listing = read_listing(folder)
        if listing is not None and plan.same(listing):
            return folder
    unused = [folder for folder in folders[-1:] if read_listing(folder) is None and not checkpoints_in(folder / "checkpoints")]
    number = int(folders[-1].name) + 1 if folders else 1
    return unused[0] if unused else root / FOLDER / str(number)


def _judged(
    plan: UpdatePlan, checkpoint: Checkpoint, directory: Path, threads: int | None, report: FitReport
) -> tuple[Artifact, GateVerdict, tuple[str, ...]]:
    def stage(name: str) -> None:
        report(FitProgress(kind="prepare", step=0, steps=0, note=name))

    stage("exporting")
    new, drift_notes = with_training_reference(export_checkpoint(checkpoint, directory / ARTIFACT), checkpoint, threads=threads)
    own = plan.parent.path.parent.parent / ARTIFACT
    old = exported(plan.parent, own) or export_checkpoint(plan.parent, directory / PARENT_ARTIFACT)
    existing = read_verdict(directory)
    if (
        existing is not None
        and (existing.artifact, existing.parent) == (new.digest, old.digest)
        and existing.conditions == plan.config.accept
    ):
        return new, existing, drift_notes
    test = open_source(checkpoint.recipe.data, task=checkpoint.recipe.task, root=directory.resolve()).split("test")
    old_samples, new_samples = (windows_to_judge(of_kind(test, prefix), plan.side) for prefix in (OLD, NEW))
    verdict = judge_artifact(
        new, old, old_samples=old_samples, new_samples=new_samples, accept=plan.config.accept, tile=tile_of(checkpoint.recipe.data.crop),
        data=plan.new.listing_digest(), strategy=plan.config.strategy, threads=threads, stage=stage,
    )  # fmt: skip
    write_verdict(verdict, directory)
    return new, verdict, drift_notes
