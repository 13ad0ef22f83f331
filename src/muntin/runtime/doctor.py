"""What is here to compute with, does it work, and what would make timings lie?

Facts are read, never assumed, and what is not said by a system is None. Then checks, each with a line that says what to do:

    ok        as it should be
    note      it works, slower or less steadily than it could
    problem   results would be wrong, or there would be none

The self-test multiplies (`ceilings`), competes for the cores (`contention`) and adds up integers (`exactness`): about ten seconds. Nothing
that is not needed for it is imported: torch and the like are looked up by name.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import floor
from pathlib import Path
from stat import S_ISLNK
from typing import TYPE_CHECKING, Any, Literal

from muntin.errors import DependencyError, install
from muntin.runtime import quiet
from muntin.runtime.cache import cache_folder, compiled_folder
from muntin.runtime.contention import CpuShare, measure_cpu_share
from muntin.runtime.exactness import RUNNERS, IntegerCheck, check_integers, provider_starts
from muntin.runtime.hardware import (
    ISA_LIMITS,
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
from muntin.runtime.options import DEFAULT_ENGINE, check_threads

if TYPE_CHECKING:
    from muntin.runtime.ceilings import Ceilings

Status = Literal["ok", "note", "problem"]

PACKAGES = ("numpy", "onnx", "torch", "torchvision", "timm", "onnxscript", "torchmetrics", "tensorboard")
VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "DNNL_", "TBB_", "OV_CPU_")
"""How the names of environment variables begin that change the speed of what computes."""
GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
GPU_INSTALL = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
BUSY, HELD_BACK = 0.25, 0.85
"""Cores' worth that others use from which on timings suffer, and the share of CPU time below which something holds threads back."""
SMALL_MEMORY = 1.0
"""GiB below which a model and its images may not fit."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question and its answer, a line that says what to do."""

    name: str
    status: Status
    text: str


@dataclass(frozen=True, kw_only=True)
class Feature:
    """What a CPU can have, and what it means that it is here or missing."""

    name: str
    present: bool
    meaning: str


@dataclass(frozen=True, kw_only=True)
class EngineFound:
    """`version`: None where it is not installed or cannot be loaded, which `error` says. `providers`: ONNX Runtime's, of this build."""

    name: str
    version: str | None
    providers: tuple[str, ...]
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Extra:
    """An extra of muntin's: the packages of it that are not installed, and the command that installs them."""

    name: str
    missing: tuple[str, ...]
    install: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this process may use. `cpus`: all that the machine has; `cores`, `physical_cores`: the usable ones. `cpu_quota`: cores' worth of
    CPU time, None without a container's limit; `memory_limit_gib` likewise. `features`: empty where the system does not say, as are
    `governors`."""

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


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that was found.

    `packages`: versions, None where not installed. `cache`: None without a home folder. `threads`: what an engine is asked for. The
    self-test's measures are None, and `integers` empty, where it was left out; an engine that is missing or cannot run is not in
    `integers`.
    """

    machine: Machine
    engines: tuple[EngineFound, ...]
    packages: Mapping[str, str | None]
    extras: tuple[Extra, ...]
    environment: Mapping[str, str]
    cache: Path | None
    threads: int
    ceilings: Ceilings | None
    share: CpuShare | None
    integers: Mapping[str, tuple[IntegerCheck, ...]]
    checks: tuple[Check, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """A line for each check that makes results wrong or impossible."""
        return tuple(f"{check.name}: {check.text}" for check in self.checks if check.status == "problem")


def examine(
    *,
    threads: int | None = None,
    self_test: bool = True,
    environment: Mapping[str, str] | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> Diagnosis:
    """Looks the machine over; with `self_test` it also measures, for about ten seconds.

    `threads`: what an engine would be asked for, None for the usable physical cores. `environment`: None for this process's. `stage` is
    told what is being done. Raises DataError for a number of threads that is not positive.
    """
    check_threads(threads)
    environment = os.environ if environment is None else environment
    stage("engines")
    machine, engines = read_machine(), tuple(find_engine(name) for name in RUNNERS)
    there = [engine.name for engine in engines if engine.version is not None]
    asked = threads or machine.physical_cores
    working = min(asked, machine.physical_cores)
    ceilings, share, integers, failures = None, None, {}, []
    if self_test:
        stage("integers")
        for name in there:
            try:
                integers[name] = check_integers(RUNNERS[name])
            except DependencyError as error:
                failures.append(Check(name=f"INT8 in {name}", status="problem", text=str(error)))
        stage("contention")
        share = measure_cpu_share(working, seconds=0.5)
        if "openvino" in there:
            from muntin.runtime.ceilings import measure_ceilings  # needs OpenVINO, which this module does without

            stage("ceilings")
            ceilings = measure_ceilings(threads=working)
    variables = {name: value for name, value in sorted(environment.items()) if name.startswith(VARIABLES)}
    exact = [name for name, layers in integers.items() if not any(layer.wrong for layer in layers)]
    checks = [
        *check_engines(engines),
        *(check_arithmetic(engine, integers[engine.name], variables, exact) for engine in engines if engine.name in integers),
        *failures,
        *([] if self_test else check_untested(machine)),
        *check_thread_counts(threads, variables, machine.physical_cores),
        *check_variables(variables),
        *([] if share is None else [check_share(share, len(machine.affinity), machine.cpu_quota)]),
        *([] if ceilings is None else [check_ceilings(ceilings)]),
        *check_machine(machine),
        *check_gpu(machine, engines, _distributions(), cuda_starts=_cuda_starts(machine, engines) if self_test else None),
        check_cache(),
    ]
    return Diagnosis(
        machine=machine,
        engines=engines,
        packages={name: _version(name) for name in PACKAGES},
        extras=find_extras(_requirements(), _distributions()),
        environment=variables,
        cache=_cache(),
        threads=asked,
        ceilings=ceilings,
        share=share,
        integers=integers,
        checks=tuple(checks),
    )


# ---- facts ----

# Name, the flags of which one is enough, what it means to have it, and to lack it
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
    """What this process may use of the machine."""
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
        available_gib=available_memory_gib(_text(Path("/proc/meminfo"))),
        numa_nodes=numa_nodes(),
        governors=cpu_governors(),
        nvidia=Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None,
        os=described["os"],
        python=described["python"],
    )


def explain_features(flags: Sequence[str], architecture: str) -> tuple[Feature, ...]:
    """What a CPU's flags mean for a user; empty without flags: then the system did not say."""
    known = _ARM if architecture.lower() in ("aarch64", "arm64") else _X86
    return tuple(
        Feature(name=name, present=present, meaning=having if present else lacking)
        for name, any_of, having, lacking in known
        for present in [not any_of.isdisjoint(flags)]
        if flags
    )


def find_engine(name: str) -> EngineFound:
    """Loads an engine's library, which takes a few tenths of a second, and asks it for its version."""
    try:
        library: Any = getattr(quiet, name)
    except ModuleNotFoundError as error:
        return EngineFound(name=name, version=None, providers=(), error=f"not installed: pip install {error.name}")
    except (ImportError, OSError) as error:
        return EngineFound(name=name, version=None, providers=(), error=f"cannot be loaded: {' '.join(str(error).split())}")
    providers = tuple(library.get_available_providers()) if name == "onnxruntime" else ()
    return EngineFound(name=name, version=str(library.__version__).partition("-")[0], providers=providers, error=None)


def _cuda_starts(machine: Machine, engines: Sequence[EngineFound]) -> bool | None:
    there = any(GPU_PROVIDERS[0] in engine.providers for engine in engines)
    return provider_starts(GPU_PROVIDERS[0]) if machine.nvidia and there else None


def find_extras(requirements: Sequence[str], installed: frozenset[str]) -> tuple[Extra, ...]:
    """Muntin's extras for users and what is missing of each, from the requirements that its metadata states."""
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


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("muntin") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _distributions() -> frozenset[str]:
    # A folder left by a broken uninstall has metadata without a name.
    return frozenset(_canonical(name) for found in importlib.metadata.distributions() if (name := found.metadata["Name"]))


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# ---- checks: facts in, words out ----


def check_engines(engines: Sequence[EngineFound]) -> Iterator[Check]:
    """A problem where none can be used; a note for each that is missing beside another."""
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


def check_arithmetic(engine: EngineFound, layers: Sequence[IntegerCheck], variables: Mapping[str, str], exact: Sequence[str] = ()) -> Check:
    """A problem where INT8 sums are wrong; a note where INT8 layers run in float. `exact`: the engines whose sums came out right here."""
    name = f"INT8 in {engine.name}"
    wrong = [layer for layer in layers if layer.wrong]
    if wrong:
        worst = max(wrong, key=lambda layer: layer.wrong / layer.outputs)
        limit = next((f"{key}={variables[key]}" for key in ISA_LIMITS if variables.get(key)), None)
        cures = [
            *([f"unset {limit}"] if limit else []),
            *(f'give engine="{other}", whose integers are exact here' for other in exact),
            "use a CPU with VNNI or AMX",
            "`muntin export --float`",
        ]
        return Check(
            name=name,
            status="problem",
            text=f"wrong integers: {worst.wrong} of {worst.outputs} sums of a {worst.layer} differ, by up to {worst.error:.0f} "
            f"(without VNNI sums saturate in 16 bits): {', or '.join(cures)}; `muntin verify` says what an artefact suffers",
        )
    floating = [layer.layer for layer in layers if not layer.integer]
    if floating:
        return Check(name=name, status="note", text=f"right, but run in float, which is slower: {', '.join(floating)}")
    return Check(name=name, status="ok", text=f"{sum(layer.outputs for layer in layers)} sums, exact, on integer kernels")


def check_untested(machine: Machine) -> Iterator[Check]:
    """What the features let fear where the self-test was left out."""
    if any(feature.name == "VNNI" and not feature.present for feature in machine.features):
        text = (
            "this CPU has none, so OpenVINO's INT8 sums may be wrong: the self-test (without --quick) says whether they are, "
            'and whether engine="onnxruntime" is exact here'
        )
        yield Check(name="VNNI", status="note", text=text)


def check_thread_counts(threads: int | None, variables: Mapping[str, str], cores: int) -> Iterator[Check]:
    """A note for each place that asks for more threads than there are physical cores: they wait for each other."""
    asked = {name: value for name, value in variables.items() if name.endswith("_NUM_THREADS")}
    if threads is not None:
        asked["threads"] = str(threads)
    wrong = [text for name, value in asked.items() if (text := _thread_count(name, value, cores))]
    for text in wrong:
        yield Check(name="threads", status="note", text=text)
    if not wrong:
        yield Check(name="threads", status="ok", text=f"{threads or cores} on {count(cores, 'usable physical core')}")


def _thread_count(name: str, value: str, cores: int) -> str:
    first = value.partition(",")[0].strip()  # OpenMP takes a list: a number for each level of nested threads
    if not first.isdecimal() or int(first) < 1:
        return f"{name}={value} is no number of threads, and goes unheeded: give {'1' if cores == 1 else f'1 to {cores}'}"
    if int(first) > cores:
        there = count(cores, "usable physical core")
        return f"{name}={value} is more than the {there}, so threads wait for each other: give at most {cores}"
    return ""


def count(number: int, noun: str) -> str:
    """The number with its noun: 1 thread, 2 threads."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def check_variables(variables: Mapping[str, str]) -> Iterator[Check]:
    """A note for each variable that takes kernels away, or time."""
    for name, value in variables.items():
        if name.endswith("_MAX_CPU_ISA") and value.upper() not in ("", "ALL", "DEFAULT"):
            yield Check(name="kernels", status="note", text=f"{name}={value} keeps OpenVINO from newer kernels: unset it")
        if name in ("ONEDNN_VERBOSE", "DNNL_VERBOSE") and value not in ("", "0", "none"):
            yield Check(name="kernels", status="note", text=f"{name}={value} prints a line for each kernel and takes time: unset it")


def check_share(share: CpuShare, cpus: int, quota: float | None) -> Check:
    """A note where our threads do not get the CPU time that they could use."""
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
            why = f"the container's quota of {cores} holds them back: use {_whole(quota)}, or raise the quota"
        else:
            why = "no other process here does that: a quota, or another guest of the host: time elsewhere, or use fewer threads"
        return Check(name="contention", status="note", text=f"{got}; {why}")
    others = "" if share.others is None else f", other processes use {share.others:.1f} of our {count(cpus, 'CPU')}"
    return Check(name="contention", status="ok", text=f"{got}{others}")


def _whole(quota: float) -> str:
    return count(max(1, floor(quota)), "thread")


def check_ceilings(ceilings: Ceilings) -> Check:
    """A note where INT8 brings no speed on this CPU."""
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
    """Notes on quota, memory, NUMA and the clock."""
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


def check_gpu(machine: Machine, engines: Sequence[EngineFound], installed: frozenset[str], *, cuda_starts: bool | None) -> Iterator[Check]:
    """Notes where a GPU lies idle, and where two builds of ONNX Runtime overwrite each other. `cuda_starts`: None where not tried."""
    if {"onnxruntime", "onnxruntime-gpu"} <= installed:
        text = f"both onnxruntime and onnxruntime-gpu are installed, in one folder: pip uninstall -y onnxruntime-gpu && {GPU_INSTALL}"
        yield Check(name="onnxruntime", status="note", text=text)
    providers = {provider for engine in engines for provider in engine.providers}
    there = [provider.removesuffix("ExecutionProvider") for provider in GPU_PROVIDERS if provider in providers]
    if machine.nvidia and not there:
        text = f"an NVIDIA driver is here, and ONNX Runtime has no CUDA provider; for one, instead of the CPU's build: {GPU_INSTALL}"
        yield Check(name="GPU", status="note", text=text)
    elif machine.nvidia and cuda_starts is False:
        text = "ONNX Runtime has CUDA and cannot start it: install the CUDA and cuDNN that this version of onnxruntime-gpu asks for"
        yield Check(name="GPU", status="note", text=text)
    elif machine.nvidia:
        yield Check(name="GPU", status="ok", text=f"an NVIDIA driver, and ONNX Runtime with {' and '.join(there)}")
    elif there:
        yield Check(name="GPU", status="note", text=f"ONNX Runtime has {' and '.join(there)}, and there is no NVIDIA driver: install it")


def check_cache() -> Check:
    """A note where what engines compile cannot be kept: a folder is made by the cache's own rules, and what was made is taken away."""
    folder = _cache()
    if folder is None:
        return Check(
            name="cache", status="note", text="this user has no home folder, so models are compiled anew each time: set MUNTIN_CACHE"
        )
    root = folder / "compiled"
    missing = [place for place in (root, *root.parents) if not os.path.lexists(place)]
    kept = compiled_folder("doctor", "0", "0" * 64)
    for made in [*root.glob("doctor-0-*"), *missing]:
        with suppress(OSError):  # another process may keep something there by now
            made.rmdir()
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


def _cache() -> Path | None:
    try:
        return cache_folder()
    except RuntimeError:  # how pathlib says that there is no home
        return None
