"""Facts about this machine and its installed packages. A value that the system does not tell is None. Nothing heavy is imported: torch and
other packages are looked up by name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muntin.errors import install
from muntin.runtime.host import quiet_imports
from muntin.runtime.host.hardware import (
    affinity,
    available_memory_gib,
    cpu_governors,
    cpu_quota,
    describe_hardware,
    memory_limit_gib,
    numa_nodes,
    physical_cores,
    usable_cores,
)
from muntin.runtime.verification.exactness import provider_starts

GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
GPU_INSTALL = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A feature that CPUs may have, and what its presence or absence means."""

    name: str
    present: bool
    meaning: str


@dataclass(frozen=True, kw_only=True)
class InstalledEngine:
    """An engine. `version`: None where it is missing or cannot be loaded; `error` says why. `providers`: of this ONNX Runtime."""

    name: str
    version: str | None
    providers: tuple[str, ...]
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Extra:
    """An extra of muntin: its packages that are not installed, and the command that installs them."""

    name: str
    missing: tuple[str, ...]
    install: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Resources of this process. `cpus`: all of the machine; `cores`, `physical_cores`: the usable ones. `cpu_quota` (cores' worth of CPU
    time), `memory_limit_gib`: a container's limits, None without. `features`, `governors`: empty where the system does not tell."""

    cpu: str
    features: tuple[Feature, ...]
    cpus: int
    cores: int
    physical_cores: int
    affinity: tuple[int, ...]
    cpu_quota: float | None
    memory_gib: float | None
    memory_limit_gib: float | None
    available_gib: float | None
    numa_nodes: int
    governors: tuple[str, ...]
    nvidia: bool
    os: str
    python: str


# Name, flags of which one suffices, meaning of presence, meaning of absence
_X86 = (
    ("AMX", {"amx_int8", "amx_bf16"}, "INT8 and BF16 on tile units", "INT8 and BF16 run on vector units, several times slower"),
    ("VNNI", {"avx512_vnni", "avx_vnni"}, "INT8 sums in 32 bits: fast, exact", "INT8 sums of u8 x s8 may saturate in 16 bits: wrong"),
    ("AVX512-BF16", {"avx512_bf16", "amx_bf16"}, "16-bit layers in BF16, by CPU faster or slower", "16-bit layers run in FP32"),
    ("AVX-512", {"avx512f"}, "vectors of 512 bits", "vectors of 256 bits: about half the speed"),
    ("AVX2", {"avx2"}, "vectors of 256 bits", "old kernels of 128 bits, several times slower"),
)
_ARM = (
    ("I8MM", {"i8mm"}, "INT8 matrix products", "no INT8 matrix products: INT8 at half the speed or less"),
    ("DotProd", {"asimddp"}, "INT8 sums in 32 bits", "INT8 sums step by step: hardly faster than FP32"),
    ("BF16", {"bf16"}, "16-bit layers in BF16", "16-bit layers run in FP16 or FP32"),
    ("SVE", {"sve"}, "long vectors", "vectors of 128 bits"),
)


def read_machine() -> Machine:
    """Reads the resources of this process."""
    described = describe_hardware()
    return Machine(
        cpu=described["cpu"],
        features=explain_features(described["features"], platform.machine()),
        cpus=os.cpu_count() or 1,
        cores=usable_cores(),
        physical_cores=physical_cores(),
        affinity=tuple(sorted(affinity())),
        cpu_quota=cpu_quota(),
        memory_gib=described["memory_gib"],
        memory_limit_gib=memory_limit_gib(),
        available_gib=available_memory_gib(),
        numa_nodes=numa_nodes(),
        governors=cpu_governors(),
        nvidia=Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None,
        os=described["os"],
        python=described["python"],
    )


def explain_features(flags: Sequence[str], architecture: str) -> tuple[Feature, ...]:
    """Explains a CPU's flags; empty without flags."""
    known = _ARM if architecture.lower() in ("aarch64", "arm64") else _X86
    if not flags:
        return ()
    return tuple(
        Feature(name=name, present=(present := not any_of.isdisjoint(flags)), meaning=presence if present else absence)
        for name, any_of, presence, absence in known
    )


def find_engine(name: str) -> InstalledEngine:
    """Imports an engine's library, in a few tenths of a second, and reads its version."""
    try:
        library: Any = getattr(quiet_imports, name)
    except ModuleNotFoundError as error:
        return InstalledEngine(name=name, version=None, providers=(), error=f"not installed: pip install {error.name}")
    except (ImportError, OSError) as error:
        return InstalledEngine(name=name, version=None, providers=(), error=f"cannot be loaded: {' '.join(str(error).split())}")
    providers = tuple(library.get_available_providers()) if name == "onnxruntime" else ()
    return InstalledEngine(name=name, version=str(library.__version__).partition("-")[0], providers=providers, error=None)


def cuda_starts(machine: Machine, engines: Sequence[InstalledEngine]) -> bool | None:
    """Tries ONNX Runtime's CUDA provider; None without a GPU's driver or the provider."""
    has_provider = any(GPU_PROVIDERS[0] in engine.providers for engine in engines)
    return provider_starts(GPU_PROVIDERS[0]) if machine.nvidia and has_provider else None


def find_extras(requirements: Sequence[str], installed: frozenset[str]) -> tuple[Extra, ...]:
    """Muntin's extras for users and their missing packages, from the requirements in its metadata."""
    needed: dict[str, list[str]] = {}
    for requirement in requirements:
        name, extra = re.match(r"[\w.-]+", requirement), re.search(r"""extra == ["']([\w-]+)["']""", requirement)
        if name and extra and extra[1] != "dev":
            needed.setdefault(extra[1], []).append(_canonical(name[0]))
    return tuple(
        Extra(
            name=name,
            missing=(missing := tuple(sorted(package for package in set(packages) if package not in installed))),
            install=GPU_INSTALL if "onnxruntime-gpu" in missing else install(name),
        )
        for name, packages in sorted(needed.items())
    )


def requirements() -> list[str]:
    """Requirements in muntin's metadata."""
    try:
        return importlib.metadata.requires("muntin") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def distributions() -> frozenset[str]:
    """Names of the installed packages. A folder left by a broken uninstall has metadata without a name."""
    return frozenset(_canonical(name) for package in importlib.metadata.distributions() if (name := package.metadata["Name"]))


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def package_version(package: str) -> str | None:
    """An installed package's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
