"""Hook of mkdocs: pages from files outside of docs/, notebooks as pages, and links that work on GitHub and in the site.

In the repository a page links to files by their place: `../benchmarks/figures.md#peers`. The site has the pages of docs/ at its root, so
such a link is rewritten to the page that the file has become, and one to another file of the repository to its address on GitHub. A link
to a file that does not exist is left as it is, and the strict build fails on it.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks/README.md",
    "benchmarks/figures.md": "benchmarks/figures.md",
}
"""Pages of the site from outside of docs/: their files in the repository, and their places in the site."""
LINK = re.compile(r"(!?\[[^]]*\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def repository() -> str:
    """Return the address of the repository, from pyproject.toml."""
    address: str = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Documentation"]
    return address


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give headings the anchors that GitHub gives them."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside of docs/, and each notebook as a page."""
    for place, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / place)))
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            text = notebook_text(json.loads(file.content_string))
            files.append(File.generated(config, str(PurePosixPath(file.src_uri).with_suffix(".md")), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page; code blocks stay as they are."""
    parts = FENCE.split(markdown)
    fences = FENCE.findall(markdown)
    places = {site: place for place, site in OUTSIDE.items()}
    source = places.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    linked = [LINK.sub(lambda found: rewritten(found, source, page.file.src_uri, files), part) for part in parts]
    return "".join(part + fence for part, fence in zip(linked, [*fences, ""], strict=True))


def rewritten(found: re.Match[str], source: str, site_page: str, files: Files) -> str:
    """Return a link of the file `source`, which is `site_page` in the site."""
    before, target, anchor, after = found.group(1), found.group(2), found.group(3) or "", found.group(4)
    if ":" in target:
        return found.group()
    place = os.path.normpath(PurePosixPath(source).parent / target)
    page = OUTSIDE.get(place, place.removeprefix("docs/"))
    notebook = str(PurePosixPath(page).with_suffix(".md")) if page.endswith(".ipynb") else page
    for name in (notebook, page):
        if (place in OUTSIDE or place.startswith("docs/")) and files.get_file_from_path(name):
            return f"{before}{os.path.relpath(name, PurePosixPath(site_page).parent)}{anchor}{after}"
    if (ROOT / place).exists():
        return f"{before}{repository()}/blob/main/{place}{anchor}{after}"
    return found.group()


def notebook_text(notebook: dict[str, Any]) -> str:
    """Return a notebook as Markdown: its texts, its code, and the text and pictures that the code gave."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![The picture that the code above shows](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif printed := "".join(output.get("text", data.get("text/plain", ()))).rstrip():
                parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n"
