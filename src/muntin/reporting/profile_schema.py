"""The schema of `profile.json`: the time of each kernel of an artefact, and the measured ceilings of its machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from muntin.reporting.records import Amount, Count, Hardware, IsoTime, PositiveCount, Record, Text, check_unique, parse_record
from muntin.runtime.profiling.contention import BUSY

FORMAT = 1

Positive = Annotated[float, Field(gt=0)]


class ProfiledArtifact(Record):
    """The artefact that ran: its folder, its size on the disk in bytes, and the digest of its model."""

    path: str
    bytes: Count
    sha256: str


class CeilingsRecord(Record):
    """The measured limits of the machine: multiply-adds by precision in 10⁹ a second (GMAC/s), and copying in 10⁹ bytes a second."""

    gmacs: dict[str, Positive]
    copy_gb_s: Positive


class KernelRow(Record):
    """One kernel that the engine ran, in execution order; `name` is the engine's, `layer` the node of the model or null.

    `share` is of the profiled time; `bytes` are read and written; `attainable_ms` is the least time that the ceilings allow, and
    `ceiling_share` its share of the measured time (above 1 where the data came from a cache). Null: not known.
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

    @property
    def macs_per_byte(self) -> float | None:
        """Multiply-adds for each byte moved; None where either is unknown or zero."""
        return self.macs / self.bytes if self.macs and self.bytes else None

    @property
    def gmac_s(self) -> float | None:
        """Speed in 10⁹ multiply-adds a second; None without multiply-adds, or where the engine's clock showed no time."""
        return self.macs / self.ms / 1e6 if self.macs and self.ms else None


class KindRow(Record):
    """All kernels of one kind; `share` is of the profiled time. A kind with a count of 0 is the time between kernels."""

    kind: str
    ms: Amount
    share: Amount
    count: Count


class FindingRecord(Record):
    """A possible saving in words; `saves_ms` is an estimate of its upper bound, null without an estimate."""

    kind: str
    words: Text
    saves_ms: Amount | None


class ProfileRecord(Record):
    """A whole profile. `shape` is (B, H, W): images, rows, columns; null for named tensors, of which `dims` are the free sizes.

    `whole_ms` is a call without counters, `profiled_ms` a call with every kernel timed, `kernels_ms` the sum of its kernels. `others`:
    cores' worth of CPU time that other processes used meanwhile; null where unknown.
    """

    format: Literal[1] = 1
    title: Text
    created: IsoTime
    muntin: Text
    hardware: Hardware
    artifact: ProfiledArtifact
    engine: Text
    precision: Text
    threads: PositiveCount
    shape: tuple[PositiveCount, PositiveCount, PositiveCount] | None = None
    dims: dict[str, PositiveCount] | None = None
    rounds: PositiveCount
    whole_ms: Positive
    profiled_ms: Positive
    kernels_ms: Amount
    others: Amount | None = None
    ceilings: CeilingsRecord
    kernels: Annotated[tuple[KernelRow, ...], Field(min_length=1)]
    kinds: tuple[KindRow, ...]
    findings: tuple[FindingRecord, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def disturbed(self) -> bool:
        """Return whether other processes used so much of the CPUs that times are too long."""
        return self.others is not None and self.others >= BUSY

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_unique("kinds", [row.kind for row in self.kinds])
        missing = sorted({kernel.kind for kernel in self.kernels} - {row.kind for row in self.kinds})
        if missing:
            raise ValueError(f"kinds lacks {missing[0]!r}, which a kernel has; kinds holds every kind of the kernels")
        return self


def parse_profile(profile: ProfileRecord | Mapping[str, Any]) -> ProfileRecord:
    """Return the profile as checked values.

    Raises MuntinError, one line: the place of the first mistake, the values allowed at that place and the number of other mistakes.
    """
    return parse_record(ProfileRecord, profile, what="profile", newest=FORMAT)
