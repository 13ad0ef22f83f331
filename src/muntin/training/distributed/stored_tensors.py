"""Tensors of a checkpoint on disk, written by one process or by several, and read whole or by the rows that a process holds.

    one process        model.safetensors
    several processes  model/shard-00001-model-00001-of-00001.safetensors, one file a process, by torch.distributed.checkpoint

Both are safetensors; neither needs a pickle.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from muntin.errors import CheckpointError
from muntin.training.distributed.matrices import rows_at
from muntin.training.distributed.ranks import is_sharded, local

MODEL, AVERAGE, OPTIMIZER = "model.safetensors", "average.safetensors", "optimizer.safetensors"
BEST = "best.safetensors"
"""Averaged weights of the best validation, where they are not those of `AVERAGE`."""
GROUPS = (MODEL, AVERAGE, OPTIMIZER, BEST)


def folder_of(group: str) -> str:
    """Name of the folder that several processes write a group of tensors into."""
    return group.removesuffix(".safetensors")


class StoredTensors(Mapping[str, dict[str, Tensor]]):
    """The tensors of a checkpoint by group and name, read from disk at each access."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[str]:
        return (group for group in GROUPS if group in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, group: object) -> bool:
        return group in GROUPS and (self._parts(str(group)) or (self.path / str(group)).is_file())

    def __getitem__(self, group: str) -> dict[str, Tensor]:
        if group not in GROUPS:
            raise KeyError(group)
        if not self._parts(group):
            with self._errors(group), safe_open(self.path / group, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
        tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in self._described(group).items()}
        self.read_into(group, tensors)
        return tensors

    def sizes(self, group: str) -> dict[str, torch.Size]:
        """Shapes of the whole tensors."""
        if self._parts(group):
            return {name: size for name, (size, _) in self._described(group).items()}
        with self._errors(group), safe_open(self.path / group, framework="pt") as file:
            return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    @torch.no_grad()
    def read_into(self, group: str, tensors: Mapping[str, Tensor]) -> None:
        """Read values by name, of a sharded tensor only this process's rows. Raises `CheckpointError` for other names and shapes."""
        sizes = self.sizes(group)
        other = [name for name, tensor in tensors.items() if sizes.get(name) != tensor.shape]
        if other:
            raise CheckpointError(f"{self.path / group}: tensors of another model than its recipe makes, such as {other[0]}")
        if self._parts(group):
            with self._errors(group), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # each process reads for itself
                checkpoint, storage = _library()
                checkpoint.load(dict(tensors), storage_reader=storage.HuggingFaceStorageReader(str(self._folder(group))), no_dist=True)
            return
        with self._errors(group), safe_open(self.path / group, framework="pt") as file:
            for name, tensor in tensors.items():
                if is_sharded(tensor):
                    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
                    local(tensor).copy_(file.get_slice(name)[rows_at(len(tensor), mesh.get_local_rank(), mesh.size())])
                else:
                    tensor.copy_(file.get_tensor(name))

    def _folder(self, group: str) -> Path:
        return self.path / folder_of(group)

    def _parts(self, group: str) -> bool:
        return self._folder(group).is_dir()

    def _described(self, group: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        with self._errors(group):
            metadata = _library()[1].HuggingFaceStorageReader(str(self._folder(group))).read_metadata().state_dict_metadata
        return {name: (entry.size, entry.properties.dtype) for name, entry in metadata.items()}

    @contextmanager
    def _errors(self, group: str) -> Iterator[None]:
        """Turn errors of reading into `CheckpointError`."""
        where = self.path / (folder_of(group) if self._parts(group) else group)
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{where}: {error.strerror or error}: use an older step, or train again") from error
        except SafetensorError as error:
            raise CheckpointError(f"{where}: not a safetensors file: {error}") from error


def save_parts(folder: Path, tensors: Mapping[str, Tensor], group: Any) -> None:
    """Write this process's tensors, and its rows of sharded ones, into `folder`. All processes call it together, with a group of theirs."""
    checkpoint, storage = _library()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(dict(tensors), storage_writer=storage.HuggingFaceStorageWriter(str(folder), save_distributed=True), process_group=group)


def _library() -> tuple[Any, Any]:
    """The package `torch.distributed.checkpoint` and its safetensors storage; importing them takes more than a second."""
    import torch.distributed.checkpoint
    from torch.distributed.checkpoint import hf_storage

    return torch.distributed.checkpoint, hf_storage
