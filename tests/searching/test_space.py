"""Spaces: what they refuse, and the architectures that their choices make."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from model_helpers import one_line
from muntin.errors import RecipeError
from muntin.models import PRESETS, ModelConfig
from muntin.searching.space import Space, UnbuildableError, default_space, load_space, parse_space
from small_space import base_of


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "the space is empty"),
        ({"latents": []}, "latents is an empty list"),
        ({"latent": [8]}, "unknown choice 'latent': did you mean 'latents'"),
        ({"latents.0": [8]}, "latents has no entries"),
        ({"depths.x": [8]}, "give a position from 0"),
        ({"classes": [3]}, "unknown choice 'classes'"),
        ({"latents": 8}, r"latents is 8: give a list of values, \[8\]"),
        ({"latents": [8, 8]}, "latents names a value twice"),
        ({"stages": [1, 16]}, "stages 16: give whole numbers from 1 to 8"),
        ({"resolution": [0.05]}, "resolution 0.05: give numbers from 0.25 to 1"),
        ({"stem": [{"a": 1}]}, "stem: .* is neither a number nor a name"),
        (["latents"], "holds list, not choices"),
        ({"depths.0": [2.0]}, r"depths\.0 2\.0: give whole numbers"),
        ({"depths.0": [1, 2.0]}, r"depths\.0 2\.0: give whole numbers"),
        ({"latents": ["8", 16]}, 'latents "8": give whole numbers'),
        ({"dims": [128]}, "dims 128: give lists of whole numbers"),
        ({"gate": [0, 1]}, "gate 0: give true or false"),
        ({"mlp_ratio": [True]}, "mlp_ratio True: give numbers"),
        ({"block": [1]}, "block 1: give names"),
    ],
)
def test_refused_spaces(content: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        parse_space(content)
    one_line(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"dims.0": [32, 40]}, r"dims.0 40: with it no network can be built \(dim 40 must be a multiple of head_dim 16"),
        ({"stem": [[8, 16]]}, r"stem \[8, 16\]: with it no network can be built \(pairs has 2 entries for a stem of 2 stages"),
        ({"stages": [3]}, r"stages 3: with it no network can be built .*dims has 2 entries"),
        ({"attention": ["fast"]}, r"attention fast: with it no network can be built \(attention: Input should be"),
        ({"dims.3": [32], "depths.3": [1]}, "dims.3 32: with it no network can be built"),
        ({"resolution": [0.5]}, "resolution 0.5: with it no network can be built .*pictures of segment keep their size"),
        ({"finest": [4, 16]}, "finest 16: with it no network can be built"),
        ({"latents": [2, 4], "dims.0": [40]}, r"dims\.0 40: with it no network can be built \(dim 40 must be"),
        ({"block": ["parallel", "serial"], "depths.2": [1, 2]}, r"depths\.2 1: with it no network can be built \(dims names 2"),
        ({"stages": [1, 2, 3], "dims.0": [24, 40]}, r"dims\.0 24: with it no network can be built \(dim 24 must be"),
        ({"stages": [1, 3]}, r"stages 3: with it no network can be built"),
        ({"stem": [[8, 16]], "pairs": [[1]], "dims.0": [40]}, r"dims\.0 40: with it no network can be built"),
        ({"dims.0": [16, 32], "attention": ["hybrid"]}, r"dims\.0 16: with it no network can be built"),
    ],
)
def test_choices_that_make_no_network(content: Any, message: str, base: ModelConfig) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        parse_space(content).check(base)
    one_line(error)


def test_choices_that_exclude_each_other(base: ModelConfig) -> None:
    local = base.model_copy(update={"attention": "local"})
    space = parse_space({"latents": [2, 4], "dims.0": [16], "attention": ["local", "hybrid"]})
    with pytest.raises(
        RecipeError, match=r"attention hybrid with dims\.0 16: no network can be built \(dim 16 must be .*remove one"
    ) as error:
        space.check(local)
    one_line(error)


def test_check_of_a_large_space(space: Space, base: ModelConfig) -> None:
    assert space.size > 2000
    space.check(base)
    with pytest.raises(RecipeError, match=r"dims\.0 30"):
        Space(choices={**space.choices, "dims.0": (32, 64, 30)}).check(base)


def test_architecture(base: ModelConfig) -> None:
    space = parse_space({"dims": [[32]], "depths.0": [3], "dims.1": [64], "stages": [1, 2], "latents": [2, 4]})
    one = space.architecture({"dims": (32,), "dims.1": 64, "depths.0": 3, "stages": 2, "latents": 2}, base)
    assert one.config.dims == (32, 64) and one.config.depths == (3, 1)
    assert one.options(base) == {"dims": [32, 64], "depths": [3, 1], "latents": 2}
    one = space.architecture({"dims": (32,), "dims.1": 64, "depths.0": 3, "stages": 1}, base)
    assert one.config.dims == (32,) and one.config.depths == (3,)


def test_choices_without_effect_make_one_architecture(base: ModelConfig) -> None:
    space = parse_space({"attention": ["local"], "latents": [2, 4]})
    keys = {space.architecture({"attention": "local", "latents": latents}, base).key for latents in (2, 4)}
    assert len(keys) == 1
    classify = base_of("classify")
    space = parse_space({"decoder": [8, 16]})
    assert len({space.architecture({"decoder": decoder}, classify).key for decoder in (8, 16)}) == 1


@pytest.mark.parametrize("task", ["segment", "classify", "restore"])
def test_default_spaces(task: Any) -> None:
    base, space = ModelConfig(task=task), default_space(task)
    space.check(base)
    generator = random.Random(0)  # noqa: S311 - no secret
    drawn = [space.architecture(space.sample(generator), base).config for _ in range(50)]
    assert {config.gate for config in drawn} == {True, False} and {config.window for config in drawn} == {4, 8}
    assert default_space(task, gated=True).choices["gate"] == (True,)


@pytest.mark.parametrize("task", ["segment", "classify", "restore"])
def test_choices_of_a_network(task: Any, base: ModelConfig) -> None:
    """The default space has the small presets; choices that do not make the network are none."""
    for name in ("hybrid-xxs", "hybrid-xs", "hybrid-s"):
        preset = ModelConfig.model_validate({"task": task, **PRESETS[name]})
        assert default_space(task).chosen_for(preset, preset) is not None
    space = parse_space({"latents": [2, 4]})
    assert space.chosen_for(base, base) == {"latents": 4}
    assert space.chosen_for(base.model_copy(update={"latents": 2, "decoder": 8}), base) is None


def test_sampled_values_are_those_of_the_choices(space: Space, base: ModelConfig) -> None:
    chosen = space.sample(random.Random(1))  # noqa: S311 - no secret
    assert all(chosen[name] in values for name, values in space.choices.items())
    with pytest.raises(UnbuildableError, match="pairs has 1 entries for a stem of 3"):
        space.architecture({**chosen, "stem": (8, 8, 16), "pairs": (1,)}, base)


def test_space_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("stem: [[8, 16, 32], [16, 24, 48]]\ndepths.0: [1, 2]\n")
    assert load_space(file).choices == {"stem": ((8, 16, 32), (16, 24, 48)), "depths.0": (1, 2)}
    file.write_text("stem: [")
    with pytest.raises(RecipeError, match="not YAML"):
        load_space(file)
    with pytest.raises(RecipeError, match="No such file"):
        load_space(tmp_path / "none.yaml")
