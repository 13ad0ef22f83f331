"""Weights that training begins with, where a recipe names a file of them: a pretrained model, or one of your own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from muntin.errors import RecipeError
from muntin.training.checkpoint import load_weights

SUFFIX = ".safetensors"
_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before a name."""
_OURS = ("model.", "model.model.")
"""What `ForeignModel` and `DividedSides`, one of them or both, put before the names of the model that they wrap."""


def begin_with(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Copies the tensors of a .safetensors file into a model, by name, and says what it did not copy.

    Names may be those of the model or, for a foreign one, those of the package that it comes from; DistributedDataParallel's and
    torch.compile's prefixes are taken off. A weight that the model has by two names may be there by one. A layer that the file has for
    another number of classes keeps its random weights, which is noted, as is what the file holds and the model has not. Raises RecipeError
    for a file that cannot be read, for a tensor of the model that it lacks, and for one of another shape; then the model is as it was.
    """
    found, own = _read(path), model.state_dict()
    named = {_name(key, own): tensor for key, tensor in found.items()}
    if len(named) != len(found):
        raise RecipeError(f"{path}: some of its tensors have one name with and without a prefix: save the weights of one model")
    named |= _tied(own, named)
    # a counter of batches is not a weight, and older files do without it
    missing = [key for key in own if key not in named and not key.endswith("num_batches_tracked")]
    if missing:
        raise RecipeError(f"{path}: it lacks {_list(missing)} of the recipe's model, and holds {_list(found)}: are these its weights?")
    anew: list[str] = []
    for key, tensor in own.items():
        if key not in named or named[key].shape == tensor.shape:
            continue
        if _is_table(model, key) or not tensor.ndim or named[key].ndim != tensor.ndim or named[key].shape[1:] != tensor.shape[1:]:
            raise RecipeError(f"{path}: {key} has the shape {tuple(named[key].shape)}, in the recipe's model {tuple(tensor.shape)}")
        anew.append(f"{key} ({len(named.pop(key)):,} for {len(tensor):,})")
    other = [key for key in named if key not in own]
    load_weights(model, own | {key: tensor for key, tensor in named.items() if key in own}, path)
    notes = [f"{path.name}: {len(named) - len(other)} of the model's {len(own)} tensors are from it"]
    if anew:
        notes.append(f"{path.name}: of another number of classes, begun at random: {_list(anew)}")
    if other:
        notes.append(f"{path.name}: not in the model, left out: {_list(other)}")
    return tuple(notes)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != SUFFIX:
        raise RecipeError(
            f"model.weights {path}: give a {SUFFIX} file (muntin reads no pickles). What torch.save wrote becomes one by: python -c "
            f"\"import torch; from safetensors.torch import save_file; save_file(torch.load('{path.name}', map_location='cpu', "
            f"weights_only=True), '{path.stem}{SUFFIX}')\""
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise RecipeError(f"model.weights {path}: {reason}") from error


def _is_table(model: nn.Module, key: str) -> bool:
    """Whether it is no part of a layer or norm of classes, whose number may differ: a table of positions, say."""
    owner, _, last = key.rpartition(".")
    of_layer = last in ("weight", "bias", "weight_g", "weight_v", "running_mean", "running_var") or ".parametrizations." in f".{key}"
    return not of_layer or isinstance(model.get_submodule(owner), nn.Embedding)


def _tied(own: dict[str, Tensor], named: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file lacks of a model's names and holds by another one, of the same memory: safetensors writes shared weights once."""
    places = {_place(tensor): named[key] for key, tensor in own.items() if key in named and tensor.numel()}
    return {key: places[_place(tensor)] for key, tensor in own.items() if key not in named and _place(tensor) in places}


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _name(key: str, own: dict[str, Tensor]) -> str:
    """The model's name of a tensor, where it has one."""
    bare = key
    while (prefix := next((one for one in _WRAPPERS if bare.startswith(one)), None)) is not None:
        bare = bare.removeprefix(prefix)
    return next((name for ours in ("", *_OURS) for name in (ours + key, ours + bare) if name in own), key)


def _list(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "") if listed else "nothing"
