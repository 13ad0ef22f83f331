"""Checks of a machine: facts in, one line out that says what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import floor
from pathlib import Path
from stat import S_ISLNK
from typing import Literal

from muntin.runtime.engines.compile_cache import compiled_folder
from muntin.runtime.host.hardware import ISA_LIMITS
from muntin.runtime.options import DEFAULT_ENGINE
from muntin.runtime.profiling.contention import CpuShare
from muntin.runtime.profiling.doctor_facts import (
    GPU_INSTALL,
    GPU_PROVIDERS,
    InstalledEngine,
    Machine,
    cuda_starts,
    distributions,
    user_cache,
)
from muntin.runtime.profiling.kernels import Ceilings
from muntin.runtime.verification.exactness import IntegerCheck
from muntin.text import count

Status = Literal["ok", "note", "problem"]
"""ok: as it should be; note: it works, slower or less steadily than it could; problem: results would be wrong, or there would be none."""

BUSY = 0.25
"""CPU cores' worth of other processes' time from which on timings suffer."""
HELD_BACK = 0.85
"""Share of CPU time below which something holds our threads back."""
SMALL_MEMORY = 1.0
"""GiB below which a model and its images may not fit."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question and its answer, a line that says what to do."""

    name: str
    status: Status
    text: str


@dataclass(kw_only=True)
class SelfTest:
    """Measurements of the self-test; None or empty for what was left out or failed."""

    ceilings: Ceilings | None = None
    share: CpuShare | None = None
    integers: dict[str, tuple[IntegerCheck, ...]] = field(default_factory=dict)
    failures: list[Check] = field(default_factory=list)


def all_checks(
    machine: Machine, engines: Sequence[InstalledEngine], threads: int | None, variables: Mapping[str, str], test: SelfTest | None
) -> list[Check]:
    """All checks, in the order in which they are printed. `test`: None without the self-test."""
    checks = list(check_engines(engines))
    if test is not None:
        exact = [name for name, layers in test.integers.items() if not any(layer.wrong for layer in layers)]
        checks += [
            check_arithmetic(engine, test.integers[engine.name], variables, exact) for engine in engines if engine.name in test.integers
        ]
        checks += test.failures
    else:
        checks += check_untested(machine)
    checks += check_thread_counts(threads, variables, machine.physical_cores)
    checks += check_variables(variables)
    if test is not None and test.share is not None:
        checks.append(check_share(test.share, len(machine.affinity), machine.cpu_quota))
    if test is not None and test.ceilings is not None:
        checks.append(check_ceilings(test.ceilings))
    checks += check_machine(machine)
    checks += check_gpu(machine, engines, distributions(), cuda=None if test is None else cuda_starts(machine, engines))
    return [*checks, check_cache()]


def check_engines(engines: Sequence[InstalledEngine]) -> Iterator[Check]:
    """A problem without any usable engine; a note for each missing one."""
    usable = [engine.name for engine in engines if engine.version is not None]
    if not usable:
        reasons = "; ".join(f"{engine.name} {engine.error}" for engine in engines)
        yield Check(name="engines", status="problem", text=f"no engine, so nothing can run: {reasons}")
        return
    yield Check(name="engines", status="ok", text=" and ".join(usable))
    for engine in engines:
        if engine.error is not None:
            fallback = f'; it is the default one: give engine="{usable[0]}" until then' if engine.name == DEFAULT_ENGINE else ""
            yield Check(name=engine.name, status="note", text=f"{engine.error}{fallback}")


def check_arithmetic(
    engine: InstalledEngine, layers: Sequence[IntegerCheck], variables: Mapping[str, str], exact: Sequence[str] = ()
) -> Check:
    """A problem for wrong INT8 sums; a note for INT8 layers that run in float. `exact`: engines whose sums are right on this machine."""
    name = f"INT8 in {engine.name}"
    wrong = [layer for layer in layers if layer.wrong]
    if wrong:
        worst = max(wrong, key=lambda layer: layer.wrong / layer.outputs)
        limit = next((f"{key}={variables[key]}" for key in ISA_LIMITS if variables.get(key)), None)
        remedies = [
            *([f"unset {limit}"] if limit else []),
            *(f'give engine="{other}", whose integers are exact here' for other in exact),
            "use a CPU with VNNI or AMX",
            "`muntin export --float`",
        ]
        return Check(
            name=name,
            status="problem",
            text=f"wrong integers: {worst.wrong} of {worst.outputs} sums of a {worst.layer} differ, by up to {worst.error:.0f} "
            f"(without VNNI sums saturate in 16 bits): {', or '.join(remedies)}; `muntin verify` says what an artefact suffers",
        )
    floating = [layer.layer for layer in layers if not layer.integer]
    if floating:
        return Check(name=name, status="note", text=f"right, but run in float, which is slower: {', '.join(floating)}")
    return Check(name=name, status="ok", text=f"{sum(layer.outputs for layer in layers)} sums, exact, on integer kernels")


def check_untested(machine: Machine) -> Iterator[Check]:
    """A note for a CPU whose INT8 sums may be wrong, where the self-test was left out."""
    if any(feature.name == "VNNI" and not feature.present for feature in machine.features):
        text = (
            "this CPU has none, so OpenVINO's INT8 sums may be wrong: the self-test (without --quick) says whether they are, "
            'and whether engine="onnxruntime" is exact here'
        )
        yield Check(name="VNNI", status="note", text=text)


def check_thread_counts(threads: int | None, variables: Mapping[str, str], cores: int) -> Iterator[Check]:
    """A note for each setting of more threads than physical cores: they wait for each other."""
    settings = {name: value for name, value in variables.items() if name.endswith("_NUM_THREADS")}
    if threads is not None:
        settings["threads"] = str(threads)
    wrong = [text for name, value in settings.items() if (text := _thread_count(name, value, cores))]
    for text in wrong:
        yield Check(name="threads", status="note", text=text)
    if not wrong:
        yield Check(name="threads", status="ok", text=f"{threads or cores} on {count(cores, 'usable physical core')}")


def _thread_count(name: str, value: str, cores: int) -> str:
    first = value.partition(",")[0].strip()  # OpenMP takes a list, a number for each level of nesting
    if not first.isdecimal() or int(first) < 1:
        return f"{name}={value} is no number of threads, and goes unheeded: give {'1' if cores == 1 else f'1 to {cores}'}"
    if int(first) > cores:
        return (
            f"{name}={value} is more than the {count(cores, 'usable physical core')}, so threads wait for each other: give at most {cores}"
        )
    return ""


def check_variables(variables: Mapping[str, str]) -> Iterator[Check]:
    """A note for each variable that disables kernels or costs time."""
    for name, value in variables.items():
        if name.endswith("_MAX_CPU_ISA") and value.upper() not in ("", "ALL", "DEFAULT"):
            yield Check(name="kernels", status="note", text=f"{name}={value} keeps OpenVINO from newer kernels: unset it")
        if name in ("ONEDNN_VERBOSE", "DNNL_VERBOSE") and value not in ("", "0", "none"):
            yield Check(name="kernels", status="note", text=f"{name}={value} prints a line for each kernel and takes time: unset it")


def check_share(share: CpuShare, cpus: int, quota: float | None) -> Check:
    """A note where our threads do not get the CPU time that they could use. `cpus`: number of CPUs that they may run on."""
    whose = "its" if share.threads == 1 else "their"
    got = f"{count(share.threads, 'busy thread')} got {share.share:.0%} of {whose} time"
    if share.others is not None and share.others >= BUSY:
        text = (
            f"other processes use {share.others:.1f} of our {count(cpus, 'CPU')}, and {got}: timings say little now: "
            "stop what runs beside (see `top`), or use fewer threads"
        )
        return Check(name="contention", status="note", text=text)
    if share.share < HELD_BACK:
        if quota is not None and quota < share.threads:
            cores = f"{quota:g} core{'' if quota == 1 else 's'}"
            cause = f"the container's quota of {cores} holds them back: use {_whole(quota)}, or raise the quota"
        else:
            cause = "no other process here does that: a quota, or another guest of the host: time elsewhere, or use fewer threads"
        return Check(name="contention", status="note", text=f"{got}; {cause}")
    others = "" if share.others is None else f", other processes use {share.others:.1f} of our {count(cpus, 'CPU')}"
    return Check(name="contention", status="ok", text=f"{got}{others}")


def _whole(quota: float) -> str:
    return count(max(1, floor(quota)), "thread")


def check_ceilings(ceilings: Ceilings) -> Check:
    """A note where INT8 is no faster on this CPU, or where other processes disturbed the measurement."""
    rates = ", ".join(f"{precision} {rate:.0f}" for precision, rate in ceilings.gmacs.items()) or "none"
    text = f"{rates} GMAC/s, copy {ceilings.copy_gb_s:.1f} GB/s, with {count(ceilings.threads, 'thread')}"
    if "i8" not in ceilings.gmacs:
        return Check(name="ceilings", status="note", text=f"{text}; INT8 layers run in float here: a float artefact is as fast")
    if ceilings.others is not None and ceilings.others >= BUSY:
        return Check(
            name="ceilings", status="note", text=f"{text}, while others used {ceilings.others:.1f} cores' time: more on a quiet machine"
        )
    return Check(name="ceilings", status="ok", text=text)


def check_machine(machine: Machine) -> Iterator[Check]:
    """Notes about quota, memory, NUMA and the clock."""
    if machine.cpu_quota is not None and machine.cpu_quota < len(machine.affinity):
        cores = "one core's" if machine.cpu_quota == 1 else f"{machine.cpu_quota:g} cores'"
        text = f"a container's quota of {cores} time on {count(len(machine.affinity), 'CPU')}: more busy threads are halted"
        yield Check(name="quota", status="note", text=f"{text}: use at most {_whole(machine.cpu_quota)}")
    sizes = [size for size in (machine.available_gib, machine.memory_limit_gib) if size is not None]
    if sizes:
        small = min(sizes) < SMALL_MEMORY
        advice = ": large images may not fit: end other programs, or predict in tiles" if small else ""
        yield Check(name="memory", status="note" if small else "ok", text=f"{min(sizes):.1f} GiB can be had{advice}")
    if machine.numa_nodes > 1:
        text = f"our CPUs lie in {machine.numa_nodes} NUMA nodes: a process for each (`numactl -N 0 -m 0 ...`) serves more"
        yield Check(name="NUMA", status="note", text=text)
    if "powersave" in machine.governors:
        text = "the clock's governor is powersave, which may lag behind short loads: `cpupower frequency-set -g performance` to time"
        yield Check(name="clock", status="note", text=text)


def check_gpu(machine: Machine, engines: Sequence[InstalledEngine], installed: frozenset[str], *, cuda: bool | None) -> Iterator[Check]:
    """Notes about an unused GPU, and about two builds of ONNX Runtime in one folder. `cuda`: True if it starts, None if not tried."""
    if {"onnxruntime", "onnxruntime-gpu"} <= installed:
        text = f"both onnxruntime and onnxruntime-gpu are installed, in one folder: pip uninstall -y onnxruntime-gpu && {GPU_INSTALL}"
        yield Check(name="onnxruntime", status="note", text=text)
    providers = {provider for engine in engines for provider in engine.providers}
    usable = [provider.removesuffix("ExecutionProvider") for provider in GPU_PROVIDERS if provider in providers]
    if machine.nvidia and not usable:
        text = f"an NVIDIA driver is here, and ONNX Runtime has no CUDA provider; for one, instead of the CPU's build: {GPU_INSTALL}"
        yield Check(name="GPU", status="note", text=text)
    elif machine.nvidia and cuda is False:
        text = "ONNX Runtime has CUDA and cannot start it: install the CUDA and cuDNN that this version of onnxruntime-gpu asks for"
        yield Check(name="GPU", status="note", text=text)
    elif machine.nvidia:
        yield Check(name="GPU", status="ok", text=f"an NVIDIA driver, and ONNX Runtime with {' and '.join(usable)}")
    elif usable:
        yield Check(name="GPU", status="note", text=f"ONNX Runtime has {' and '.join(usable)}, and there is no NVIDIA driver: install it")


def check_cache() -> Check:
    """A note where compiled models cannot be kept. Creates a folder by the cache's own rules, and removes everything that it created."""
    folder = user_cache()
    if folder is None:
        return Check(
            name="cache", status="note", text="this user has no home folder, so models are compiled anew each time: set MUNTIN_CACHE"
        )
    root = folder / "compiled"
    missing = [path for path in (root, *root.parents) if not os.path.lexists(path)]
    kept = compiled_folder("doctor", "0", "0" * 64)
    for created in [*root.glob("doctor-0-*"), *missing]:
        with suppress(OSError):  # another process may have written there
            created.rmdir()
    if kept is not None:
        return Check(name="cache", status="ok", text=str(folder))
    return Check(
        name="cache",
        status="note",
        text=f"{_refusal(folder)}, or set MUNTIN_CACHE to another; until then models are compiled anew each time",
    )


def _refusal(folder: Path) -> str:
    root = folder / "compiled"
    try:
        status = root.lstat()
    except OSError:
        return f"{folder} cannot be written: make it a folder that can"
    if S_ISLNK(status.st_mode):
        return f"{root} is a link, which is not followed: put a folder there"
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        return f"{root} belongs to another user: remove it"
    if status.st_mode & 0o022:
        return f"others may write {root} (mode {status.st_mode & 0o777:o}): chmod go-w {root}"
    return f"{root} cannot be written: make it a folder that can"
