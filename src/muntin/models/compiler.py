"""Whether `torch.compile` can work here, asked before it fails far from where it was wanted."""

from __future__ import annotations

import shutil

from muntin.errors import DependencyError


def require_compiler(device: str) -> None:
    """Raises `DependencyError` where `torch.compile` would find no C++ compiler."""
    if device != "cpu":
        return
    from torch._inductor import config  # takes most of a second, and only compiling needs it

    found = config.cpp.cxx  # what PyTorch will call: the variable CXX, or its own choice
    names = [found] if isinstance(found, str) else [name for name in found if name]
    if not any(shutil.which(name) for name in names):
        raise DependencyError(
            f"torch.compile needs a C++ compiler on CPUs and there is no {' or '.join(names)}: install it, or leave `compile` false"
        )
