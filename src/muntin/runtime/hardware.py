"""What this process may use of the machine: for reports, and for the number of threads an engine gets.

Plain values, read and never assumed. Where a system does not say (no /proc, no /sys), what `platform` and `os` know is given.
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
"""Variables of the environment that keep oneDNN, and so OpenVINO, from using all that the CPU has."""
# The flags that decide which kernels an engine has, under one name for both families of CPUs (x86 "flags", ARM "Features").
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
    """CPU, cores, memory and features that this process has, and the versions of what computes.

    `cores` are the logical cores it may run on (affinity and a container's quota considered), `physical_cores` those without
    hyper-threads; `memory_gib` is the machine's or the container's limit, whichever is less, None where unknown. A package that is not
    installed is left out, and so are torch and the `gpus` that it may use unless it is loaded already.
    """
    cpuinfo = _text(Path("/proc/cpuinfo"))
    described: dict[str, Any] = {
        "cpu": cpu_model(cpuinfo) or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "physical_cores": physical_cores(),
        "memory_gib": memory_gib(),
        "features": list(cpu_features(cpuinfo)),
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    for name in (*PACKAGES, "onnxruntime-gpu"):  # the latter in place of onnxruntime, whose modules it has
        with suppress(importlib.metadata.PackageNotFoundError):
            described.setdefault(name.removesuffix("-gpu"), importlib.metadata.version(name))
    if torch := sys.modules.get("torch"):
        described["torch"] = str(torch.__version__)
        if torch.cuda.is_available():
            described["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return described


def cpu_model(cpuinfo: str) -> str:
    """The CPU's name in the text of /proc/cpuinfo; empty when it has none."""
    match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match[1].strip() if match else ""


def cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """Those of `FEATURES` that the text of /proc/cpuinfo lists, in that order."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    return tuple(feature for feature in FEATURES if feature in flags)


def cpu_identity() -> str:
    """Name and all feature flags of the CPU, and what the environment leaves of them, one line: what code that was compiled for it depends
    on."""
    cpuinfo = _text(Path("/proc/cpuinfo"))
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    limits = "".join(f" {name}={value}" for name in ISA_LIMITS if (value := os.environ.get(name)))
    name = cpu_model(cpuinfo) or platform.processor() or platform.machine()
    return f"{name} {' '.join(sorted(flags[1].split())) if flags else ''}{limits}"


def usable_cores() -> int:
    """Logical cores that this process may use: its affinity, and a container's CPU quota rounded up."""
    quota = cpu_quota()
    return len(affinity()) if quota is None else max(1, min(len(affinity()), ceil(quota)))


def physical_cores() -> int:
    """Physical cores among the usable ones: what an engine's threads are best counted by."""
    siblings = {_text(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) or str(cpu) for cpu in affinity()}
    return min(len(siblings), usable_cores())


def memory_gib() -> float | None:
    """Memory that this process may use, in GiB; None where the system does not say."""
    sizes = [size for size in (_memory_limit(), _machine_memory()) if size is not None]
    return round(min(sizes) / 2**30, 2) if sizes else None


def memory_limit_gib() -> float | None:
    """A container's memory limit, in GiB; None where there is none below the machine's memory."""
    limit, machine = _memory_limit(), _machine_memory()
    return None if limit is None or (machine is not None and limit >= machine) else round(limit / 2**30, 2)


def available_memory_gib(meminfo: str) -> float | None:
    """Memory of the machine that can be had without swapping, in GiB, from the text of /proc/meminfo; None when it does not say."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", meminfo, re.MULTILINE)
    return round(int(match[1]) / 2**20, 2) if match else None


def cpu_governors() -> tuple[str, ...]:
    """What sets the clock of our CPUs ("performance", "powersave", ...), each once; empty where the system does not say."""
    files = (Path(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor") for cpu in affinity())
    return tuple(sorted({text for file in files if (text := _text(file))}))


def numa_nodes() -> int:
    """How many NUMA nodes our CPUs belong to; 1 where the system does not say."""
    ours = affinity()
    lists = (_text(file) for file in Path("/sys/devices/system/node").glob("node[0-9]*/cpulist"))
    return max(1, sum(bool(parse_cpus(text) & ours) for text in lists))


def last_level_cache() -> int | None:
    """Bytes of the outermost caches of our CPUs, each counted once; None where the system does not say."""
    sizes: dict[str, int] = {}
    for cpu in affinity():
        levels = Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*")
        outermost = max(levels, key=lambda folder: int(_text(folder / "level") or 0), default=None)
        match = None if outermost is None else re.fullmatch(r"(\d+)([KM]?)", _text(outermost / "size"))
        if outermost is not None and match:
            sizes[_text(outermost / "shared_cpu_list") or str(cpu)] = int(match[1]) << {"": 0, "K": 10, "M": 20}[match[2]]
    return sum(sizes.values()) or None


def parse_cpus(text: str) -> set[int]:
    """The CPUs of a list as Linux writes it: "0-2,8" is 0, 1, 2 and 8."""
    ranges = (part.partition("-") for part in text.split(",") if part)
    return {cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)}


def affinity() -> set[int]:
    """The numbers of the logical CPUs that this thread, and those that it starts, may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def cpu_quota() -> float | None:
    """CPU time that a container's limit allows, in cores' worth; None where there is no limit."""
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
    """A limit's text in this process's control group and all above it, in version 2 and version 1, where it may stand in several files."""
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
