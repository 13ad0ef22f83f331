"""A small network that reads drawn digits, trained once, and plans for it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from drawn_digits import Digits, Uniform, draw_digits, network
from model_helpers import one_seed_one_thread
from muntin.budgeting import pipeline
from muntin.budgeting.deployed import deploy
from muntin.budgeting.trials import batches_digest
from muntin.compression.history import history

__all__ = ["one_seed_one_thread"]


@pytest.fixture(scope="session")
def digits() -> Digits:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images, labels = draw_digits(1536, 1)
    train = list(zip(images.split(64), labels.split(64), strict=True))
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(6):
        for x, y in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    torch.set_num_threads(threads)
    return Digits(model.eval(), train, [x for x, _ in train[:3]], draw_digits(400, 2), draw_digits(400, 3))


@pytest.fixture(scope="session")
def uniform() -> Callable[..., Uniform]:
    """`uniform(width, ...)`: opens plans of uniform forms."""
    return lambda width, *given: Uniform(width)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module", autouse=True)
def equal_models_are_exported_once(exported: Path) -> Iterator[None]:
    """Searches of many tests have the same candidates, whose artifacts are copied."""

    def write(model: nn.Module, interface: Any, example: Any, path: Path, *, exact: bool = False) -> None:
        tensors = tuple(tensor for _, tensor in sorted(model.state_dict().items()))
        text = f"{model} {history(model)} {batches_digest([tensors, example])} {interface} {exact}"
        first = exported / hashlib.sha256(text.encode()).hexdigest()
        if not first.exists():
            deploy(model, interface, example, first, exact=exact)
        shutil.copytree(first, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "deploy", write)
        yield
