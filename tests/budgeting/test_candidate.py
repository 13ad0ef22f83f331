from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from model_helpers import answer, count, one_line
from muntin import load_compressed, save
from muntin.budgeting.candidate import CandidateTraining, CourseStage, apply_plan, course_stages, narrowed
from muntin.budgeting.forms.layer_forms import KEPT
from muntin.budgeting.forms.plans import Form, Plan
from muntin.compression.low_rank.factored_layers import FactoredConv2d, FactoredLinear
from muntin.compression.quantization.embeddings import QuantizedEmbedding
from muntin.compression.quantization.qat import QATConv2d, QATLinear
from muntin.compression.quantization.quantized_layers import QuantizedConv2d, QuantizedLinear
from muntin.errors import MuntinError
from muntin.models.eager import eager_copy
from muntin.training.config import CompressionConfig

PLAN = Plan(forms={"1": Form(None, 8), "4": Form(16, 4), "8": Form(32, 5), "10": Form(None, 16)})


def applied(digits: Any, plan: Plan = PLAN, training: CandidateTraining | None = None, **arguments: Any) -> nn.Module:
    base = narrowed(digits.model, plan.width, digits.calibration)
    return apply_plan(base, plan, digits.calibration, **course_of(training, digits.model, **arguments))


def course_of(training: CandidateTraining | None, teacher: nn.Module, **arguments: Any) -> dict[str, Any]:
    return {} if training is None else {"stages": training.stages, "train": partial(training.train, teacher=teacher, **arguments)}


def direct(steps: int, rate: float = 1e-3) -> tuple[CourseStage, ...]:
    return course_stages(CompressionConfig(), steps, rate)


def forms_of(model: nn.Module) -> dict[str, int]:
    return {name: module.bits for name, module in model.named_modules() if isinstance(module, QuantizedLinear | QuantizedConv2d)}


BITS = {"1": 8, "4.reduce": 4, "4.core": 4, "4.expand": 4, "8.reduce": 5, "8.expand": 5}


ROUNDED = {name: bits for name, bits in BITS.items() if bits < 8}
"""Layers whose weights are rounded without training; export rounds those of 8 bits."""


def check_forms(model: nn.Module, bits: dict[str, int]) -> None:
    assert forms_of(model) == bits
    factored = model.get_submodule("4"), model.get_submodule("8")
    assert isinstance(factored[0], FactoredConv2d) and factored[0].ranks == (16, 16)
    assert isinstance(factored[1], FactoredLinear) and factored[1].ranks == (32,)
    assert type(model.get_submodule("10")) is nn.Linear


def test_plan_without_training(digits: Any, tmp_path: Path) -> None:
    before = eager_copy(digits.model).state_dict()
    model = applied(digits)
    check_forms(model, ROUNDED)
    assert all(torch.equal(value, before[name]) for name, value in digits.model.state_dict().items())
    loaded = load_compressed(save(model, tmp_path / "model"), eager_copy(digits.model))
    assert torch.equal(answer(loaded, digits.validation[0]), answer(model, digits.validation[0]))


@pytest.mark.parametrize("labels", [False, True])
def test_plan_with_training(digits: Any, labels: bool) -> None:
    data: Any = digits.train if labels else [x for x, _ in digits.train]
    loss: Any = F.cross_entropy if labels else None
    seen: list[float] = []
    training = CandidateTraining(data=data, stages=direct(40, 2e-3), loss=loss)
    model = applied(digits, training=training, report=lambda step, value: seen.append(value))
    check_forms(model, BITS)
    assert len(seen) == 40 and not model.training
    coarse = Plan(forms=dict.fromkeys(PLAN.forms, Form(None, 2)))
    plain, trained = applied(digits, coarse), applied(digits, coarse, training=training)
    assert digits.evaluate(trained) > digits.evaluate(plain) + 0.05


def test_same_seed_same_model(digits: Any) -> None:
    training = CandidateTraining(data=digits.train, stages=direct(4), loss=F.cross_entropy)
    states = [torch.cat([value.flatten().float() for value in applied(digits, training=training, seed=seed).state_dict().values()])
              for seed in (1, 1, 2)]  # fmt: skip
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_model_without_gradients_is_trained(digits: Any) -> None:
    frozen = eager_copy(digits.model).requires_grad_(False)
    base = narrowed(frozen, 1.0, digits.calibration)
    training = CandidateTraining(data=[x for x, _ in digits.train], stages=direct(2))
    assert forms_of(apply_plan(base, PLAN, digits.calibration, **course_of(training, frozen))) == BITS


def test_narrower_model(digits: Any) -> None:
    base = narrowed(digits.model, 0.6, digits.calibration)
    assert count(base) <= 0.6 * count(digits.model)
    model = apply_plan(base, Plan(width=0.6, forms={"8": Form(None, 4)}), digits.calibration)
    assert forms_of(model) == {"8": 4}
    assert digits.evaluate(model) > 0.3


def test_kept_layers_keep_their_outputs(digits: Any) -> None:
    base = narrowed(digits.model, 0.7, digits.calibration, keep=["8", "embedding"])
    assert base.get_submodule("8").out_features == 64 and count(base) <= 0.7 * count(digits.model)


@pytest.mark.parametrize("training", [None, CandidateTraining(data=[{"input": torch.arange(50).reshape(10, 5)}], stages=direct(1))])
def test_forms_of_an_embedding(training: CandidateTraining | None) -> None:
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 8)).eval()
    batch = [{"input": torch.arange(50).reshape(10, 5)}]
    plans = [Plan(forms={"0": Form(None, bits), "1": Form(None, 8)}) for bits in (KEPT, 5)]
    kept, narrow = (apply_plan(model, plan, batch, **course_of(training, model)) for plan in plans)
    assert type(kept[0]) is nn.Embedding and type(narrow[0]) is QuantizedEmbedding and narrow[0].bits == 5  # type: ignore[index]
    assert all(type(one[1]) is (QuantizedLinear if training else nn.Linear) for one in (kept, narrow))  # type: ignore[index]


def test_plan_of_another_model(digits: Any) -> None:
    with pytest.raises(MuntinError) as error:
        applied(digits, Plan(forms={"head": Form(8, 4)}))
    assert "'head' is no Linear or Conv2d" in one_line(error)


def test_iterator_is_refused() -> None:
    with pytest.raises(MuntinError) as error:
        CandidateTraining(data=iter([1]), stages=direct(1))
    assert "give a list of batches or a DataLoader" in one_line(error)


def test_course_of_three_stages(digits: Any) -> None:
    """Ranks first, then 4 bits at most, then the plan's."""
    stages = course_stages(CompressionConfig(course="stages"), 10, 4e-4)
    assert [(stage.name, stage.steps) for stage in stages] == [("low-rank", 4), ("w4a8", 1), ("mixed", 5)]
    assert stages[0].final_learning_rate == stages[2].final_learning_rate == 0 and stages[1].final_learning_rate == 4e-4
    seen = list[tuple[str, dict[str, int]]]()

    def train(stage: CourseStage, model: nn.Module) -> None:
        seen.append((stage.name, {name: layer.bits for name, layer in model.named_modules() if isinstance(layer, QATLinear | QATConv2d)}))

    model = apply_plan(narrowed(digits.model, 1.0, digits.calibration), PLAN, digits.calibration, stages=stages, train=train)
    check_forms(model, BITS)
    assert seen == [("low-rank", {}), ("w4a8", {name: min(4, bits) for name, bits in BITS.items()}), ("mixed", BITS)]
    unfactored = Plan(forms={name: Form(None, form.bits) for name, form in PLAN.forms.items()})
    seen.clear()
    apply_plan(narrowed(digits.model, 1.0, digits.calibration), unfactored, digits.calibration, stages=stages, train=train)
    assert [name for name, _ in seen] == ["w4a8", "mixed"]
