"""Integer sums of the engines against numpy's; and that a wrong one is found, in a reference that errs and on kernels that saturate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from muntin.errors import DependencyError
from muntin.runtime.host.hardware import describe_hardware
from muntin.runtime.verification.exactness import RUNNERS, check_integers, provider_starts

FEATURES = set(describe_hardware()["features"])
SATURATES = {"avx2", "avx512f"} & FEATURES and not {"avx512_vnni", "avx_vnni"} & FEATURES


def plain(model: bytes, x: NDArray[np.float32]) -> tuple[Any, bool]:
    """The specification's own arithmetic, in float."""
    return ReferenceEvaluator(onnx.load_model_from_string(model)).run(None, {"x": x})[0], False


@pytest.mark.skipif(bool(SATURATES), reason="on this CPU engines may be wrong: the check is for that")
@pytest.mark.parametrize("engine", RUNNERS)
def test_exact_integers_on_this_machine(engine: str) -> None:
    checks = check_integers(RUNNERS[engine])
    assert len(checks) == len({check.layer for check in checks}) == 4
    assert all((check.wrong, check.error) == (0, 0) for check in checks), checks
    assert all(check.integer for check in checks), checks
    assert min(check.outputs for check in checks) > 1000


def test_reference_runner() -> None:
    checks = check_integers(plain)
    assert all((check.wrong, check.error, check.integer) == (0, 0, False) for check in checks), checks


def test_one_wrong_sum() -> None:
    def run(model: bytes, x: NDArray[np.float32]) -> tuple[Any, bool]:
        y, integer = plain(model, x)
        y.reshape(-1)[-1] += 2.0**-13 if y.ndim == 2 else 0  # a unit is an input's step of 2**-6 times a weight's of 2**-6 or 2**-7
        return y, integer

    product, odd, *convolutions = check_integers(run)
    assert (product.wrong, product.error) == (1, 1)
    assert (odd.wrong, odd.error) == (1, 0.5)
    assert all(check.wrong == 0 for check in convolutions)


def test_sum_that_is_not_finite() -> None:
    checks = check_integers(lambda model, x: (plain(model, x)[0] * np.float32("nan"), True))
    assert all((check.wrong, check.error) == (check.outputs, float("inf")) for check in checks)


@pytest.mark.skipif("avx512_vnni" not in FEATURES, reason="kernels that saturate are had by switching VNNI's off")
def test_saturating_kernels() -> None:
    code = """
import json
from muntin.runtime.verification.exactness import check_integers, run_openvino
print(json.dumps([[check.wrong, check.integer] for check in check_integers(run_openvino)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert all(wrong > 100 and integer for wrong, integer in json.loads(done.stdout))


def test_provider_starts() -> None:
    assert provider_starts("CPUExecutionProvider")


@pytest.mark.parametrize("engine", RUNNERS)
def test_engine_that_cannot_run_a_layer(engine: str) -> None:
    with pytest.raises(DependencyError, match=r"cannot run a small INT8 layer: install it again"):
        RUNNERS[engine](b"no model", np.zeros((2, 2), np.float32))
