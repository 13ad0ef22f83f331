"""From a recipe to a model with weights: build the model, load tensors into it, start from a file of weights."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from muntin.artifact.classes import ClassInfo
from muntin.errors import CheckpointError, RecipeError
from muntin.models import PRESETS, HybridNet, ModelConfig, create_model
from muntin.models.create import preset_config
from muntin.models.encoder import encoder_tensors
from muntin.models.trusted_code import check_trusted
from muntin.text import count, list_some
from muntin.training.recipe import Recipe

SUFFIX = ".safetensors"
_TORCH_PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile add to names."""
_WRAPPER_PREFIXES = ("model.", "model.model.")
"""Prefixes that `ForeignModel` and `DividedSides`, one or both, add to the names of the wrapped model."""
_ENCODER = "encoder.features"
"""The place of timm's network in a hybrid with an encoder."""


def new_model(recipe: Recipe, classes: tuple[ClassInfo, ...]) -> nn.Module:
    """Create a recipe's model with random weights. Raises `CheckpointError` for code that the user has not consented to."""
    choice = recipe.model
    check_trusted(choice.name)
    return create_model(
        choice.name, task=recipe.task, classes=max(1, len(classes)), channels=recipe.data.channels, options=choice.options,
        scale=recipe.data.output_scale, size_divisor=choice.size_divisor, encoder=choice.encoder,
    )  # fmt: skip


def structure_of(recipe: Recipe, classes: tuple[ClassInfo, ...]) -> ModelConfig | None:
    """Return the structure of a recipe's hybrid; None for other models."""
    choice = recipe.model
    if choice.name not in PRESETS:
        return None
    return preset_config(
        choice.name, task=recipe.task, classes=max(1, len(classes)), channels=recipe.data.channels, scale=recipe.data.output_scale,
        options=choice.options, encoder=choice.encoder,
    )  # fmt: skip


def build_model(recipe: Recipe, classes: tuple[ClassInfo, ...]) -> nn.Module:
    """Create a recipe's model, ready for `load_weights`. A foreign model is called once, to create its lazy parameters and buffers.

    Raises `CheckpointError` if this call fails.
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


def load_weights(model: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Copy tensors into a model. `where` names their file in errors.

    Raises `CheckpointError` if they belong to another model or hold NaN or infinity.
    """
    current: Any = model.state_dict()
    if unsound := not_finite(tensors, current):
        raise CheckpointError(f"{where}: {unsound}: use an older step of the run, or train again")
    weights: Any = OrderedDict(tensors)
    weights._metadata = current._metadata  # safetensors keeps no module versions, and some modules (MNASNet) do not load without them
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{where}: weights of another model than its recipe makes: {reason}") from error


def load_initial_weights(model: nn.Module, path: Path, *, setting: str = "model.weights", whole: bool = False) -> tuple[str, ...]:
    """Copy the tensors of a .safetensors file into a model, by name, and return notes on tensors that were not copied.

    Names may be the model's or, for a foreign model, those of its package, with prefixes of DistributedDataParallel and torch.compile. A
    layer of the file for another number of classes keeps its random weights. For a hybrid with an encoder the file may hold the encoder's
    weights alone, or those of timm's classifier, by timm's names: the rest of the model keeps its random weights. `whole`: refuse a
    file that leaves any weights random. `setting`: the recipe's key, for errors. Raises `RecipeError` for an unreadable file, a missing
    tensor, one of another shape, or NaN and infinity; the model is then unchanged.
    """
    stored, own = _read(path, setting), model.state_dict()
    first: list[str] = []
    if isinstance(model, HybridNet) and model.config.encoder is not None and not any(_model_name(key, own) in own for key in stored):
        stored, first = _with_encoder(model, stored, path)
    named = {_model_name(key, own): tensor for key, tensor in stored.items()}
    if len(named) != len(stored):
        raise RecipeError(f"{path}: some of its tensors have one name with and without a prefix: save the weights of one model")
    named |= shared_tensors(own, named)
    # num_batches_tracked is a counter, and older files lack it
    missing = [key for key in own if key not in named and not key.endswith("num_batches_tracked")]
    if missing:
        held = list_some(list(stored), 3) or "nothing"
        raise RecipeError(f"{path}: it lacks {list_some(missing, 3)} of the recipe's model, and holds {held}: are these its weights?")
    random: list[str] = []
    for key, tensor in own.items():
        if key not in named or named[key].shape == tensor.shape:
            continue
        if _is_table(model, key) or not tensor.ndim or named[key].ndim != tensor.ndim or named[key].shape[1:] != tensor.shape[1:]:
            raise RecipeError(f"{path}: {key} has the shape {tuple(named[key].shape)}, in the recipe's model {tuple(tensor.shape)}")
        random.append(f"{key} ({len(named.pop(key)):,} for {len(tensor):,})")
    if whole and random:
        raise RecipeError(f"{setting} {path}: of another number of classes: {list_some(random, 3)}: give weights for the same classes")
    if unsound := not_finite(named, own):
        raise RecipeError(f"{setting} {path}: {unsound}: training cannot begin with them; take the weights of a sound run")
    unknown = [key for key in named if key not in own]
    load_weights(model, own | {key: tensor for key, tensor in named.items() if key in own}, path)
    if first:
        return tuple(first)
    notes = [f"{path.name}: {len(named) - len(unknown)} of the model's {len(own)} tensors are from it"]
    if random:
        notes.append(f"{path.name}: of another number of classes, initialised at random: {list_some(random, 3)}")
    if unknown:
        notes.append(f"{path.name}: not in the model, left out: {list_some(unknown, 3)}")
    return tuple(notes)


def _with_encoder(model: HybridNet, stored: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of a hybrid, those of its encoder from a file in timm's names, and notes. Raises `RecipeError` if the file lacks any."""
    bare = {_without_torch_prefixes(key): tensor for key, tensor in stored.items()}
    tensors, others, notes = encoder_tensors(model.encoder, bare)
    own = model.encoder.features.state_dict()
    missing = [key for key in own if key not in tensors and not key.endswith("num_batches_tracked")]
    if missing:
        raise RecipeError(
            f"{path}: it lacks {list_some(missing, 3)} of model.encoder {model.encoder.name}, and holds "
            f"{list_some(list(stored), 3) or 'nothing'}: give the weights of this network, by timm's names, or of the whole model"
        )
    place = f"{_ENCODER}."
    rest = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(place)}
    others_random = f"the model's other {len(rest)} are initialised at random"
    given = [f"{path.name}: {len(tensors)} of the encoder's {len(own)} tensors are from it; {others_random}"]
    if others:
        layers = sorted({key.rpartition(".")[0] or key for key in others})
        given.append(f"{path.name}: not in the encoder, left out: {list_some(layers, 3)}")
    return rest | {f"{place}{key}": tensor for key, tensor in tensors.items()}, given + [f"{path.name}: {note}" for note in notes]


def _read(path: Path, setting: str) -> dict[str, Tensor]:
    if path.suffix != SUFFIX and path.is_file():
        raise RecipeError(
            f"{setting} {path}: give a {SUFFIX} file (muntin reads no pickles). What torch.save wrote becomes one by: python -c "
            f"\"import torch; from safetensors.torch import save_file; saved = torch.load('{path.name}', map_location='cpu', "
            f"weights_only=True); save_file({{name: one.contiguous() for name, one in saved.items()}}, '{path.stem}{SUFFIX}')\""
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
    except (OSError, SafetensorError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise RecipeError(f"{setting} {path}: {reason}") from error


def not_finite(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """Describe the tensors that hold NaN or infinity where those of a new model, `own`, do not (a mask may hold -inf). "" for none."""
    counts: dict[str, int] = {}
    for key, tensor in tensors.items():
        if key in own and (tensor.is_floating_point() or tensor.is_complex()) and own[key].isfinite().all():
            number = tensor.numel() - int(tensor.isfinite().sum())
            counts |= {key: number} if number else {}
    if not counts:
        return ""
    first, number = next(iter(counts.items()))
    others = f" (and so for {count(len(counts) - 1, 'other tensor')})" if len(counts) > 1 else ""
    return f"{first} holds NaN or infinity in {number:,} of its {tensors[first].numel():,} values{others}"


def _is_table(model: nn.Module, key: str) -> bool:
    """Return True for a tensor whose length does not depend on the number of classes, such as a table of positions."""
    owner, _, last = key.rpartition(".")
    of_layer = last in ("weight", "bias", "weight_g", "weight_v", "running_mean", "running_var") or ".parametrizations." in f".{key}"
    return not of_layer or isinstance(model.get_submodule(owner), nn.Embedding)


def shared_tensors(own: dict[str, Tensor], named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the model that the file stores under another name of the same memory: safetensors writes a shared weight once."""
    places = {place(tensor): named[key] for key, tensor in own.items() if key in named and tensor.numel()}
    return {key: places[place(tensor)] for key, tensor in own.items() if key not in named and place(tensor) in places}


def place(tensor: Tensor) -> tuple[object, ...]:
    """Return device, memory, shape, strides and type of a tensor, which are equal for two names of one tensor."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _model_name(key: str, own: dict[str, Tensor]) -> str:
    """The model's name for a tensor of the file; the file's name if the model has none."""
    bare = _without_torch_prefixes(key)
    return next((name for ours in ("", *_WRAPPER_PREFIXES) for name in (ours + key, ours + bare) if name in own), key)


def _without_torch_prefixes(key: str) -> str:
    while (prefix := next((one for one in _TORCH_PREFIXES if key.startswith(one)), None)) is not None:
        key = key.removeprefix(prefix)
    return key
