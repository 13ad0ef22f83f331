"""How many files a process may have open: each connection is one, and an answer that it has not read is two."""

from __future__ import annotations

from contextlib import suppress

from muntin.serving.config import ServeConfig
from muntin.serving.http.listener import SPARE

_ANSWER = 2
"""Memory that the engine's process writes to: a file, and Python's copy of it for the mapping."""
_OTHERS = 64
"""Open files beside the connections: libraries, the artefact, what is loaded meanwhile."""


def raise_descriptors(config: ServeConfig) -> str:
    """Lets this process have as many open files as the system allows it. Says where those are too few for what a server is told."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return ""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    faces = 1 if config.grpc_port is None else 2
    wanted = (1 + _ANSWER) * faces * config.bounds.connections + SPARE + _OTHERS
    for most in (hard, wanted):  # the latter where the system allows less than it says, as macOS does
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
            break
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return ""
    return (
        f"this process may have {soft:,} open files, and --max-connections {config.bounds.connections} wants {wanted:,}: "
        "connections beyond them wait; raise the limit (ulimit -Hn), or lower --max-connections"
    )
