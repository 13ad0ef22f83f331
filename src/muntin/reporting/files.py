"""Files of a report, written all or none, and the templates of pages and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from muntin.artifact import atomic_files
from muntin.errors import MuntinError
from muntin.reporting import layers, text
from muntin.reporting.labels import breakable
from muntin.text import plain

REPORT_NAME = "report.json"
# Functions that templates call by their names: filters format one value, the others take several.
_FILTERS: tuple[Callable[..., Any], ...] = (
    *(text.amount, text.css_color, text.duration, text.milliseconds, text.moment, text.percent, text.size, text.three_digits),
    *(layers.bits_family, layers.bits_style, layers.family_of, layers.is_fallback, layers.requested_bits),
    *(breakable, text.capitalized, text.unbroken, text.with_minus),
)
_FUNCTIONS: tuple[Callable[..., Any], ...] = (text.change, text.machine_facts, text.percent_of, text.ratio)


def template(name: str) -> Template:
    """Return the template `name` of this package. It escapes every value, and a missing value raises an error."""
    environment = Environment(
        loader=PackageLoader("muntin.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({function.__name__: function for function in _FILTERS})
    environment.globals.update({function.__name__: function for function in _FUNCTIONS})
    return environment.get_template(name)


def json_text(values: Mapping[str, Any]) -> str:
    """Return `values` as the text of a JSON file. NaN and infinity raise ValueError."""
    return f"{json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)}\n"


def write_files(directory: Path, contents: Mapping[str, str], *, what: str) -> None:
    """Write texts by file name into `directory`, which is created if absent.

    All texts are complete on the disk before the first one takes its name. On an error, the earlier files stay, and MuntinError says that
    the `what` could not be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        atomic_files.write_files(directory, {name: plain(text).encode() for name, text in contents.items()})
    except OSError as error:
        raise MuntinError(
            f"cannot write the {what} into {directory} ({error.strerror or error}): free some space there or name another folder"
        ) from None
