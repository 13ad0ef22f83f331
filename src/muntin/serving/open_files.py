"""Raises the limit of open files: a connection is one, and its unread answer two."""

from __future__ import annotations

from contextlib import suppress

from muntin.serving.config import ServeConfig
from muntin.serving.http.listener import SPARE

_ANSWER = 2
"""Open files of an unread answer: shared memory, and its mapping."""
_OTHERS = 64
"""Open files beside the connections."""


def raise_descriptors(config: ServeConfig) -> str:
    """Raise the limit to the system's maximum. Returns a warning if that is too low for the settings, or ""."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return ""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    protocols = 1 if config.grpc_port is None else 2
    needed = (1 + _ANSWER) * protocols * config.bounds.connections + SPARE + _OTHERS
    for most in (hard, needed):  # macOS allows less than it says
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
            break
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return ""
    return (
        f"this process may have {soft:,} open files, and --max-connections {config.bounds.connections} wants {needed:,}: "
        "connections beyond them wait; raise the limit (ulimit -Hn), or lower --max-connections"
    )
