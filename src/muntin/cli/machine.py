"""`muntin doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from itertools import zip_longest
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from muntin.cli.console import finite, out, print_json, status
from muntin.cli.options import JsonOption
from muntin.errors import VerificationError

if TYPE_CHECKING:
    from muntin.runtime.profiling.doctor import Diagnosis
    from muntin.runtime.profiling.doctor_facts import Machine

LABEL, LINE = 12, 64
"""Minimum width of a row's label and width of the list of packages, in columns; 80 with the margins."""
_GLUE = "\N{NO-BREAK SPACE}"
_COLORS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor_command(
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to check for; the usable physical cores by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the self-test, which takes about ten seconds.")] = False,
    json: JsonOption = False,
) -> None:
    """Examine this machine: hardware, software, correct integer arithmetic, and settings that distort timings."""
    from muntin.runtime.profiling.doctor import examine

    with status("examining") as stage:
        diagnosis = examine(threads=threads, self_test=not quick, stage=stage)
    if json:
        print_json(finite(asdict(diagnosis) | {"problems": diagnosis.problems}))
    else:
        _print(diagnosis)
    if diagnosis.problems:
        more = f" (and {len(diagnosis.problems) - 1} more)" if len(diagnosis.problems) > 1 else ""
        raise VerificationError(f"{diagnosis.problems[0]}{more}")


def _print(diagnosis: Diagnosis) -> None:
    _table("machine", _machine(diagnosis.machine))
    _table("CPU features", _features(diagnosis.machine))
    _table("software", _software(diagnosis))
    environment = list(diagnosis.environment.items()) or [("", "none of those that change speed")]
    _table("environment", [*environment, ("cache", str(diagnosis.cache or "none"))])
    _table("checks", [(check.status, f"{check.name}: {check.text}") for check in diagnosis.checks])


def _table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    out.print(Text(title, style="bold"))
    rows = list(rows)
    if not out.is_terminal:  # one line a row in a pipe
        width = max(LABEL, *(len(label) for label, _ in rows))
        for label, text in rows:
            out.print(f"  {label:<{width}}  {text}")
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=2 + LABEL)
    table.add_column(overflow="fold")  # complete paths and commands can be copied
    for label, text in rows:
        table.add_row(Text(f"  {label}", style=_COLORS.get(label, "")), Text(text))
    out.print(table)


def _machine(machine: Machine) -> list[tuple[str, str]]:
    hidden = f" of {machine.cpus}" if machine.cores < machine.cpus else ""
    whose = "core's" if machine.cpu_quota == 1 else "cores'"
    quota = "" if machine.cpu_quota is None else f", a quota of {machine.cpu_quota:g} {whose} time"
    sizes = {"usable": machine.memory_gib, "available now": machine.available_gib, "container's limit": machine.memory_limit_gib}
    memory = ", ".join(f"{size:.1f} GiB {what}" for what, size in sizes.items() if size is not None)
    rows = [
        ("CPU", machine.cpu),
        ("cores", f"{machine.cores}{hidden} logical, {machine.physical_cores} physical{quota}"),
        ("memory", memory or "unknown"),
        ("NUMA nodes", str(machine.numa_nodes)),
        ("system", f"{machine.os}, Python {machine.python}"),
    ]
    if len(machine.affinity) < machine.cpus:
        rows.insert(2, ("affinity", f"CPUs {', '.join(map(str, machine.affinity))}"))
    if machine.governors:
        rows.insert(2, ("clock", ", ".join(machine.governors)))
    return rows


def _features(machine: Machine) -> list[tuple[str, str]]:
    if not machine.features:
        return [("", "unknown: this system does not list them")]
    return [(feature.name, f"{'yes' if feature.present else 'no '}  {feature.meaning}") for feature in machine.features]


def _software(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    rows = []
    for engine in diagnosis.engines:
        providers = ", ".join(provider.removesuffix("ExecutionProvider") for provider in engine.providers)
        rows.append((engine.name, f"{engine.version or engine.error}{f' ({providers})' if providers else ''}"))
    versions = [f"{name}{_GLUE}{version}" for name, version in diagnosis.packages.items() if version is not None]
    lines = [line.replace(_GLUE, " ") for line in wrap(", ".join(versions), LINE)]
    rows += zip_longest(["packages"], lines, fillvalue="")
    for extra in diagnosis.extras:
        lacking = f"without {', '.join(extra.missing)}: {extra.install}"
        rows.append((f"[{extra.name}]", "complete" if not extra.missing else lacking))
    return rows
