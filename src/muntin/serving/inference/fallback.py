"""Compute with a version, or with another one where that fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from math import inf
from typing import TypeVar

from muntin.errors import DataError
from muntin.runtime.session import Session
from muntin.serving.versions.slot import Slot
from muntin.serving.versions.version import Begun, Version
from muntin.serving.worker.calls import Call

T = TypeVar("T")


def compute_somewhere(
    slot: Slot,
    version: Version,
    work: Callable[[Session], T],
    *,
    rows: int,
    call: Call | None = None,
    within: float = inf,
    whole: Callable[[T], bool] = lambda answer: True,
) -> tuple[T, Version]:
    """Return `work(session)` of a leased version, or of another one if that fails or hangs; and the version that computed it.

    The slot counts it (`Slot.observe`). A failure counts against a version only if another one computes the same: an image that no version
    can compute must not send a version back. An OSError never counts: this process may open no more files then. `within`: as of
    `Slot.begin`. `whole`: returns True for an answer of one call. Raises the first error of `work`; a DataError at once.
    """
    failures: list[tuple[Begun, Exception]] = []

    def count(failures: list[tuple[Begun, Exception]]) -> None:
        for begun, error in failures:
            if not isinstance(error, OSError):
                slot.observe(begun.version, rows=rows, error=error, call=call, begun=begun)

    try:
        with ExitStack() as leases:
            while (slot.hangs(version) or version.state == "failed") and (lease := slot.fallback(version)) is not None:
                version = leases.enter_context(lease).version
            while True:
                begun = slot.begin(version, rows=rows, within=within)
                try:
                    answer = work(version.session)
                except DataError:
                    raise
                except Exception as error:  # noqa: BLE001 - it is raised below if no other version computes it
                    failures.append((begun, error))
                else:
                    slot.observe(version, seconds=slot.clock() - begun.at, rows=rows, call=call, begun=begun, whole=whole(answer))
                    count(failures)
                    return answer, version
                finally:
                    slot.end(begun)
                lease = slot.fallback(version)
                if lease is None:
                    break
                version = leases.enter_context(lease).version
        count(failures[-1:])
        raise failures[0][1]
    finally:
        failures.clear()  # an error holds this frame, and with it the inputs
