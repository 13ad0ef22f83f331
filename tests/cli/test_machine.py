"""`muntin doctor`, on this machine, on a healthy one and with faults planted: a busy neighbour, too many threads, kernels that saturate."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muntin.runtime.host.hardware import describe_hardware

Call = Callable[..., Any]

FEATURES = set(describe_hardware()["features"])
SPIN = """
import os, time
os.sched_setaffinity(0, {%d})
print("busy", flush=True)
end = time.time() + 120
while time.time() < end:
    pass
"""


def checks(document: Any, name: str) -> list[dict[str, str]]:
    return [check for check in document["checks"] if check["name"] == name]


def test_doctor_quick(call: Call) -> None:
    document = call("doctor", "--quick", "--json").document()
    assert document["machine"]["cpu"]
    assert document["machine"]["physical_cores"] == document["threads"]
    assert {engine["name"]: bool(engine["version"]) for engine in document["engines"]} == {"openvino": True, "onnxruntime": True}
    assert {extra["name"] for extra in document["extras"]} >= {"train", "demo"}
    assert (document["ceilings"], document["share"], document["integers"], document["problems"]) == (None, None, {}, [])
    answer = call("doctor", "--quick")
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["machine", "CPU features", "software", "environment", "checks"]
    assert any(line.split()[:2] == ["[train]", "complete"] for line in lines)
    assert any(line.split()[:2] == ["ok", "engines:"] for line in lines)
    assert "ceilings" not in answer.out


def test_doctor_layout(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lines = call("doctor", "--quick").out.splitlines()
    start, end = lines.index("environment"), lines.index("checks")
    rows = {line.split()[0]: line for line in lines[start + 1 : end]}
    column = rows["OMP_NUM_THREADS"].index("1")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in rows.values())
    software = lines[lines.index("software") + 1 : start]
    first = next(n for n, line in enumerate(software) if line.split()[0] == "packages")
    last = next(n for n, line in enumerate(software) if line.split()[0].startswith("["))
    assert max(map(len, software[first:last])) <= 80
    words = " ".join(" ".join(software[first:last]).split()[1:]).split(", ")
    assert all(len(word.split()) == 2 for word in words)
    assert not any(line.endswith(name) for line in software[first:last] for name in ("numpy", "torch", "torchvision", "timm"))


BRIEF = f"import sys; sys.path.append({str(Path(__file__).parents[1])!r}); from brief_ceilings import brief; brief()"
"""Python that shortens a doctor's measurements, of which no test judges the figures."""


@pytest.mark.slow
def test_doctor_self_test_and_threads(call_process: Call) -> None:
    answer = call_process("doctor", "--threads", "64", "--json", before=BRIEF, env=os.environ | {"OMP_NUM_THREADS": "65"})
    if "avx512_vnni" not in FEATURES and answer.code == 1:
        pytest.skip("this CPU's INT8 sums are wrong, which the test of saturating kernels reads")
    document = answer.document()
    cores = document["machine"]["physical_cores"]
    if cores < 64:
        texts = [(check["status"], check["text"]) for check in checks(document, "threads")]
        assert ("note", f"OMP_NUM_THREADS=65 is more than the {cores} usable") in [(s, t.partition(" physical")[0]) for s, t in texts]
        assert ("note", f"threads=64 is more than the {cores} usable") in [(s, t.partition(" physical")[0]) for s, t in texts]
    assert document["environment"]["OMP_NUM_THREADS"] == "65"
    assert document["threads"] == 64
    assert document["ceilings"]["threads"] == document["share"]["threads"] == min(64, cores)
    assert document["ceilings"]["gmacs"]["f32"] > 0
    assert 0 < document["share"]["share"] <= 1
    assert set(document["integers"]) == {"openvino", "onnxruntime"}
    assert all(layer["wrong"] == 0 for layers in document["integers"].values() for layer in layers)
    assert checks(document, "INT8 in openvino")[0]["status"] == "ok"


@pytest.mark.soak
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="affinity and /proc/stat are Linux's")
def test_doctor_names_a_busy_process(call: Call) -> None:
    cpu = min(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", SPIN % cpu], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "busy\n"
            answer = call("doctor")
        finally:
            process.kill()
    (line,) = (line for line in answer.out.splitlines() if " contention: " in line)
    assert line.split()[0] == "note"
    assert "other processes use" in line
    assert "stop other programs" in line
    assert answer.code == 0 or "wrong integers" in answer.err


@pytest.mark.slow
@pytest.mark.skipif("avx512_vnni" not in FEATURES, reason="kernels that saturate are had by switching VNNI's off")
def test_doctor_with_wrong_integers(call_process: Call) -> None:
    answer = call_process("doctor", before=BRIEF, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    text = answer.mistake()
    assert text.startswith("INT8 in openvino: wrong integers: ")
    assert 'unset ONEDNN_MAX_CPU_ISA=AVX2, or give engine="onnxruntime", whose integers are exact here' in text
    words = [line.split() for line in answer.out.splitlines()]
    assert ["problem", "INT8", "in", "openvino:"] in [line[:4] for line in words]
    assert ["ok", "INT8", "in", "onnxruntime:"] in [line[:4] for line in words]


def test_doctor_without_engines(call_process: Call, tmp_path: Path) -> None:
    for name in ("openvino", "onnxruntime"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    before = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})"
    answer = call_process("doctor", "--quick", "--json", before=before)
    assert answer.mistake().startswith("engines: no engine, so nothing can run: openvino cannot be loaded: libgomp.so.1")
    assert '"no engine, so nothing can run: ' in answer.out
