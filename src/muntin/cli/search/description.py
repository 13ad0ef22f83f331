"""Result of a search: on the terminal, and as the values of its page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich.table import Table

from muntin.cli.console import INDENT, LINE, out, print_notes, print_table, print_wrapped

if TYPE_CHECKING:
    from muntin.reporting.front.search_page import SearchRecord
    from muntin.searching import ArchitectureSearch, SearchPlan


def choices(chosen: Mapping[str, Any]) -> str:
    """Choices and their values in words."""
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in chosen.items())


def amount(cost: float, objective: str) -> str:
    """A cost in the unit of its objective."""
    return f"{cost:.2f} ms" if objective == "latency" else f"{cost / 1e6:.3f} MB"


def duration(seconds: float) -> str:
    """Seconds in words: "40 s", "3.5 min", "2.1 h"."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan_lines(plan: SearchPlan) -> list[str]:
    """The plan of a search in wrapped lines, each part of the work on lines of its own."""
    settings, rough = plan.settings, ", rough until some are tried" if plan.rough else ", as measured so far"
    within = round(plan.study_s / plan.candidate_s)
    count = settings.candidates - plan.scored
    number = f"{count} candidates" if within >= count else f"about {max(1, within)} of {count} candidates"
    scored = f" ({plan.scored} are tried already)" if plan.scored else ""
    deployed = "exported and timed, then " if settings.objective == "latency" else ""
    lines = [
        f"candidates: {number}{scored}, each {deployed}trained for a ninth of a training, the best third for a third; about "
        f"{duration(plan.candidate_s)} each{rough}, {duration(plan.study_s)}"
    ]
    of_each = f"{duration(plan.network_s)} of training each, then about {duration(plan.export_s)} of export and scoring (rough)"
    own = " and the recipe's own model" if settings.own else ""
    lines.append(f"alone: up to {settings.finalists} networks of the front{own}, {of_each}")
    lines.append("at the end: each is scored in INT8 on the validation split, and all are timed in turns")
    if settings.minutes is None:
        lines.append(f"total: about {duration(plan.total_s)}; without --minutes every training has the recipe's steps")
    else:
        lines.append(
            f"total: about {duration(plan.total_s)}; --minutes covers all of this, and work that has begun then is finished: one "
            "candidate, or one network"
        )
    if plan.too_short:
        lines.append(
            f"too short: the first network is expected after {duration(plan.least_s)}; what is done by then is kept, and the same command "
            "goes on"
        )
    words = [f"{'' if index else 'plan':<{INDENT}}{line}" for index, line in enumerate(lines)]
    return [part for line in words for part in wrap(line, LINE, subsequent_indent=" " * (INDENT + 2), break_on_hyphens=False)]


def describe_architectures(result: ArchitectureSearch, metric: str) -> None:
    """Print the front, the trained networks, and how far the scores of short trainings can be trusted."""
    objective = result.settings.objective
    table = Table("network", f"{metric}, short", objective, "choices")
    for point in result.front:
        table.add_row(f"{point.number + 1:03d}", f"{point.score:.4f}", amount(point.cost, objective), choices(point.chosen))
    if result.front:
        print_table(table)
    trained = Table("network", f"{metric}, deployed", f"{metric}, floats", f"{metric}, short", "MB", "ms")
    for network in result.networks:
        found = network.point
        trained.add_row(
            network.name, f"{network.score:.4f}", f"{network.float_score:.4f}", "" if found is None else f"{found.score:.4f}",
            f"{network.bytes / 1e6:.3f}", f"{network.ms:.2f}",
        )  # fmt: skip
    if result.networks:
        print_table(trained)
    if result.correlation is not None:
        out.print(f"ranks     correlation of the scores of short trainings and of whole ones: {result.correlation:.2f} (Spearman)")
    for kind, shares in result.importances.items():
        print_wrapped(f"{'worth' if kind == 'score' else '':<10}{kind}: " + ", ".join(f"{n} {v:.0%}" for n, v in list(shares.items())[:8]))
    for network in result.networks:
        out.print(f"wrote     {network.artifact}")
    trained_numbers = {network.point.number for network in result.networks if network.point is not None}
    for point in result.front:
        if result.finished and point.number not in trained_numbers:
            out.print(f"train     {result.command(point)}")
    print_notes(result.notes)


def search_record(result: ArchitectureSearch, *, title: str, metric: str) -> SearchRecord:
    """The values of a search's page."""
    from importlib.metadata import version

    from muntin.reporting.front.schema import FrontRecord
    from muntin.reporting.front.search_page import SearchRecord
    from muntin.runtime import describe_hardware
    from muntin.searching.architecture_search import document

    content = document(result)
    head = {
        "muntin": version("muntin"), "created": datetime.now(UTC).isoformat(timespec="seconds"), "title": title, "metric": metric,
        "objective": result.settings.objective, "hardware": describe_hardware(),
    }  # fmt: skip
    reference = result.networks[0]
    places = [network.artifact.relative_to(result.folder).as_posix() for network in result.networks]
    points = [
        {
            "number": 0 if network is reference or network.point is None else network.point.number + 1, "name": network.name,
            "width": 1.0, "score": network.score, "drop": reference.score - network.score, "bytes": network.bytes, "ms": network.ms,
            "kept": network.score >= reference.score, "artifact": place,
        }
        for network, place in zip(result.networks, places, strict=True)
    ]  # fmt: skip
    dashed = "the recipe's own model" if reference.point is None else f"network {reference.name}"
    legend = f"dashed: {dashed}; blue reaches its score, red does not"
    picture = FrontRecord.model_validate({**head, "max_drop": 0.0, "chosen": None, "points": points, "legend": legend})
    names = ("name", "score", "float_score", "short_score", "bytes", "ms", "parameters")
    networks = [
        {**{name: row[name] for name in names}, "artifact": place} for row, place in zip(content["networks"], places, strict=True)
    ]  # fmt: skip
    front = [
        {
            **{name: row[name] for name in ("number", "score", "cost", "parameters", "command")},
            "options": choices(row["options"]) or "none",
        }
        for row in content["front"]
    ]  # fmt: skip
    return SearchRecord.model_validate(
        {
            **head, "scored": content["scored"], "front": front, "networks": networks, "picture": picture,
            "importances": content["importances"], "correlation": content["correlation"], "notes": result.notes,
        }
    )  # fmt: skip
