"""muntin: vision models made small and fast, proven on what is deployed, and served.

The public names load on first use: `import muntin` imports nothing heavy, and what needs no torch works without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muntin import layers
    from muntin.compression import quantize
    from muntin.deployment import TorchSession, export
    from muntin.models import create_model
    from muntin.runtime import load, predict, verify
    from muntin.training import evaluate, fit

__all__ = ["TorchSession", "create_model", "evaluate", "export", "fit", "layers", "load", "predict", "quantize", "verify"]

_ROOMS = {
    "TorchSession": "deployment",
    "create_model": "models",
    "evaluate": "training",
    "export": "deployment",
    "fit": "training",
    "load": "runtime",
    "predict": "runtime",
    "quantize": "compression",
    "verify": "runtime",
}


def __getattr__(name: str) -> Any:
    if name == "layers":
        return importlib.import_module("muntin.layers")
    if name not in _ROOMS:
        raise AttributeError(f"module 'muntin' has no attribute '{name}'")
    return getattr(importlib.import_module(f"muntin.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
