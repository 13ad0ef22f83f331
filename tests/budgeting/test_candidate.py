from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from model_helpers import answer, count, one_line
from muntin import load_compressed, save
from muntin.budgeting.candidate import CandidateTraining, apply_plan, narrowed
from muntin.budgeting.forms.layer_forms import KEPT
from muntin.budgeting.forms.plans import Form, Plan
from muntin.compression.low_rank.factored_layers import FactoredConv2d, FactoredLinear
from muntin.compression.quantization.embeddings import QuantizedEmbedding
from muntin.compression.quantization.quantized_layers import QuantizedConv2d, QuantizedLinear
from muntin.errors import MuntinError
from muntin.models.eager import eager_copy

PLAN = Plan(forms={"1": Form(None, 8), "4": Form(16, 4), "8": Form(32, 5), "10": Form(None, 16)})


def applied(digits: Any, plan: Plan = PLAN, training: CandidateTraining | None = None, **arguments: Any) -> nn.Module:
    base = narrowed(digits.model, plan.width, digits.calibration)
    train = None if training is None else partial(training.train, teacher=digits.model, **arguments)
    return apply_plan(base, plan, digits.calibration, train=train)


def forms_of(model: nn.Module) -> dict[str, int]:
    return {name: module.bits for name, module in model.named_modules() if isinstance(module, QuantizedLinear | QuantizedConv2d)}


BITS = {"1": 8, "4.reduce": 4, "4.core": 4, "4.expand": 4, "8.reduce": 5, "8.expand": 5}


def check_forms(model: nn.Module) -> None:
    assert forms_of(model) == BITS
    factored = model.get_submodule("4"), model.get_submodule("8")
    assert isinstance(factored[0], FactoredConv2d) and factored[0].ranks == (16, 16)
    assert isinstance(factored[1], FactoredLinear) and factored[1].ranks == (32,)
    assert type(model.get_submodule("10")) is nn.Linear


def test_plan_without_training(digits: Any, tmp_path: Path) -> None:
    before = eager_copy(digits.model).state_dict()
    model = applied(digits)
    check_forms(model)
    assert all(torch.equal(value, before[name]) for name, value in digits.model.state_dict().items())
    loaded = load_compressed(save(model, tmp_path / "model"), eager_copy(digits.model))
    assert torch.equal(answer(loaded, digits.validation[0]), answer(model, digits.validation[0]))


@pytest.mark.parametrize("labels", [False, True])
def test_plan_with_training(digits: Any, labels: bool) -> None:
    data: Any = digits.train if labels else [x for x, _ in digits.train]
    loss: Any = F.cross_entropy if labels else None
    seen: list[float] = []
    training = CandidateTraining(data=data, steps=40, loss=loss, learning_rate=2e-3)
    model = applied(digits, training=training, report=lambda step, value: seen.append(value))
    check_forms(model)
    assert len(seen) == 40 and not model.training
    coarse = Plan(forms=dict.fromkeys(PLAN.forms, Form(None, 2)))
    plain, trained = applied(digits, coarse), applied(digits, coarse, training=training)
    assert digits.evaluate(trained) > digits.evaluate(plain) + 0.05


def test_same_seed_same_model(digits: Any) -> None:
    training = CandidateTraining(data=digits.train, steps=4, loss=F.cross_entropy)
    states = [torch.cat([value.flatten().float() for value in applied(digits, training=training, seed=seed).state_dict().values()])
              for seed in (1, 1, 2)]  # fmt: skip
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_model_without_gradients_is_trained(digits: Any) -> None:
    frozen = eager_copy(digits.model).requires_grad_(False)
    base = narrowed(frozen, 1.0, digits.calibration)
    training = CandidateTraining(data=[x for x, _ in digits.train], steps=2)
    assert forms_of(apply_plan(base, PLAN, digits.calibration, train=partial(training.train, teacher=frozen))) == BITS


def test_narrower_model(digits: Any) -> None:
    base = narrowed(digits.model, 0.6, digits.calibration)
    assert count(base) <= 0.6 * count(digits.model)
    model = apply_plan(base, Plan(width=0.6, forms={"8": Form(None, 4)}), digits.calibration)
    assert forms_of(model) == {"1": 8, "4": 8, "8": 4, "10": 8}
    assert digits.evaluate(model) > 0.3


def test_kept_layers_keep_their_outputs(digits: Any) -> None:
    base = narrowed(digits.model, 0.7, digits.calibration, keep=["8", "embedding"])
    assert base.get_submodule("8").out_features == 64 and count(base) <= 0.7 * count(digits.model)


@pytest.mark.parametrize("training", [None, CandidateTraining(data=[{"input": torch.arange(50).reshape(10, 5)}], steps=1)])
def test_forms_of_an_embedding(training: CandidateTraining | None) -> None:
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 8)).eval()
    batch = [{"input": torch.arange(50).reshape(10, 5)}]
    train = None if training is None else partial(training.train, teacher=model)
    plans = [Plan(forms={"0": Form(None, bits), "1": Form(None, 8)}) for bits in (KEPT, 5)]
    kept, narrow = (apply_plan(model, plan, batch, train=train) for plan in plans)
    assert type(kept[0]) is nn.Embedding and type(narrow[0]) is QuantizedEmbedding and narrow[0].bits == 5  # type: ignore[index]
    assert all(type(one[1]) is QuantizedLinear for one in (kept, narrow))  # type: ignore[index]


def test_plan_of_another_model(digits: Any) -> None:
    with pytest.raises(MuntinError) as error:
        applied(digits, Plan(forms={"head": Form(8, 4)}))
    assert "'head' is no Linear or Conv2d" in one_line(error)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data": iter([1]), "steps": 1}, "give a list of batches or a DataLoader"),
        ({"data": [], "steps": 0}, "steps=0"),
        ({"data": [], "steps": 1, "learning_rate": math.inf}, "learning_rate=inf"),
    ],
)
def test_training_that_is_refused(values: Any, words: str) -> None:
    with pytest.raises(MuntinError) as error:
        CandidateTraining(**values)
    assert words in one_line(error)
