"""The table of steps, as the terminal shows it."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from muntin.reporting import artifacts_table, terminal_table


def printed(report: dict[str, Any], width: int = 160, *, artifacts: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(artifacts_table(report["artifacts"], task="segment", title="earth") if artifacts else terminal_table(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_terminal_table_changes(report: dict[str, Any]) -> None:
    shown = printed(report)
    lines = {step["name"]: next(line for line in shown.splitlines() if f" {step['name']} " in line) for step in report["steps"]}
    assert "0.649 (\N{MINUS SIGN}0.002)" in lines["deployed"]
    assert "812 kB (13.9× less)" in lines["deployed"]
    assert "6.9 ms (6.0× faster)" in lines["deployed"]
    assert "(" not in lines["fp32"]
    assert "–" in lines["w4a8"]


@pytest.mark.parametrize("with_weights", [False, True])
def test_terminal_table_in_80_columns(report: dict[str, Any], with_weights: bool) -> None:
    for step in report["steps"] if with_weights else ():
        step["weights"] = 10_000_000
    shown = printed(report, 80)
    assert "…" not in shown
    assert all(f" {step['name']} " in shown for step in report["steps"])
    column = next(line.index("engine") for line in shown.splitlines() if "engine" in line)
    engines = "".join(line[column:].strip() for line in shown.splitlines())
    assert all(step["engine"].replace(" ", "") in engines.replace(" ", "") for step in report["steps"])
    figures = {"0.649", "(\N{MINUS SIGN}0.002)", "812 kB", "(13.9×", "6.9 ms", "(6.0×", "faster)"}
    assert figures <= {word.strip() for line in shown.splitlines() for word in re.split(r"  +", line)}  # none is broken in two


def test_terminal_table_with_weights(report: dict[str, Any]) -> None:
    def headings() -> list[str]:
        return next(line for line in printed(report, 200).splitlines() if "params" in line).split()

    assert headings()[2:5] == ["params", "on", "disk"]
    for step, weights in zip(report["steps"], (10_000_000, 5_000_000, 500_000, 700_000), strict=False):
        step["weights"] = weights
    report["steps"][1]["bytes"] = None
    assert headings()[2:6] == ["params", "weights", "on", "disk"]
    line = next(line for line in printed(report, 200).splitlines() if f" {report['steps'][1]['name']} " in line)
    assert re.split(r"  +", line.strip())[3:5] == ["5.0 MB (2.0× less)", "–"]


def test_table_of_artefacts(report: dict[str, Any]) -> None:
    shown = printed(report, artifacts=True)
    cells = {re.split(r"  +", line.strip())[0]: re.split(r"  +", line.strip())[1:] for line in shown.splitlines() if line.strip()}
    assert cells["artefact"] == ["validation mIoU", "test mIoU", "labels as fp32", "on disk", "latency", "p90"]
    assert cells["fp32"] == ["0.662", "0.651", "–", "11.3 MB", "41.3 ms", "45.4 ms"]
    minus = "\N{MINUS SIGN}"
    assert cells["mixed"] == [
        f"0.658 ({minus}0.004)",
        f"0.649 ({minus}0.002)",
        "97.3 %",
        "812 kB (13.9× less)",
        "6.9 ms (6.0× faster)",
        "7.6 ms",
    ]
    report["artifacts"]["rows"][1]["peak_mib"] = 1234.5
    assert "1,234 MiB" in printed(report, artifacts=True) and "peak memory" in printed(report, artifacts=True)
    assert "…" not in printed(report, 80, artifacts=True)


def test_terminal_table_without_latency(report: dict[str, Any]) -> None:
    for step in report["steps"]:
        step["latency_ms"] = None
    assert "latency" not in printed(report)


def test_terminal_table_names_are_not_markup(report: dict[str, Any]) -> None:
    report["steps"][0]["name"] = "[red]fp32[/red]"
    report["title"] = "[bold]"
    shown = printed(report)
    assert "[red]fp32[/red]" in shown
    assert "[bold]" in shown
