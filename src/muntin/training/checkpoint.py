"""Checkpoints: safetensors for numbers, JSON for the rest, written atomically, read with every digest checked.

    RUN/checkpoints/step-00000250/model.safetensors      weights in training
                                  average.safetensors    averaged weights, which are evaluated, compressed and exported
                                  optimizer.safetensors  optimiser moments
                                  best.safetensors       averaged weights of the best validation, if they are not those above
                                  checkpoint.json        recipe, step, history, sha256 of the files above and of itself

Several processes write a folder in place of each of the safetensors files (see `stored_tensors`). A directory is written beside its place
and then renamed, so an incomplete one is never read. The newest two are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from safetensors.torch import save
from torch import Tensor

from muntin.artifact import Signature
from muntin.artifact.atomic_directory import replace_directory
from muntin.artifact.classes import ClassInfo, present_classes
from muntin.data import Source, calibration_batches, open_source
from muntin.errors import ArtifactError, CheckpointError, DataError
from muntin.images.listing import composed
from muntin.models import ModelConfig
from muntin.models.compression_record import Change, CompressionRecord
from muntin.models.create import preset_options
from muntin.models.trusted_code import trust_model
from muntin.training.config import UpdateStrategy
from muntin.training.distributed.ranks import ALONE, Ranks
from muntin.training.distributed.stored_tensors import AVERAGE, GROUPS, StoredTensors, folder_of
from muntin.training.recipe import Recipe, present_keys
from muntin.training.recovery.instability import GuardState
from muntin.training.recovery.out_of_memory import MemoryUse
from muntin.training.weights import structure_of

FORMAT, FORMAT_OF_SEVERAL = 1, 2
"""Formats of checkpoints that one process has written, and several."""
KEPT_CHECKPOINTS = 2
"""Checkpoints of a run that are kept."""
STATE = "checkpoint.json"
FIXED = ("gate_budget", "optimizer")
"""Keys of `training` that a resumed run cannot change: closed gates stay closed, and an optimiser cannot use another one's state."""
FREE = ("workers", "cache_mib")
"""Keys of `data` that a resumed run can change: they do not change a batch."""
NAMES = (STATE, *GROUPS, *map(folder_of, GROUPS))
"""Names that a checkpoint directory may hold."""
_OLDER = "use an older step beside it (remove this one, and --resume goes on from that), or train again"
_NAME = re.compile(r"^step-(\d{8,})$")


class DamagedCheckpointError(CheckpointError):
    """A checkpoint was altered, or is incomplete."""


class UpdateRecord(BaseModel):
    """The lineage of a model that `muntin update` has trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parent: str
    """sha256 of the averaged weights that it began with."""
    data: str
    """sha256 of the listing of the new pictures: their names and digests."""
    strategy: UpdateStrategy
    added: tuple[str, ...] = ()
    """Names of the new classes."""
    steps: int
    """Steps of the first training, of which later updates take a share."""


class CheckpointState(BaseModel):
    """Content of `checkpoint.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    step: int
    recipe: Annotated[Recipe, BeforeValidator(present_keys)]
    root: str
    """Folder that the recipe's relative paths start at."""
    classes: tuple[ClassInfo, ...]
    precision: str
    seconds: float
    training: list[dict[str, float]]
    pending: list[float] = []
    """Losses since the last point of the training curve."""
    validation: list[dict[str, Any]]
    compression: CompressionRecord | None = None
    """None for checkpoints of `muntin fit`."""
    structure: ModelConfig | None = None
    """Structure of a hybrid, as the preset was when it was trained; None for other models, and in checkpoints of muntin 0.1."""
    update: UpdateRecord | None = None
    """None for a model that saw no update."""
    guard: GuardState = GuardState()
    """State of the guard of the losses, with the number of batches that were left out."""
    memory: MemoryUse | None = None
    """The micro batch and checkpointing to which the run shrank for lack of memory."""
    averaged_at: int | None = None
    """Step of the averaged weights, if these are of an earlier step: of the best validation, in the last checkpoint of a run."""
    sha256: dict[str, str]

    @property
    def weights(self) -> str:
        """sha256 of the averaged weights: of their file, or of the digests of its parts."""
        parts = {name: digest for name, digest in self.sha256.items() if name.startswith(f"{folder_of(AVERAGE)}/")}
        return self.sha256[AVERAGE] if AVERAGE in self.sha256 else hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def result(self) -> dict[str, Any] | None:
        """The validation of the averaged weights; the last one if they were not validated; None if there is none."""
        step = self.step if self.averaged_at is None else self.averaged_at
        return next((point for point in self.validation if point["step"] == step), self.validation[-1] if self.validation else None)

    @property
    def judged(self) -> bool:
        """True if the last step was validated."""
        return self.step == 0 or bool(self.validation and self.validation[-1]["step"] == self.step)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read and checked. `muntin.compression.load_model` makes its model."""

    path: Path
    state: CheckpointState
    classes: tuple[ClassInfo, ...]
    """The present names and colours of its classes, which `muntin relabel` changes. `state.classes` are those in training."""
    tensors: StoredTensors = field(repr=False)

    @property
    def recipe(self) -> Recipe:
        """The recipe of its training."""
        return self.state.recipe

    @property
    def signature(self) -> Signature:
        """Inputs and outputs of its model, with the present names of its classes."""
        return self.recipe.signature(self.classes)

    @property
    def bytes(self) -> int:
        """Size of the FP32 weights on disk."""
        parts = list((self.path / folder_of(AVERAGE)).glob("*")) or [self.path / AVERAGE]
        return sum(part.stat().st_size for part in parts)

    @property
    def trained_steps(self) -> int:
        """Steps of its run, at least 1: fewer than the recipe's if `training.minutes` or `patience` ended it."""
        return max(1, min(self.state.step, self.recipe.training.steps))

    @property
    def trial(self) -> bool:
        """True for a candidate of `muntin compress`; False for runs, also those that go on from one."""
        return self.state.compression is not None and self.state.update is None

    @property
    def quantized(self) -> bool:
        """True if the model's layers have integer weights, or are trained for them."""
        record = self.state.compression
        return record is not None and bool(record.qat or record.integers)

    @property
    def changes(self) -> tuple[Change, ...]:
        """Changes of compression up to this checkpoint."""
        return () if self.state.compression is None else self.state.compression.changes


def check_classes(checkpoint: Checkpoint, source: Source) -> None:
    """Raise `DataError` if the data have other classes than the model was trained on, or another order of them."""
    trained, current = ([entry.name for entry in classes] for classes in (checkpoint.state.classes, source.classes))
    if [composed(name) for name in trained] != [composed(name) for name in current]:
        raise DataError(
            f"{checkpoint.path} was trained on the classes {', '.join(trained)}, and its data now have {', '.join(current)}: "
            "restore the names of their folders, or train again"
        )


def source_of(checkpoint: Checkpoint) -> Source:
    """Open the data that a checkpoint was trained on. Raises `DataError` if they are gone or have other classes now."""
    root = Path(checkpoint.state.root)
    try:
        source = open_source(checkpoint.recipe.data, task=checkpoint.recipe.task, root=root)
    except DataError as error:
        if root.is_dir():
            raise
        raise DataError(
            f"{checkpoint.path} was trained on data in {root}, which does not exist any more: `muntin fit RECIPE --resume` records "
            "the recipe's new place"
        ) from error
    check_classes(checkpoint, source)
    return source


def calibration_of(checkpoint: Checkpoint, source: Source) -> list[Tensor]:
    """Crops of the training split that calibrate a checkpoint's activations."""
    recipe = checkpoint.recipe
    samples, count = source.split("train"), recipe.quantization.calibration_images
    return list(calibration_batches(samples, task=recipe.task, crop=recipe.data.crop, count=count, batch_size=8, seed=recipe.seed))


def write_checkpoint(folder: Path, state: dict[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write `folder/step-NNNNNNNN` and remove all but the newest `KEPT_CHECKPOINTS`.

    `state`: the fields of `CheckpointState` without format and digests. Raises `CheckpointError` if it cannot be written (full
    disk); older checkpoints are then unchanged.
    """
    begin_checkpoint(folder, state, tensors)()
    return folder / step_name(state["step"])


def begin_checkpoint(folder: Path, state: dict[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Callable[[], None]:
    """Copy the state of one process, and return a function that writes it as `write_checkpoint` does."""
    content = state_content(state, FORMAT)
    return partial(_write_files, folder, content, {name: save(_separate(group)) for name, group in tensors.items()})


def _write_files(folder: Path, content: dict[str, Any], files: dict[str, bytes]) -> None:
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    path = folder / step_name(content["step"])
    with writing_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        replace_directory(path, {**files, STATE: state_file(content, digests)}, marker=STATE, names=NAMES)
    remove_old(folder)


def state_content(state: dict[str, Any], format_: int = FORMAT_OF_SEVERAL) -> dict[str, Any]:
    """The content of `checkpoint.json` without digests, as plain values."""
    structure = structure_of(state["recipe"], state["classes"])
    return CheckpointState(format=format_, sha256={}, structure=structure, **state).model_dump(mode="json")


def state_file(content: dict[str, Any], digests: dict[str, str]) -> bytes:
    """`checkpoint.json` with the digests of the files beside it and its own."""
    content = {**content, "sha256": digests}
    content["sha256"] = {**digests, STATE: digest_of(content)}
    return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"


def step_name(step: int) -> str:
    """Name of a checkpoint's directory."""
    return f"step-{step:08d}"


@contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """Turn errors of writing `path` into `CheckpointError`."""
    try:
        yield
    except (ArtifactError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) else str(error)
        raise CheckpointError(
            f"{path} cannot be written ({reason}): make room, then --resume goes on from the newest checkpoint that is there"
        ) from error


def remove_old(folder: Path) -> None:
    """Remove all but the newest `KEPT_CHECKPOINTS`."""
    for old in checkpoints_in(folder)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)  # the next checkpoint tries again


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, none sharing memory with another: safetensors refuses shared weights."""
    separate, places = {}, set()
    for name, tensor in tensors.items():
        on_cpu = tensor.detach().contiguous().cpu()
        place = on_cpu.untyped_storage().data_ptr()
        separate[name] = on_cpu.clone() if place in places else on_cpu
        places.add(place)
    return separate


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.match(p.name)), key=lambda p: int(p.name[5:]))


def find_checkpoint(path: Path | str) -> Path:
    """Find the checkpoint at `path`: a checkpoint directory, or the newest one of a run's directory."""
    path = Path(path)
    if (path / STATE).is_file():
        return _with_run(path)
    checkpoints = checkpoints_in(path / "checkpoints") or checkpoints_in(path)
    if not checkpoints:
        problem = "does not exist" if not path.exists() else "holds no checkpoint"
        raise CheckpointError(
            f"{path} {problem}; give a run's directory or one of its checkpoints/step-..., written by `muntin fit`, or a trained model in "
            "RUN/compressed/trials, written by `muntin compress RUN`"
        )
    return _with_run(checkpoints[-1])


def _with_run(path: Path) -> Path:
    """The path in a form with the run's directories as parents."""
    return path if len(path.parts) > 1 and ".." not in path.parts else path.resolve()


def find_start(
    directory: Path, recipe: Recipe, *, resume: bool, ranks: Ranks = ALONE, note: Callable[[str], None] = lambda text: None
) -> Checkpoint | None:
    """The newest sound checkpoint of a run to resume, None for a new run. `note`: is called for checkpoints that are left out.

    Raises `CheckpointError` if `resume` is True and there is no checkpoint, or its recipe differs in more than keys of `training`; and if
    `resume` is False and there is one.
    """
    folder = directory / "checkpoints"
    if not checkpoints_in(folder):
        if resume:
            raise CheckpointError(
                f"{directory} holds no checkpoint to resume from: name the run's folder by --output, or leave out --resume to train anew"
            )
        return None
    if not resume:
        raise CheckpointError(f"{directory} already holds a run; --resume goes on with it, another --output starts anew")
    checkpoint = newest_sound(folder, ranks=ranks, note=note)
    difference = value_changes(_fixed(checkpoint.recipe), _fixed(recipe))
    if difference:
        raise CheckpointError(
            f"{checkpoint.path} was trained by another recipe ({difference}), and a resumed run can change only keys of training, except "
            f"{', '.join(FIXED)}, and data.{' and data.'.join(FREE)}: give its recipe to resume, or another --output to start again"
        )
    return checkpoint


def newest_sound(folder: Path, *, ranks: Ranks = ALONE, note: Callable[[str], None] = lambda text: None) -> Checkpoint:
    """Read the newest checkpoint that is not damaged. Damaged ones get another name, which `note` tells.

    Of several processes the first one chooses and checks. Raises `DamagedCheckpointError` if all are damaged.
    """
    paths, step = checkpoints_in(folder), 0
    if ranks.first:
        checkpoint, damaged = _read_newest(paths[::-1])
        for path, error in damaged:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            note(f"{error}. It is now {aside.name}, and the run goes on from {checkpoint.path.name}")
        step = int(checkpoint.path.name[5:])
    step = int(ranks.of_first(step))
    return checkpoint if ranks.first else read_checkpoint(folder / step_name(step), check=False)


def _read_newest(paths: list[Path]) -> tuple[Checkpoint, list[tuple[Path, DamagedCheckpointError]]]:
    damaged: list[tuple[Path, DamagedCheckpointError]] = []
    for path in paths:
        try:
            return read_checkpoint(path), damaged
        except DamagedCheckpointError as error:
            damaged.append((path, error))
    raise damaged[0][1]


def recipe_changes(start: Checkpoint, recipe: Recipe) -> str:
    """Differences of `recipe` from the recipe of `start`, with both values; empty if they are equal."""
    return value_changes(start.recipe.model_dump(mode="json"), recipe.model_dump(mode="json"))


def _fixed(recipe: Recipe) -> dict[str, Any]:
    content = recipe.model_dump(mode="json", exclude={"update", "compression"})
    data = {key: value for key, value in content["data"].items() if key not in FREE}
    return {**content, "data": data, "training": {key: content["training"][key] for key in FIXED}}


def value_changes(trained: Any, given: Any, where: str = "") -> str:
    """The first three values of each section in which two recipes, or other nested values, differ; empty if they are equal."""
    if isinstance(trained, dict) and isinstance(given, dict):
        keys = [key for key in {**trained, **given} if trained.get(key) != given.get(key)]
        shown = ", ".join(value_changes(trained.get(key), given.get(key), f"{where}.{key}".lstrip(".")) for key in keys[:3])
        return shown + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    return f"{where} was {trained!r:.60}, is {given!r:.60}"


def read_checkpoint(path: Path | str, *, check: bool = True, trust_code: bool = False) -> Checkpoint:
    """Read a checkpoint's state and check its files; tensors are read on access.

    `check`: False if another process checks the files. `trust_code`: consent to the factory that its recipe may name as the model
    (`package.module:factory`), which `load_model` imports and calls. Raises `CheckpointError` if it is missing, altered, incomplete or of a
    newer format.
    """
    path = find_checkpoint(path)
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > FORMAT_OF_SEVERAL:
            raise CheckpointError(
                f"{path}: checkpoint format {content['format']} is newer than this muntin reads ({FORMAT_OF_SEVERAL}): upgrade muntin"
            )
        state = CheckpointState.model_validate(content)
    except OSError as error:
        raise DamagedCheckpointError(f"{path / STATE}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        received = "" if first["type"] == "missing" else f" (got {first['input']!r:.60})"
        raise DamagedCheckpointError(
            f"{path / STATE}: {place}: {first['msg']}{received}: corrupted, or written by another version of muntin: use that one, or "
            f"{_OLDER}"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path / STATE}: corrupted ({type(error).__name__}); {_OLDER}") from error
    if state.sha256.get(STATE) != digest_of(content):
        raise DamagedCheckpointError(f"{path / STATE}: corrupted (its sha256 is not the recorded one); {_OLDER}")
    for name in (name for name in state.sha256 if name != STATE and check):
        try:
            digest = digest_of_file(path / name)
        except OSError as error:
            raise DamagedCheckpointError(f"{path / name}: {error.strerror}; {_OLDER}") from error
        if digest != state.sha256[name]:
            raise DamagedCheckpointError(f"{path / name}: corrupted (its sha256 is not the recorded one); {_OLDER}")
    if trust_code:
        trust_model(state.recipe.model.name)
    classes = present_classes(path, state.classes)
    return Checkpoint(path=path, state=_as_trained(state), classes=classes, tensors=StoredTensors(path))


def _as_trained(state: CheckpointState) -> CheckpointState:
    """The state with all options of its hybrid in the recipe, if the preset has changed since."""
    recipe = state.recipe
    if state.structure is None or state.structure == structure_of(recipe, state.classes):
        return state
    choice = recipe.model.model_copy(update={"options": preset_options(state.structure)})
    return state.model_copy(update={"recipe": recipe.model_copy(update={"model": choice})})


def digest_of(content: dict[str, Any]) -> str:
    """sha256 of the content of `checkpoint.json` without its own digest."""
    digests = {name: digest for name, digest in content["sha256"].items() if name != STATE}
    return hashlib.sha256(json.dumps({**content, "sha256": digests}, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
