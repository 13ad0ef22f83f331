"""Writes checkpoints in a background thread while training goes on: a copy of the state is taken, then it is written and renamed.

    one process        copy, as bytes of safetensors files -> hash, write, fsync, rename
    several processes  copy of each one's part -> each writes its files -> the first one hashes all, writes checkpoint.json, renames

At most one checkpoint is being written. Several processes agree in a gloo group of its own, so messages of training are not mixed with
these. Memory: the copy, until it is written.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor

from muntin.artifact.atomic_directory import publish_directory
from muntin.artifact.atomic_files import write_synced
from muntin.errors import CheckpointError, MuntinError
from muntin.training.checkpoint import (
    NAMES,
    STATE,
    begin_checkpoint,
    digest_of_file,
    remove_old,
    state_content,
    state_file,
    step_name,
    writing_errors,
)
from muntin.training.distributed.ranks import TIMEOUT, Ranks
from muntin.training.distributed.stored_tensors import folder_of, save_parts


class CheckpointWriter:
    """Writes checkpoints of a run into `folder`. Leaving the block waits for the last one.

    An error of writing (`CheckpointError`) is raised by the next `write` or `wait`, or at the end of the block.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self._pool = ThreadPoolExecutor(1, "muntin-checkpoint")
        self._pending: Future[None] | None = None
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if ranks.count > 1 else None
        if ranks.count > 1 and ranks.first:
            for left in folder.glob(".step-*.partial"):  # of a killed run
                shutil.rmtree(left, ignore_errors=True)

    def write(self, state: dict[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
        """Begin to write a checkpoint, after the one before. `state`: as of `write_checkpoint`. All processes call it together."""
        self.wait()
        job = begin_checkpoint(self.folder, state, tensors) if self.ranks.count == 1 else self._begin_parts(state_content(state), tensors)
        self._pending = self._pool.submit(job)
        return self.folder / step_name(state["step"])

    def wait(self) -> None:
        """Wait until no checkpoint is being written. Raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            with suppress(*(() if error is None else (MuntinError, RuntimeError))):  # the block's own error is raised
                self.wait()
        finally:
            self._pool.shutdown()

    def _begin_parts(self, content: dict[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Callable[[], None]:
        copies = {group: {name: _copied(tensor) for name, tensor in named.items()} for group, named in tensors.items()}
        token = int(self.ranks.of_first(secrets.randbits(32)))
        return partial(self._write_parts, self.folder / f".{step_name(content['step'])}.{token:08x}.partial", content, copies)

    def _write_parts(self, fresh: Path, content: dict[str, Any], copies: dict[str, dict[str, Tensor]]) -> None:
        path = self.folder / step_name(content["step"])
        from torch.distributed.checkpoint.api import CheckpointException  # importing it takes a second

        try:
            with writing_errors(path):
                for group, tensors in copies.items():
                    save_parts(fresh / folder_of(group), tensors, self._group)
                if self.ranks.first:
                    parts = sorted(file.relative_to(fresh).as_posix() for file in fresh.glob("*/*"))
                    digests = {name: digest_of_file(fresh / name) for name in parts}
                    write_synced(fresh / STATE, state_file(content, digests))
                    publish_directory(fresh, path, names=NAMES, marker=STATE)
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            with writing_errors(path):
                raise (first if isinstance(first, OSError) else CheckpointError(f"{path} cannot be written ({first})")) from error
        if self.ranks.first:
            remove_old(self.folder)
        dist.barrier(self._group)  # a process that goes on may read it


def _copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU of a tensor, or of this process's rows."""
    copied = tensor.detach().clone(memory_format=None) if tensor.device.type == "cpu" else tensor.detach().cpu()
    return copied.contiguous()
