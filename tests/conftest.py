"""A tiny data set of real files and a recipe for it, for the tests that train, export or call the command line."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import settings

from muntin.images import write_image
from muntin.runtime import describe_hardware
from muntin.runtime.host.hardware import disabled_features
from muntin.runtime.verification.exactness import sums_saturate
from ray_cluster import cluster

CLASSES = ({"name": "sea", "color": [0, 0, 200]}, {"name": "field", "color": [0, 160, 0]}, {"name": "roof", "color": [200, 60, 0]})
SMALL = {"stem": [8, 8, 16], "dims": [32, 32], "depths": [1, 1], "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "pairs": [1, 1]}
settings.register_profile("muntin", deadline=None)  # what a machine is busy with beside is no failure
settings.load_profile("muntin")
COUNTS = {"train": 4, "validation": 2, "test": 2}
LONG_S = 3.0
"""Seconds from which a test that has no mark is named at the end of a run."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process ends long after the others."""
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


@dataclass(frozen=True)
class Tiny:
    """Where the pictures and the recipe lie, and the recipe as plain values."""

    root: Path
    recipe: Path
    content: dict[str, Any]


def write_scene(image: Path, mask: Path, seed: int, side: int = 48) -> None:
    """A picture of three noisy colours in rectangles, and its mask with an ignored edge."""
    generator = np.random.default_rng(seed)
    labels = np.zeros((side, side), np.uint8)
    for label in (1, 2):
        top, left = generator.integers(0, side - 24, 2)
        labels[top : top + 24, left : left + 24] = label
    colors = np.array([entry["color"] for entry in CLASSES])[labels]
    write_image(image, np.clip(colors + generator.normal(0, 20, colors.shape), 0, 255).astype(np.uint8))
    labels[0] = 255
    write_image(mask, labels)


def segment_content() -> dict[str, Any]:
    def folders(split: str) -> dict[str, str]:
        return {"images": f"{split}/images", "masks": f"{split}/masks"}

    data = {"source": "folders", **folders("train"), "validation": folders("validation"), "test": folders("test"), "classes": list(CLASSES)}
    training = {"steps": 6, "batch_size": 2, "learning_rate": 0.002, "validate_every": 3, "checkpoint_every": 3, "threads": 1}
    return {
        "name": "tiny",
        "data": {**data, "crop": 32},
        "model": {"name": "hybrid-xs", "options": SMALL},
        "training": training,
        "quantization": {"calibration_images": 4},
    }


@pytest.fixture(scope="session")
def write_tiny() -> Callable[..., Tiny]:
    """`write_tiny(root, **sections)`: files in `root`, and a recipe whose sections are updated."""

    def write(root: Path, **sections: Any) -> Tiny:
        for split, count in COUNTS.items():
            for kind in ("images", "masks"):
                (root / split / kind).mkdir(parents=True)
            for number in range(count):
                name = f"{split}-{number}.png"
                write_scene(root / split / "images" / name, root / split / "masks" / name, seed=len(split) * 100 + number)
        content = segment_content()
        for section, values in sections.items():
            content[section] = content.get(section, {}) | values if isinstance(values, dict) else values
        recipe = root / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
        return Tiny(root, recipe, content)

    return write


@pytest.fixture(scope="session")
def write_scenes() -> Callable[[Path, str, int, int], None]:
    """`write_scenes(folder, name, count, seed)`: scenes in `images` and their masks in `masks`."""

    def write(folder: Path, name: str, count: int, seed: int) -> None:
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            file = f"{name}-{number}.png"
            write_scene(folder / "images" / file, folder / "masks" / file, seed + number)

    return write


@pytest.fixture
def tiny(tmp_path: Path, write_tiny: Callable[..., Tiny]) -> Tiny:
    """A data set and a recipe of this test's own."""
    return write_tiny(tmp_path / "data")
