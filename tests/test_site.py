"""The documentation as a site: `mkdocs build` is strict, and its pages load nothing from the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import muntin

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
ROOT = Path(__file__).parents[1]
LOADED = re.compile(
    r"<(?:script|img|iframe|source)[^>]* src=\"?(https?:)?//|<link[^>]* href=\"?(https?:)?//(?!docs\.)[^>]*stylesheet|url\(\"?(https?:)?//"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A warning, such as of a link to nowhere or of a page that is not in the navigation, ends the build."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_of_docs_is_built(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert not [page for page in pages if not (site / page).exists()]
    assert {"index.html", "changelog.html", "contributing.html", "benchmarks"} <= {path.name for path in site.iterdir()}


def test_nothing_is_loaded_from_the_network(site: Path) -> None:
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(files) > 30
    assert not [str(path) for path in files if LOADED.search(path.read_text(encoding="utf-8"))]


def test_links_between_docs_and_the_repository(site: Path) -> None:
    models = (site / "models.html").read_text(encoding="utf-8")
    assert 'href="benchmarks/figures.html#peers"' in models
    demo = (site / "demo.html").read_text(encoding="utf-8")
    assert 'href="https://github.com/muntin/muntin/blob/main/recipes/demo.yaml"' in demo


def test_every_public_name_has_its_signature(site: Path) -> None:
    text = re.sub("<[^>]+>", "", (site / "api.html").read_text(encoding="utf-8"))
    assert not [name for name in muntin.__all__ if name != "layers" and not re.search(rf"^{name}\(", text, re.MULTILINE)]
