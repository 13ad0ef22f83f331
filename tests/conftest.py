"""What all tests share: a cache of their own, no lines of progress, the marks of slow tests, and fixtures of tiny data (`scenes`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import products
import scenes
from muntin.runtime import describe_hardware
from muntin.runtime.host.hardware import disabled_features
from muntin.runtime.verification.exactness import sums_saturate
from ray_cluster import cluster
from scenes import Tiny

settings.register_profile("muntin", deadline=None)  # what a machine is busy with beside is no failure
settings.load_profile("muntin")
LONG_S = 3.0
"""Seconds from which a test that has no mark is named at the end of a run."""


SLOW = (
    *("budgeting", "cli/test_compress.py", "cli/test_export.py", "cli/updating", "compression/test_stages.py", "deployment", "end_to_end"),
    *("runtime/bulk/test_on_ray.py", "searching", "training/distributed", "training/memory", "training/recovery", "training/test_loop.py"),
    "updating",
)
"""Folders and files whose tests train, compress or export almost everywhere: all are marked `slow`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `SLOW`. Files with slow tests come first, so that no process ends long after the others."""
    places = [Path(__file__).parent / name for name in SLOW]
    for item in items:
        if any(item.path.is_relative_to(place) for place in places):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the tests without the mark `slow` that took long. It fails nothing: other work on the machine may be the reason."""
    long = [
        (report.duration, report.nodeid)
        for report in terminalreporter.stats.get("passed", [])
        if report.duration > LONG_S and not {"slow", "soak"} & set(report.keywords)
    ]
    if long:
        terminalreporter.section(f"tests above {LONG_S:g} s without the mark `slow`")
        for duration, name in sorted(long, reverse=True):
            terminalreporter.write_line(f"{duration:.1f} s  {name}")


@pytest.fixture(scope="session")
def dot_products() -> None:
    """Skips a test on a CPU without exact 8-bit dot products (VNNI, AMX, dotprod), where weights have 7 bits."""
    if sums_saturate() or not {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"} & set(describe_hardware()["features"]):
        pytest.skip("this CPU has no 8-bit dot products")


@pytest.fixture(scope="session")
def group_norms() -> None:
    """Skips a test where `ONEDNN_MAX_CPU_ISA` disables AVX-512 on a CPU that has it: OpenVINO's group norm of free sizes crashes then."""
    if "avx512f" in disabled_features():
        pytest.skip("OpenVINO's group norm crashes with this ONEDNN_MAX_CPU_ISA")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What engines compile here does not go to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUNTIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_progress_lines() -> Iterator[None]:
    """A command prints no line of progress, however slow this machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("muntin.progress.FIRST_S", 3600.0)
        yield


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Of a Ray cluster of one node with two cores, which all tests share: its start takes seconds."""
    with cluster() as address:
        yield address


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.fixture(scope="session")
def signal_stack() -> Callable[[], tuple[int, int]]:
    """`signal_stack()`: address and flags of this thread's alternate signal stack; flags 2: there is none. Linux only."""

    def read() -> tuple[int, int]:
        stack = _Stack()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
        return stack.sp or 0, stack.flags

    return read


@pytest.fixture(scope="session", autouse=True)
def unchanged_products() -> Iterator[None]:
    """Fails a run of tests that change what all share."""
    yield
    products.check()


@pytest.fixture(scope="session")
def write_tiny() -> Callable[..., Tiny]:
    """`write_tiny(root, **sections)`: files in `root`, and a recipe whose sections are updated."""
    return scenes.write_tiny


@pytest.fixture(scope="session")
def write_scenes() -> Callable[[Path, str, int, int], None]:
    """`write_scenes(folder, name, count, seed)`: scenes in `images` and their masks in `masks`."""
    return scenes.write_scenes


@pytest.fixture
def tiny(tmp_path: Path, write_tiny: Callable[..., Tiny]) -> Tiny:
    """A data set and a recipe of this test's own."""
    return write_tiny(tmp_path / "data")
