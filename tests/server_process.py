"""A server in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def server_process(
    artifact: Path, *options: str, python: str | Path = sys.executable, **process_options: Any
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Start `muntin serve` on a free port, and yield the process and the addresses that it has printed. It is terminated afterwards."""
    command = [str(python), "-m", "muntin", "serve", str(artifact), "--http-port", "0", "--threads", "1", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **process_options) as process:
        try:
            assert process.stdout is not None
            lines = ""
            while not lines.endswith("}\n"):
                line = process.stdout.readline()
                assert line, process.communicate()[1]
                lines += line
            yield process, json.loads(lines)
        finally:
            if process.poll() is None:
                process.terminate()
