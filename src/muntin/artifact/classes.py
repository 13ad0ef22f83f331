"""The classes of a task."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Channel8 = Annotated[int, Field(ge=0, le=255)]


class ClassInfo(BaseModel):
    """One class: name and colour (red, green, blue; 0-255)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    color: tuple[Channel8, Channel8, Channel8]
