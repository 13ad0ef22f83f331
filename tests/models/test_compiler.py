"""Without a compiler torch.compile is refused before it is tried."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from muntin.artifact import ClassInfo, Signature
from muntin.errors import DependencyError
from muntin.models import TorchSession
from muntin.models.compiler import require_compiler


def test_no_compiler_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    signature = Signature(task="segment", channels=3, classes=(ClassInfo(name="a", color=(0, 0, 0)),))
    with pytest.raises(DependencyError, match=r"needs a C\+\+ compiler on CPUs"):
        TorchSession(nn.Conv2d(3, 1, 1), signature, compile=True)
    require_compiler("cuda")  # there it is Triton's affair
