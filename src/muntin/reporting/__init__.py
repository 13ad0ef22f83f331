"""Tables and the HTML report, from plain values and files (no torch).

`write_report` checks a report and writes `report.json` and `report.html`; `read_report` reads the first back. `write_profile` does the same
for a profile (where the time of an artefact goes), with its roofline as a picture of its own; `roofline_svg` draws several side by side.
"""

from __future__ import annotations

from muntin.reporting.files import read_report, write_report
from muntin.reporting.page import render_html
from muntin.reporting.profile_page import render_profile, write_profile
from muntin.reporting.profile_schema import Profile, parse_profile
from muntin.reporting.roofline import roofline_svg
from muntin.reporting.schema import Report, parse_report
from muntin.reporting.terminal import terminal_table

__all__ = [
    "Profile",
    "Report",
    "parse_profile",
    "parse_report",
    "read_report",
    "render_html",
    "render_profile",
    "roofline_svg",
    "terminal_table",
    "write_profile",
    "write_report",
]
