"""The engines' libraries, imported so that they tell nobody.

On import, `openvino` starts a process that reports to Google Analytics, and writes a client identifier into the user's home, unless
`openvino_telemetry` cannot be imported: then it takes an empty stub of its own. That package is hidden while `openvino` is imported here,
and visible again afterwards for whoever else in the process wants it. `onnxruntime` writes a device identifier and a database
below the user's cache unless ORT_DISABLE_TELEMETRY is set before it is imported. Import either from this module and nowhere else; each is
loaded when it is first asked for, so that a machine that serves with one needs no other.
"""

from __future__ import annotations

import importlib
import os
import sys
from threading import RLock
from typing import Any

_TELEMETRY = "openvino_telemetry"
_importing = RLock()  # while it is hidden; one module of the family may import another here

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
    """A module of OpenVINO's family, which reports nothing where `openvino_telemetry` cannot be imported: imported as if it could not."""
    with _importing:
        hidden = {loaded: module for loaded, module in sys.modules.items() if loaded.partition(".")[0] == _TELEMETRY}
        for loaded in hidden:
            del sys.modules[loaded]
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # documented: makes the import raise ModuleNotFoundError
        try:
            return importlib.import_module(name)
        finally:
            del sys.modules[_TELEMETRY]
            sys.modules.update(hidden)
