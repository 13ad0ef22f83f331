"""The order in memory that training computes in."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def channels_last(model: M) -> M:
    """The model, in place, with the kernels of its 2-D convolutions channels last, and everything else as it was. PyTorch's own
    `Module.to(memory_format=...)` ends in an error where a kernel has three dimensions of space."""

    def ordered(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    model._apply(ordered)  # type: ignore[no-untyped-call]
    return model
