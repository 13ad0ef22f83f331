"""Ceilings: that the right kernels are timed. How fast they are is nobody's to assert."""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from muntin.errors import DataError
from muntin.runtime.engines.openvino.compiled import capabilities, executed_products
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.host.signal_stack import signal_stack_kept
from muntin.runtime.profiling import ceilings
from muntin.runtime.profiling.ceilings import (
    PRODUCT_PRECISIONS,
    Kind,
    measure_ceilings,
    measure_copy,
    measure_product,
    product_graph,
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of a call, and little memory to copy."""
    for name, value in (("_REPEATS", 1), ("_BLOCK", 2), ("_COPY_ROUNDS", 2), ("_copy_bytes", lambda: 32 << 20)):
        monkeypatch.setattr(ceilings, name, value)


@pytest.fixture(scope="module")
def core() -> Any:
    return openvino.Core()


def test_ceilings_of_every_precision(core: Any, signal_stack: Any) -> None:
    before = signal_stack()
    measured = measure_ceilings(threads=1, seconds=0.02)
    assert signal_stack() == before
    assert "f32" in measured.gmacs
    assert set(measured.gmacs) == {name for name, (capability, _, _) in PRODUCT_PRECISIONS.items() if capability in capabilities(core)}
    assert all(0 < rate < 1e6 for rate in measured.gmacs.values())
    assert measured.copy_gb_s > 0
    assert measured.threads == 1
    assert measured.others is None or measured.others >= 0
    with pytest.raises(FrozenInstanceError):
        measured.threads = 2  # type: ignore[misc]


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_ceiling_of_a_missing_precision(core: Any, precision: str) -> None:
    """OpenVINO runs an FP16 hint in BF16 or FP32 where there is no FP16, and says nothing."""
    has = PRODUCT_PRECISIONS[precision][0] in capabilities(core)
    rate = measure_product(core, "MatMul", precision, threads=1, seconds=0.01)
    assert (rate is not None) == has


@pytest.mark.parametrize("kind", ["MatMul", "Conv"])
@pytest.mark.parametrize("integer", [False, True])
def test_precision_of_the_products(core: Any, kind: Kind, integer: bool) -> None:
    model = core.read_model(model=product_graph(kind, 32, integer=integer), weights=b"")
    with signal_stack_kept():
        products = executed_products(core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model())
    assert len(products) == 2
    assert PRODUCT_PRECISIONS["i8" if integer else "f32"][2].issuperset(products.values())


@pytest.mark.parametrize("integer", [False, True])
def test_values_keep_their_size(integer: bool) -> None:
    """Otherwise the second product would multiply zeros, infinities or saturated integers, which some CPUs do faster or slower."""
    x = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    (y,) = ReferenceEvaluator(product_graph("MatMul", 64, integer=integer)).run(None, {"x": x})
    assert 0.7 < y.std() / x.std() < 1.4


@pytest.mark.parametrize("threads", [1, 3])
def test_measure_copy(threads: int) -> None:
    assert 0 < measure_copy(threads, 0.01) < 1e5


@pytest.mark.parametrize("arguments", [{"threads": 0}, {"threads": "two"}, {"seconds": 0}, {"seconds": float("nan")}])
def test_wrong_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"^(threads|seconds)=.*: give a "):
        measure_ceilings(**arguments)


def test_copy_thread_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, full = itertools.count(), np.full

    def scarce(*given: Any, **more: Any) -> Any:
        if next(calls) == 2:
            raise MemoryError("no more")
        return full(*given, **more)

    monkeypatch.setattr("muntin.runtime.profiling.ceilings.np.full", scarce)
    with pytest.raises(MemoryError, match="no more"):
        measure_copy(2, 0.01)
