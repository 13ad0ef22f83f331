from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from model_helpers import answer, count, one_line, pixels, settled
from muntin import create_model, low_rank, prune, quantize
from muntin.compression import Change
from muntin.compression.channels.groups import channel_groups, costs, counted_macs, cut, mask
from muntin.compression.channels.pruning import USED
from muntin.errors import MuntinError
from muntin.layers import ChannelGate
from muntin.models.eager import call, tensors_of


def by_layer(changes: list[Change]) -> dict[str, Change]:
    return {change.layer: change for change in changes if change.pass_ == "prune"}


class Branches(nn.Module):
    """A residual sum, a depthwise convolution, a concatenation and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.point = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.ConvTranspose2d(16, 24, 2, stride=2)
        self.mix, self.head = nn.Conv2d(8 + 24, 12, 1), nn.Linear(12 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.point(torch.sigmoid(self.depthwise(x)))
        maps = torch.cat([nn.functional.adaptive_avg_pool2d(part(x), 2) for part in (self.left, self.right)], 1)
        out: Tensor = self.head(self.mix(maps).flatten(1))
        return out


def test_cut_channels_are_those_that_nothing_reads() -> None:
    model, x = settled(Branches(), pixels(2, 3, 9, 8)), pixels(2, 3, 9, 8)
    groups = channel_groups(model, x)
    names = {giver: name for name, group in groups.items() for giver in group.givers}
    assert names["stem"] == names["point"] and len(groups) == 5
    cuts = {names["stem"]: [0, 5, 6], "left": [7], "right": [1, 2, 23], "mix": [3]}
    small, masked = copy.deepcopy(model), copy.deepcopy(model)
    mask(masked, groups, cuts)
    with torch.no_grad(), counted_macs(model) as positions:
        model(x[:1])
    predicted = costs(model, groups, cuts, positions)
    cut(small, groups, cuts)
    torch.testing.assert_close(answer(small, x), answer(masked, x))
    assert not torch.allclose(answer(masked, x), answer(model, x), rtol=1e-3)
    with torch.no_grad(), counted_macs(small) as fewer:
        small(x[:1])
    assert predicted == costs(small, {}, {}, fewer) and predicted.parameters == count(small)
    assert (
        small.depthwise.groups == 13
        and small.norm.num_features == 13
        and small.mix.in_channels == 7 + 21
        and small.head.in_features == 4 * 11
    )


def test_least_important_channels_leave() -> None:
    model, x = settled(Branches(), pixels(2, 3, 8, 8)), pixels(2, 3, 8, 8)
    with torch.no_grad():
        model.right.weight[:, 8:16] = 0
        model.right.bias[8:16] = 0
        model.mix.weight[:, 8 + 8 : 8 + 16] = 0
    before, flags = answer(model, x), {name: p.requires_grad_(name != "right.bias").requires_grad for name, p in model.named_parameters()}
    changes = by_layer(prune(model, x, ratio=1 / 3, only=("right",)))
    assert changes["right"].done == "16 of 24 channels"
    assert {change.reason for name, change in changes.items() if name in ("stem", "point", "left")} == {"not named in only"}
    torch.testing.assert_close(answer(model, x), before, rtol=1e-4, atol=1e-4)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("kind", ["parameters", "macs"])
def test_budgets(kind: str) -> None:
    model, x = settled(Branches(), pixels(2, 3, 9, 8)), pixels(2, 3, 9, 8)

    def cost() -> int:
        with torch.no_grad(), counted_macs(model) as positions:
            model(x[:1])
        return int(getattr(costs(model, {}, {}, positions), kind))

    whole = cost()
    for share in (0.7, 0.5):
        prune(model, x, multiple=1, **{kind: share})  # type: ignore[arg-type]
        assert 0.75 * share * whole < cost() <= share * whole
    with pytest.raises(MuntinError, match=rf"{kind}=0.001: out of reach: with the least channels 0\.\d+ are left"):
        prune(model, x, **{kind: 0.001})  # type: ignore[arg-type]


class OneOf(nn.Module):
    """A layer between others, of which a pass may not cut the channels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(3, 16, 1), inner, nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.inner(self.first(x))))
        return out


class ByOther(nn.Module):
    """Uses channels otherwise than by a layer: their order, or their number."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.what(x)
        return out


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (nn.GroupNorm(4, 16), "inner (GroupNorm) cannot be cut"),
        (nn.Conv2d(16, 16, 1, groups=4), "inner is a grouped convolution"),
        (weight_norm(nn.Conv2d(16, 16, 1)), "inner"),
        (ByOther(lambda x: x - x.mean(1, keepdim=True)), USED),
        (ByOther(lambda x: x.unflatten(1, (4, 4)).softmax(2).flatten(1, 2)), USED),
        (ByOther(lambda x: x.view(len(x), 16, *x.shape[2:])), USED),
    ],
)
def test_kept_groups(inner: nn.Module, reason: str) -> None:
    model, x = OneOf(inner).eval(), pixels(1, 3, 4, 4)
    before = answer(model, x)
    changes = by_layer(prune(model, x, ratio=0.5))
    assert changes["first"].kept and reason in changes["first"].reason
    assert "are the answer's" in changes["last"].reason
    assert torch.equal(answer(model, x), before)


def test_flattened_concatenation() -> None:
    """torch-pruning maps it to positions that a layer does not have."""

    class Flattened(Branches):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.Identity(), nn.Linear((8 + 24) * 4, 5)

    changes = by_layer(prune(Flattened().eval(), pixels(1, 3, 8, 8), ratio=0.5))
    assert "cannot be followed" in changes["right"].reason and not changes["stem"].kept


def test_transformer() -> None:
    """Of a transformer the perceptrons and heads are cut, whatever its weights hide: here the scales of its branches are near 0."""
    model, x = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, init_values=1e-6).eval(), pixels(1, 3, 32, 32)
    changes = by_layer(prune(model, x, ratio=0.5))
    assert {name for name, change in changes.items() if not change.kept} == {
        f"blocks.{index}.{layer}" for index in (0, 1) for layer in ("attn.qkv", "mlp.fc1")
    }
    assert changes["blocks.0.attn.qkv"].done == "2 of 3 heads"


class Twins(nn.Module):
    """Each channel of `first` twice, read with different weights; `last` gets a bias or none."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.first, self.last, self.head = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 12, 3, bias=bias), nn.Linear(12, 5)
        with torch.no_grad():
            for tensor in (self.first.weight, self.first.bias):
                tensor[16:] = tensor[:16]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.last(torch.relu(self.first(x)))).mean((2, 3)))
        return out


@pytest.mark.parametrize("bias", [True, False])
def test_other_channels_take_over(bias: bool) -> None:
    """Of channels that are equal, one stays with the weights of both, so that the answer changes by the damping alone."""
    torch.manual_seed(0)
    model, batches = settled(Twins(bias=bias), pixels(8, 3, 12, 12)), [pixels(8, 3, 12, 12), pixels(4, 3, 12, 12)]
    before = answer(model, batches[1])
    prune(model, batches, ratio=0.5, only=("first",))
    assert model.first.out_channels == 16
    distance = (answer(model, batches[1]) - before).square().mean() / before.var()
    assert distance < 1e-3


def test_budget_goes_to_useful_layers() -> None:
    """Under a budget a layer whose channels hardly change the answer loses more of them than one whose channels matter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    with torch.no_grad():
        model[4].weight[:, 16:] *= 1e-3
    x = torch.randn(256, 16)
    before = answer(model, x)
    changes = by_layer(prune(model, [x], parameters=0.6))
    assert changes["0"].kept and changes["2"].done == "32 of 64 channels"
    assert (answer(model, x) - before).square().mean() < 0.01 * before.var()


def test_factored_model() -> None:
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(64, 32)
    low_rank(model, [x], parameters=0.6, multiple=8)
    ranks = [layer.ranks[0] for layer in model if hasattr(layer, "ranks")]
    prune(model, x, ratio=0.5, multiple=4)
    assert ranks and [layer.ranks[0] for layer in model if hasattr(layer, "ranks")] == [rank // 2 for rank in ranks]
    assert answer(model, x).shape == (64, 8)
    plain = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    prune(plain, x, ratio=0.25)
    low_rank(plain, [x], parameters=0.6, multiple=8)
    assert all(change.kept for change in prune(plain, x, ratio=0.25))


def test_channel_gates() -> None:
    options = {"depths": (1,), "dims": (32,), "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "gate": True}
    model, x = create_model("hybrid-xs", classes=3, options=options).eval(), pixels(1, 3, 32, 32)
    with pytest.raises(MuntinError, match=r"channel gates \(\d+ here\).*without ratio"):
        prune(model, x, ratio=0.5)
    assert all(change.kept for change in prune(model))
    gate = next(module for module in model.modules() if isinstance(module, ChannelGate))
    with torch.no_grad():
        gate.logit[gate.dim // 2 :] = -100.0
    before, parameters = answer(model, x), count(model)
    assert not all(change.kept for change in prune(model))
    torch.testing.assert_close(answer(model, x), before, rtol=1e-4, atol=1e-4)
    assert count(model) < parameters and all(change.kept for change in prune(model))


@pytest.mark.parametrize("fusion", ["progressive", "one-step", "upernet"])
def test_hybrid_without_gates(fusion: str) -> None:
    """Its residual path holds a depthwise convolution, whose inputs and outputs leave together."""
    options = {"depths": (1, 1), "dims": (64, 64), "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "gate": False}
    model = create_model("hybrid-xs", classes=3, options={**options, "fusion": fusion, "latent_share": 0.25}).eval()
    before = count(model)
    prune(model, [pixels(4, 3, 32, 32)], parameters=0.9)
    assert count(model) <= 0.9 * before and answer(model, pixels(1, 3, 32, 32)).shape == (1, 3, 32, 32)


SWIN = """
import resource, torch, torchvision
from pathlib import Path
from muntin import prune

model = torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5).eval()
import torch_pruning
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
print(*[(change.layer, change.done) for change in prune(model, [torch.rand(1, 3, 64, 64)], ratio=0.5) if not change.kept])
assert model(torch.rand(1, 3, 64, 64)).shape == (1, 5)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux")
def test_endless_graph() -> None:
    """torch-pruning follows the shifted windows of torchvision's Swin without end, until the memory is full; MLPs are pruned without it."""
    pytest.importorskip("torchvision")
    done = subprocess.run([sys.executable, "-c", SWIN], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split("\n")[0].count("'32 of 64 channels'") == 2 and "attn" not in done.stdout


def test_inputs_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.hidden, self.out = nn.Embedding(9, 16), nn.Linear(16, 32), nn.Linear(32, 3)

        def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": self.out(torch.relu(self.hidden(self.table(ids)) * scale))}

    model, batch = Named().eval(), {"ids": torch.randint(0, 9, (4, 7)), "scale": torch.ones(4, 1, 1)}
    assert by_layer(prune(model, batch, ratio=0.5))["hidden"].done == "16 of 32 channels"
    low_rank(model, [batch], parameters=0.9, multiple=1)
    assert not all(change.kept for change in quantize(model, [batch]))
    assert tensors_of(call(model, batch))[0].shape == (4, 7, 3)


def test_wrong_arguments() -> None:
    model, x = Branches().eval(), pixels(1, 3, 8, 8)
    for arguments, message in (
        ({}, "no share and a calibration"),
        ({"ratio": 0.5, "macs": 0.5}, "prune got ratio, macs"),
        ({"ratio": 1.0}, "ratio=1.0"),
        ({"ratio": 0.5, "only": ("nosuch",)}, "only names no layer: nosuch"),
        ({"ratio": 0.5, "keep": "stem"}, "give a sequence of names"),
    ):
        with pytest.raises(MuntinError, match=message) as error:
            prune(model, x, **arguments)  # type: ignore[arg-type]
        one_line(error)
    with pytest.raises(MuntinError, match="no calibration"):
        prune(model, ratio=0.5)
    with pytest.raises(MuntinError, match="cannot be followed"):
        prune(model, pixels(1, 4, 8, 8), ratio=0.5)
