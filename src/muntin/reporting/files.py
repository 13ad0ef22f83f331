"""A report on disk: `report.json` for programs, `report.html` for people, each there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muntin.artifact import writing
from muntin.errors import MuntinError
from muntin.reporting.page import render_html
from muntin.reporting.schema import Report, parse_report, report_values
from muntin.text import plain

JSON_NAME = "report.json"
HTML_NAME = "report.html"


def write_report(directory: Path, report: Report | Mapping[str, Any]) -> Path:
    """Checks `report`, writes `report.json` and `report.html` into `directory` (made if absent), returns the page's path.

    The pictures that the report names must lie in `directory` already; each costs one decode. Both files are complete on the disk
    before either takes its name, so an error leaves what was there before. Raises MuntinError (DataError for a picture), one line.
    """
    checked = parse_report(report)
    page = render_html(checked, directory)
    values = json.dumps(report_values(checked), indent=1, ensure_ascii=False, allow_nan=False)
    write_files(directory, {JSON_NAME: f"{values}\n", HTML_NAME: page}, what="report")
    return directory / HTML_NAME


def read_report(path: Path) -> Report:
    """The report in the file `path`, or in `report.json` of the folder `path`. Raises MuntinError, one line."""
    file = path / JSON_NAME if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MuntinError(f"there is no report {file}: name a report.json, or the folder of a run that wrote one") from None
    except OSError as error:
        raise MuntinError(f"cannot read the report {file} ({error.strerror or error}): check the path and its permissions") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).split("\n")[0]
        raise MuntinError(f"{file} is not a whole JSON document ({reason}): let the run write it again") from None
    try:
        return parse_report(values)
    except MuntinError as error:
        raise MuntinError(f"{file}: {error}") from None


def write_files(directory: Path, contents: Mapping[str, str], *, what: str) -> None:
    """Writes texts by file name into `directory` (made if absent): all are complete on the disk before any takes its name.

    Raises MuntinError that says the `what` could not be written, and leaves what was there before.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writing.write_files(directory, {name: plain(text).encode() for name, text in contents.items()})
    except OSError as error:
        raise MuntinError(
            f"cannot write the {what} into {directory} ({error.strerror or error}): free some space there or name another folder"
        ) from None
