"""The shape of `profile.json`: where the time of one artefact goes, kernel by kernel, against what its machine can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from muntin.reporting.records import Amount, Count, Hardware, Moment, Record, Text, parse_record, unique

FORMAT = 1

Positive = Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(ge=1)]


class ProfiledArtifact(Record):
    """The artefact that ran: its folder, all its bytes on the disk, and the digest of its model."""

    path: str
    bytes: Count
    sha256: str


class Ceilings(Record):
    """What the machine was measured to reach: multiply-adds by precision in 10⁹ a second (GMAC/s), and copying in 10⁹ bytes a second."""

    gmacs: dict[str, Positive]
    copy_gb_s: Positive


class KernelRow(Record):
    """One kernel that the engine ran, in execution order; `name` is the engine's own, `layer` the node of the model, null if there is none.

    `share` is of the profiled time; `bytes` are those read and written; `attainable_ms` is the least time that the ceilings allow, and
    `ceiling_share` its part of the measured one (above 1 where data came from a cache). Null: not known.
    """

    name: str
    kind: str
    implementation: str
    precision: str
    compute: bool
    layer: str | None
    ms: Amount
    share: Amount
    macs: Count | None
    bytes: Count | None
    attainable_ms: Amount | None
    ceiling_share: Amount | None


class KindRow(Record):
    """All kernels of one kind; `share` is of the profiled time. One of no kernels is the time between them."""

    kind: str
    ms: Amount
    share: Amount
    count: Count


class Finding(Record):
    """What could be won, in words; `saves_ms` is an estimate of at most how much, null where there is none."""

    kind: str
    words: Text
    saves_ms: Amount | None


class Profile(Record):
    """A whole profile. `shape` is (B, H, W): images, rows, columns.

    `whole_ms` is one call undisturbed, `profiled_ms` one with every kernel timed, `kernels_ms` what the kernels of that add up to.
    """

    format: Literal[1] = 1
    title: Text
    created: Moment
    muntin: Text
    hardware: Hardware
    artifact: ProfiledArtifact
    engine: Text
    precision: Text
    threads: Size
    shape: tuple[Size, Size, Size]
    rounds: Size
    whole_ms: Positive
    profiled_ms: Positive
    kernels_ms: Amount
    ceilings: Ceilings
    kernels: Annotated[tuple[KernelRow, ...], Field(min_length=1)]
    kinds: tuple[KindRow, ...]
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        unique("kinds", [row.kind for row in self.kinds])
        missing = sorted({kernel.kind for kernel in self.kernels} - {row.kind for row in self.kinds})
        if missing:
            raise ValueError(f"kinds lacks {missing[0]!r}, which a kernel has; kinds holds every kind of the kernels")
        return self


def parse_profile(profile: Profile | Mapping[str, Any]) -> Profile:
    """The profile as checked values.

    Raises MuntinError, in one line, with the place of the first mistake, what is allowed there and how many more mistakes there are.
    """
    return parse_record(Profile, profile, what="profile", newest=FORMAT)


def profile_values(profile: Profile) -> dict[str, Any]:
    """The profile as plain values for `profile.json`, in the schema's order."""
    return profile.model_dump(mode="json")
