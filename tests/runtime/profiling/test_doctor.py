"""`muntin doctor`: facts, checks, and the whole examination."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from muntin.errors import DataError, install
from muntin.runtime.engines.compile_cache import cache_folder
from muntin.runtime.host import quiet_imports
from muntin.runtime.profiling import ceilings
from muntin.runtime.profiling.contention import CpuShare
from muntin.runtime.profiling.doctor import examine
from muntin.runtime.profiling.doctor_checks import (
    Check,
    check_arithmetic,
    check_cache,
    check_ceilings,
    check_engines,
    check_gpu,
    check_machine,
    check_share,
    check_thread_counts,
    check_variables,
)
from muntin.runtime.profiling.doctor_facts import GPU_INSTALL, InstalledEngine, explain_features, find_engine, find_extras, read_machine
from muntin.runtime.profiling.kernels import Ceilings
from muntin.runtime.verification.exactness import RUNNERS, IntegerCheck, run_onnxruntime

OPENVINO = InstalledEngine(name="openvino", version="2026.4.1", providers=(), error=None)
ORT = InstalledEngine(name="onnxruntime", version="1.32.0", providers=("CPUExecutionProvider",), error=None)
ORT_GPU = dataclasses.replace(ORT, providers=("CUDAExecutionProvider", "CPUExecutionProvider"))


def missing_engine(engine: InstalledEngine, error: str) -> InstalledEngine:
    return dataclasses.replace(engine, version=None, providers=(), error=error)


def machine(**changes: Any) -> Any:
    """This machine with quiet, plain and large values, and the test's changes."""
    plain: dict[str, Any] = {
        "affinity": (0, 1, 2, 3), "cpu_quota": None, "memory_limit_gib": None, "available_gib": 8.0, "numa_nodes": 1, "governors": (),
        "nvidia": False,
    }  # fmt: skip
    return dataclasses.replace(read_machine(), **(plain | changes))


def layer(**changes: Any) -> IntegerCheck:
    return IntegerCheck(**({"layer": "matrix product", "outputs": 100, "wrong": 0, "error": 0.0, "integer": True} | changes))


def statuses(checks: Any) -> list[tuple[str, str]]:
    listed = list(checks)
    assert all(isinstance(check, Check) and check.text and "\n" not in check.text for check in listed)
    return [(check.name, check.status) for check in listed]


# ---- this machine ----


def test_examine_without_self_test() -> None:
    diagnosis = examine(self_test=False, environment={"HOME": "/", "OMP_PLACES": "cores"})
    assert [engine.name for engine in diagnosis.engines] == ["openvino", "onnxruntime"]
    assert all(engine.version and engine.error is None for engine in diagnosis.engines)
    assert "CPUExecutionProvider" in diagnosis.engines[1].providers
    assert diagnosis.problems == ()
    assert diagnosis.environment == {"OMP_PLACES": "cores"}
    assert diagnosis.threads == diagnosis.machine.physical_cores <= diagnosis.machine.cores <= diagnosis.machine.cpus
    assert (diagnosis.ceilings, diagnosis.share, dict(diagnosis.integers)) == (None, None, {})
    assert diagnosis.cache == cache_folder()
    assert diagnosis.packages["numpy"]
    assert statuses(diagnosis.checks)[0] == ("engines", "ok")


def test_examine_imports_nothing_heavy() -> None:
    code = """
import importlib.metadata, sys
from muntin.runtime.profiling.doctor import examine
diagnosis = examine(self_test=False)
heavy = {"torch", "torchvision", "timm", "onnxscript", "openvino_telemetry"} & set(sys.modules)
assert not heavy, heavy
assert diagnosis.packages["torch"] == importlib.metadata.version("torch")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_examine_without_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openvino", "onnxruntime"):
        monkeypatch.delitem(vars(quiet_imports), name, raising=False)
        monkeypatch.setitem(sys.modules, name, None)
    diagnosis = examine()
    (problem,) = diagnosis.problems
    assert problem.startswith("engines: no engine, so nothing can run: ")
    assert "pip install openvino" in problem
    assert "pip install onnxruntime" in problem
    assert (diagnosis.ceilings, dict(diagnosis.integers)) == (None, {})
    assert diagnosis.share is not None


def test_engine_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    monkeypatch.delitem(vars(quiet_imports), "onnxruntime", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    engine = find_engine("onnxruntime")
    assert engine.version is None
    assert engine.error == "cannot be loaded: libgomp.so.1: cannot open shared object file"


@pytest.mark.slow
def test_examine_with_an_engine_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNNERS, "onnxruntime", lambda model, x: run_onnxruntime(b"no model", x))
    for name, value in (("_REPEATS", 1), ("_BLOCK", 1), ("_COPY_ROUNDS", 1), ("_copy_bytes", lambda: 32 << 20)):
        monkeypatch.setattr(ceilings, name, value)
    monkeypatch.setattr(ceilings, "measure_ceilings", partial(ceilings.measure_ceilings, seconds=0.02))
    diagnosis = examine(threads=1)
    assert any(problem.startswith("INT8 in onnxruntime: ONNX Runtime ") for problem in diagnosis.problems)
    assert list(diagnosis.integers) == ["openvino"]
    assert diagnosis.ceilings is not None
    assert diagnosis.ceilings.threads == 1


@pytest.mark.parametrize("threads", [0, -2, 1.5, "4", 2**40])
def test_examine_with_wrong_threads(threads: Any) -> None:
    with pytest.raises(DataError, match=r"^threads=.*: give a whole number"):
        examine(threads=threads, self_test=False)


# ---- facts from texts ----


def test_explain_features() -> None:
    features = {feature.name: feature for feature in explain_features(["avx2", "avx512f"], "x86_64")}
    assert {name for name, feature in features.items() if feature.present} == {"AVX2", "AVX-512"}
    assert "saturate in 16 bits" in features["VNNI"].meaning
    assert "FP32" in features["AVX512-BF16"].meaning
    assert "saturate" not in {f.name: f for f in explain_features(["avx_vnni"], "AMD64")}["VNNI"].meaning
    arm = {feature.name: feature.present for feature in explain_features(["asimddp", "bf16"], "aarch64")}
    assert arm == {"I8MM": False, "DotProd": True, "BF16": True, "SVE": False}
    assert explain_features([], "x86_64") == ()


def test_extras_with_missing_packages() -> None:
    requirements = [
        "numpy>=1.26",
        "torch>=2.9; extra == 'train'",
        'Torch_Metrics>=1 ; python_version > "3" and extra == "train"',
        "onnxruntime-gpu>=1.20; extra == 'gpu'",
        "pytest>=8; extra == 'dev'",
    ]
    train, gpu = sorted(find_extras(requirements, frozenset({"numpy", "torch"})), key=lambda extra: extra.name, reverse=True)
    assert (train.name, train.missing, train.install) == ("train", ("torch-metrics",), install("train"))
    assert (gpu.name, gpu.missing, gpu.install) == ("gpu", ("onnxruntime-gpu",), GPU_INSTALL)
    assert [extra.missing for extra in find_extras(requirements, frozenset({"torch", "torch-metrics", "onnxruntime-gpu"}))] == [(), ()]


# ---- checks ----


def test_engines_with_one_missing() -> None:
    assert statuses(check_engines([OPENVINO, ORT])) == [("engines", "ok")]
    missing = list(check_engines([missing_engine(OPENVINO, "not installed: pip install openvino"), ORT]))
    assert statuses(missing) == [("engines", "ok"), ("openvino", "note")]
    assert 'give engine="onnxruntime"' in missing[1].text


def test_wrong_integers_and_float_layers() -> None:
    assert check_arithmetic("openvino", [layer(), layer()], {}).status == "ok"
    floating = check_arithmetic("onnxruntime", [layer(), layer(layer="convolution", integer=False)], {})
    assert floating.status == "note"
    assert floating.text.endswith("convolution")
    wrong = check_arithmetic("openvino", [layer(wrong=1, error=1.0), layer(layer="convolution", wrong=7, error=float("inf"))], {})
    assert (wrong.name, wrong.status) == ("INT8 in openvino", "problem")
    assert "7 of 100 sums of a convolution differ, by up to inf" in wrong.text
    assert "engine=" not in wrong.text and "use a CPU with VNNI or AMX" in wrong.text
    cured = check_arithmetic("openvino", [layer(wrong=1)], {"ONEDNN_MAX_CPU_ISA": "AVX2"}, ["onnxruntime"]).text
    assert 'unset ONEDNN_MAX_CPU_ISA=AVX2, or give engine="onnxruntime", whose integers are exact here, or' in cured


@pytest.mark.parametrize(
    ("threads", "variables", "says"),
    [
        (None, {}, "4 on 4 usable physical cores"),
        (2, {"OMP_NUM_THREADS": "4"}, "2 on 4 usable"),
        (64, {}, "threads=64 is more than the 4 usable physical cores"),
        (None, {"OMP_NUM_THREADS": "64"}, "OMP_NUM_THREADS=64 is more than the 4"),
        (None, {"OPENBLAS_NUM_THREADS": "5"}, "OPENBLAS_NUM_THREADS=5 is more than the 4"),
        (None, {"OMP_NUM_THREADS": "8,2"}, "OMP_NUM_THREADS=8,2 is more than"),
        (None, {"OMP_NUM_THREADS": "4,2"}, "4 on 4"),
        (None, {"MKL_NUM_THREADS": "many"}, "MKL_NUM_THREADS=many is no number"),
        (None, {"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS=0 is no number of threads, and is ignored: give 1 to 4"),
        (None, {"OMP_PLACES": "cores"}, "4 on 4"),
    ],
)
def test_thread_counts(threads: int | None, variables: dict[str, str], says: str) -> None:
    (check,) = check_thread_counts(threads, variables, 4)
    assert says in check.text
    assert check.status == ("ok" if " on 4 usable" in check.text else "note")


def test_singular() -> None:
    assert [check.text for check in check_thread_counts(None, {}, 1)] == ["1 on 1 usable physical core"]
    (many,) = check_thread_counts(2, {}, 1)
    assert many.text == "threads=2 is more than the 1 usable physical core, so threads wait for each other: give at most 1"
    assert check_share(CpuShare(threads=1, share=0.99, others=0.0), 1, None).text == (
        "1 busy thread got 99% of its time, other processes use 0.0 of our 1 CPU"
    )
    ceilings = Ceilings(gmacs={"f32": 9.0, "i8": 9.0}, copy_gb_s=1.0, threads=1, others=0.0)
    assert check_ceilings(ceilings).text.endswith("with 1 thread")
    (quota, _) = check_machine(machine(cpu_quota=1.0))
    assert quota.text == "a container's quota of one core's time on 4 CPUs: more busy threads are halted: use at most 1 thread"


def test_several_thread_counts() -> None:
    notes = list(check_thread_counts(9, {"OMP_NUM_THREADS": "8", "MKL_NUM_THREADS": "4"}, 4))
    assert [note.text.partition(" ")[0] for note in notes] == ["OMP_NUM_THREADS=8", "threads=9"]


def test_variables_that_cost_speed() -> None:
    assert (
        statuses(check_variables({"ONEDNN_MAX_CPU_ISA": "AVX2", "ONEDNN_VERBOSE": "1", "OMP_PLACES": "cores"})) == [("kernels", "note")] * 2
    )
    assert statuses(check_variables({"ONEDNN_MAX_CPU_ISA": "ALL", "ONEDNN_VERBOSE": "0"})) == []


@pytest.mark.parametrize(
    ("share", "others", "quota", "status", "says"),
    [
        (0.99, 0.05, None, "ok", "4 busy threads got 99% of their time, other processes use 0.1 of our 4 CPUs"),
        (0.97, None, None, "ok", "4 busy threads got 97% of their time"),
        (0.55, 2.0, None, "note", "other processes use 2.0 of our 4 CPUs"),
        (0.98, 0.4, None, "note", "other processes use 0.4 of our 4 CPUs"),
        (0.38, 0.0, 1.5, "note", "quota of 1.5 cores holds them back: use 1 thread,"),
        (0.12, None, 0.5, "note", "quota of 0.5 cores holds them back: use 1 thread,"),
        (0.60, 0.0, None, "note", "another guest of the host"),
        (0.60, 0.0, 8.0, "note", "another guest of the host"),
    ],
)
def test_cpu_share(share: float, others: float | None, quota: float | None, status: str, says: str) -> None:
    check = check_share(CpuShare(threads=4, share=share, others=others), 4, quota)
    assert check.status == status
    assert says in check.text


def test_ceilings_without_int8_and_on_a_busy_machine() -> None:
    quiet_machine = Ceilings(gmacs={"f32": 98.4, "i8": 391.0}, copy_gb_s=14.25, threads=2, others=0.02)
    assert check_ceilings(quiet_machine) == Check(
        name="ceilings", status="ok", text="f32 98, i8 391 GMAC/s, copy 14.2 GB/s, with 2 threads"
    )
    busy = check_ceilings(dataclasses.replace(quiet_machine, others=1.5))
    assert (busy.status, "while others used 1.5 cores" in busy.text) == ("note", True)
    floating = check_ceilings(dataclasses.replace(quiet_machine, gmacs={"f32": 98.4}))
    assert (floating.status, "INT8 layers run in float" in floating.text) == ("note", True)


def test_machine_limits() -> None:
    assert statuses(check_machine(machine())) == [("memory", "ok")]
    assert statuses(check_machine(machine(available_gib=None))) == []
    assert statuses(check_machine(machine(memory_limit_gib=0.5))) == [("memory", "note")]
    assert statuses(check_machine(machine(cpu_quota=2.5))) == [("quota", "note"), ("memory", "ok")]
    assert statuses(check_machine(machine(cpu_quota=4.0))) == [("memory", "ok")]
    assert statuses(check_machine(machine(numa_nodes=2, governors=("performance", "powersave")))) == [
        ("memory", "ok"),
        ("NUMA", "note"),
        ("clock", "note"),
    ]


def test_unused_gpu() -> None:
    assert statuses(check_gpu(machine(), [OPENVINO, ORT], frozenset({"onnxruntime"}), cuda=None)) == []
    (idle,) = check_gpu(machine(nvidia=True), [OPENVINO, ORT], frozenset({"onnxruntime"}), cuda=None)
    assert (idle.status, idle.text.endswith(GPU_INSTALL)) == ("note", True)
    (works,) = check_gpu(machine(nvidia=True), [ORT_GPU], frozenset(), cuda=True)
    assert (works.status, works.text) == ("ok", "an NVIDIA driver, and ONNX Runtime with CUDA")
    (fails,) = check_gpu(machine(nvidia=True), [ORT_GPU], frozenset(), cuda=False)
    assert (fails.status, "cannot start it" in fails.text) == ("note", True)
    (driver,) = check_gpu(machine(), [ORT_GPU], frozenset(), cuda=None)
    assert (driver.status, "no NVIDIA driver" in driver.text) == ("note", True)
    both = list(check_gpu(machine(), [ORT], frozenset({"onnxruntime", "onnxruntime-gpu"}), cuda=None))
    assert statuses(both) == [("onnxruntime", "note")]


def cache_check(folder: object, patch: pytest.MonkeyPatch) -> Check:
    patch.setenv("MUNTIN_CACHE", str(folder))
    return check_cache()


def test_writable_cache_is_left_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = tmp_path / "new" / "muntin"
    assert cache_check(new, monkeypatch) == Check(name="cache", status="ok", text=str(new))
    assert not (tmp_path / "new").exists()
    (tmp_path / "used" / "compiled" / "model").mkdir(parents=True, mode=0o700)
    (tmp_path / "used" / "compiled").chmod(0o700)
    assert cache_check(tmp_path / "used", monkeypatch).status == "ok"
    assert [place.name for place in (tmp_path / "used").rglob("*")] == ["compiled", "model"]


def test_cache_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    check = cache_check(tmp_path / "file" / "muntin", monkeypatch)
    assert (check.status, check.text.partition(",")[0]) == ("note", f"{tmp_path}/file/muntin/compiled must be a folder")
    assert "MUNTIN_CACHE" in check.text


@pytest.mark.skipif(os.name != "posix", reason="modes and links are POSIX's")
def test_cache_writable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "open" / "compiled"
    root.mkdir(parents=True)
    root.chmod(0o777)
    check = cache_check(tmp_path / "open", monkeypatch)
    assert (check.status, "that others cannot write (chmod go-w)" in check.text) == ("note", True)
    assert list(root.iterdir()) == []
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "compiled").symlink_to(tmp_path)
    assert cache_check(tmp_path / "linked", monkeypatch).status == "note"


def test_cache_without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    check = cache_check("~no such user/cache", monkeypatch)
    assert (check.status, "no home folder" in check.text) == ("note", True)
    assert examine(self_test=False).cache is None
