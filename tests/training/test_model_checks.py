"""Checks of a model before training."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_helpers import one_line
from muntin.artifact import ClassInfo
from muntin.errors import RecipeError
from muntin.models import HybridNet, ModelConfig, create_model
from muntin.models.trusted_code import trust_model
from muntin.training.fitting import fit
from muntin.training.model_checks import check_maps, check_model, check_reading, measured_precision, restore_notes
from muntin.training.precision import PAIRS, TrainingPrecision, resolve_precision
from muntin.training.recipe import Recipe, load_recipe, parse_recipe
from muntin.training.weights import new_model

TWO = (ClassInfo(name="a", color=(0, 0, 0)), ClassInfo(name="b", color=(9, 9, 9)))


def own_model(recipe: Recipe) -> nn.Module:
    """Create a recipe's model as `fit` does: a recipe that the user gives may name code."""
    trust_model(recipe.model.name)
    return new_model(recipe, TWO)


class Own(nn.Module):
    """A layer, and a function of its answer."""

    def __init__(self, layer: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.answer = layer, answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self, x, self.layer(x / 255))


def whole_strides(model: Own, x: Tensor, y: Tensor) -> Tensor:
    if x.shape[2] % 8 or x.shape[3] % 8:
        raise RuntimeError("Expected image height and width divisible by 8")
    return y


def only_of(side: int) -> Callable[[Own, Tensor, Tensor], Tensor]:
    def answer(model: Own, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[2:] != (side, side):
            raise ValueError(f"{side} only")
        return y

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda m, x, y: {"out": y},
            r"'own:make' answers a dict .* in evaluation; .* wants one float tensor of shape \(1, 2, 16, 16\): wrap",
        ),
        (lambda m, x, y: y[:, :1], r"answers torch.float32 of shape \(1, 1, 16, 16\)"),
        (lambda m, x, y: y[:, :, ::2, ::2], r"answers torch.float32 of shape \(1, 2, 8, 8\)"),
        (
            lambda m, x, y: y[:, :, : x.shape[2] // 8 * 8],
            r"answers torch.float32 of shape \(1, 2, 16, 25\) to pixels of shape \(1, 3, 17, 25\)",
        ),
        (lambda m, x, y: (y, y) if m.training else y, r"answers a tuple .* in training"),
        (lambda m, x, y: y.view(2, -1).view(y.shape), r"fails in training .* in channels-last order \(view size .* write reshape"),
        (whole_strides, r"takes no 17 x 25 \(Expected .* divisible by 8\), .* set model\.size_divisor to 8, and pictures are padded"),
        (lambda m, x, y: y if x.shape[2] % 2 == 0 else y[:0, :0, 0], r"answers torch.float32 of shape \(0, 0, 25\)"),
        (
            lambda m, x, y: y * ((x - x.mean()) / x.std()).mean(),
            r"'own:make' answers nan to a black picture in evaluation, .* divides by .* add a small number",
        ),
        (only_of(64), r"data\.crop 16: 'own:make' takes pictures of another size \(64 only\): set data\.crop to 64, which it takes"),
        (
            lambda m, x, y: torch.cat([y, x.flatten(1)]),
            r"'own:make' fails on pixels of shape \(1, 3, 16, 16\) \(Tensors must .*\), and on other sizes too: fix its forward",
        ),
        (only_of(16), r"takes no 17 x 25 \(16 only\), .*: let its forward take them; a model of one size can be exported"),
    ],
)
def test_wrong_answers(answer: Any, message: str) -> None:
    recipe = parse_recipe({"data": {"crop": 16}, "model": {"name": "own:make"}}, where="test")
    with pytest.raises(RecipeError, match=message) as error:
        check_model(Own(nn.Conv2d(3, 2, 3, padding=1), answer), recipe, TWO)
    one_line(error)


def test_out_of_memory() -> None:
    recipe = parse_recipe({"data": {"crop": 16}, "model": {"name": "own:make"}}, where="test")
    greedy = Own(nn.Conv2d(3, 2, 1), lambda m, x, y: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="you tried to allocate"):
        check_model(greedy, recipe, TWO)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:Lazy modules")
def test_lazy_parameters() -> None:
    recipe = parse_recipe({"data": {"crop": 16}, "model": {"name": "own:make"}}, where="test")
    lazy = Own(nn.LazyConv2d(2, 1), lambda m, x, y: y)
    assert check_model(lazy, recipe, TWO) == () and lazy.training
    assert lazy.layer.weight.shape == (2, 3, 1, 1) and not lazy.layer.weight.is_inference()
    norm = Own(nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Dropout()), lambda m, x, y: y)
    state, before = torch.get_rng_state(), copy.deepcopy(norm.state_dict())
    check_model(norm, recipe, TWO)
    assert torch.equal(torch.get_rng_state(), state) and all(torch.equal(before[k], v) for k, v in norm.state_dict().items())
    old = Own(torch.nn.utils.weight_norm(nn.Conv2d(3, 2, 1)), lambda m, x, y: y)
    with pytest.raises(RecipeError, match=r"'own:make' cannot be copied: .* of torch\.nn\.utils\.parametrizations"):
        check_model(old, recipe, TWO)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_scripted_parts() -> None:
    recipe = parse_recipe({"data": {"crop": 16}, "model": {"name": "own:make"}}, where="test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Conv2d(3, 2, 1))
    (note,) = check_model(Own(scripted, lambda m, x, y: y), recipe, TWO)
    assert note.startswith("'own:make' is trained, and cannot be compressed: 'layer', a part of the model, is TorchScript")


def test_nothing_to_train() -> None:
    recipe = parse_recipe({"data": {"crop": 16}, "model": {"name": "own:make"}}, where="test")
    frozen = Own(nn.Conv2d(3, 2, 1), lambda m, x, y: y).requires_grad_(False)
    with pytest.raises(RecipeError, match=r"the answer of 'own:make' depends on no trainable parameter: call requires_grad_\(\)"):
        check_model(frozen, recipe, TWO)
    detached = Own(nn.Conv2d(3, 2, 1), lambda m, x, y: y.detach())
    with pytest.raises(RecipeError, match=r"depends on no trainable parameter: .*leave out detach\(\)"):
        check_model(detached, recipe, TWO)
    half = Own(nn.Sequential(nn.Conv2d(3, 2, 1).requires_grad_(False), nn.Conv2d(2, 2, 1)), lambda m, x, y: y)
    assert check_model(half, recipe, TWO) == () and half.layer[1].weight.grad is None


def test_crop_size() -> None:
    name = "timm:vit_tiny_patch16_224"
    recipe = parse_recipe({"task": "classify", "data": {"crop": 32}, "model": {"name": name}}, where="test")
    with pytest.raises(
        RecipeError, match=rf"data\.crop 32: '{name}' takes pictures of another size \(.*224.*\): set data\.crop to 224"
    ) as error:
        check_model(create_model(name, task="classify", classes=2), recipe, TWO)
    one_line(error)


def test_classifier_of_one_size() -> None:
    name = "timm:vit_tiny_patch16_224"
    recipe = parse_recipe({"task": "classify", "data": {"crop": 224}, "model": {"name": name}}, where="test")
    model = create_model(name, task="classify", classes=2)
    assert check_model(model, recipe, TWO) == () and model.training


@pytest.mark.parametrize("name", ["torchvision:alexnet", "timm:coatnet_0_rw_224"])
def test_failing_crop(name: str) -> None:
    recipe = parse_recipe({"task": "classify", "data": {"crop": 32}, "model": {"name": name}}, where="test")
    with pytest.raises(
        RecipeError, match=rf"data\.crop 32: '{name}' takes pictures of another size \(.+\): set data\.crop to \d+, which"
    ) as error:
        check_model(create_model(name, task="classify", classes=2), recipe, TWO)
    one_line(error)


def unreadable_at_first_call(model: Own, x: Tensor, y: Tensor) -> Tensor:
    if model.training and not hasattr(model, "seen"):
        model.register_buffer("seen", torch.zeros(1))
    return y


def unreadable_by_size(model: Own, x: Tensor, y: Tensor) -> Tensor:
    model.register_buffer("grid", torch.zeros(x.shape[2:]))
    return y


def keeping(model: Own, x: Tensor, y: Tensor) -> Tensor:
    if not hasattr(model, "mean"):
        model.register_buffer("mean", torch.zeros(2, 1, 1))
    return y - model.get_buffer("mean")


class Extra(nn.Conv2d):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


class Scaled(nn.Conv2d):
    """Multiplies by a random number that is in no checkpoint."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.scale = torch.rand(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


MADE = {
    "training": lambda: Own(nn.Conv2d(3, 2, 1), unreadable_at_first_call),
    "size": lambda: Own(nn.Conv2d(3, 2, 1), unreadable_by_size),
    "extra": lambda: Own(Extra(3, 2, 1), lambda m, x, y: y),
    "scaled": lambda: Own(Scaled(3, 2, 1), lambda m, x, y: y),
    "depth": lambda: Own(
        nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(int(torch.randint(99, ())))), nn.Conv2d(3, 2, 1)), lambda m, x, y: y
    ),
    "keeping": lambda: Own(nn.Conv2d(3, 2, 1), keeping),
    "lazy": lambda: Own(nn.Sequential(nn.LazyConv2d(8, 1), nn.BatchNorm2d(8), nn.Dropout(), nn.LazyConv2d(2, 1)), lambda m, x, y: y),
}


def make(kind: str, *, task: str, classes: int, channels: int) -> nn.Module:
    return MADE[kind]()


for kind in MADE:  # a factory each, as recipes name them
    globals()[f"make_{kind}"] = functools.partial(make, kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "training",
            r"cannot be read from its own checkpoint \(.*Unexpected key\(s\) in state_dict: \"seen\".*\): its factory has to make",
        ),
        ("size", r"cannot be read from its own checkpoint \(.*size mismatch for grid.*\): .* or persistent=False"),
        ("depth", r"cannot be read from its own checkpoint \(.*state_dict.*\): its factory has to make the same model each time"),
        (
            "extra",
            r"has a dict in its state \(layer\._extra_state\), and a checkpoint holds tensors: keep it in a buffer, or have no get_extra",
        ),
        ("scaled", r"answers differently after it was read from its own checkpoint: its factory has to make the same model each time"),
    ],
)
def test_state_that_does_not_restore(kind: str, message: str) -> None:
    recipe = parse_recipe({"data": {"crop": 16}, "model": {"name": f"{__name__}:make_{kind}"}}, where="test")
    torch.manual_seed(0)
    model = own_model(recipe)
    check_model(model, recipe, TWO)
    with pytest.raises(RecipeError, match=message) as error:
        check_reading(model, recipe, TWO)
    one_line(error)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("kind", ["keeping", "lazy"])
def test_lazy_parameters_restore(kind: str) -> None:
    recipe = parse_recipe({"data": {"crop": 16}, "model": {"name": f"{__name__}:make_{kind}"}}, where="test")
    model = own_model(recipe)
    check_model(model, recipe, TWO)
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    check_reading(model, recipe, TWO)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert before.keys() == model.state_dict().keys() and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def deep(*, task: str, classes: int, channels: int) -> nn.Module:
    """A model with a Conv3d."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bands, self.head = nn.Conv3d(1, 4, 3, padding=1), nn.Conv2d(4 * channels, classes, 1)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.head(self.bands(x[:, None] / 128 - 1).flatten(1, 2))
            return answer

    return Deep()


def test_three_dimensional_kernel(tiny: Any, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.recipe, ["training.steps=2", f"model.name={__name__}:deep", "model.options={}"])
    assert fit(recipe, root=tiny.root, directory=tmp_path / "run").step == 2


# Gradients in BF16


BF16 = TrainingPrecision(name="bf16", device="cpu", dtype=torch.bfloat16, reason="for this test")


@pytest.mark.parametrize("choice", [{"name": "hybrid-xxs"}, {"name": f"{__name__}:normed"}])
def test_measured_precision(choice: dict[str, str]) -> None:
    """Steps in BF16 run on any CPU, slowly on most; they leave no trace."""
    training = {"steps": 300, "batch_size": 4, "norm_group": 2, "checkpointing": {"budget": "1GiB"}}
    recipe = parse_recipe({"name": "test", "model": choice, "data": {"crop": 32}, "training": training}, where="test")
    model = own_model(recipe)
    undecided = TrainingPrecision(name="fp32", device="cpu", dtype=None, reason="test", undecided=True)
    state, random, threads = copy.deepcopy(model.state_dict()), torch.get_rng_state(), torch.get_num_threads()
    precision = measured_precision(model, undecided, recipe, TWO)
    assert len(precision.gains) == PAIRS and min(precision.gains) > 0
    assert precision.notes[0].startswith(f"precision auto: {precision.name}, since BF16 is ")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random, torch.get_rng_state()) and threads == torch.get_num_threads()
    assert measured_precision(model, precision, recipe, TWO) is precision


def normed(*, task: str, classes: int, channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, classes, 1))


def test_kernel_larger_than_its_map() -> None:
    model = create_model("hybrid-xs", task="classify").train()
    precision = check_maps(model, BF16, crop=16, channels=3, requested="auto")
    assert (precision.name, precision.dtype) == ("fp32", None)
    assert precision.reason.startswith("at data.crop 16 the 3x3 convolution ") and "sees maps of 1x1, where" in precision.reason
    assert check_maps(model, BF16, crop=32, channels=3, requested="auto") is BF16
    assert model.training
    with pytest.raises(
        RecipeError, match=r"^training\.precision bf16: at data\.crop 16 the 3x3 .*: write auto or fp32, or take larger crops$"
    ):
        check_maps(model, BF16, crop=16, channels=3, requested="bf16")


def test_call_by_keyword() -> None:
    class ByKeyword(nn.Conv2d):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().__call__(input=x)
            return out

    assert check_maps(ByKeyword(3, 4, 3, padding=8, dilation=8), BF16, crop=8, channels=3, requested="auto").name == "fp32"


def test_dilation_and_other_types() -> None:
    wide = nn.Conv2d(3, 4, 3, padding=8, dilation=8)
    assert check_maps(wide, BF16, crop=8, channels=3, requested="auto").name == "fp32"
    assert check_maps(wide, BF16, crop=9, channels=3, requested="auto") is BF16
    fp32 = resolve_precision("fp32", "cpu")
    assert check_maps(wide, fp32, crop=16, channels=3, requested="fp32") is fp32


def test_gradients_on_small_maps() -> None:
    """In BF16 the gradients of this model differ from call to call, or are NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, 2, 1))
    images = torch.randn(4, 3, 1, 1)
    precision = check_maps(model, BF16, crop=1, channels=3, requested="auto")
    expected = torch.autograd.grad(model.double()(images.double()).sum(), list(model.parameters()))
    model.float()
    for _ in range(8):
        dirt = [torch.full((size,), torch.nan) for size in (1024, 4096, 16384, 65536) * 4]
        del dirt
        with precision.autocast():
            loss = model(images).float().sum()
        for gradient, reference in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
            torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("options", "notes"), [({}, 1), ({"finest": 8}, 1), ({"finest": 2}, 0), ({"finest": 2, "decoder": 8}, 1)])
def test_channels_of_a_restorer(options: dict[str, Any], notes: int) -> None:
    fields = {"stem": (16, 24, 48), "decoder": 64, "task": "restore", **options}
    found = restore_notes(HybridNet(ModelConfig.model_validate(fields)))
    assert len(found) == notes
    assert all("set model.options" in note for note in found)
    assert restore_notes(HybridNet(ModelConfig.model_validate({**fields, "task": "segment"}))) == ()


def test_channels_of_a_restorer_with_an_encoder() -> None:
    model = create_model("hybrid-xs", task="restore", encoder="timm:test_efficientnet")
    (note,) = restore_notes(model)  # type: ignore[arg-type]
    assert note.startswith("the decoder ends at a quarter") and "finest: 2" in note
