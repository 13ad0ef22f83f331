"""Models that can be inspected, copied and rewritten, and errors for others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from muntin.compression import prepare_qat, quantize
from muntin.compression.low_rank.factorization import low_rank
from muntin.errors import MuntinError
from muntin.models.eager import as_input, check_eager, check_module, eager_copy

PASSES = [quantize, low_rank, prepare_qat]


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()


def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).float()


@pytest.fixture
def _compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def compiled_whole() -> nn.Module:
    model = torch.compile(small(), backend="eager")
    model(images())
    return model


def compiled_part() -> nn.Module:
    model = small()
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    model(images())
    return model


def compiled_in_place() -> nn.Module:
    model = small()
    model.compile(backend="eager")
    model(images())
    return model


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize(
    ("build", "said"),
    [
        (compiled_whole, "the model is compiled by torch.compile: give the module that it was made of (its _orig_mod"),
        (compiled_part, "'0', a part of the model, is compiled by torch.compile"),
        (compiled_in_place, "the model is compiled by torch.compile"),
        (
            lambda: torch.jit.script(small()),
            "the model is TorchScript, which is neither rewritten nor traced: give the original module",
        ),
        (lambda: nn.Sequential(torch.jit.trace(small(), images())), "'0', a part of the model, is TorchScript"),
        (lambda: small().to("meta"), "the model is on the meta device, without values: load its weights first"),
        (lambda: small().state_dict(), "the model is of type OrderedDict: give a torch.nn.Module; weights alone go into one by"),
    ],
)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:.*torch.jit.* is deprecated")
def test_unsupported_models(build: Callable[[], Any], said: str, pass_: Callable[..., Any]) -> None:
    """Compiled code runs without hooks, so a pass would change nothing."""
    model = build()
    before = [type(part) for part in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(MuntinError) as error:
        pass_(model, [images()])
    assert said in str(error.value)
    assert before == ([type(part) for part in model.modules()] if isinstance(model, nn.Module) else [])


@pytest.mark.usefixtures("_compiler")
def test_part_with_two_names() -> None:
    part = torch.compile(nn.Conv2d(3, 8, 1), backend="eager")
    copied = eager_copy(nn.ModuleList([part, part]))
    check_eager(copied)
    assert isinstance(copied, nn.ModuleList) and type(copied[0]) is nn.Conv2d and copied[0] is copied[1]


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("build", [compiled_whole, compiled_part, compiled_in_place])
def test_copy_of_a_compiled_model(build: Callable[[], nn.Module]) -> None:
    model = build()
    copied = eager_copy(model)
    check_eager(copied)
    assert list(copied.state_dict()) == list(small().state_dict())
    torch.testing.assert_close(copied(images()), model(images()), rtol=0, atol=0)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(copied.parameters(), model.parameters(), strict=True))


class Keeps(nn.Module):
    """Keeps the outputs of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = small()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layers(x)
        return self.last + 0


def pruned() -> nn.Module:
    model = small()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def called(model: nn.Module) -> nn.Module:
    model(images())
    return model


def locked() -> nn.Module:
    model = small()
    model.lock = threading.Lock()  # type: ignore[assignment]
    model.w_g = nn.Parameter(torch.zeros(1))  # by its name a part of a norm, without the other
    return model


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (pruned, "call prune.remove for layers with pruning masks"),
        (lambda: called(Keeps()), "cannot be copied: Only Tensors created explicitly by the user"),
        (lambda: nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 2, 1))), "use the norms of torch.nn.utils.parametrizations"),
        (lambda: nn.Sequential(called(nn.utils.spectral_norm(nn.Conv2d(3, 2, 1)))), "use the norms of torch.nn.utils.parametrizations"),
        (locked, "cannot be copied: cannot pickle '_thread.lock' object; its modules must hold objects that Python can copy"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:.*is deprecated")
def test_model_that_cannot_be_copied(build: Callable[[], nn.Module], said: str) -> None:
    model = build()
    check_module(model)
    with pytest.raises(MuntinError) as error:
        eager_copy(model)
    assert said in str(error.value) and "\n" not in str(error.value)


class Grid(nn.Module):
    """Creates and keeps a grid of the picture's width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grid = nn.Conv2d(3, 64, 3, padding=1), torch.zeros(0)
        self.middle, self.last = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.grid.shape[0] != x.shape[-1]:
            self.grid = torch.linspace(0, 1, x.shape[-1])
        return self.last(torch.relu(self.middle(torch.relu(self.first(x / 255) * self.grid))))


@pytest.mark.parametrize("pass_", PASSES)
def test_kept_activations_are_trainable(pass_: Callable[..., Any]) -> None:
    model = Grid()
    pass_(model, [images()])
    assert not model.grid.is_inference()
    if pass_ is not quantize:
        model(images()).sum().backward()


def test_input_type_and_device() -> None:
    batch = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    assert as_input(nn.Conv2d(3, 3, 1).double(), batch).dtype == torch.float64
    assert as_input(nn.BatchNorm2d(3, affine=False).double(), batch).dtype == torch.float64
    assert as_input(nn.Identity(), batch).dtype == torch.float32
