from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import muntin
from muntin.compression import Change, fold_batch_norms
from muntin.compression.equivalent.batch_norm import _fold, apply_folds
from muntin.errors import MuntinError


def trained_norms(model: nn.Module) -> nn.Module:
    """Give the norms random statistics and weights."""
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "timm:resnet10t", "torchvision:squeezenet1_1"])
def test_folding_foreign_models(name: str) -> None:
    model = trained_norms(muntin.create_model(name, task="classify", classes=5))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    images = torch.randint(0, 256, (2, 3, 64, 64)).float()
    with torch.no_grad():
        before = model(images)
        changes = fold_batch_norms(model, images)
        after = model(images)
    assert len(changes) == norms and not any(change.kept for change in changes)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    assert fold_batch_norms(model, images) == []


def test_double_precision() -> None:
    model = trained_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).double()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        before = model(images.double())
        assert [change.kept for change in fold_batch_norms(model, images)] == [False]
        torch.testing.assert_close(model(images.double()), before)


class Shared(nn.Module):
    """The convolution's output is read by its norm and by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.norm(y) + y
        return out


class Twice(nn.Module):
    """One convolution, called twice, with a norm after the second call only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(self.conv(x)))
        return out


def test_convolution_called_twice() -> None:
    model = trained_norms(Twice())
    images = torch.randint(0, 256, (1, 3, 8, 8)).float()
    with torch.no_grad():
        before = model(images)
        assert fold_batch_norms(model, images) == []
        assert torch.equal(model(images), before)


class Standardised(nn.Sequential):
    """Normalises each picture by its own deviation: NaN for a black one."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward((x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True))
        return out


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(input=self.conv(input=x))
        return out


def assert_folded(model: nn.Module, batch: Tensor, kept: dict[str, bool]) -> list[Change]:
    """Fold; check the kept norms and that the answer is the same."""
    images = torch.randint(0, 256, (2, 3, 12, 12)).float()
    with torch.no_grad():
        before = model(images)
        changes = fold_batch_norms(model, batch)
        torch.testing.assert_close(model(images), before, rtol=1e-3, atol=1e-4)
    assert {change.layer: change.kept for change in changes} == kept
    for name, stays in kept.items():
        assert isinstance(model.get_submodule(name), nn.BatchNorm2d) == stays
    return changes


def test_black_picture_and_nan() -> None:
    assert_folded(trained_norms(Standardised(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), torch.zeros(2, 3, 12, 12), {"1": False})


def test_answer_not_finite() -> None:
    model = trained_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[0].bias.data.fill_(float("nan"))  # type: ignore[union-attr,operator]
    (change,) = fold_batch_norms(model, torch.rand(1, 3, 8, 8))
    assert change.kept and change.reason.startswith("the model's answer is NaN or infinite")


def test_calls_by_keyword() -> None:
    assert_folded(trained_norms(ByKeyword()), torch.rand(1, 3, 12, 12) * 255, {"norm": False})


def test_norm_behind_inplace_operation() -> None:
    """ReLU changes the convolution's output in place."""
    model = trained_norms(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
    )
    assert_folded(model, torch.rand(1, 3, 12, 12) * 255, {"1": False})
    assert isinstance(model[4], nn.BatchNorm2d)


def test_only_changing_pairs_are_kept() -> None:
    def unit(inputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

    shared = Shared()
    model = trained_norms(nn.Sequential(unit(3), unit(3), unit(3), shared, nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)), unit(3)))
    owned = shared.conv.weight
    kept = {"0.1": False, "1.1": False, "2.1": False, "3.norm": True, "4.1": False, "5.1": False}
    changes = assert_folded(model, torch.rand(1, 3, 12, 12) * 255, kept)
    assert shared.conv.weight is owned and "elsewhere" in changes[3].reason


def test_shared_weight_is_kept() -> None:
    first, second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
    second.weight = first.weight
    own = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    model = trained_norms(nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU(), second, nn.BatchNorm2d(3), *own))
    changes = assert_folded(model, torch.rand(1, 3, 12, 12) * 255, {"1": True, "4": True, "6": False})
    reasons = {change.layer: change.reason for change in changes if change.kept}
    assert reasons == dict.fromkeys("14", "its convolution shares its weights with another one: folding would separate them")
    assert second.weight is first.weight


def test_apply_folds_without_running_the_model() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), nn.BatchNorm2d(4)
        )

    model, other = trained_norms(make()), make().eval()
    images = torch.rand(1, 3, 12, 12) * 255
    norms = [change.layer for change in fold_batch_norms(model, images)]
    apply_folds(other, norms, model.state_dict())
    other.load_state_dict(model.state_dict())
    assert norms == ["1"] and torch.equal(other(images), model(images))
    with pytest.raises(MuntinError, match="fold: '0' is no BatchNorm2d of the model: build the model"):
        apply_folds(other, ["0"], {})


def test_training_mode() -> None:
    with pytest.raises(ValueError, match="eval"):
        fold_batch_norms(nn.BatchNorm2d(3), torch.zeros(1, 3, 4, 4))


def mixed() -> nn.Sequential:
    """A model in 16 bits with a norm in FP32."""
    model = trained_norms(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    for layer in (model[0], model[3]):
        layer.bfloat16()
    assert isinstance(model, nn.Sequential)
    return model


def test_mixed_precision() -> None:
    model, images = mixed(), torch.randint(0, 256, (2, 3, 16, 16)).float()
    with torch.no_grad():
        before = model(images.bfloat16())
        (change,) = fold_batch_norms(model, images)
        after = model(images.bfloat16())
    assert "or rounding in 16 bits differs" in change.reason if change.kept else isinstance(model[1], nn.Identity)
    assert model[0].weight.dtype == torch.bfloat16 and after.dtype == before.dtype
    assert (after - before).float().std() < 0.03 * before.float().std()
    conv, norm = nn.Conv2d(3, 8, 3).bfloat16(), nn.BatchNorm2d(8)
    _fold(conv, norm)
    assert conv.weight.dtype == torch.bfloat16 and conv.bias is not None and conv.bias.dtype == torch.bfloat16


def test_model_restored_after_an_interruption() -> None:
    model, images = trained_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), torch.rand(1, 3, 8, 8) * 255
    weight, norm, calls = model[0].weight, model[1], list[int]()

    def interrupted(*given: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = model[0].register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        fold_batch_norms(model, images)
    handle.remove()
    assert model[0].weight is weight and model[1] is norm and model[0].bias is not None
