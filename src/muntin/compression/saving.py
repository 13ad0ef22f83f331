"""A compressed model on disk: its weights as safetensors, and a JSON record of its structure. Nothing in it is executed.

FOLDER/compression.json     what each pass did, and the sizes, ranks and bits of every layer
FOLDER/model.safetensors    the tensors, each once
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from muntin.artifact.atomic_directory import replace_directory
from muntin.compression.structure import restore_structure, structure_fields
from muntin.errors import CheckpointError, MuntinError
from muntin.models.compression_record import SavedRecord
from muntin.models.eager import check_eager
from muntin.training.weights import not_finite, place, shared_tensors

RECORD, WEIGHTS = "compression.json", "model.safetensors"


def save(model: nn.Module, path: Path | str) -> Path:
    """Write a model that passes have changed, also one in quantisation-aware training, as a folder; return its path.

    The folder holds no code: `load_compressed` needs a new model of the same architecture. It is written whole or not at all, and replaces
    one that `save` wrote. Raises `MuntinError` for a compiled model, and for state that is no tensor.
    """
    check_eager(model)
    tensors: dict[str, Tensor] = {}
    places: set[tuple[object, ...]] = set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise MuntinError(f"'{name}' in the model's state is of type {type(tensor).__name__}: only tensors can be saved")
        if not tensor.numel() or place(tensor) not in places:
            places.add(place(tensor))
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    weights = tensor_bytes(tensors)
    record = SavedRecord(model=type(model).__qualname__, weights=hashlib.sha256(weights).hexdigest(), **structure_fields(model))
    target = Path(path)
    replace_directory(target, {RECORD: record.model_dump_json(indent=1).encode(), WEIGHTS: weights}, marker=RECORD)
    return target


def load_compressed(path: Path | str, model: nn.Module) -> nn.Module:
    """Give `model` the structure and the weights of a folder that `save` wrote, and return it, in `eval` mode.

    `model`: a new model of the architecture that was saved, with any weights; it is changed in place. Its answers are then those of the
    saved model, bit for bit. Raises `CheckpointError` if the folder is damaged, and `MuntinError` if it is of another architecture; the
    model is then of no use.
    """
    check_eager(model)
    folder = Path(path)
    record = saved_record(folder)
    with _reading(folder):
        weights = (folder / WEIGHTS).read_bytes()
        tensors = read_tensors(weights)
    if hashlib.sha256(weights).hexdigest() != record.weights:
        raise CheckpointError(f"{folder}: {WEIGHTS} is not the file that was saved with {RECORD}: save the model again")
    model.eval()
    restore_structure(model, record, tensors)
    _fill(model, tensors, f"{folder}: saved of {record.model}, and this is {type(model).__qualname__}")
    return model.eval()


def saved_record(folder: Path) -> SavedRecord:
    """Read the record of a folder that `save` wrote. Raises `CheckpointError` as `load_compressed` does."""
    with _reading(folder):
        return SavedRecord.model_validate_json((folder / RECORD).read_bytes())


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror or error}: give a folder that muntin.save wrote") from error
    except (ValidationError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: it is damaged, or of a newer version of muntin: {reason}") from error


def _fill(model: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                stored = tensors.get(f"{prefix}.{name}" if prefix else name)
                if value is not None and stored is not None and stored.dtype != value.dtype:
                    value.data = value.data.to(stored.dtype)  # the same object, which another layer may share
    own: dict[str, Any] = model.state_dict()
    if unsound := not_finite(tensors, own):
        raise CheckpointError(f"{what}: {unsound}")
    weights: Any = OrderedDict(tensors | shared_tensors(own, tensors))
    weights._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]  # some modules do not load without their versions
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise MuntinError(f"{what}: the tensors differ: {' '.join(str(error).split())[:200]}: build the model that was saved") from error
