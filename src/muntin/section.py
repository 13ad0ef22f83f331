"""The base class of a recipe's sections."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidatorFunctionWrapHandler, field_validator


class Section(BaseModel):
    """A frozen section without unknown keys, in which a boolean is no number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="wrap")
    @classmethod
    def _refuse_boolean_for_number(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        checked = check(value)
        pairs = zip(value, checked, strict=False) if isinstance(value, list) and isinstance(checked, tuple) else [(value, checked)]
        if any(isinstance(given, bool) and not isinstance(taken, bool) for given, taken in pairs):
            raise ValueError("a number is required, and YAML reads yes, no, on and off as true or false")
        return checked
