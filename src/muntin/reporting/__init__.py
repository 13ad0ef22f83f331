"""Tables and HTML reports, from plain values and files (no torch).

`write_report` checks a report and writes `report.json` and `report.html`; `write_profile` does the same for a profile of an artefact's
time, with its roofline as a separate picture; `roofline_svg` draws several profiles side by side.
"""

from __future__ import annotations

from muntin.reporting.page import render_html, write_report
from muntin.reporting.profile_page import render_profile, write_profile
from muntin.reporting.profile_schema import ProfileRecord, parse_profile
from muntin.reporting.roofline import roofline_svg
from muntin.reporting.schema import Report, parse_report
from muntin.reporting.steps import artifacts_table, terminal_table

__all__ = [
    "ProfileRecord",
    "Report",
    "artifacts_table",
    "parse_profile",
    "parse_report",
    "render_html",
    "render_profile",
    "roofline_svg",
    "terminal_table",
    "write_profile",
    "write_report",
]
