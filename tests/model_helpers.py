"""Helpers of tests on models: pixels, answers, norms with statistics, changes by layer, memory of tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from muntin.errors import MuntinError
from muntin.models import Change
from muntin.training.checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def one_seed_one_thread() -> Iterator[None]:
    """Imported by the conftest of the folders in which it applies."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def one_line(error: pytest.ExceptionInfo[MuntinError]) -> str:
    """The message of an error, of one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def pixels(*shape: int) -> Tensor:
    """Random grey levels, float 0-255."""
    return torch.randint(0, 256, shape).float()


def answer(model: nn.Module, x: Tensor) -> Tensor:
    """The model's answer in `eval` mode."""
    with torch.inference_mode():
        scores: Tensor = model.eval()(x)
    return scores


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with updated statistics of its norms."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model.eval()


def names(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """Dotted names of the modules of some kinds."""
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def by_layer(changes: Iterable[Change], pass_: str) -> dict[str, Change]:
    """The changes of a pass by layer, exactly one each."""
    by_name = [change for change in changes if change.pass_ == pass_]
    assert len({change.layer for change in by_name}) == len(by_name)
    return {change.layer: change for change in by_name}


def assert_same_state(one: Checkpoint, other: Checkpoint) -> None:
    """Assert that two checkpoints have the same step, compression record and tensors, to the last bit."""
    assert one.state.step == other.state.step and one.state.compression == other.state.compression
    assert one.tensors.keys() == other.tensors.keys()
    for file, tensors in one.tensors.items():
        others = other.tensors[file]  # read from disk
        assert tensors.keys() == others.keys()
        for name, value in tensors.items():
            assert torch.equal(value, others[name]), f"{file}: {name}"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators make inside the block: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (place := tensor.untyped_storage()._cdata) not in given | self._counted:
                storage = tensor.untyped_storage()
                self._counted.add(place)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, place, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, place: int, size: int) -> None:
        self._counted.discard(place)
        self.live -= size
