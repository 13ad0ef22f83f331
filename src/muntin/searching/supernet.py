"""Supernet: one set of weights that all networks of a space share.

    layers of the largest networks, one of each combination of kinds  ->  slices for a configuration  ->  an ordinary HybridNet

A network has the first blocks, heads, latents and channels of the shared weights (`slices`). It is called by
`torch.func.functional_call` with its slices, which are views where they are contiguous, so its gradients reach the shared weights.
Source: weight sharing by slices, as in BigNAS (Yu et al., 2003.11142, section 3). Deviation: kinds of attention have weights of their own.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call

from muntin.errors import RecipeError
from muntin.models import HybridNet, ModelConfig
from muntin.searching.slices import coordinates, shared_layer
from muntin.searching.space import Space
from muntin.training.memory.norm_groups import group_norms

KINDS = ("attention", "block", "finest", "fusion", "latent_share")
"""Fields whose values make layers of other shapes or names."""
AMOUNTS = ("latents", "mlp_ratio", "decoder", "gate")
"""Fields of which the greatest value holds the others."""
KEPT_NETWORKS = 32
"""Networks without weights of their own that are kept for the next call."""


class Supernet(nn.Module):
    """The shared weights of a space. `base`: the configuration of the fields that no choice names. `norm_group`: as in a recipe.

    Raises `RecipeError` if the space has no network.
    """

    def __init__(self, space: Space, base: ModelConfig, *, seed: int = 0, norm_group: int | None = None) -> None:
        super().__init__()
        self.norm_group = norm_group
        configs = list(largest_configs(space, base))
        if not configs:
            raise RecipeError("space: no network can be built from the greatest values of its choices: leave out some of them")
        self.layers = nn.ModuleDict()
        self._places: dict[str, list[dict[object, int]]] = {}
        self._networks: OrderedDict[ModelConfig, HybridNet] = OrderedDict()
        self._indices: OrderedDict[ModelConfig, dict[str, list[Tensor | int]]] = OrderedDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            configs.sort(key=_weights_of, reverse=True)
            for config in configs:
                self._add(config)
        self.largest = configs[0]
        """The network with the most parameters, which teaches the others."""

    def _add(self, config: ModelConfig) -> None:
        """Add the layers of a network that are not there yet."""
        network = HybridNet(config)
        for name, layer in network.named_modules():
            own = dict(layer.named_parameters(recurse=False))
            if not own or _key(key := shared_layer(name, config)) in self.layers:
                continue
            self.layers[_key(key)] = layer
            for last, parameter in own.items():
                axes = coordinates(f"{name}.{last}", parameter.shape, config)
                self._places[f"{key}.{last}"] = [{entry: index for index, entry in enumerate(axis)} for axis in axes]

    def weights(self, config: ModelConfig) -> dict[str, Tensor]:
        """The parameters of a network by their names in it: slices of the shared ones, with gradients for these."""
        network = self._network(config)
        if config not in self._indices:
            self._indices[config] = {name: self._index(name, p.shape, config) for name, p in network.named_parameters()}
            if len(self._indices) > KEPT_NETWORKS:
                self._indices.popitem(last=False)
        found = {}
        for name, indices in self._indices[config].items():
            layer, _, last = name.rpartition(".")
            tensor = self.layers[_key(shared_layer(layer, config))].get_parameter(last)
            found[name] = _sliced(tensor, indices)
        return found

    def _index(self, name: str, shape: torch.Size, config: ModelConfig) -> list[Tensor | int]:
        """For each axis the entries of the shared parameter: their number if they are the first ones, otherwise a tensor."""
        layer, _, last = name.rpartition(".")
        places = self._places[f"{shared_layer(layer, config)}.{last}"]
        axes = [[place[entry] for entry in axis] for place, axis in zip(places, coordinates(name, shape, config), strict=True)]
        return [len(axis) if axis == list(range(len(axis))) else torch.tensor(axis) for axis in axes]

    def run(self, config: ModelConfig, images_BCHW: Tensor) -> Tensor:
        """The scores of a network, in the mode (`train`, `eval`) of the supernet. Its norms have no statistics: see `extract`."""
        network = self._network(config).train(self.training)
        scores: Tensor = functional_call(network, self.weights(config), (images_BCHW,))
        return scores

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The scores of the largest network."""
        return self.run(self.largest, images_BCHW)

    @torch.no_grad()
    def extract(self, config: ModelConfig) -> HybridNet:
        """A network with copies of its weights, whose norms have the statistics of a new one (`training.norm_recalibration`)."""
        network = self._new(config)
        parameters = dict(network.named_parameters())
        for name, tensor in self.weights(config).items():
            parameters[name].copy_(tensor)
        return network.eval()

    def _network(self, config: ModelConfig) -> HybridNet:
        """A network whose own weights are not used."""
        if config not in self._networks:
            self._networks[config] = self._new(config).requires_grad_(False)
            if len(self._networks) > KEPT_NETWORKS:
                self._networks.popitem(last=False)
        self._networks.move_to_end(config)
        return self._networks[config]

    def _new(self, config: ModelConfig) -> HybridNet:
        with torch.random.fork_rng(devices=[]):
            network = HybridNet(config)
        if self.norm_group is not None:
            group_norms(network, self.norm_group)
        return network.to(next(self.parameters()).device)


def largest_configs(space: Space, base: ModelConfig) -> Iterator[ModelConfig]:
    """The largest network of each combination of kinds and of lengths of the stem, for a classifier of each number of stages, too.

    A network with fewer stages has layers of its own only if its last layer reads the last stage.
    """
    stems, pairs = space.sequences("stem", base), space.sequences("pairs", base)
    dims, depths = space.sequences("dims", base), space.sequences("depths", base)
    if not base.answer.one:
        dims, depths = dims[-1:], depths[-1:]
    kinds = [space.kinds(field, base) for field in KINDS]
    amounts = {field: max(space.kinds(field, base)) for field in AMOUNTS}
    for values in itertools.product(stems, pairs, dims, depths, *kinds):
        fields = dict(zip(("stem", "pairs", "dims", "depths", *KINDS), values, strict=True))
        try:
            yield ModelConfig.model_validate({**base.model_dump(), **amounts, **fields})
        except ValidationError:  # lengths that do not fit each other
            continue


def _weights_of(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in HybridNet(config).parameters())


def _sliced(tensor: Tensor, indices: list[Tensor | int]) -> Tensor:
    for axis, index in enumerate(indices):
        if isinstance(index, int):
            tensor = tensor.narrow(axis, 0, index) if index < tensor.shape[axis] else tensor
        else:
            tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def _key(name: str) -> str:
    return name.replace(".", "/")  # names of modules hold no dots
