"""OpenVINO, imported so that it tells nobody.

On import, `openvino` starts a process that reports to Google Analytics, and writes a client identifier into the user's home, unless
`openvino_telemetry` cannot be imported: then it takes an empty stub of its own. That package is hidden while `openvino` is imported here,
and visible again afterwards for whoever else in the process wants it. Import `openvino` from this module and nowhere else.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_TELEMETRY = "openvino_telemetry"


def _import_openvino() -> Any:
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == _TELEMETRY}
    for name in hidden:
        del sys.modules[name]
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # documented: makes the import raise ModuleNotFoundError
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[_TELEMETRY]
        sys.modules.update(hidden)


openvino: Any = _import_openvino()
