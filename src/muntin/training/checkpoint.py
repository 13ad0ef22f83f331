"""Checkpoints: safetensors for numbers, JSON for the rest, written whole or not at all, read with every digest checked.

    RUN/checkpoints/step-00000250/model.safetensors      the weights that are trained
                                  average.safetensors    the averaged weights: what is evaluated, compressed and exported
                                  optimizer.safetensors  the optimiser's moments and the state of the random generators
                                  checkpoint.json        recipe, step, history, sha256 of the files above and of itself

A directory is written beside its place and renamed into it, and only then is an older one removed: there is always a
whole one. The newest two are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from muntin.artifact import Signature
from muntin.artifact.classes import ClassInfo
from muntin.artifact.directory import replace_directory
from muntin.data.listing import composed
from muntin.data.source import Source
from muntin.errors import ArtifactError, CheckpointError, DataError
from muntin.models import HybridNet, create_model
from muntin.training.recipe import Recipe

FORMAT = 1
KEPT = 2
STATE = "checkpoint.json"
MODEL, AVERAGE, OPTIMIZER = "model.safetensors", "average.safetensors", "optimizer.safetensors"
_SCALER = ("scale", "_growth_tracker")
_OLDER = "use an older step beside it (remove this one, and --resume goes on from that), or train again"
_NAME = re.compile(r"^step-(\d{8,})$")


class CheckpointState(BaseModel):
    """What `checkpoint.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    step: int
    recipe: Recipe
    root: str
    """The folder that the recipe's relative paths start at."""
    classes: tuple[ClassInfo, ...]
    precision: str
    seconds: float
    training: list[dict[str, float]]
    pending: list[float] = []
    """Losses since the last point of the training curve."""
    validation: list[dict[str, Any]]
    compression: dict[str, Any] | None = None
    """What compression has made of the recipe's model, None for the model itself: see `muntin.compression.stages`."""
    sha256: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read and checked. Tensors are read when they are asked for."""

    path: Path
    state: CheckpointState
    tensors: dict[str, dict[str, Tensor]] = field(repr=False)

    @property
    def recipe(self) -> Recipe:
        """The recipe it was trained by."""
        return self.state.recipe

    @property
    def signature(self) -> Signature:
        """What goes in and comes out of its model, with the classes that it was trained on."""
        return make_signature(self.recipe, self.state.classes)

    @property
    def bytes(self) -> int:
        """Size of the FP32 weights that a user would deploy without muntin."""
        return (self.path / AVERAGE).stat().st_size

    def model(self) -> nn.Module:
        """The trained model (averaged weights), in `eval` mode. Raises `CheckpointError` for a compressed one."""
        if self.state.compression is not None:
            raise CheckpointError(f"{self.path} holds a compressed model: give the checkpoint of `muntin fit` that it was made from")
        model = build_model(self.state.recipe, self.state.classes)
        load_weights(model, self.tensors[AVERAGE], self.path / AVERAGE)
        return model.eval()


def new_model(recipe: Recipe, classes: tuple[ClassInfo, ...]) -> nn.Module:
    """The model that a recipe asks for, randomly initialised."""
    choice = recipe.model
    return create_model(
        choice.name,
        task=recipe.task,
        classes=max(1, len(classes)),
        channels=recipe.data.channels,
        options=choice.options,
        size_divisor=choice.size_divisor,
    )


def build_model(recipe: Recipe, classes: tuple[ClassInfo, ...]) -> nn.Module:
    """A new model that weights can be read into: one that is not ours has been called with a crop of zeros, and so has what it makes then.

    Raises `CheckpointError` for a model that fails there.
    """
    model = new_model(recipe, classes)
    if isinstance(model, HybridNet):
        return model
    side = recipe.data.crop
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, recipe.data.channels, side, side))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"'{recipe.model.name}' fails on a crop of data.crop {side} ({reason}): has its code changed since?"
        ) from error
    return model.train()


def make_signature(recipe: Recipe, classes: tuple[ClassInfo, ...]) -> Signature:
    """What goes in and comes out of a model trained by a recipe."""
    side = recipe.data.crop if recipe.task == "classify" else None
    return Signature(task=recipe.task, channels=recipe.data.channels, classes=classes, side=side)


def check_classes(checkpoint: Checkpoint, source: Source) -> None:
    """Raises `DataError` where the data have other classes than the model was trained on, or the same in another order.

    Where a recipe names no classes they are the folders of the day: a model's labels would go by the names of others without a word.
    """
    trained, found = ([entry.name for entry in classes] for classes in (checkpoint.state.classes, source.classes))
    if [composed(name) for name in trained] != [composed(name) for name in found]:
        raise DataError(
            f"{checkpoint.path} was trained on the classes {', '.join(trained)}, and its data are now of {', '.join(found)}: "
            "give their folders the old names again, or train anew"
        )


def load_weights(model: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy tensors into a model. Raises `CheckpointError` when they are of another one."""
    own: Any = model.state_dict()
    weights: Any = OrderedDict(tensors)
    weights._metadata = own._metadata  # safetensors keeps no versions of modules, and some (MNASNet) do not load without
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{where}: weights of another model than its recipe makes: {reason}") from error


def write_checkpoint(folder: Path, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> Path:
    """Write `folder/step-NNNNNNNN` and drop all but the newest; `state` holds all of `CheckpointState` but format and digests.

    Raises `CheckpointError` when it cannot be written, a full disk for one; the older ones are then as they were.
    """
    files = {name: save(_apart(group)) for name, group in tensors.items()}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    checked = CheckpointState(format=FORMAT, sha256=digests, **state)
    content = checked.model_dump(mode="json")
    content["sha256"][STATE] = digest_of(content)
    files[STATE] = json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"
    path = folder / f"step-{checked.step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_directory(path, files, marker=STATE)
    except (ArtifactError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) else str(error)
        raise CheckpointError(
            f"{path} cannot be written ({reason}): make room, then --resume goes on from the newest checkpoint that is there"
        ) from error
    for old in checkpoints_in(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)  # the next one tries again
    return path


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each in memory of its own: layers may share a weight, which goes by both of their names then."""
    found, places = {}, set()
    for name, tensor in tensors.items():
        own = tensor.detach().contiguous().cpu()
        place = own.untyped_storage().data_ptr()
        found[name] = own.clone() if place in places else own
        places.add(place)
    return found


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.match(p.name)), key=lambda p: int(p.name[5:]))


def find_checkpoint(path: Path | str) -> Path:
    """The checkpoint that a user means: a checkpoint directory itself, or the newest one of a run's directory."""
    path = Path(path)
    if (path / STATE).is_file():
        return _with_its_run(path)
    found = checkpoints_in(path / "checkpoints") or checkpoints_in(path)
    if not found:
        problem = "does not exist" if not path.exists() else "holds no checkpoint"
        raise CheckpointError(f"{path} {problem}; give a run's directory or one of its checkpoints/step-..., written by `muntin fit`")
    return _with_its_run(found[-1])


def _with_its_run(path: Path) -> Path:
    """A checkpoint's path by which what lies beside it, and above, is found."""
    return path if len(path.parts) > 1 and ".." not in path.parts else path.resolve()


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read and check a checkpoint; raises `CheckpointError` for a missing, altered, incomplete or newer one."""
    path = find_checkpoint(path)
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > FORMAT:
            raise CheckpointError(
                f"{path}: checkpoint format {content['format']} is newer than this muntin reads ({FORMAT}): upgrade muntin"
            )
        state = CheckpointState.model_validate(_without_rare(_without_scale(content)))
    except OSError as error:
        raise CheckpointError(f"{path / STATE}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise CheckpointError(
            f"{path / STATE}: {place}: {first['msg']}: corrupted, or written by another version of muntin: use that one, or {_OLDER}"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path / STATE}: corrupted ({type(error).__name__}); {_OLDER}") from error
    if state.sha256.get(STATE) != digest_of(content):
        raise CheckpointError(f"{path / STATE}: corrupted (its sha256 is not the recorded one); {_OLDER}")
    return Checkpoint(path=path, state=state, tensors={name: _read(path, name, state) for name in (MODEL, AVERAGE, OPTIMIZER)})


def _without_scale(content: Any) -> Any:
    """What a checkpoint says, without the `model.scale: 1` that recipes had: no other value could be trained."""
    recipe = content.get("recipe") if isinstance(content, dict) else None
    model = recipe.get("model") if isinstance(recipe, dict) else None
    if not isinstance(recipe, dict) or not isinstance(model, dict) or model.get("scale") != 1:
        return content
    return {**content, "recipe": {**recipe, "model": {key: value for key, value in model.items() if key != "scale"}}}


def _without_rare(content: Any) -> Any:
    """What a checkpoint says, without a `data.rare` that did nothing: of a classifier."""
    recipe = content.get("recipe") if isinstance(content, dict) else None
    data = recipe.get("data") if isinstance(recipe, dict) else None
    if not isinstance(recipe, dict) or not isinstance(data, dict) or recipe.get("task") != "classify":
        return content
    return {**content, "recipe": {**recipe, "data": {key: value for key, value in data.items() if key != "rare"}}}


def digest_of(content: dict[str, Any]) -> str:
    """sha256 of all that `checkpoint.json` says, its own digest excepted."""
    digests = {name: digest for name, digest in content["sha256"].items() if name != STATE}
    return hashlib.sha256(json.dumps({**content, "sha256": digests}, sort_keys=True).encode()).hexdigest()


def _read(path: Path, name: str, state: CheckpointState) -> dict[str, Tensor]:
    try:
        data = (path / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path / name}: {error.strerror}; {_OLDER}") from error
    if hashlib.sha256(data).hexdigest() != state.sha256.get(name):
        raise CheckpointError(f"{path / name}: corrupted (its sha256 is not the recorded one); {_OLDER}")
    try:
        tensors: dict[str, Tensor] = load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{path / name}: not a safetensors file: {error}") from error
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, the generators' states, and the loss scale where one is used (FP16)."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    if scaler.is_enabled():
        tensors |= {f"scaler.{key}": torch.tensor(scaler.state_dict()[key]) for key in _SCALER}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}.{names[id(parameter)]}"] = torch.as_tensor(value)
    return tensors


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, tensors: dict[str, Tensor]) -> None:
    """Undo `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        key, _, parameter = name.partition(".")
        if key == "rng":
            (torch.set_rng_state if parameter == "cpu" else torch.cuda.set_rng_state)(value)
        elif key == "scaler":
            scaler.load_state_dict(scaler.state_dict() | {parameter: value.item()})
        else:
            like = parameters[parameter]
            state = value.to(like.device)
            optimizer.state[like][key] = state.clone() if value.ndim == 0 else torch.empty_like(like).copy_(state)
