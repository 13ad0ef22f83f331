"""Hardware that this process may use, for reports and for the number of an engine's threads.

Without /proc and /sys the values come from `platform` and `os`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Any

ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that keep oneDNN, and so OpenVINO, from using all features of the CPU."""
_AVX512 = {"avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}
_DISABLED = {
    "SSE41": {"avx2", "avx_vnni", *_AVX512},
    "AVX": {"avx2", "avx_vnni", *_AVX512},
    "AVX2": {"avx_vnni", *_AVX512},
    "AVX2_VNNI": _AVX512,
    "AVX512_CORE": {"avx_vnni", *_AVX512} - {"avx512f"},
    "AVX512_CORE_VNNI": _AVX512 - {"avx512f", "avx512_vnni"},
}
"""Features that each of the variables' values disables."""
# Flags that decide on an engine's kernels, of x86 ("flags") and ARM ("Features").
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
PACKAGES = ("numpy", "openvino", "onnxruntime", "onnx")


def describe_hardware() -> dict[str, Any]:
    """CPU, cores, memory and features of this process (without those that `ISA_LIMITS` disable), versions of libraries that compute.

    `cores`: usable logical cores (affinity and a container's quota considered); `physical_cores`: without hyper-threads; `memory_gib`: the
    smaller of the machine's memory and a container's limit, None where unknown. Missing packages are left out, and torch and its `gpus`
    unless torch is imported already.
    """
    cpuinfo = _text(Path("/proc/cpuinfo"))
    described: dict[str, Any] = {
        "cpu": cpu_model(cpuinfo),
        "cores": usable_cores(),
        "physical_cores": physical_cores(),
        "memory_gib": memory_gib(),
        "features": [feature for feature in cpu_features(cpuinfo) if feature not in disabled_features()],
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    for name in (*PACKAGES, "onnxruntime-gpu"):  # the latter contains onnxruntime's modules
        with suppress(importlib.metadata.PackageNotFoundError):
            described.setdefault(name.removesuffix("-gpu"), importlib.metadata.version(name))
    if torch := sys.modules.get("torch"):
        described["torch"] = str(torch.__version__)
        if torch.cuda.is_available():
            described["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return described


def cpu_model(cpuinfo: str) -> str:
    """The CPU's name in the text of /proc/cpuinfo, or as Python knows it."""
    match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """The entries of `FEATURES` that the text of /proc/cpuinfo lists, in that order."""
    flags = _cpu_flags(cpuinfo)
    return tuple(feature for feature in FEATURES if feature in flags)


def cpu_identity() -> str:
    """Name and all feature flags of the CPU, and the environment's limits on them, in one line: compiled code depends on these."""
    cpuinfo = _text(Path("/proc/cpuinfo"))
    limits = "".join(f" {name}={value}" for name in ISA_LIMITS if (value := os.environ.get(name)))
    return f"{cpu_model(cpuinfo)} {' '.join(sorted(_cpu_flags(cpuinfo)))}{limits}"


def _cpu_flags(cpuinfo: str) -> set[str]:
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return set(match[1].split()) if match else set()


def disabled_features() -> set[str]:
    """Features of the CPU that the environment keeps oneDNN from using."""
    return {feature for name in ISA_LIMITS for feature in _DISABLED.get(os.environ.get(name, "").upper(), ())}


def usable_cores() -> int:
    """Logical cores that this process may use: its affinity, and a container's CPU quota rounded up."""
    quota = cpu_quota()
    return len(affinity()) if quota is None else max(1, min(len(affinity()), ceil(quota)))


def physical_cores() -> int:
    """Physical cores among the usable ones: the best number of threads for an engine."""
    siblings = {_text(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) or str(cpu) for cpu in affinity()}
    return min(len(siblings), usable_cores())


def memory_gib() -> float | None:
    """Memory that this process may use, in GiB; None where unknown."""
    sizes = [size for size in (_memory_limit(), _machine_memory()) if size is not None]
    return round(min(sizes) / 2**30, 2) if sizes else None


def memory_limit_gib() -> float | None:
    """A container's memory limit, in GiB; None without one below the machine's memory."""
    limit, machine = _memory_limit(), _machine_memory()
    return None if limit is None or (machine is not None and limit >= machine) else round(limit / 2**30, 2)


def available_memory_gib() -> float | None:
    """The machine's memory that is available without swapping, in GiB; None where unknown."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", _text(Path("/proc/meminfo")), re.MULTILINE)
    return round(int(match[1]) / 2**20, 2) if match else None


def cpu_governors() -> tuple[str, ...]:
    """Frequency governors of our CPUs ("performance", "powersave", ...), each once; empty where unknown."""
    files = (Path(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor") for cpu in affinity())
    return tuple(sorted({text for file in files if (text := _text(file))}))


def numa_nodes() -> int:
    """Number of NUMA nodes of our CPUs; 1 where unknown."""
    ours = affinity()
    lists = (_text(file) for file in Path("/sys/devices/system/node").glob("node[0-9]*/cpulist"))
    return max(1, sum(bool(parse_cpus(text) & ours) for text in lists))


def last_level_cache() -> int | None:
    """Bytes of the outermost caches of our CPUs, each counted once; None where unknown."""
    sizes: dict[str, int] = {}
    for cpu in affinity():
        levels = Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*")
        outermost = max(levels, key=lambda folder: int(_text(folder / "level") or 0), default=None)
        match = None if outermost is None else re.fullmatch(r"(\d+)([KM]?)", _text(outermost / "size"))
        if outermost is not None and match:
            sizes[_text(outermost / "shared_cpu_list") or str(cpu)] = int(match[1]) << {"": 0, "K": 10, "M": 20}[match[2]]
    return sum(sizes.values()) or None


def parse_cpus(text: str) -> set[int]:
    """CPU numbers in Linux's list format: "0-2,8" is 0, 1, 2 and 8."""
    ranges = (part.partition("-") for part in text.split(",") if part)
    return {cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)}


def affinity() -> set[int]:
    """Numbers of the logical CPUs that this thread and its child threads may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def cpu_quota() -> float | None:
    """A container's limit of CPU time, in cores' worth; None without a limit."""
    quotas = []
    for text in _cgroup_values("cpu", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"):
        quota, _, period = text.partition(" ")
        if quota.isdigit():  # "max" in version 2 and -1 in version 1: no limit
            quotas.append(int(quota) / int(period or 100_000))
    return min(quotas, default=None)


def _memory_limit() -> int | None:
    return min((int(text) for text in _cgroup_values("memory", "memory.max", "memory.limit_in_bytes") if text.isdigit()), default=None)


def _machine_memory() -> int | None:
    with suppress(AttributeError, ValueError, OSError):  # names that sysconf has on POSIX only
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _cgroup_values(controller: str, unified: str, *legacy: str) -> Iterator[str]:
    """A limit's text in this process's control group and all its parents, in version 2 and in version 1 (there from several files)."""
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / (controller if controllers else "")
        folder = root / group.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            if text := " ".join(filter(None, (_text(place / name) for name in (legacy if controllers else (unified,))))):
                yield text


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
