"""No test of this folder may reach the network."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        pytest.fail(f"a name was looked up in the network: {arguments[:2]}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def write_pictures() -> Callable[..., Path]:
    """`write_pictures(folder, count, height, width)`: pictures 0.png, 1.png, ... whose first channel holds their number."""

    def write(folder: Path, count: int, height: int = 48, width: int = 64) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)).copy()
            pixels[:, :, 0] = number
            Image.fromarray(pixels).save(folder / f"{number:03}.png")
        return folder

    return write
