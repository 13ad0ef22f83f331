"""PNG files with bit depths that Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def write_png() -> Callable[..., None]:
    """`write_png(path, width=..., height=..., depth=..., kind=..., rows=...)`: `kind` is PNG's colour type, `rows` unfiltered."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    def write(path: Path, *, width: int, height: int, depth: int, kind: int, rows: bytes) -> None:
        head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))

    return write
