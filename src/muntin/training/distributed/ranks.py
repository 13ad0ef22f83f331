"""The processes that train one model together, and what they have to agree on.

`torchrun` starts the processes and describes them by environment variables, on one machine or on several. Tensors of CPUs are sent by gloo,
those of GPUs by NCCL. A process that ends closes its connections, so the others end too, with a message, and `torchrun --max-restarts`
starts all of them again.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from muntin.errors import MuntinError, RecipeError

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, which may check data or write a checkpoint meanwhile."""
BUCKET = 25 << 20
"""Bytes that are added up in one message, about."""
POLL_S = 0.02
"""Seconds between two looks for the others at the start."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_RESTARTS = "TORCHELASTIC_RESTART_COUNT"
_LOST = ("gloo", "connection closed by peer", "connection reset by peer", "nccl", "socket timeout", "broken pipe")
"""Words in errors of a lost connection, lower case: gloo has no type of error of its own."""


class RanksError(MuntinError):
    """Another process of the run has ended, or cannot be reached."""


class Ranks:
    """A run of one process. `count`: processes; `index`: this one's number, from 0. See `ProcessGroup` for several."""

    count = 1
    index = 0

    @property
    def first(self) -> bool:
        """True for the process that writes what is shared."""
        return self.index == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors of one shape."""
        return tensor

    def any(self, flag: bool) -> bool:
        """True if it is True in any process."""
        return flag

    def of_first(self, number: float) -> float:
        """The first process's number."""
        return number

    def add(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by the sum over the processes."""

    def send(self, tensors: list[Tensor], owner: int) -> None:
        """Copy the values of process `owner` into the others' tensors."""


class ProcessGroup(Ranks):
    """One of several processes. `device`: "cpu" or "cuda", of the tensors that are sent most."""

    def __init__(self, device: str) -> None:
        self.count, self.index, self.device = dist.get_world_size(), dist.get_rank(), device

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        number = torch.tensor(int(flag))
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return bool(number)

    def of_first(self, number: float) -> float:
        value = torch.tensor(number, dtype=torch.float64)
        dist.broadcast(value, 0)
        return value.item()

    def add(self, tensors: list[Tensor]) -> None:
        _in_buckets(tensors, dist.all_reduce)

    def send(self, tensors: list[Tensor], owner: int) -> None:
        _in_buckets(tensors, lambda flat: dist.broadcast(flat.view(torch.uint8), owner))


ALONE = Ranks()


@torch.no_grad()
def _in_buckets(tensors: list[Tensor], exchange: Callable[[Tensor], object]) -> None:
    """Exchange tensors of any order in memory as flat ones, several in a message."""
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        exchange(flat)
        for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Lists of consecutive tensors of one type, each of about `BUCKET` bytes."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


@contextmanager
def joined_processes(environment: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """Join the processes that `torchrun` has started; without it, or for one process, yield `ALONE`.

    Raises `RecipeError` for an incomplete environment or a machine without a GPU for each process, `RanksError` if another process ends.
    """
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    missing = [name for name in _VARIABLES if name not in environment]
    if missing:
        given = f"WORLD_SIZE is {environment['WORLD_SIZE']}"
        raise RecipeError(f"{given} and {', '.join(missing)} are not set: start the processes by torchrun")
    cuda, index = torch.cuda.is_available(), int(environment["LOCAL_RANK"])
    if cuda and index >= torch.cuda.device_count():
        raise RecipeError(
            f"process {index + 1} of this machine has no GPU of its own, {torch.cuda.device_count()} are there: start one process a GPU "
            "(torchrun --nproc-per-node), or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
        )
    if cuda:
        torch.cuda.set_device(index)
    try:
        store, rank, count = next(rendezvous("env://", timeout=TIMEOUT))
        names = dist.PrefixStore(_agreed_name(store, rank, count), store)  # type: ignore[attr-defined]
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT, store=names, rank=rank, world_size=count)
        yield ProcessGroup("cuda" if cuda else "cpu")
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        place = f"process {environment['RANK']} of {environment['WORLD_SIZE']}"
        reason = re.sub(r"^\[[^]]*\] ", "", " ".join(str(error).split())).partition(". ")[0][:120]
        raise RanksError(
            f"{place} lost the others ({reason}): one has ended, and its own message says why, or the network "
            "failed; `torchrun --max-restarts 3 ...` goes on from the newest checkpoint by itself, and `--resume` by hand"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _agreed_name(store: Any, rank: int, count: int) -> str:
    """A name that the processes of this start agree on.

    `torchrun` keeps one store for all starts of a job, so the addresses that processes wrote before a failure are still in it. Restarts are
    not counted alike on every machine either. So each process sends a random name, and the first one answers with its own.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"muntin/from/{rank}", own)
        name: str = store.get(f"muntin/to/{own}").decode()
        store.set(f"muntin/has/{name}/{rank}", "")
        return name
    waiting = set(range(1, count))
    while waiting:
        for other in sorted(waiting):
            if store.check([f"muntin/from/{other}"]):
                store.set(f"muntin/to/{store.get(f'muntin/from/{other}').decode()}", own)
        waiting = {other for other in waiting if not store.check([f"muntin/has/{own}/{other}"])}
        time.sleep(POLL_S)
    return own


def lost_contact(error: BaseException) -> bool:
    """Return True for an error of the connection to another process."""
    return isinstance(error, dist.DistError) or any(words in str(error).lower() for words in _LOST)


def restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Return True if `torchrun` has started the processes again after a failure."""
    return int(environment.get(_RESTARTS, "0")) > 0


def spread(sizes: list[int], count: int) -> list[int]:
    """The owner of each item, so that the owners' sums of sizes are about equal: the largest first, to the owner of the least."""
    owners, loads = [0] * len(sizes), [0] * count
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        owners[item] = loads.index(min(loads))
        loads[owners[item]] += sizes[item]
    return owners


def local(tensor: Any) -> Tensor:
    """The part of a sharded tensor that this process holds; other tensors as they are. They share memory."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def is_sharded(tensor: Tensor) -> bool:
    """Return True for a tensor of which each process holds some rows (DTensor, whose import takes most of a second)."""
    return hasattr(tensor, "to_local")
