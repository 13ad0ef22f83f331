"""Files of weights for the models of other packages: every tensor of the model is loaded, or nothing is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from muntin.deployment.sources.source_model import LoadedWeights
from muntin.errors import RecipeError
from muntin.text import list_some
from muntin.training.weights import SUFFIX, load_weights, not_finite, shared_tensors

_ENTRIES = ("state_dict", "model_state_dict", "model")
"""Entries of a training program's checkpoint that may hold the weights, in the order in which they are tried."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes that DistributedDataParallel, torch.compile, and Lightning or muntin add to names."""


def load_file(model: nn.Module, path: Path, *, unused: tuple[str, ...] = ()) -> LoadedWeights:
    """Load a .safetensors file, or what `torch.save` wrote, into a model.

    Names may begin with prefixes of training programs. Tensors whose names begin with one of `unused` are left out. Raises `RecipeError`,
    and leaves the model unchanged, for missing and unexpected tensors, other shapes, and NaN or infinity.
    """
    stored, own = read_tensors(path), model.state_dict()
    named = {_own_name(key, own): tensor for key, tensor in stored.items()}
    if len(named) != len(stored):
        raise RecipeError(f"{path}: some of its tensors have one name with and without a prefix: save the weights of one model")
    left_out = tuple(key for key in named if key not in own and key.startswith(unused)) if unused else ()
    named = {key: tensor for key, tensor in named.items() if key not in left_out}
    named |= shared_tensors(own, named)
    # num_batches_tracked is a counter, and older files lack it
    missing = [key for key in own if key not in named and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in named if key not in own]
    if missing or unexpected:
        parts = [f"{len(missing)} of the model's {len(own)} tensors are missing ({list_some(missing, 3)})"] if missing else []
        parts += [f"{len(unexpected)} of its {len(stored)} are not in the model ({list_some(unexpected, 3)})"] if unexpected else []
        raise RecipeError(f"weights {path}: {', and '.join(parts)}: give the weights of this model, or the model of these weights")
    _check_shapes(path, named, own)
    if unsound := not_finite(named, own):
        raise RecipeError(f"weights {path}: {unsound}: take the weights of a sound training")
    load_weights(model, own | named, path)
    return LoadedWeights(path=path, tensors=sum(key in own for key in named), left_out=left_out)


def _check_shapes(path: Path, named: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise `RecipeError` for tensors of other shapes, with advice where only the number of classes differs."""
    wrong = [key for key, tensor in named.items() if tensor.shape != own[key].shape]
    if not wrong:
        return
    shapes = [f"{key} is {tuple(named[key].shape)} and in the model {tuple(own[key].shape)}" for key in wrong]
    numbers = {(len(named[key]), len(own[key])) if named[key].ndim and own[key].ndim else (0, 0) for key in wrong}
    same_rest = all(named[key].shape[1:] == own[key].shape[1:] for key in wrong)
    advice = "give the weights of this model"
    if same_rest and len(numbers) == 1 and len(wrong) <= 4:  # weights and biases of a last layer or two
        ((count, _),) = numbers
        advice = f"if the model has {count} classes, give --classes FILE with {count} names, or --classes {count}"
    raise RecipeError(f"weights {path}: {list_some(shapes, 3)}: {advice}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of what `torch.save` wrote. No code in the file is run. Raises `RecipeError`."""
    if not path.is_file():
        raise RecipeError(f"weights {path}: there is no such file")
    if path.suffix == SUFFIX:
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
        except (OSError, SafetensorError) as error:
            raise RecipeError(f"weights {path}: {_one_line(error)}") from error
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises has no common class
        raise RecipeError(
            f"weights {path}: not a {SUFFIX} file, and for torch.load it is damaged or holds Python objects, which would run code: give "
            "what torch.save wrote of model.state_dict()"
        ) from error
    entry = next((name for name in _ENTRIES if isinstance(content, dict) and isinstance(content.get(name), dict)), None)
    tensors = content if entry is None else content[entry]
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        held = f"the entries {list_some(list(tensors), 5)}" if isinstance(tensors, dict) else type(tensors).__name__
        raise RecipeError(f"weights {path}: holds {held or 'nothing'}, not a tensor for each name: save model.state_dict()")
    return tensors


def _own_name(key: str, own: dict[str, Tensor]) -> str:
    """Return the model's name for a tensor of the file; the file's name if the model has none."""
    name = key
    while name not in own and (prefix := next((one for one in _PREFIXES if name.startswith(one)), None)) is not None:
        name = name.removeprefix(prefix)
    return name if name in own else key


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
