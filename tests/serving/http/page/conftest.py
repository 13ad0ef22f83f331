"""Servers of tiny artefacts, and Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def start_server(make_server: Callable[..., Any]) -> Callable[..., Any]:
    """`with start_server(path, **settings) as server`."""
    return partial(make_server, grpc_port=None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium. Closed with the module: while it is open, this thread has a running event loop."""
    playwright = pytest.importorskip("playwright.sync_api", reason="drives Chromium with playwright (extra dev)")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("looks at the page in Chromium, which is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", "--force-color-profile=srgb"])
        yield chromium
        chromium.close()


@pytest.fixture
def save_picture() -> Callable[[Any, str], None]:
    """`save_picture(page, name)`: a screenshot in $MUNTIN_SCREENSHOTS, if that is set."""
    folder = os.environ.get("MUNTIN_SCREENSHOTS")

    def save(page: Any, name: str) -> None:
        if folder is not None:
            page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    return save
