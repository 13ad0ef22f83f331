"""The engines' libraries, imported without their telemetry. Import them from this module and nowhere else.

On import, `openvino` starts a process that reports to Google Analytics and writes a client identifier into the user's home, unless
`openvino_telemetry` cannot be imported: that package is hidden during the import. `onnxruntime` writes a device identifier and a database
into the user's cache unless ORT_DISABLE_TELEMETRY is set before its import. Each library is imported on first use, so a machine needs only
the engine that it serves with.
"""

from __future__ import annotations

import importlib
import os
import sys
from threading import RLock
from typing import Any

_TELEMETRY = "openvino_telemetry"
_importing = RLock()  # held while the package is hidden; reentrant, since these modules import each other

openvino: Any
onnxruntime: Any


def __getattr__(name: str) -> Any:
    if name == "openvino":
        module = import_without_telemetry(name)
    elif name == "onnxruntime":
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        module = importlib.import_module(name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = module
    return module


def import_without_telemetry(name: str) -> Any:
    """Imports a module of OpenVINO's family while `openvino_telemetry` cannot be imported."""
    with _importing:
        hidden = {loaded: module for loaded, module in sys.modules.items() if loaded.partition(".")[0] == _TELEMETRY}
        for loaded in hidden:
            del sys.modules[loaded]
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # makes its import raise ModuleNotFoundError
        try:
            return importlib.import_module(name)
        finally:
            del sys.modules[_TELEMETRY]
            sys.modules.update(hidden)
