"""Examination of this machine: what it computes with, whether that works, and what would make timings wrong.

The self-test multiplies (`ceilings`), competes for the cores (`contention`) and adds up integers (`exactness`): about ten seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from muntin.errors import DependencyError
from muntin.runtime.engines.compile_cache import cache_folder
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.contention import CpuShare, measure_cpu_share
from muntin.runtime.profiling.doctor_checks import Check, SelfTest, all_checks
from muntin.runtime.profiling.doctor_facts import (
    Extra,
    InstalledEngine,
    Machine,
    distributions,
    find_engine,
    find_extras,
    package_version,
    read_machine,
    requirements,
)
from muntin.runtime.profiling.kernels import Ceilings
from muntin.runtime.verification.exactness import RUNNERS, IntegerCheck, check_integers

PACKAGES = ("numpy", "onnx", "torch", "torchvision", "timm", "onnxscript", "torchmetrics", "tensorboard")
VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "DNNL_", "TBB_", "OV_CPU_")
"""Prefixes of environment variables that change the speed of computation."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Facts, measurements and checks.

    `packages`: versions, None where not installed. `cache`: None without a home folder. `threads`: number that an engine would get.
    Without the self-test `ceilings` and `share` are None and `integers` is empty; an engine that is missing or cannot run is not in
    `integers`.
    """

    machine: Machine
    engines: tuple[InstalledEngine, ...]
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
    """Examines the machine; with `self_test` it also measures, for about ten seconds.

    `threads`: number that an engine would get, None for the usable physical cores. `environment`: None for this process's. `stage` is
    called with the name of each step. Raises DataError for a number of threads that is not positive.
    """
    options = SessionOptions(threads=threads)
    environment = os.environ if environment is None else environment
    stage("engines")
    machine, engines = read_machine(), tuple(find_engine(name) for name in RUNNERS)
    test = _measure(engines, min(options.thread_count, machine.physical_cores), stage) if self_test else None
    variables = {name: value for name, value in sorted(environment.items()) if name.startswith(VARIABLES)}
    measured = test or SelfTest()
    return Diagnosis(
        machine=machine,
        engines=engines,
        packages={name: package_version(name) for name in PACKAGES},
        extras=find_extras(requirements(), distributions()),
        environment=variables,
        cache=cache_folder(),
        threads=options.thread_count,
        ceilings=measured.ceilings,
        share=measured.share,
        integers=measured.integers,
        checks=tuple(all_checks(machine, engines, threads, variables, test)),
    )


def _measure(engines: Sequence[InstalledEngine], threads: int, stage: Callable[[str], None]) -> SelfTest:
    test = SelfTest()
    installed = [engine.name for engine in engines if engine.version is not None]
    stage("integers")
    for name in installed:
        try:
            test.integers[name] = check_integers(RUNNERS[name])
        except DependencyError as error:
            test.failures.append(Check(name=f"INT8 in {name}", status="problem", text=str(error)))
    stage("contention")
    test.share = measure_cpu_share(threads, seconds=0.5)
    if "openvino" in installed:
        from muntin.runtime.profiling.ceilings import measure_ceilings  # imports OpenVINO, which may be missing

        stage("ceilings")
        test.ceilings = measure_ceilings(threads=threads)
    return test
