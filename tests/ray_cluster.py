"""A Ray cluster of one node for the tests, and its processes. Linux only."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # read when Ray is imported
ON_LINUX = Path("/proc/self/stat").exists()


@contextmanager
def restored_signals() -> Iterator[None]:
    """Put the handlers back that Ray replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def cluster() -> Iterator[str]:
    """The address of a cluster of one node with two cores, on loopback, which needs a token: replicas of Serve listen on all interfaces."""
    from ray.cluster_utils import Cluster

    with restored_signals():
        node = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 << 20}
        started = Cluster(initialize_head=True, head_node_args=node)
        try:
            yield started.address
        finally:
            started.shutdown()


def processes(title: str) -> Iterator[int]:
    """Yield Ray's processes whose title begins so, and that descend from this process."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(title.encode()):
                ancestor = int(folder.name)
                while ancestor > 1:
                    ancestor = _parent(ancestor)
                    if ancestor == os.getpid():
                        yield int(folder.name)
        except OSError:  # it has ended
            continue


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
