from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from model_helpers import LiveBytes
from muntin.data import open_source
from muntin.data.items import class_counts
from muntin.errors import RecipeError
from muntin.images import IGNORED
from muntin.tasks.learning import LEARNING
from muntin.training.config import LossName
from muntin.training.fitting import fit
from muntin.training.loss import Loss, class_weights, loss_of
from muntin.training.recipe import load_recipe

LOSSES = get_args(LossName)


def segment_loss(scores: torch.Tensor, target: torch.Tensor, overlap: float, *, entropy: float = 1.0) -> torch.Tensor:
    return Loss(task="segment", overlap=overlap, entropy=entropy)(scores, target)


def example(seed: int, batch: int = 2, classes: int = 4, height: int = 5, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, classes, height, width, generator=generator)
    target = torch.randint(0, classes, (batch, height, width), generator=generator)
    target[torch.rand(batch, height, width, generator=generator) < 0.2] = IGNORED
    return scores, target


def naive_soft_iou(scores: torch.Tensor, target: torch.Tensor) -> float:
    """Soft IoU by loops in float64."""
    batch, classes, height, width = scores.shape
    both, either, present = [0.0] * classes, [0.0] * classes, [False] * classes
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                truth = int(target[b, y, x])
                if truth == IGNORED:
                    continue
                exponentials = [math.exp(float(s)) for s in scores[b, :, y, x]]
                for k in range(classes):
                    p = exponentials[k] / sum(exponentials)
                    both[k] += p * (truth == k)
                    either[k] += p + (truth == k) - p * (truth == k)
                    present[k] |= truth == k
    losses = [1 - (both[k] + 1) / (either[k] + 1) for k in range(classes) if present[k]]
    return sum(losses) / len(losses) if losses else 0.0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 2), classes=st.integers(2, 5), height=st.integers(1, 4), width=st.integers(1, 4))
def test_soft_iou_formula(seed: int, batch: int, classes: int, height: int, width: int) -> None:
    scores, target = example(seed, batch, classes, height, width)
    loss = float(segment_loss(scores, target, 1.0, entropy=0.0))
    assert loss == pytest.approx(naive_soft_iou(scores, target), abs=1e-5)
    assert 0 <= loss <= 1


def test_cross_entropy_mean() -> None:
    scores, target = example(1)
    counted = target != IGNORED
    naive = [-math.log(float(scores.softmax(1)[b, target[b, y, x], y, x])) for b, y, x in counted.nonzero().tolist()]
    assert float(segment_loss(scores, target, 0)) == pytest.approx(sum(naive) / len(naive), rel=1e-5)
    whole = float(segment_loss(scores, target, 0.5))
    assert whole == pytest.approx(sum(naive) / len(naive) + 0.5 * naive_soft_iou(scores, target), rel=1e-5)


def plain_loss(scores: torch.Tensor, target: torch.Tensor, overlap: float) -> torch.Tensor:
    """The loss by PyTorch's operations and autograd."""
    counted = (target != IGNORED).unsqueeze(1)
    p = scores.softmax(1) * counted
    truth = F.one_hot(target.masked_fill(target == IGNORED, 0), scores.shape[1]).permute(0, 3, 1, 2) * counted
    both, sizes = (p * truth).sum((0, 2, 3)), truth.sum((0, 2, 3))
    losses = 1 - (both + 1) / (p.sum((0, 2, 3)) + sizes - both + 1)
    entropy = F.cross_entropy(scores, target, ignore_index=IGNORED)
    return entropy + overlap * losses[sizes > 0].mean()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("overlap", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("seed", range(3))
def test_gradient_against_autograd(seed: int, overlap: float, layout: torch.memory_format) -> None:
    scores, target = example(seed, batch=3, classes=5, height=6, width=7)
    target[target == 4] = 1  # a class that is absent
    one, other = (scores.double().to(memory_format=layout).requires_grad_() for _ in range(2))
    loss, expected = segment_loss(one, target, overlap), plain_loss(other, target, overlap)
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()  # as a scaler of losses does
    (3 * expected).backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_sums_over_many_pixels() -> None:
    target = torch.zeros(1, 2048, 2048, dtype=torch.long)
    target[:, :100] = 1
    scores = torch.zeros(1, 2, 2048, 2048)
    scores[:, 0] = 3.0
    scores[:, 0, :100] = -3.0
    p = 1 / (1 + math.exp(-3.0))
    share = 100 / 2048
    expected = [1 - p * n / (p * n + (1 - p) * n + (1 - p) * (1 - n)) for n in (share, 1 - share)]
    assert float(segment_loss(scores, target, 1.0, entropy=0.0)) == pytest.approx(sum(expected) / 2, abs=2e-6)


def test_second_derivative() -> None:
    scores, target = example(6)
    (gradient,) = torch.autograd.grad(segment_loss(scores.requires_grad_(), target, 1).square(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_ignored_pixels() -> None:
    scores, target = example(2)
    ignored = (target == IGNORED).unsqueeze(1).expand_as(scores)
    assert 0 < ignored.sum() < ignored.numel()
    results = []
    for shift in (0.0, 30.0):
        moved = (scores + shift * torch.rand(scores.shape) * ignored).requires_grad_()
        loss = segment_loss(moved, target, 1)
        (gradient,) = torch.autograd.grad(loss, moved)
        assert not gradient[ignored].any()
        assert gradient[~ignored].any()
        results.append((loss, gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_no_pixel_that_counts() -> None:
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = segment_loss(scores, torch.full((2, 4, 4), IGNORED), 1)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == 0
    assert not gradient.any()  # NaN would be true here


def test_weight_of_a_rare_class() -> None:
    """40 of 1000 pixels are class 1: without them the overlap loss is a half, the cross-entropy a twenty-fifth."""
    target = torch.zeros(1, 10, 100, dtype=torch.long)
    target[0, 0, :40] = 1
    missed = torch.zeros(1, 2, 10, 100)
    missed[:, 0] = 20
    assert float(segment_loss(missed, target, 1.0, entropy=0.0)) == pytest.approx(0.5 * (1 - 1 / 41) + 0.5 * (1 - 961 / 1001), abs=1e-4)
    right = 20 * F.one_hot(target, 2).permute(0, 3, 1, 2).float()
    assert float(segment_loss(right, target, 1.0, entropy=0.0)) < 1e-4


def test_absent_class() -> None:
    scores, target = example(3, classes=3)
    target[target == 2] = 0
    alone = naive_soft_iou(scores, target)
    assert float(segment_loss(scores, target, 1.0, entropy=0.0)) == pytest.approx(alone, abs=1e-5)
    sure = torch.full((1, 3, 4, 4), -20.0)
    sure[:, 0] = 20
    assert float(segment_loss(sure, torch.zeros(1, 4, 4, dtype=torch.long), 1.0, entropy=0.0)) < 1e-4


@pytest.mark.parametrize("overlap", [0.0, 1.0])
def test_gradient_direction(overlap: float) -> None:
    scores, target = example(4)
    scores.requires_grad_()
    (gradient,) = torch.autograd.grad(segment_loss(scores, target, overlap), scores)
    for b, y, x in (target != IGNORED).nonzero().tolist():
        right = int(target[b, y, x])
        assert gradient[b, right, y, x] < 0
        assert int(gradient[b, :, y, x].argmin()) == right


def test_descent() -> None:
    scores, target = example(5)
    scores.requires_grad_()
    optimizer = torch.optim.SGD([scores], lr=5.0)
    first = float(segment_loss(scores.detach(), target, 1))
    for _ in range(300):
        optimizer.zero_grad()
        segment_loss(scores, target, 1).backward()
        optimizer.step()
    counted = target != IGNORED
    assert torch.equal(scores.argmax(1)[counted], target[counted])
    assert float(segment_loss(scores.detach(), target, 1)) < first / 5


def test_task_losses() -> None:
    scores, target = example(6)
    loss = Loss(task="segment", overlap=1)(scores.bfloat16(), target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, segment_loss(scores.bfloat16().float(), target, 1))
    classes = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 3.0]])
    truth = torch.tensor([0, 1])
    naive = [-math.log(math.exp(float(row[k])) / sum(math.exp(float(s)) for s in row)) for row, k in zip(classes, truth, strict=True)]
    assert float(Loss(task="classify", overlap=1)(classes, truth)) == pytest.approx(sum(naive) / 2, rel=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_distillation_against_kl_divergence(layout: torch.memory_format) -> None:
    scores, target = (torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(n)).to(memory_format=layout) for n in (0, 1))
    one, other = scores.clone().requires_grad_(), scores.double().requires_grad_()
    loss = LEARNING["segment"].mean_distance(one, target)
    expected = F.kl_div(other.log_softmax(1), target.double().softmax(1), reduction="sum") / (2 * 6 * 7)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(one.grad, other.grad.float() if other.grad is not None else None)


def test_distillation_ignored_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, expected, target = *(torch.randn(2, 5, 6, 7, generator=generator) for _ in range(2)), torch.zeros(2, 6, 7, dtype=torch.long)
    torch.testing.assert_close(
        LEARNING["segment"].mean_distance(scores, expected, target), LEARNING["segment"].mean_distance(scores, expected)
    )
    target[:, :4] = IGNORED
    scores.requires_grad_()
    loss = LEARNING["segment"].mean_distance(scores, expected, target)
    torch.testing.assert_close(loss, LEARNING["segment"].mean_distance(scores[:, :, 4:], expected[:, :, 4:]))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert not gradient[:, :, :4].any() and gradient[:, :, 4:].all()
    assert LEARNING["segment"].mean_distance(scores, expected, torch.full_like(target, IGNORED)).item() == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("distillation", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loss_within_memory(layout: torch.memory_format, distillation: float, dtype: torch.dtype) -> None:
    scores, target = example(1, batch=4, classes=12, height=40, width=30)
    scores = scores.to(dtype).to(memory_format=layout)
    teacher_scores = scores.flip(1).contiguous(memory_format=layout) if distillation else None

    def computed(memory: int | None) -> tuple[torch.Tensor, torch.Tensor, int]:
        given = scores.clone().requires_grad_()
        loss = Loss(task="segment", overlap=0.7, distillation=distillation, memory=memory)
        with LiveBytes() as live:
            value = loss(given, target, teacher_scores)
            (gradient,) = torch.autograd.grad(value, given)
        return value.detach(), gradient, live.peak - gradient.nbytes

    *expected, whole = computed(None)
    memory = whole // 8
    *results, peak = computed(memory)
    torch.testing.assert_close(results, expected, rtol=1e-12 if dtype is torch.float64 else 1e-2, atol=1e-16)
    assert peak <= memory + scores.shape[0] * 12 * 8


def test_distillation_of_equal_answers() -> None:
    scores = torch.randn(3, 4, requires_grad=True)
    loss = LEARNING["classify"].mean_distance(scores, scores.detach())
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == pytest.approx(0, abs=1e-6) and gradient.abs().max() < 1e-6


def test_distillation_of_restoration() -> None:
    assert float(LEARNING["restore"].mean_distance(torch.full((1, 3, 2, 2), 96.0), torch.full((1, 3, 2, 2), 32.0))) == 1.0


@pytest.mark.parametrize("memory", [None, 600])
def test_restore_loss(memory: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 256, (4, 3, 9, 7), generator=generator, dtype=torch.uint8)
    answer = (target + 30 * torch.randn(target.shape, generator=generator)).requires_grad_()
    teacher = (target + torch.randn(target.shape, generator=generator)).float()
    loss = Loss(task="restore", distillation=0.5, memory=memory)
    expected = (answer - target).abs().mean() / 64 + 0.5 * (answer - teacher).square().mean() / 64**2
    assert loss(answer, target, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    (given,) = torch.autograd.grad(loss(answer, target, teacher), answer)
    (wanted,) = torch.autograd.grad(expected, answer)
    torch.testing.assert_close(given, wanted)
    parts = [slice(0, 1), slice(1, 4)]
    sums = sum(loss.sums(answer[part], target[part], teacher[part]) for part in parts)
    totals = sum(loss.totals(target[part], 0) for part in parts)
    assert loss.value(sums, totals).item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.linear


# ---- focal, Dice, class weights ----

KINDS = {
    "focal": {"gamma": 2.0, "overlap": 0.7},
    "focal, a root": {"gamma": 0.5},
    "weights": {"weights": (0.2, 3.0, 1.0, 0.5, 7.0)},
    "weighted focal": {"gamma": 1.5, "weights": (0.2, 3.0, 1.0, 0.5, 7.0), "overlap": 1.0},
    "dice": {"dice": True, "overlap": 1.0, "entropy": 0.0},
    "dice and cross-entropy": {"dice": True, "overlap": 2.0},
}


def plain_value(loss: Loss, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss of a batch of maps by PyTorch's operations and autograd."""
    counted = target != IGNORED
    labels, p = target.masked_fill(~counted, 0), scores.softmax(1)
    truth = F.one_hot(labels, scores.shape[1]).permute(0, 3, 1, 2) * counted.unsqueeze(1)
    weights = torch.tensor(loss.weights or (1.0,) * scores.shape[1], dtype=scores.dtype)[labels] * counted
    p_true = p.gather(1, labels.unsqueeze(1)).squeeze(1)
    value = loss.entropy * (-weights * (1 - p_true) ** loss.gamma * p_true.log()).sum() / weights.sum()
    if loss.overlap:
        p = p * counted.unsqueeze(1)
        both, guessed, true = (p * truth).sum((0, 2, 3)), p.sum((0, 2, 3)), truth.sum((0, 2, 3))
        overlap = (2 * both + 1) / (guessed + true + 1) if loss.dice else (both + 1) / (guessed + true - both + 1)
        value = value + loss.overlap * (1 - overlap)[true > 0].mean()
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_other_losses_and_their_gradients_against_autograd(kind: str) -> None:
    scores, target = example(3, batch=3, classes=5, height=6, width=7)
    target[target == 4] = 1  # a class that is absent
    loss = Loss(task="segment", **KINDS[kind])  # type: ignore[arg-type]
    one, other = (scores.double().requires_grad_() for _ in range(2))
    value, expected = loss(one, target), plain_value(loss, other, target)
    torch.testing.assert_close(value, expected)
    for leaf, result in ((one, value), (other, expected)):
        result.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_other_losses_in_parts(kind: str) -> None:
    scores, target = example(4, batch=4, classes=5)
    loss = Loss(task="segment", **KINDS[kind])  # type: ignore[arg-type]
    parts = [slice(0, 1), slice(1, 4)]
    sums = torch.stack([loss.sums(scores[part].double(), target[part]) for part in parts]).sum(0)
    totals = torch.stack([loss.totals(target[part], 5 if loss.overlap else 0) for part in parts]).sum(0)
    torch.testing.assert_close(loss.value(sums, totals), loss(scores.double(), target))


def test_focal_loss_of_a_learned_pixel_is_finite() -> None:
    scores = torch.tensor([[100.0, -100.0], [-100.0, 100.0]]).view(1, 2, 2, 1).requires_grad_()
    target = torch.tensor([0, 0]).view(1, 2, 1)  # one certain and right, one certain and wrong
    Loss(task="segment", gamma=0.5)(scores, target).backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None and scores.grad.isfinite().all() and scores.grad.abs().sum() > 0


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_classify_with_weights_and_shares(gamma: float) -> None:
    generator = torch.Generator().manual_seed(5)
    scores, target = torch.randn(6, 3, generator=generator).double(), torch.tensor([0, 1, 2, 2, 1, 1])
    weights = (0.5, 1.0, 4.0)
    loss = Loss(task="classify", gamma=gamma, weights=weights)
    value, one_hot = loss(scores, target), F.one_hot(target, 3).double()
    torch.testing.assert_close(loss(scores, one_hot), value)
    if not gamma:
        torch.testing.assert_close(value, F.cross_entropy(scores, target, torch.tensor(weights).double()))
    mixed = 0.3 * one_hot + 0.7 * one_hot.roll(1, 0)
    torch.testing.assert_close(Loss(task="classify")(scores, mixed), F.cross_entropy(scores, mixed))


def test_class_weights_of_a_recipe(tmp_path: Path, write_tiny: Callable[..., Any]) -> None:
    tiny = write_tiny(tmp_path)
    recipe = load_recipe(tiny.recipe, ["training.class_weights=auto"])
    source = open_source(recipe.data, task=recipe.task, root=tiny.root)
    counts = class_counts(source.split("train"), 3, "segment")
    weights = class_weights(recipe.training, source)
    assert all(weight * number == pytest.approx(counts.sum() / 3) for weight, number in zip(weights, counts.tolist(), strict=True))
    given = load_recipe(tiny.recipe, ["training.class_weights={field: 3}"]).training
    assert class_weights(given, source) == (1.0, 3.0, 1.0)
    with pytest.raises(RecipeError, match="'cow', which is no class: the classes are sea, field, roof"):
        class_weights(load_recipe(tiny.recipe, ["training.class_weights={cow: 3}"]).training, source)
    with pytest.raises(RecipeError, match="class_weights with loss dice"):
        load_recipe(tiny.recipe, ["training.loss=dice", "training.class_weights=auto"])


def test_loss_of_a_recipe(tmp_path: Path, write_tiny: Callable[..., Any]) -> None:
    tiny = write_tiny(tmp_path)
    made = {name: loss_of(load_recipe(tiny.recipe, [f"training.loss={name}"]).training, task="segment") for name in LOSSES}
    assert made["cross-entropy"] == Loss(task="segment", overlap=1.0)
    assert made["focal"] == Loss(task="segment", overlap=1.0, gamma=2.0)
    assert made["dice"] == Loss(task="segment", overlap=1.0, entropy=0.0, dice=True)
    assert made["dice-cross-entropy"] == Loss(task="segment", overlap=1.0, dice=True)
    result = fit(load_recipe(tiny.recipe, ["training.loss=focal", "training.class_weights=auto", "training.steps=2"]), root=tiny.root,
                 directory=tmp_path / "run")  # fmt: skip
    assert any(note.startswith("class weights in the loss: sea ") for note in result.notes)
