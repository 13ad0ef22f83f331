"""The parts that report and profile files share, and the one-line error for a file that does not fit its schema.

Measured values are finite numbers or null. NaN is refused, because it shows a bug in the measurement.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from muntin.errors import MuntinError


def _iso(moment: str) -> str:
    try:
        datetime.fromisoformat(moment)
    except ValueError:
        raise ValueError("a moment is written as in 2026-11-24T16:30:00+00:00 (ISO 8601)") from None
    return moment


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveCount = Annotated[int, Field(ge=1)]
IsoTime = Annotated[str, AfterValidator(_iso)]


class Record(BaseModel):
    """A part of a file: frozen, without unknown keys, without NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Hardware(Record):
    """The machine and the software versions of a measurement. Keys beyond these four are free: plain values, or names in a list.

    `memory_gib` is null where the system does not report it.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, str | int | float | bool | list[str] | None]

    cpu: Text
    cores: PositiveCount
    memory_gib: Amount | None
    features: tuple[str, ...]


AnyRecord = TypeVar("AnyRecord", bound=Record)


def parse_record(record: type[AnyRecord], values: AnyRecord | Mapping[str, Any], *, what: str, newest: int) -> AnyRecord:
    """Return `values` as a checked `record`; `what` names its kind of file in errors, `newest` is the highest format that can be read.

    Raises MuntinError, one line: the place of the first mistake, the values allowed at that place and the number of other mistakes.
    """
    if isinstance(values, record):
        return values
    if not isinstance(values, Mapping):
        raise MuntinError(f"a {what} is an object with the keys {', '.join(record.model_fields)}; this one is a {type(values).__name__}")
    version = values.get("format", newest)
    if isinstance(version, int) and version > newest:
        raise MuntinError(f"{what} format {version} is newer than this muntin reads ({newest}): upgrade muntin")
    try:
        return record.model_validate(dict(values))
    except ValidationError as error:
        raise MuntinError(_one_line(error, record, what)) from None


def check_unique(where: str, names: list[str]) -> None:
    """Raise ValueError if a name occurs twice in `names`, the names at `where`."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{where} holds the name {repeated[0]!r} twice; names are unique")


def _one_line(error: ValidationError, record: type[BaseModel], what: str) -> str:
    mistakes = error.errors(include_url=False)
    first, more = mistakes[0], len(mistakes) - 1
    location, value = first["loc"], _short(first["input"])
    place = _place(location) or f"the {what}"
    if first["type"] == "missing":
        text = f"{place} is missing"
    elif first["type"] == "extra_forbidden":
        allowed = list(_record_at(record, location[:-1]).model_fields)
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed here: {', '.join(allowed)}"
        text = f"{place} is an unknown key; {hint}"
    elif first["type"] == "finite_number":
        text = f"{place} is {value}; a {what} holds finite numbers only, and null for what was not measured"
    elif first["type"] == "value_error" and not location:
        text = first["msg"].removeprefix("Value error, ")
    else:
        reason = first["msg"].removeprefix("Value error, ")
        text = f"{place} is {value}; {reason[:1].lower()}{reason[1:]}"
    suffix = f" (and {more} more)" if more else ""
    return " ".join(f"the {what} does not fit: {text}{suffix}".split())


def _place(location: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" if part.isidentifier() else f"[{part!r}]" for part in location]
    return "".join(parts).removeprefix(".")


def _record_at(record: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    for part in location:
        if isinstance(part, str) and part in record.model_fields:
            record = _record_in(record.model_fields[part].annotation) or record
    return record


def _record_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((record for part in get_args(annotation) if (record := _record_in(part))), None)


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
