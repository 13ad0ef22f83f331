"""Write the figures of the pages from the documents in results/.

    python benchmarks/tables.py [--check]

Pages have marked places; what stands between the marks is replaced:
    <!-- figures: rows NAME ... -->       the overview of some benchmarks: newest figures, goals met and missed
    <!-- figures: sections -->            every benchmark's tables, newest document of each variant
    <!-- figures: NAME.BLOCK -->          a text of a benchmark's `blocks`
each up to `<!-- end -->`, on lines of their own or within a line. `--check` writes nothing, and fails where a page differs.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from functools import cache

from documents import Document, grid, judge, read_document
from harness import ROOT, Benchmark

RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "benchmarks/README.md", "benchmarks/figures.md", "docs/claims.md", "docs/demo.md", "docs/limits.md")
MARKED = re.compile(r"(<!-- figures: (.+?) -->)(.*?)(<!-- end -->)", re.DOTALL)


@cache
def benchmarks() -> dict[str, Benchmark]:
    """Every module beside this one that declares a benchmark, by name."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks").glob("*.py"))}
    return {name: importlib.import_module(name).BENCHMARK for name, text in texts.items() if "\nBENCHMARK = " in text}


@cache
def documents() -> dict[str, list[Document]]:
    """Documents on record, oldest first, by benchmark."""
    found: dict[str, list[Document]] = {name: [] for name in benchmarks()}
    for path in sorted(RESULTS.glob("*.json")):
        document = read_document(path)
        found[document.benchmark].append(document)
    return {name: sorted(each, key=lambda document: document.created) for name, each in found.items()}


def variants(name: str) -> dict[str, list[Document]]:
    """The runs of each variant, oldest first; variants by their newest document."""
    runs: dict[str, list[Document]] = {}
    for document in documents()[name]:
        runs.setdefault(benchmarks()[name].variant(document), []).append(document)
    return dict(sorted(runs.items(), key=lambda item: item[1][-1].created, reverse=True))


def overview(names: list[str]) -> str:
    """A row for each variant of some benchmarks."""
    lines = [["command", "newest figures", "met", "missed", "n", "machine, date"]]
    for name in names:
        benchmark = benchmarks()[name]
        link = f"`{name}.py` ([tables](figures.md#{name}))"
        for variant, runs in variants(name).items():
            newest, verdicts = runs[-1], judge(benchmark.goals, runs)
            figures = (f"{variant}: " if variant else "") + benchmark.newest(newest)
            marked = "".join(f" *({mark})*" for mark in newest.marks)
            repeats = newest.n + (f"; {len(runs)} runs" if len(runs) > 1 else "")
            met, missed = ("; ".join(v.summary for v in verdicts if v.met is wanted) for wanted in (True, False))
            lines.append([link, figures + marked, met, missed, repeats, newest.where])
        if not documents()[name]:
            lines.append([link, f"{benchmark.unrecorded} *(no document)*", "", "", "1 run", "see figures"])
    return grid(lines)


def section(name: str) -> str:
    """The tables of each variant's newest document; older runs are named."""
    benchmark, parts = benchmarks()[name], [f"## {name}", f"`python benchmarks/{name}.py`. {benchmarks()[name].about}".strip()]
    for variant, runs in variants(name).items():
        newest = runs[-1]
        title = f"**{variant}**, " if variant else ""
        others = "; ".join(f"{run.where} ([{run.file}](results/{run.file}))" for run in reversed(runs[:-1]))
        marks = "".join(f" *{mark.capitalize()}.*" for mark in newest.marks)
        commit = f", commit {newest.commit}" if newest.commit else ""
        parts.append(
            f"{title}{newest.where}, {newest.n}{commit} ([{newest.file}](results/{newest.file})).{marks}"
            + (f" Earlier: {others}." if others else "")
        )
        parts += benchmark.markdown(runs, paged=True)
    if not documents()[name]:
        parts.append(f"*No document on record; a run before documents gave:* {benchmark.unrecorded}")
    return "\n\n".join(parts)


def text_of(place: str) -> str:
    """The text of a marked place."""
    kind, _, names = place.partition(" ")
    if kind == "rows":
        return f"\n{overview(names.split())}\n"
    if kind == "sections":
        return "\n" + "\n\n".join(map(section, benchmarks())) + "\n"
    name, _, block = place.partition(".")
    if name not in benchmarks() or block not in benchmarks()[name].blocks:
        raise SystemExit(
            f"figures: {place}: no such block; {name} has {', '.join(benchmarks()[name].blocks) if name in benchmarks() else ''}"
        )
    return benchmarks()[name].blocks[block](documents()[name])


def written(page: str) -> str:
    """A page's text with new figures."""
    return MARKED.sub(lambda found: found[1] + text_of(found[2]) + found[4], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs from its results")
    arguments = parser.parse_args()
    differ = []
    for name in PAGES:
        path = ROOT / name
        page = path.read_text(encoding="utf-8")
        if (new := written(page)) != page:
            differ.append(name)
            if not arguments.check:
                path.write_text(new, encoding="utf-8")
    print(f"{'differ' if arguments.check else 'written'}: {', '.join(differ) or 'none'}")
    sys.exit(bool(differ) and arguments.check)


if __name__ == "__main__":
    main()
