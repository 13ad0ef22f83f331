"""The commands under `benchmarks/`: that each can be started. What they measure is theirs to show."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
HEAVY = {"segmentation_models_pytorch", "nncf", "timm", "torchvision", "litserve", "ray"}
"""What the extra `bench` brings, or the environment of another server: where it is not installed, what needs it cannot be asked."""
MODULES = sorted(".".join(path.relative_to(FOLDER).with_suffix("").parts) for path in FOLDER.rglob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in HEAVY and "ray[serve]" not in str(error):
            raise
        pytest.skip(str(error))
    finally:
        for module in set(sys.modules) - before:
            if (getattr(sys.modules[module], "__file__", None) or "").startswith(str(FOLDER)):
                del sys.modules[module]
