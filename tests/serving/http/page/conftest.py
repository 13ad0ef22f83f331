"""Servers of tiny artefacts, and Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from muntin.serving.config import ServeConfig
from muntin.serving.server import Server


@contextmanager
def started(path: Path, **options: Any) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("muntin.serving.versions.loader.can_open_remote", lambda: False)  # in this process, which is quicker
        settings: dict[str, Any] = {"http_port": 0, "grpc_port": None, "threads": 1, "max_batch": 2}
        with Server(path, ServeConfig(**(settings | options))) as server:
            yield server


@pytest.fixture(scope="session")
def start_server() -> Callable[..., Any]:
    """`with start_server(path, **settings) as server`."""
    return started


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
def save_picture(tmp_path: Path) -> Callable[[Any, str], None]:
    """`save_picture(page, name)`: a screenshot in $MUNTIN_SCREENSHOTS, or in the test's folder."""
    folder = Path(os.environ.get("MUNTIN_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    def save(page: Any, name: str) -> None:
        page.screenshot(path=folder / f"{name}.png", full_page=True)

    return save
