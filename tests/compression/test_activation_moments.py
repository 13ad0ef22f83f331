"""Moments of inputs and sensitivity of the answer. Axes: N rows, B images, C channels, H W map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muntin.compression import activation_moments as moments
from muntin.compression.activation_moments import answer_sensitivity, input_moments
from muntin.errors import MuntinError


class TwoLinears(nn.Module):
    """A nonlinear model with a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def test_moment_over_batches() -> None:
    model, batches = TwoLinears().double(), [torch.randn(5, 7, 4).double(), torch.randn(3, 7, 4).double()]
    moments_by_name = input_moments(model, batches, linears(model))
    rows_NI = torch.cat([batch.reshape(-1, 4) for batch in batches])
    assert torch.allclose(moments_by_name["first"].matrix, rows_NI.T @ rows_NI / len(rows_NI))
    assert moments_by_name["first"].matrix.dtype == torch.float64
    assert moments_by_name["first"].positions == moments_by_name["second"].positions == 7
    assert "idle" not in moments_by_name


def test_convolution_moment() -> None:
    model, x_BCHW = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1)), torch.randn(2, 3, 9, 8)
    moments_by_name = input_moments(model, [x_BCHW], {"0": model[0]})["0"]
    rows_NI = x_BCHW.permute(0, 2, 3, 1).reshape(-1, 3).double()
    assert torch.allclose(moments_by_name.matrix, rows_NI.T @ rows_NI / len(rows_NI))
    assert moments_by_name.positions == 5 * 4


def test_strided_1x1_moment() -> None:
    model, x_BCHW = nn.Sequential(nn.Conv2d(3, 5, 1, 2)), torch.randn(2, 3, 8, 8)
    rows_NI = x_BCHW[:, :, ::2, ::2].permute(0, 2, 3, 1).reshape(-1, 3).double()
    assert torch.allclose(input_moments(model, [x_BCHW], {"0": model[0]})["0"].matrix, rows_NI.T @ rows_NI / len(rows_NI))


def test_sampled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(4000, 3)
    whole = input_moments(model, [x], {"0": model[0]})["0"]
    monkeypatch.setattr(moments, "POSITIONS", 1000)
    monkeypatch.setattr(moments, "CHUNK", 64)
    part = input_moments(model, [x], {"0": model[0]})["0"]
    rows_NI = x[::5].double()
    assert torch.allclose(part.matrix, rows_NI.T @ rows_NI / len(rows_NI))
    assert torch.allclose(part.matrix, whole.matrix, atol=0.2)
    assert part.positions == whole.positions == 1


def test_shrinking() -> None:
    generator, layer = torch.Generator().manual_seed(0), nn.Linear(32, 1).double()
    decay = torch.arange(1, 33).double().pow(-0.25)
    truth_II = torch.diag(decay.square()) + torch.ones(32, 32)
    far = []
    for rows in (1, 16, 64, 60_000):
        x = 1 + decay * torch.randn(rows, 32, generator=generator, dtype=torch.float64)
        seen = input_moments(nn.Sequential(layer), [x], {"0": layer})["0"]
        assert seen.rows == rows and torch.allclose(seen.mean, x.mean(0))
        assert seen.fourth == pytest.approx(float((x - x.mean(0)).square().sum(1).square().mean()), abs=1e-9)
        shrunk_II = seen.shrunk()
        assert torch.allclose(shrunk_II.trace(), seen.matrix.trace())
        assert torch.allclose(shrunk_II, shrunk_II.T) and torch.linalg.eigvalsh(shrunk_II).min() > -1e-9
        centred = [float((m - torch.outer(seen.mean, seen.mean) - torch.diag(decay.square())).norm()) for m in (seen.matrix, shrunk_II)]
        assert centred[1] < centred[0] or rows not in (16, 64)
        far.append(float((shrunk_II - seen.matrix).norm()))
    assert far[0] < 1e-9 < far[3] < 0.01 < far[2] < far[1]
    assert torch.allclose(shrunk_II, truth_II, atol=0.03)


def test_integer_and_keyword_inputs() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(input=x)
            return out

    model, x = ByKeyword(), torch.randint(0, 256, (5, 3), dtype=torch.uint8)
    assert torch.allclose(input_moments(model, [x], linears(model))["layer"].matrix, x.double().T @ x.double() / 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_not_finite(bad: float) -> None:
    model, x = TwoLinears(), torch.randn(2, 4)
    with torch.no_grad():
        model.first.bias[0] = bad
        model.second.weight[:, 0] = 0
    if bad == float("inf"):
        x[0, 0] = bad
    where = "second" if bad != bad else "first"
    with pytest.raises(MuntinError, match=f"NaN or infinity at the input of layer '{where}': check the weights"):
        input_moments(model, [x], linears(model))
    with pytest.raises(MuntinError, match="the model's answer holds NaN or infinity"):
        answer_sensitivity(model, [x], linears(model))


def test_hooks_removed_after_an_error() -> None:
    model = TwoLinears()
    for run in (input_moments, answer_sensitivity):
        with pytest.raises(RuntimeError):
            run(model, [torch.randn(2, 5)], linears(model))  # type: ignore[operator]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sensitivity_of_a_linear_model() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()
    x = torch.randn(4000, 4).double()
    moments_by_name = answer_sensitivity(model, [x[:1000], x[1000:]], linears(model))
    with torch.no_grad():
        variance = float(model(x).var(correction=0))
    jacobian = model[1].weight.detach()
    assert moments_by_name["0"] == pytest.approx(float(jacobian.square().sum()) / 6 / variance / 3, rel=0.05)
    assert moments_by_name["1"] == pytest.approx(1 / variance / 3, rel=0.05)


def test_sensitivity_against_measured_noise() -> None:
    model, x = TwoLinears().double(), torch.randn(500, 4).double()
    moments_by_name = answer_sensitivity(model, [x], linears(model))
    with torch.no_grad():
        answer = model(x)
        noise = 1e-3 * torch.randn(500, 6).double()
        handle = model.first.register_forward_hook(lambda layer, inputs, output: output + noise)
        moved = (model(x) - answer).square().mean() / answer.var()
        handle.remove()
    assert moments_by_name["first"] * 6 * 1e-6 == pytest.approx(float(moved), rel=0.15)
    assert moments_by_name["idle"] == 0


def test_inplace_operations() -> None:
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    in_place = nn.Sequential(plain[0], nn.ReLU(inplace=True), plain[2])
    x = torch.randn(50, 4)
    assert answer_sensitivity(plain, [x], linears(plain)) == answer_sensitivity(in_place, [x], linears(in_place))


def test_layer_called_twice() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    twice = nn.Sequential(model, model)
    x = torch.randn(50, 4)
    assert answer_sensitivity(twice, [x], {"0.0": model[0]})["0.0"] > 0
    assert input_moments(twice, [x], {"0.0": model[0]})["0.0"].positions == 2


def test_model_restored() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 3))
    model.train()
    model[2].eval()
    model[0].requires_grad_(False)
    state = torch.get_rng_state()
    with torch.inference_mode():
        x = torch.randn(3, 4)
        torch.set_rng_state(state)
        moments_by_name = answer_sensitivity(model, [x], linears(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert moments_by_name == answer_sensitivity(model, [x], linears(model))
    assert [module.training for module in model] == [True, True, False]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_answers_without_information() -> None:
    class Answers(nn.Module):
        def __init__(self, what: Any) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.what = what

        def forward(self, x: Tensor) -> Any:
            return self.what(self.layer(x))

    x = torch.randn(2, 4)
    with pytest.raises(MuntinError, match="answers with a dict: wrap it"):
        model: nn.Module = Answers(lambda out: {"out": out.tolist()})
        answer_sensitivity(model, [x], linears(model))
    by_name = Answers(lambda out: {"out": out, "label": out.argmax(1)})
    plain = Answers(lambda out: out)
    plain.load_state_dict(by_name.state_dict())
    assert answer_sensitivity(by_name, [x], linears(by_name)) == answer_sensitivity(plain, [x], linears(plain))
    with pytest.raises(MuntinError, match="depends smoothly on none"):
        model = Answers(lambda out: out.argmax(1))
        answer_sensitivity(model, [x], linears(model))


def test_sensitivity_of_constant_answers() -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    for x in (torch.randn(1, 4), torch.full((8, 4), 128.0)):
        assert 0 < answer_sensitivity(model, [x], linears(model))["0"] < float("inf")
    assert answer_sensitivity(model, [x], {}) == {}
