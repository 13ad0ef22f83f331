"""docs/licences.md lists every declared dependency."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_page_has_every_declared_dependency() -> None:
    spec = importlib.util.spec_from_file_location("make_licences", DOCS / "make_licences.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (DOCS / "licences.md").read_text(encoding="utf-8")
    sections = {head: re.findall(r"^\| (\S+) \|", body, re.MULTILINE)[2:] for head, body in re.findall(r"## (.+)\n([^#]*)", page)}
    del sections["Brought along"]
    assert sections == script.declared(), "write it again: python docs/make_licences.py"
