"""The order in which channels leave a group, the harm that this does to the answer, and the refit of the layers that read them.

A channel does harm as far as the layers that read it cannot replace it: the part of its values that is no linear combination of the
channels that stay, times the weights that read it. Channels leave one after another, and each time the weights of the others take over
what they can. Sources: Optimal Brain Surgeon (Hassibi and Stork, 1993) and its form for structures (Kurtic et al., ZipLM, 2302.04089,
section 3.1). Deviations: the error of an output counts by the sensitivity of the model's answer to it; taps of a kernel are refitted
alike, as if they saw uncorrelated pixels; several layers that read a channel are ranked together.

Axes: C channels of a group, P positions of a channel in a layer's input, O output and I input channels of a layer, T taps of a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from muntin.compression.activation_moments import Moment
from muntin.compression.channels.groups import ChannelCuts, ChannelGroup, axis_of, removed

DAMPING = 1e-3
"""Added to the diagonal of a moment, relative to its mean."""
STEPS = 64
"""Steps of the elimination in a group: of more channels several leave at a time."""
MAX_INPUTS = 6144
"""Maximum number of input channels of a layer for which the harm is estimated: its moment has their square."""
EPS = 1e-12


def magnitudes(model: nn.Module, group: ChannelGroup) -> Tensor:
    """The importance of each channel by its weights alone, float64 `(C,)`: its share of the squares of each weight and norm, summed.

    Source: DepGraph (Fang et al., 2301.12900, section 3.3), without its training.
    """
    total_C = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.members:
        layer = model.get_submodule(member.layer)
        weight = layer._parameters.get("weight")
        if weight is None:
            continue
        squares = weight.detach().to("cpu", torch.float64).square()
        squares = squares.movedim(axis_of(layer, member.side), 0).flatten(1).sum(1) if weight.ndim > 1 else squares
        squares = squares[list(member.positions)]
        total_C.index_add_(0, torch.tensor(member.channels), squares / squares.sum().clamp_min(EPS))
    return total_C


def readers(model: nn.Module, group: ChannelGroup) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that read a group, if all have moments and read each channel equally often; empty otherwise.

    Without moments are kinds other than Linear and ungrouped Conv2d, and layers with more than `MAX_INPUTS` inputs.
    """
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    for name in dict.fromkeys(member.layer for member in group.members if member.side == "in"):
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear | nn.Conv2d) or (isinstance(layer, nn.Conv2d) and layer.groups > 1):
            return {}
        if layer.weight.shape[1] > MAX_INPUTS or len({len(places) for places in _places(group, name)}) != 1:
            return {}
        layers[name] = layer
    return layers


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The channels of a group in the order in which they leave."""

    order: tuple[int, ...]
    harm: tuple[float, ...]
    """The harm once the first n have left, n from 0 to C: estimated noise over signal of the answer. Empty if it was not estimated."""


def rank(model: nn.Module, group: ChannelGroup, moments: Mapping[str, Moment], sensitivity: Mapping[str, float]) -> Ranking:
    """Rank by the harm, or by the magnitudes if a layer that reads the group has no moment.

    Costs O(C·I²) for each layer that reads the group, in at most `STEPS` steps.
    """
    layers = readers(model, group)
    if not layers or any(name not in moments for name in layers):
        return Ranking(order=tuple(magnitudes(model, group).argsort(stable=True).tolist()), harm=())
    states = [_Elimination(group, name, layer, moments[name], sensitivity.get(name, 1.0)) for name, layer in layers.items()]
    left = torch.arange(group.channels)
    order: list[int] = []
    harm = [0.0]
    step = -(-group.channels // STEPS)
    while len(left) > step:
        scores = torch.stack([state.scores(left) for state in states]).sum(0)
        leaving = scores.argsort(stable=True)[:step]
        total = sum(state.remove(left[leaving]) for state in states)
        order += left[leaving].tolist()
        harm += [harm[-1] + total * (index + 1) / len(leaving) for index in range(len(leaving))]
        left = torch.tensor(sorted(set(left.tolist()).difference(order)))
    rest = torch.stack([state.scores(left) for state in states]).sum(0)
    last = rest.argsort(stable=True)
    order += left[last].tolist()
    harm += [harm[-1] + float(rest[last][: index + 1].sum()) for index in range(len(left))]
    return Ranking(order=tuple(order), harm=tuple(harm))


class _Elimination:
    """The inverse moment of one layer's input, and the Gram matrix of its weight, while channels leave."""

    def __init__(self, group: ChannelGroup, name: str, layer: nn.Linear | nn.Conv2d, moment: Moment, sensitivity: float) -> None:
        weight = layer.weight.detach().to("cpu", torch.float64).movedim(1, -1).flatten(0, -2)
        self.gram_II = weight.T @ weight
        self.inverse_II = torch.linalg.inv(_spread(layer, moment))
        self.places_CP = torch.tensor(_places(group, name))
        self.scale = sensitivity * moment.positions

    def scores(self, channels: Tensor) -> Tensor:
        """The error that each channel would add if it left next."""
        places_CP = self.places_CP[channels]
        inverse_CPP, gram_CPP = (matrix[places_CP[:, :, None], places_CP[:, None, :]] for matrix in (self.inverse_II, self.gram_II))
        error_CP: Tensor = torch.linalg.solve(inverse_CPP, gram_CPP).diagonal(dim1=1, dim2=2)
        return self.scale * error_CP.sum(1)

    def remove(self, channels: Tensor) -> float:
        """Let channels leave together; return the error that this adds."""
        places = self.places_CP[channels].flatten()
        inverse_SI, gram_SI = self.inverse_II[places], self.gram_II[places]
        share_SI = torch.linalg.solve(inverse_SI[:, places], inverse_SI)
        error = float(torch.linalg.solve(inverse_SI[:, places], gram_SI[:, places]).trace())
        moved_II = gram_SI.T @ share_SI
        self.gram_II += share_SI.T @ gram_SI[:, places] @ share_SI - moved_II - moved_II.T
        self.inverse_II -= inverse_SI.T @ share_SI
        for matrix in (self.gram_II, self.inverse_II):
            matrix[places], matrix[:, places] = 0, 0
        return self.scale * error


@torch.no_grad()
def refit(model: nn.Module, groups: Mapping[str, ChannelGroup], cuts: ChannelCuts, moments: Mapping[str, Moment]) -> None:
    """Let the channels that stay take over the part of the others that they predict, in place, before `cut`.

    The channels that leave are predicted from those that stay by least squares; the weights that read them are moved to the others.
    """
    for (name, side), leaving_at in removed(groups, cuts).items():
        layer = model.get_submodule(name)
        if side != "in" or name not in moments or not leaving_at or not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        spread_II = _spread(layer, moments[name])
        leaving = torch.tensor(sorted(leaving_at))
        kept = torch.tensor([place for place in range(len(spread_II)) if place not in leaving_at])
        if not len(kept):
            continue
        share_SK = torch.linalg.solve(spread_II[kept][:, kept], spread_II[kept][:, leaving]).T
        weight = layer.weight.detach().to("cpu", torch.float64)
        weight[:, kept] += torch.einsum("os...,sk->ok...", weight[:, leaving], share_SK)
        if layer.bias is not None:
            mean_I = moments[name].mean
            missing_S = mean_I[leaving] - share_SK @ mean_I[kept]
            layer.bias += torch.einsum("os...,s->o", weight[:, leaving], missing_S).to(layer.bias)
        layer.weight.copy_(weight)


def _spread(layer: nn.Linear | nn.Conv2d, moment: Moment) -> Tensor:
    """The second moment of the input, about its mean if the layer has a bias, which then takes the mean over; with damping."""
    matrix = moment.shrunk()
    if layer.bias is not None:
        matrix = matrix - torch.outer(moment.mean, moment.mean)
    return matrix + (DAMPING * float(matrix.diagonal().mean()) + EPS) * torch.eye(len(matrix), dtype=matrix.dtype)


def _places(group: ChannelGroup, layer: str) -> list[list[int]]:
    """The positions of each channel in a layer's input."""
    places: list[set[int]] = [set() for _ in range(group.channels)]
    for member in group.members:
        if member.layer == layer and member.side == "in":
            for place, channel in zip(member.positions, member.channels, strict=True):
                places[channel].add(place)
    return [sorted(some) for some in places]
