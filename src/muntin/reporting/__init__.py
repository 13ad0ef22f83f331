"""Tables and the HTML report, from plain values and files (no torch).

`write_report` checks a report and writes `report.json` and `report.html`; `read_report` reads the first back.
"""

from __future__ import annotations

from muntin.reporting.files import read_report, write_report
from muntin.reporting.page import render_html
from muntin.reporting.schema import Report, parse_report
from muntin.reporting.terminal import terminal_table

__all__ = ["Report", "parse_report", "read_report", "render_html", "terminal_table", "write_report"]
