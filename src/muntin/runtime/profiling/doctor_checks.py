"""Checks of a machine: facts in, one line out that says what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import floor
from typing import Literal

from muntin.runtime.engines.compile_cache import cache_folder, compiled_folder
from muntin.runtime.host.hardware import ISA_LIMITS
from muntin.runtime.options import DEFAULT_ENGINE
from muntin.runtime.profiling.contention import BUSY_MACHINE, CpuShare, others_use
from muntin.runtime.profiling.doctor_facts import (
    GPU_INSTALL,
    GPU_PROVIDERS,
    InstalledEngine,
    Machine,
    cuda_starts,
    distributions,
)
from muntin.runtime.profiling.kernels import Ceilings
from muntin.runtime.verification.exactness import IntegerCheck
from muntin.text import count

Status = Literal["ok", "note", "problem"]
"""ok: as it should be; note: it works, slower or less steadily than it could; problem: results would be wrong, or there would be none."""

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


def _ok(name: str, text: str) -> Check:
    return Check(name=name, status="ok", text=text)


def _note(name: str, text: str) -> Check:
    return Check(name=name, status="note", text=text)


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
        checks += [check_arithmetic(name, layers, variables, exact) for name, layers in test.integers.items()]
        checks += test.failures
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
    yield _ok("engines", " and ".join(usable))
    for engine in engines:
        if engine.error is not None:
            fallback = f'; it is the default one: give engine="{usable[0]}" until then' if engine.name == DEFAULT_ENGINE else ""
            yield _note(engine.name, f"{engine.error}{fallback}")


def check_arithmetic(engine: str, layers: Sequence[IntegerCheck], variables: Mapping[str, str], exact: Sequence[str] = ()) -> Check:
    """A problem for wrong INT8 sums; a note for INT8 layers that run in float. `exact`: engines whose sums are right on this machine."""
    name = f"INT8 in {engine}"
    wrong = [layer for layer in layers if layer.wrong]
    if wrong:
        worst = max(wrong, key=lambda layer: layer.wrong / layer.outputs)
        remedies = [
            *[f"unset {key}={variables[key]}" for key in ISA_LIMITS if variables.get(key)][:1],
            *(f'give engine="{other}", whose integers are exact here' for other in exact),
            "use a CPU with VNNI or AMX",
            "`muntin export --float`",
        ]
        return Check(
            name=name,
            status="problem",
            text=f"wrong integers: {worst.wrong} of {worst.outputs} sums of a {worst.layer} differ, by up to {worst.error:.0f} "
            f"(without VNNI sums saturate in 16 bits): {', or '.join(remedies)}; `muntin verify` shows the effect on an artefact",
        )
    floating = [layer.layer for layer in layers if not layer.integer]
    if floating:
        return _note(name, f"right, but run in float, which is slower: {', '.join(floating)}")
    return _ok(name, f"{sum(layer.outputs for layer in layers)} sums, exact, on integer kernels")


def check_thread_counts(threads: int | None, variables: Mapping[str, str], cores: int) -> Iterator[Check]:
    """A note for each setting of more threads than physical cores: they wait for each other."""
    settings = {name: value for name, value in variables.items() if name.endswith("_NUM_THREADS")}
    if threads is not None:
        settings["threads"] = str(threads)
    wrong = [text for name, value in settings.items() if (text := _thread_count(name, value, cores))]
    yield from (_note("threads", text) for text in wrong)
    if not wrong:
        yield _ok("threads", f"{threads or cores} on {count(cores, 'usable physical core')}")


def _thread_count(name: str, value: str, cores: int) -> str:
    first = value.partition(",")[0].strip()  # OpenMP takes a list, a number for each level of nesting
    if not first.isdecimal() or int(first) < 1:
        return f"{name}={value} is no number of threads, and is ignored: give {'1' if cores == 1 else f'1 to {cores}'}"
    if int(first) <= cores:
        return ""
    return f"{name}={value} is more than the {count(cores, 'usable physical core')}, so threads wait for each other: give at most {cores}"


def check_variables(variables: Mapping[str, str]) -> Iterator[Check]:
    """A note for each variable that disables kernels or costs time."""
    for name, value in variables.items():
        if name.endswith("_MAX_CPU_ISA") and value.upper() not in ("", "ALL", "DEFAULT"):
            yield _note("kernels", f"{name}={value} keeps OpenVINO from newer kernels: unset it")
        if name in ("ONEDNN_VERBOSE", "DNNL_VERBOSE") and value not in ("", "0", "none"):
            yield _note("kernels", f"{name}={value} prints a line for each kernel and takes time: unset it")


def check_share(share: CpuShare, cpus: int, quota: float | None) -> Check:
    """A note where our threads do not get the CPU time that they could use. `cpus`: number of CPUs that they may run on."""
    got = f"{count(share.threads, 'busy thread')} got {share.share:.0%} of {'its' if share.threads == 1 else 'their'} time"
    others = "" if share.others is None else f", {others_use(share.others, cpus)}"
    if share.others is not None and share.others >= BUSY_MACHINE:
        return _note("contention", f"{got}{others}: timings are unreliable now: stop other programs (see `top`), or use fewer threads")
    if share.share >= HELD_BACK:
        return _ok("contention", f"{got}{others}")
    if quota is not None and quota < share.threads:
        cores = f"{quota:g} core{'' if quota == 1 else 's'}"
        return _note("contention", f"{got}; the container's quota of {cores} holds them back: use {_whole(quota)}, or raise the quota")
    cause = "no other process here causes that: a quota, or another guest of the host: measure elsewhere, or use fewer threads"
    return _note("contention", f"{got}; {cause}")


def _whole(quota: float) -> str:
    return count(max(1, floor(quota)), "thread")


def check_ceilings(ceilings: Ceilings) -> Check:
    """A note where INT8 is no faster on this CPU, or where other processes disturbed the measurement."""
    rates = ", ".join(f"{precision} {rate:.0f}" for precision, rate in ceilings.gmacs.items()) or "none"
    text = f"{rates} GMAC/s, copy {ceilings.copy_gb_s:.1f} GB/s, with {count(ceilings.threads, 'thread')}"
    if "i8" not in ceilings.gmacs:
        return _note("ceilings", f"{text}; INT8 layers run in float here: a float artefact is as fast")
    if ceilings.others is not None and ceilings.others >= BUSY_MACHINE:
        return _note("ceilings", f"{text}, while others used {ceilings.others:.1f} cores' time: more on a quiet machine")
    return _ok("ceilings", text)


def check_machine(machine: Machine) -> Iterator[Check]:
    """Notes about quota, memory, NUMA and the clock."""
    if machine.cpu_quota is not None and machine.cpu_quota < len(machine.affinity):
        cores = "one core's" if machine.cpu_quota == 1 else f"{machine.cpu_quota:g} cores'"
        text = f"a container's quota of {cores} time on {count(len(machine.affinity), 'CPU')}: more busy threads are halted"
        yield _note("quota", f"{text}: use at most {_whole(machine.cpu_quota)}")
    sizes = [size for size in (machine.available_gib, machine.memory_limit_gib) if size is not None]
    if sizes and min(sizes) < SMALL_MEMORY:
        advice = "large images may not fit: end other programs, or predict in tiles"
        yield _note("memory", f"{min(sizes):.1f} GiB are available: {advice}")
    elif sizes:
        yield _ok("memory", f"{min(sizes):.1f} GiB are available")
    if machine.numa_nodes > 1:
        yield _note("NUMA", f"our CPUs lie in {machine.numa_nodes} NUMA nodes: a process for each (`numactl -N 0 -m 0 ...`) serves more")
    if "powersave" in machine.governors:
        text = "the clock's governor is powersave, which may lag behind short loads: `cpupower frequency-set -g performance` to time"
        yield _note("clock", text)


def check_gpu(machine: Machine, engines: Sequence[InstalledEngine], installed: frozenset[str], *, cuda: bool | None) -> Iterator[Check]:
    """Notes about an unused GPU, and about two builds of ONNX Runtime in one folder. `cuda`: True if it starts, None if not tried."""
    if {"onnxruntime", "onnxruntime-gpu"} <= installed:
        text = f"both onnxruntime and onnxruntime-gpu are installed, in one folder: pip uninstall -y onnxruntime-gpu && {GPU_INSTALL}"
        yield _note("onnxruntime", text)
    providers = {provider for engine in engines for provider in engine.providers}
    usable = " and ".join(provider.removesuffix("ExecutionProvider") for provider in GPU_PROVIDERS if provider in providers)
    if machine.nvidia and not usable:
        yield _note(
            "GPU", f"an NVIDIA driver is here, and ONNX Runtime has no CUDA provider; for one, instead of the CPU's build: {GPU_INSTALL}"
        )
    elif machine.nvidia and cuda is False:
        text = "ONNX Runtime has CUDA and cannot start it: install the CUDA and cuDNN that this version of onnxruntime-gpu asks for"
        yield _note("GPU", text)
    elif machine.nvidia:
        yield _ok("GPU", f"an NVIDIA driver, and ONNX Runtime with {usable}")
    elif usable:
        yield _note("GPU", f"ONNX Runtime has {usable}, and there is no NVIDIA driver: install it")


def check_cache() -> Check:
    """A note where compiled models cannot be kept. Creates a folder by the cache's own rules, and removes everything that it created."""
    folder = cache_folder()
    if folder is None:
        return _note("cache", "this user has no home folder, so models are compiled anew each time: set MUNTIN_CACHE")
    root = folder / "compiled"
    missing = [path for path in (root, *root.parents) if not os.path.lexists(path)]
    kept = compiled_folder("doctor", "0", "0" * 64)
    for created in [*root.glob("doctor-0-*"), *missing]:
        with suppress(OSError):  # another process may have written there
            created.rmdir()
    if kept is not None:
        return _ok("cache", str(folder))
    return _note(
        "cache",
        f"{root} must be a folder, not a link, of yours that others cannot write (chmod go-w), or set MUNTIN_CACHE to another; "
        "until then models are compiled anew each time",
    )
