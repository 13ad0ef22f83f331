"""Supernets: networks are slices of the shared weights, and compute what an ordinary network with these weights does."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from model_helpers import pixels
from muntin.errors import RecipeError
from muntin.models import HybridNet, ModelConfig
from muntin.searching.space import Architecture, Space, UnbuildableError, parse_space
from muntin.searching.supernet import Supernet, largest_configs
from small_space import CHOICES, base_of


def some(space: Space, base: ModelConfig, count: int) -> list[Architecture]:
    """Random architectures of a space."""
    generator, found = random.Random(0), list[Architecture]()  # noqa: S311 - no secret
    while len(found) < count:
        try:
            found.append(space.architecture(space.sample(generator), base))
        except UnbuildableError:
            continue
    return found


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    """Of the whole space. Making it takes seconds: copy before changing it."""
    return Supernet(parse_space(CHOICES), base_of("segment"), seed=3)


@pytest.mark.parametrize("task", ["segment", "classify", "restore"])
def test_networks_compute_what_their_copies_do(task: str, space: Space, supernet: Supernet) -> None:
    """Whole for segmentations; for the other tasks with what differs in them: the beginning, the number of stages and the end."""
    base, images = base_of(task), pixels(2, 3, 48, 32)
    if task == "segment":
        supernet = copy.deepcopy(supernet)
    else:
        space = parse_space({name: CHOICES[name] for name in ("stem", "pairs", "stages", "dims.0", "depths.0", "fusion", "finest")})
        supernet = Supernet(space, base)
    for layer in supernet.layers.values():  # norms, biases and the last layer of restore begin with 0 and 1
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    for one in some(space, base, 12):
        scores = supernet.train().run(one.config, images)
        assert torch.equal(scores, supernet.extract(one.config).train()(images))
    assert torch.equal(supernet(images), supernet.extract(supernet.largest).train()(images))


def test_largest_network_is_an_ordinary_one(supernet: Supernet) -> None:
    torch.manual_seed(3)
    network = HybridNet(supernet.largest)
    weights = supernet.weights(supernet.largest)
    assert weights.keys() == dict(network.named_parameters()).keys()
    assert all(torch.equal(weights[name], parameter) for name, parameter in network.named_parameters())
    assert supernet.largest.dims == (64, 48) and supernet.largest.depths == (2, 1)


def test_training_a_network_moves_the_shared_weights(base: ModelConfig) -> None:
    space = parse_space({"dims.0": [32, 64], "mlp_ratio": [1, 2], "latents": [2, 4], "depths.0": [1, 2]})
    supernet = Supernet(space, base)
    small = space.architecture({"dims.0": 32, "mlp_ratio": 1, "latents": 2, "depths.0": 1}, base).config
    view = supernet.weights(small)["stages.0.blocks.0.mlp.expand.weight"]
    shared = supernet.layers["stages/16/of-3/blocks/0/mlp/expand"].weight
    assert view.data_ptr() == shared.data_ptr() and view.shape == (32, 32) and shared.shape == (128, 64)  # type: ignore[union-attr, operator]
    before = {name: parameter.clone() for name, parameter in supernet.named_parameters()}
    supernet.train().run(small, pixels(2, 3, 32, 32)).square().mean().backward()
    torch.optim.SGD(supernet.parameters(), 0.1).step()
    moved = {name for name, parameter in supernet.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(name.startswith("layers.stages/16/of-3/blocks/0/attention/hybrid-0_5/project_latent") for name in moved)
    assert not any("blocks/1" in name for name in moved)
    name = "layers.stages/16/of-3/blocks/0/mlp/expand.weight"
    after = dict(supernet.named_parameters())[name]
    assert not torch.equal(after[:32, :32], before[name][:32, :32]) and torch.equal(after[32:], before[name][32:])


def test_heads_and_latents_keep_their_role(base: ModelConfig) -> None:
    space = parse_space({"dims.0": [32, 64], "latents": [2, 4]})
    supernet = Supernet(space, base)
    small = space.architecture({"dims.0": 32, "latents": 2}, base).config
    projection = supernet.weights(small)["stages.0.blocks.0.attention.project_latent.weight"]
    shared = supernet.layers["stages/16/of-3/blocks/0/attention/hybrid-0_5/project_latent"].weight
    values, read, write = torch.split(shared, [2 * 16, 2 * 4, 2 * 4])  # type: ignore[arg-type]
    assert torch.equal(projection, torch.cat([values[:16], read[:2], write[:2]])[:, :32])


def test_gates_and_windows(base: ModelConfig) -> None:
    space, images = parse_space({"gate": [True, False], "window": [2, 4]}), pixels(2, 3, 48, 32)
    supernet = Supernet(space, base).train()
    for parameter in supernet.parameters():  # gates begin with 1
        torch.nn.init.normal_(parameter, std=0.1)
    configs = [space.architecture({"gate": gate, "window": window}, base).config for gate in (True, False) for window in (2, 4)]
    scores = [supernet.run(config, images) for config in configs]
    assert all(torch.equal(one, supernet.extract(config).train()(images)) for one, config in zip(scores, configs, strict=True))
    assert not any(torch.equal(scores[0], other) for other in scores[1:])
    gated, plain = (dict(supernet.weights(config)) for config in (configs[0], configs[2]))
    assert gated.keys() > plain.keys() and all(torch.equal(gated[name], weights) for name, weights in plain.items())


def test_kinds_of_attention_share_nothing(space: Space, base: ModelConfig, supernet: Supernet) -> None:
    kinds = {key.split("/attention/")[1].split("/")[0] for key in supernet.layers if "/attention/" in key}
    assert kinds == {"hybrid-0_5", "hybrid-0_75", "local", "global", "dense"}
    configs = list(largest_configs(space, base))
    assert {len(config.stem) for config in configs} == {2, 3} and {len(config.dims) for config in configs} == {2}
    assert {len(config.dims) for config in largest_configs(space, base_of("classify"))} == {1, 2}


def test_space_without_a_largest_network(base: ModelConfig) -> None:
    space = parse_space({"stem": [[8, 16]], "pairs": [[1, 1]]})
    with pytest.raises(RecipeError, match="no network can be built"):
        Supernet(space, base)
