from __future__ import annotations

import pytest
import torch

from muntin.errors import DependencyError
from muntin.training.precision import MIN_GAIN, TrainingPrecision, bf16_gain, cpu_computes_bf16, resolve_precision


def product_dtype(precision: TrainingPrecision) -> torch.dtype:
    with precision.autocast():
        return torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)).dtype


def test_fp32() -> None:
    precision = resolve_precision("fp32", "cpu")
    assert (precision.name, precision.dtype) == ("fp32", None)
    assert product_dtype(precision) == torch.float32


@pytest.mark.parametrize("gain", [MIN_GAIN + 0.1, MIN_GAIN - 0.1])
def test_auto_by_measured_gain(gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.training.precision.bf16_gain", lambda: gain)
    precision = resolve_precision("auto", "cpu")
    expected = torch.bfloat16 if cpu_computes_bf16() and gain > MIN_GAIN else None
    assert precision.dtype == expected
    assert product_dtype(precision) == (expected or torch.float32)
    assert "BF16" in precision.reason


def test_pytorch_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking() -> bool:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_is_mkldnn_bf16_supported'")  # as of such a build

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lacking)
    assert not cpu_computes_bf16()


def test_measured_gain() -> None:
    assert 0.02 < bf16_gain() < 50
    assert bf16_gain() == bf16_gain()  # once a process


@pytest.mark.parametrize("gain", [10.0, 0.1])
@pytest.mark.parametrize("begun", ["fp32", "bf16"])
def test_resumed_run(begun: str, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.training.precision.bf16_gain", lambda: gain)
    precision = resolve_precision("auto", "cpu", begun=begun)
    assert precision.name == (begun if cpu_computes_bf16() else "fp32")
    assert resolve_precision("fp32", "cpu", begun=begun).name == "fp32"


def test_unsupported_types() -> None:
    with pytest.raises(DependencyError, match="write auto, bf16 or fp32") as error:
        resolve_precision("fp16", "cpu")
    assert "\n" not in str(error.value)
    if cpu_computes_bf16():
        assert resolve_precision("bf16", "cpu").dtype == torch.bfloat16
    else:
        with pytest.raises(DependencyError, match="write auto or fp32"):
            resolve_precision("bf16", "cpu")


def test_autocast_block() -> None:
    precision = TrainingPrecision(name="bf16", device="cpu", dtype=torch.bfloat16, reason="test")
    assert product_dtype(precision) == torch.bfloat16
    assert torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "scales"), [(torch.float16, True), (torch.bfloat16, False), (None, False)])
def test_loss_scaler(dtype: torch.dtype | None, scales: bool) -> None:
    scaler = TrainingPrecision(name="x", device="cpu", dtype=dtype, reason="test").scaler()
    assert scaler.is_enabled() == scales
    loss = torch.tensor(2.0)
    assert (float(scaler.scale(loss)) > 2) == scales
