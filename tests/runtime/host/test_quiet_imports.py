"""The engines' libraries come from one place, whatever of them a process has imported before."""

from __future__ import annotations

import subprocess
import sys

TELEMETRY_FIRST = """
import sys
import openvino_telemetry
from muntin.runtime.host.quiet_imports import openvino
assert openvino.__name__ == "openvino", openvino
assert openvino.Core().available_devices
assert sys.modules["openvino_telemetry"] is openvino_telemetry  # visible again
"""


def test_import_after_the_telemetry_package() -> None:
    run = subprocess.run([sys.executable, "-c", TELEMETRY_FIRST], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
