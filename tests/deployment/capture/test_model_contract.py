"""Checks of a PyTorch model before its export."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

import muntin
from muntin.artifact.sizes import GOLDEN_SIDE, golden_sizes
from muntin.compression.quantization.quantized_layers import QuantizedConv2d
from muntin.deployment import infer_signature
from muntin.deployment.capture.model_contract import check_copy, check_independence, pairs_at
from muntin.errors import ExportError
from muntin.graph.artifacts.engine_check import FLOAT_LIMITS
from muntin.graph.grids import ByteGrid
from muntin.models import DividedSides
from muntin.runtime import load
from muntin.runtime.verification.golden import compare_outputs

ODD_SIZES = ((1, 64, 64), (3, 65, 33), (1, 1, 37), (1, 1, 1))


@pytest.mark.parametrize("kind", ["norm", "mean"])
def test_batch_dependent_model(kind: str, build: type[nn.Module], pixels: Any, tmp_path: Path, refused: Any) -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.stem(x / 60 - 2)
        return m.head(torch.relu(m.norm(y) if kind == "norm" else y - y.mean(0, keepdim=True)))

    parts = {"stem": nn.Conv2d(3, 16, 3, padding=1), "norm": nn.BatchNorm2d(16, track_running_stats=False), "head": nn.Conv2d(16, 4, 1)}
    message = refused(build(run, **parts), pixels(1, 3, 48, 40), tmp_path)
    assert "answers an image otherwise beside another one, by " in message


class Rounded(nn.Module):
    """Rounds its input after a sum whose last bits depend on the batch size, as they do in real kernels; all values lie on a border."""

    def __init__(self, mean: bool = False) -> None:
        super().__init__()
        self.mean, self.conv = mean, QuantizedConv2d(nn.Conv2d(3, 4, 1), ByteGrid(scale=40.0, unsigned=True))

    def forward(self, x: Tensor) -> Tensor:
        y = x.div(40).floor() * 40 + 20
        return self.conv((y - y.mean(0, keepdim=True) if self.mean else y) * (1 + 1e-6 * (len(x) - 1)))


def test_rounding_that_depends_on_the_batch_size(pixels: Any) -> None:
    model = Rounded().eval()
    pairs = pairs_at(model, pixels(1, 3, 48, 40), [(16, 16)])
    together, alone = (model(torch.cat([torch.from_numpy(pairs[0][0]).permute(0, 3, 1, 2).float()] * count))[:1] for count in (2, 1))
    assert float((together - alone).detach().std()) > 0.05 * float(alone.detach().std())
    check_independence(model, pairs)


def test_mean_over_the_batch_beside_rounding(pixels: Any) -> None:
    model = Rounded(mean=True).eval()
    with pytest.raises(ExportError, match="answers an image otherwise beside another one"):
        check_independence(model, pairs_at(model, pixels(1, 3, 48, 40), [(16, 16)]))


def test_model_of_other_inputs(build: type[nn.Module], pixels: Any, tmp_path: Path, refused: Any) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    keyed = build(lambda m, x: x["image"], conv=nn.Conv2d(3, 4, 1))
    named = build(lambda m, x: {"a": x}["b"], conv=nn.Conv2d(3, 4, 1))
    for model, kind in ((Two(), "TypeError"), (keyed, "IndexError"), (named, "KeyError")):
        text = refused(model, pixels(1, 3, 48, 48), tmp_path)
        assert f"fails on pixels of shape (1, 3, 48, 48) ({kind}: " in text
        assert "it is called with one tensor, raw pixels (B, C, H, W), and nothing else: wrap it" in text
    assert "is of type OrderedDict: give a torch.nn.Module" in refused(Two().state_dict(), pixels(1, 3, 48, 48), tmp_path)  # type: ignore[arg-type]


def test_one_size_where_any_is_given(build: type[nn.Module], pixels: Any, tmp_path: Path, refused: Any) -> None:
    model = build(lambda m, x: m.conv(x) + m.conv.weight.new_zeros(1, 4, 48, 48), conv=nn.Conv2d(3, 4, 1))
    message = refused(model, pixels(1, 3, 48, 48), tmp_path)
    assert "the model fails on pixels of shape (1, 3, 31, 43): The size of tensor" in message and "leave out sizes" in message


class Quarters(nn.Module):
    """Refuses sides that 4 does not divide, as encoders and decoders with skips do."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.shape[2] % 4 or x_BCHW.shape[3] % 4:
            raise RuntimeError("sides that 4 divides")
        return F.interpolate(self.up(self.down(x_BCHW / 255).relu()), scale_factor=4.0, mode="bilinear")


def test_divided_sides(pixels: Any, pictures: Any, tmp_path: Path, refused: Any) -> None:
    torch.manual_seed(0)
    model = DividedSides(Quarters().eval(), 4).eval()
    assert "muntin.models.DividedSides pads and cuts" in refused(model.model, pixels(1, 3, 48, 48), tmp_path)
    artifact = muntin.export(model, pixels(1, 3, 48, 48), tmp_path / "artifact")
    session = muntin.load(artifact.path, precision="f32", threads=1)
    for size in (*ODD_SIZES, (1, 48, 64)):
        images = pictures(*size, 3)
        with torch.inference_mode():
            wanted = model(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
        assert np.abs(session(images) - wanted).max() <= 1e-4 * wanted.std()


def test_answer_of_another_size(build: type[nn.Module], pixels: Any, tmp_path: Path, refused: Any) -> None:
    model = build(lambda m, x: F.interpolate(m.down(x), scale_factor=2), down=nn.Conv2d(3, 4, 2, 2))
    message = refused(model, pixels(1, 3, 64, 64), tmp_path)
    assert "answers (1, 4, 30, 42) to 1 x 31 x 43 pixels, where (1, 4, 31, 43) is due" in message and "DividedSides" in message


class PadsOddSides(nn.Conv2d):
    """What it does to odd sides its padding does not say."""

    def forward(self, input: Tensor) -> Tensor:
        H, W = input.shape[-2:]
        return super().forward(F.pad(input, (0, W % 2, 0, H % 2), value=1.0))


def test_hooks_and_subclasses_of_layers(build: type[nn.Module], pixels: Any, pictures: Any, tmp_path: Path) -> None:
    """A hook, and a subclass that pads some sizes only."""

    def run(m: Any, x: Tensor) -> Any:
        return m.head(F.interpolate(torch.relu(m.down(torch.relu(m.stem(x / 60 - 2)))), x.shape[2:]))

    model = build(run, stem=nn.Conv2d(3, 32, 3, padding=1), down=PadsOddSides(32, 32, 2, 2), head=nn.Conv2d(32, 4, 1)).eval()
    model.stem.register_forward_hook(lambda layer, inputs, output: output * torch.linspace(-2, 2, 32).reshape(1, -1, 1, 1))
    artifact = muntin.export(model, pixels(1, 3, 64, 64), tmp_path / "a", calibration=[pixels(2, 3, 64, 64)])
    assert [layer.activation_bits for layer in artifact.manifest.layers] == [8, 8, 8]  # the graph shows what the hook and the subclass do
    for size in ((64, 64), (41, 57)):
        images = pictures(1, *size, 3)
        with torch.inference_mode():
            due = model(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
        error = muntin.load(artifact.path, precision="f32", threads=1)(images) - due
        assert np.sqrt(np.square(error).mean()) < 0.05 * due.std()


def test_note_on_integers_at_uncalibrated_sizes(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    """Absolute positions: those of a larger image lie outside the grid of 8 bits."""

    def run(m: Any, x: Tensor) -> Any:
        places = (torch.arange(x.shape[2])[:, None] + torch.arange(x.shape[3])[None]) / 64
        return m.head(torch.relu(m.stem(torch.cat([x / 60 - 2, places.expand(len(x), 1, -1, -1)], 1))))

    model = build(run, stem=nn.Conv2d(4, 16, 3, padding=1), head=nn.Conv2d(16, 4, 1))
    example = pixels(1, 3, 64, 64)
    notes = {}
    for name, calibration in (("small", [example]), ("both", [example, pixels(1, 3, 256, 256)])):
        notes[name] = muntin.export(model, example, tmp_path / name, calibration=calibration).manifest.measured["notes"]
    notes = {name: [note for note in values if "saturate" not in note] for name, values in notes.items()}
    (note,) = notes["small"]
    assert re.match(r"rounding to integers moves the answer to an image of 256 x 256 by 0\.\d+ standard deviations in the mean", note)
    assert notes["both"] == []


class Context(nn.Module):
    """A gate by the mean of an earlier map, which a function of its own keeps in a dictionary: a copy's map goes into the original's."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.stem, self.gate, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.kept: dict[str, Tensor] = {}
        self.gain = gain
        self.stem.register_forward_hook(lambda layer, inputs, output: self.kept.update(context=output.mean((2, 3), keepdim=True)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x / 255)
        return self.out(y.relu()) + self.gain * self.gate(self.kept["context"])


@pytest.mark.parametrize(("used", "message"), [(False, "a copy of the model fails where"), (True, "a copy of the model answers otherwise")])
def test_copy_that_differs(used: bool, message: str, pixels: Any, tmp_path: Path, refused: Any) -> None:
    model = Context(gain=10).train()
    if used:
        with torch.no_grad():
            model(torch.full((1, 3, 32, 32), 255.0))
    told = refused(model, pixels(1, 3, 48, 48), tmp_path)
    assert message in told
    assert "let it reach them through the module that it is given" in told
    assert model.training and model.stem.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copy_of_a_16_bit_model(dtype: torch.dtype, pixels: Any) -> None:
    class Ends(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, super().forward(x).float())

    torch.manual_seed(0)
    parts = [part for _ in range(12) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    check_copy(Ends(nn.Conv2d(3, 8, 1), *parts, nn.Conv2d(8, 4, 1)).eval().to(dtype), pixels(1, 3, 48, 48))


def test_copy_with_infinite_scores(pixels: Any) -> None:
    class Masked(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).index_fill(1, torch.tensor(0), -torch.inf)

    check_copy(Masked(3, 4, 1).eval(), pixels(1, 3, 48, 48))


def test_copy_of_a_merging_adapter(pixels: Any) -> None:
    class Merges(nn.Conv2d):
        merged = False

        def train(self, mode: bool = True) -> Any:
            if not mode and not self.merged:
                self.merged = True
                self.weight.data += 1
            return super().train(mode)

    model = nn.Sequential(Merges(3, 4, 1), nn.Dropout())
    before = model[0].weight.detach().clone()
    check_copy(model, pixels(1, 3, 48, 48))
    assert model.training and model[1].training and not model[0].merged
    assert torch.equal(model[0].weight, before)


def test_drifting_buffer(pixels: Any, tmp_path: Path, refused: Any) -> None:
    class Drifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.mul_(0.9).add_(x.mean() / 10)
            return self.conv(x) + self.seen

    assert "changes its buffer 'seen' with each image" in refused(Drifts(), pixels(1, 3, 48, 48), tmp_path)


def test_quantisation_keeps_layer_types_that_code_asks_for(pixels: Any, tmp_path: Path) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
            self.layers = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem((x - 127) / 60).relu()
            for layer in self.layers:
                x = x + layer(x) if isinstance(layer, nn.Conv2d) else layer(x)
            return cast(Tensor, self.last(x))

    torch.manual_seed(0)
    model, images = Asks().eval(), pixels(2, 3, 48, 48)
    artifact = muntin.export(model, images, tmp_path / "a", calibration=[images])
    with torch.no_grad():
        due = model(images.float()).numpy()
    found = load(artifact.path, precision="f32")(images.permute(0, 2, 3, 1).to(torch.uint8).numpy())
    assert np.sqrt(np.square(found - due).mean()) < 0.05 * due.std()
    assert {record.name for record in artifact.manifest.layers if record.activation_bits} == {"stem", "layers.0", "layers.2", "last"}


@pytest.mark.parametrize(("height", "width"), [(200, 64), (40, 300), (7, 9), (1, 1)])
def test_golden_pairs(height: int, width: int, pixels: Any, tiny: Any) -> None:
    model, example = tiny().eval(), pixels(2, 3, height, width)
    pairs = pairs_at(model, example, golden_sizes(height, width))
    assert len(pairs) == (1 if height * width == 1 else 2) and all(max(images.shape[1:3]) <= GOLDEN_SIDE for images, _ in pairs)
    assert height * width == 1 or pairs[0][0].shape != pairs[1][0].shape
    for images, scores in pairs:
        rows, columns = images.shape[1:3]
        windows = np.lib.stride_tricks.sliding_window_view(example[0].numpy(), (rows, columns), (1, 2))
        assert (windows == images[0].transpose(2, 0, 1)[:, None, None]).all((0, 3, 4)).any()
        session = muntin.TorchSession(model, infer_signature(model, example))
        (result,) = compare_outputs({"scores": session(images)}, {"scores": scores}, FLOAT_LIMITS["f32"], session.signature.answer)
        assert result.max_error is not None and result.max_error < 1e-6 and result.passed


def test_golden_images_of_a_plain_picture(pixels: Any, tiny: Any) -> None:
    example = torch.full((1, 3, 200, 300), 7.0)
    example[:, :, 140:, 200:] = pixels(1, 3, 60, 100)
    assert all(len(np.unique(images)) > 200 for images, _ in pairs_at(tiny().eval(), example, golden_sizes(200, 300)))
