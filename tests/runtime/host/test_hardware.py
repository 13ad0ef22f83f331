"""Description of the machine, read from the system's files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from muntin.runtime import describe_hardware
from muntin.runtime.host import hardware
from muntin.runtime.host.hardware import (
    ISA_LIMITS,
    affinity,
    available_memory_gib,
    cpu_features,
    cpu_governors,
    cpu_identity,
    cpu_model,
    cpu_quota,
    last_level_cache,
    memory_gib,
    memory_limit_gib,
    numa_nodes,
    parse_cpus,
    usable_cores,
)

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Processor @ 2.10GHz
flags\t\t: fpu sse4_2 avx2 avx512f amx_int8 avx512_vnni amx_bf16

processor\t: 1
model name\t: Intel(R) Xeon(R) Processor @ 2.10GHz
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\nModel\t\t: Raspberry Pi 5\n"


def test_reads_cpuinfo() -> None:
    assert cpu_model(X86) == "Intel(R) Xeon(R) Processor @ 2.10GHz"
    assert cpu_features(X86) == ("avx2", "avx512f", "avx512_vnni", "amx_bf16", "amx_int8")
    assert (cpu_model(ARM), cpu_features(ARM)) == ("Raspberry Pi 5", ("asimddp", "i8mm", "bf16"))
    assert cpu_model("") == (platform.processor() or platform.machine())
    assert cpu_features("") == ()


def test_description_is_plain_and_true() -> None:
    described = describe_hardware()
    assert json.loads(json.dumps(described)) == described
    assert described["cpu"]
    assert described["numpy"] == np.__version__
    assert described["onnxruntime"] == onnxruntime.__version__
    assert described["openvino"]
    assert 1 <= described["physical_cores"] <= described["cores"] <= (os.cpu_count() or 1)
    assert described["memory_gib"] is None or described["memory_gib"] > 0.1
    assert ("torch" in described) == ("torch" in sys.modules)


def test_onnxruntime_gpu_is_reported_as_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.99" if name == "onnxruntime-gpu" else "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    described = describe_hardware()
    assert (described["onnxruntime"], described["numpy"]) == ("1.99", "1")
    assert "onnxruntime-gpu" not in described


def test_affinity_counts() -> None:
    if not hasattr(os, "sched_setaffinity"):
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
        assert describe_hardware()["physical_cores"] == 1
    finally:
        os.sched_setaffinity(0, before)


def test_parse_cpus() -> None:
    assert parse_cpus("0-2,8,10-11") == {0, 1, 2, 8, 10, 11}
    assert (parse_cpus("5"), parse_cpus("")) == ({5}, set())


def test_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "MemTotal:  8388608 kB\nMemFree: 1 kB\nMemAvailable:    3145728 kB\n"
    monkeypatch.setattr(hardware, "_text", lambda file: text)
    assert available_memory_gib() == 3.0
    text = ""
    assert available_memory_gib() is None


def test_limits_of_this_machine() -> None:
    cpus, quota, limit, memory = affinity(), cpu_quota(), memory_limit_gib(), memory_gib()
    assert cpus <= set(range(os.cpu_count() or 1))
    assert quota is None or quota > 0
    assert limit is None or limit == memory
    assert 1 <= numa_nodes() <= len(cpus)
    assert (last_level_cache() or 1 << 20) >= 1 << 16
    assert all(name and "\n" not in name for name in cpu_governors())


def test_cpu_identity_with_isa_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ISA_LIMITS:
        monkeypatch.delenv(name, raising=False)
    whole = cpu_identity()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert cpu_identity() == f"{whole} ONEDNN_MAX_CPU_ISA=AVX2"
    assert not {"avx512f", "avx_vnni", "amx_int8"} & set(describe_hardware()["features"])


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "50000"}, 2.0),
        ({"cpu.cfs_quota_us": "100000"}, 1.0),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
    ],
)
def test_quota_of_a_container(monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: float | None) -> None:
    group = "0::/" if "cpu.max" in files else "4:cpu,cpuacct:/"
    texts = {Path("/proc/self/cgroup"): group}
    root = Path("/sys/fs/cgroup") / ("" if "cpu.max" in files else "cpu")
    texts |= {root / name: text for name, text in files.items()}
    monkeypatch.setattr("muntin.runtime.host.hardware._text", lambda file: texts.get(file, ""))
    assert cpu_quota() == cores
