"""muntin: vision models made small and fast, measured as deployed artefacts, and served.

Public names load on first use, so `import muntin` is light, and only names that need torch import it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from muntin.errors import DependencyError, install

if TYPE_CHECKING:
    from muntin import layers
    from muntin.artifact import write_standalone
    from muntin.budgeting import Budget, compress
    from muntin.compression import distil, freeze, load_compressed, low_rank, prepare_qat, prune, quantize, save, sparsify
    from muntin.deployment import TorchSession, export, open_model
    from muntin.graph import export_onnx, quantize_onnx
    from muntin.models import create_model
    from muntin.runtime import SessionOptions, load, predict, verify
    from muntin.serving.server import serve
    from muntin.training import evaluate, fit

__all__ = [
    "Budget",
    "SessionOptions",
    "TorchSession",
    "compress",
    "create_model",
    "distil",
    "evaluate",
    "export",
    "export_onnx",
    "fit",
    "freeze",
    "layers",
    "load",
    "load_compressed",
    "low_rank",
    "open_model",
    "predict",
    "prepare_qat",
    "prune",
    "quantize",
    "quantize_onnx",
    "save",
    "serve",
    "sparsify",
    "verify",
    "write_standalone",
]

_ROOMS = {
    "Budget": "budgeting",
    "SessionOptions": "runtime",
    "TorchSession": "deployment",
    "compress": "budgeting",
    "create_model": "models",
    "distil": "compression",
    "evaluate": "training",
    "export": "deployment",
    "export_onnx": "graph",
    "fit": "training",
    "freeze": "compression",
    "load": "runtime",
    "load_compressed": "compression",
    "low_rank": "compression",
    "open_model": "deployment",
    "predict": "runtime",
    "prepare_qat": "compression",
    "prune": "compression",
    "quantize": "compression",
    "quantize_onnx": "graph",
    "save": "compression",
    "serve": "serving.server",  # `muntin.serving` itself is imported by engine processes, which need neither HTTP nor gRPC
    "sparsify": "compression",
    "verify": "runtime",
    "write_standalone": "artifact",
}


def __getattr__(name: str) -> Any:
    if name != "layers" and name not in _ROOMS:
        raise AttributeError(f"module 'muntin' has no attribute '{name}'")
    room = _ROOMS.get(name, name)
    try:
        module = importlib.import_module(f"muntin.{room}")
    except ModuleNotFoundError as error:
        package = (error.name or "muntin").partition(".")[0]
        if package == "muntin" or room in ("runtime", "graph"):  # a bug, or a broken installation
            raise
        extra = "serve" if name == "serve" else "train"
        raise DependencyError(f"muntin.{name} needs the package {package}: {install(extra)}") from error
    return module if name == "layers" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
