from __future__ import annotations

import pytest
import torch
from torch import nn

from muntin.errors import DependencyError, RecipeError
from muntin.models import create_model
from muntin.training.precision import PAYS, Precision, bf16_gain, check_maps, cpu_computes_bf16, resolve_precision


def product_dtype(precision: Precision) -> torch.dtype:
    with precision.autocast():
        return torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)).dtype


def test_fp32_stays_fp32() -> None:
    precision = resolve_precision("fp32", "cpu")
    assert (precision.name, precision.dtype) == ("fp32", None)
    assert product_dtype(precision) == torch.float32


@pytest.mark.parametrize("gain", [PAYS + 0.1, PAYS - 0.1])
def test_auto_is_what_is_faster_here_and_says_why(gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.training.precision.bf16_gain", lambda: gain)
    precision = resolve_precision("auto", "cpu")
    wanted = torch.bfloat16 if cpu_computes_bf16() and gain > PAYS else None
    assert precision.dtype == wanted
    assert product_dtype(precision) == (wanted or torch.float32)
    assert "BF16" in precision.reason


def test_pytorch_without_onednn_computes_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking() -> bool:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_is_mkldnn_bf16_supported'")  # as of such a build

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lacking)
    assert not cpu_computes_bf16()


def test_what_is_faster_is_measured() -> None:
    assert 0.02 < bf16_gain() < 50
    assert bf16_gain() == bf16_gain()  # once a process


@pytest.mark.parametrize("gain", [10.0, 0.1])
@pytest.mark.parametrize("begun", ["fp32", "bf16"])
def test_a_run_goes_on_as_it_was_begun(begun: str, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.training.precision.bf16_gain", lambda: gain)
    precision = resolve_precision("auto", "cpu", begun=begun)
    assert precision.name == (begun if cpu_computes_bf16() else "fp32")
    assert resolve_precision("fp32", "cpu", begun=begun).name == "fp32"


def test_a_type_that_the_hardware_lacks_is_refused_in_one_line() -> None:
    with pytest.raises(DependencyError, match="write auto, bf16 or fp32") as error:
        resolve_precision("fp16", "cpu")
    assert "\n" not in str(error.value)
    if cpu_computes_bf16():
        assert resolve_precision("bf16", "cpu").dtype == torch.bfloat16
    else:
        with pytest.raises(DependencyError, match="write auto or fp32"):
            resolve_precision("bf16", "cpu")


def test_autocast_ends_with_its_block() -> None:
    precision = Precision(name="bf16", device="cpu", dtype=torch.bfloat16, reason="test")
    assert product_dtype(precision) == torch.bfloat16
    assert torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "scales"), [(torch.float16, True), (torch.bfloat16, False), (None, False)])
def test_only_fp16_scales_its_loss(dtype: torch.dtype | None, scales: bool) -> None:
    scaler = Precision(name="x", device="cpu", dtype=dtype, reason="test").scaler()
    assert scaler.is_enabled() == scales
    loss = torch.tensor(2.0)
    assert (float(scaler.scale(loss)) > 2) == scales


BF16 = Precision(name="bf16", device="cpu", dtype=torch.bfloat16, reason="for this test")


def test_where_a_kernel_exceeds_its_map_training_is_in_fp32() -> None:
    model = create_model("hybrid-xs", task="classify").train()
    precision = check_maps(model, BF16, crop=16, channels=3, asked="auto")
    assert (precision.name, precision.dtype) == ("fp32", None)
    assert precision.reason.startswith("at data.crop 16 the 3x3 convolution ") and "sees maps of 1x1, where" in precision.reason
    assert check_maps(model, BF16, crop=32, channels=3, asked="auto") is BF16
    assert model.training
    with pytest.raises(
        RecipeError, match=r"^training\.precision bf16: at data\.crop 16 the 3x3 .*: write auto or fp32, or take larger crops$"
    ):
        check_maps(model, BF16, crop=16, channels=3, asked="bf16")


def test_a_convolution_may_be_called_by_keyword() -> None:
    class ByKeyword(nn.Conv2d):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().__call__(input=x)
            return out

    assert check_maps(ByKeyword(3, 4, 3, padding=8, dilation=8), BF16, crop=8, channels=3, asked="auto").name == "fp32"


def test_dilation_counts_and_other_types_are_not_looked_at() -> None:
    wide = nn.Conv2d(3, 4, 3, padding=8, dilation=8)
    assert check_maps(wide, BF16, crop=8, channels=3, asked="auto").name == "fp32"
    assert check_maps(wide, BF16, crop=9, channels=3, asked="auto") is BF16
    fp32 = resolve_precision("fp32", "cpu")
    assert check_maps(wide, fp32, crop=16, channels=3, asked="fp32") is fp32


def test_the_gradients_that_are_taken_are_right_on_small_maps() -> None:
    """What it is for: in BF16 the weights of this model's convolution over a map of 1x1 had another gradient each time, or none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, 2, 1))
    images = torch.randn(4, 3, 1, 1)
    precision = check_maps(model, BF16, crop=1, channels=3, asked="auto")
    wanted = torch.autograd.grad(model.double()(images.double()).sum(), list(model.parameters()))
    model.float()
    for _ in range(8):
        dirt = [torch.full((size,), torch.nan) for size in (1024, 4096, 16384, 65536) * 4]
        del dirt
        with precision.autocast():
            loss = model(images).float().sum()
        for found, due in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
            torch.testing.assert_close(found.double(), due, rtol=1e-4, atol=1e-5)
