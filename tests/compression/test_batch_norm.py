from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import muntin
from muntin.compression import fold_batch_norms


def trained_norms(model: nn.Module) -> nn.Module:
    """Statistics and weights as training leaves them: not the identity."""
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
def test_the_answer_stays_and_the_norms_go(name: str) -> None:
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


def test_a_model_in_double_precision_is_folded() -> None:
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


def test_what_is_used_elsewhere_too_is_left_as_it_was() -> None:
    model = trained_norms(Shared())
    images = torch.randint(0, 256, (1, 3, 8, 8)).float()
    with torch.no_grad():
        before = model(images)
        changes = fold_batch_norms(model, images)
        assert torch.equal(model(images), before)
    assert [change.kept for change in changes] == [True] and "elsewhere" in changes[0].reason


def test_a_convolution_that_is_called_twice_is_left_alone() -> None:
    model = trained_norms(Twice())
    images = torch.randint(0, 256, (1, 3, 8, 8)).float()
    with torch.no_grad():
        before = model(images)
        assert fold_batch_norms(model, images) == []
        assert torch.equal(model(images), before)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="eval"):
        fold_batch_norms(nn.BatchNorm2d(3), torch.zeros(1, 3, 4, 4))
