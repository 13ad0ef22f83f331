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
    from muntin.compression import quantize
    from muntin.deployment import TorchSession, export, open_model
    from muntin.graph import export_onnx, quantize_onnx
    from muntin.models import create_model
    from muntin.runtime import SessionOptions, load, predict, verify
    from muntin.serving.server import serve
    from muntin.training import evaluate, fit

__all__ = [
    "SessionOptions",
    "TorchSession",
    "create_model",
    "evaluate",
    "export",
    "export_onnx",
    "fit",
    "layers",
    "load",
    "open_model",
    "predict",
    "quantize",
    "quantize_onnx",
    "serve",
    "verify",
    "write_standalone",
]

_ROOMS = {
    "SessionOptions": "runtime",
    "TorchSession": "deployment",
    "create_model": "models",
    "evaluate": "training",
    "export": "deployment",
    "export_onnx": "graph",
    "fit": "training",
    "load": "runtime",
    "open_model": "deployment",
    "predict": "runtime",
    "quantize": "compression",
    "quantize_onnx": "graph",
    "serve": "serving.server",  # `muntin.serving` itself is imported by engine processes, which need neither HTTP nor gRPC
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
