"""Training of supernets: killed and resumed, both tasks, and the scores of candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from muntin.data import open_source
from muntin.errors import MuntinError
from muntin.models import ModelConfig
from muntin.searching.candidates import CandidateScorer, recipe_of
from muntin.searching.cost import layer_macs
from muntin.searching.preparation import base_config
from muntin.searching.space import Space, UnbuildableError, parse_space
from muntin.searching.supernet import Supernet
from muntin.searching.supernet_training import ROUND, SAMPLED, SupernetTraining, draw_round, sampled_from
from muntin.training import Recipe, load_recipe
from muntin.training.precision import resolve_precision

CHOICES = {"dims.0": [32, 48], "depths.0": [1, 2], "attention": ["hybrid", "local"], "finest": [2, 4], "stages": [1, 2]}


def trained(recipe: Recipe, folder: Path, root: Path, *, until: int | None = None) -> Any:
    source = open_source(recipe.data, task=recipe.task, root=root)
    precision = resolve_precision("fp32", "cpu")
    training = SupernetTraining(
        parse_space(CHOICES), base_config(recipe, source), recipe, source, folder=folder, root=root, precision=precision
    )
    return training.run(stopped=lambda: training.step == until), source, precision


def test_killed_and_resumed(tiny: Any, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.recipe)
    whole, source, precision = trained(recipe, tmp_path / "whole", tiny.root)
    first, *_ = trained(recipe, tmp_path / "parts", tiny.root, until=2)
    assert (first.step, first.finished) == (2, False)
    second, *_ = trained(recipe, tmp_path / "parts", tiny.root)
    assert (second.step, second.finished) == (recipe.training.steps, True)
    pairs = zip(whole.supernet.named_parameters(), second.supernet.named_parameters(), strict=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in pairs)
    again, *_ = trained(recipe, tmp_path / "parts", tiny.root)  # nothing is left to do
    assert again.step == second.step and again.seconds == second.seconds

    scorer = CandidateScorer(second.supernet, recipe, source, precision)
    base, space = base_config(recipe, source), parse_space({**CHOICES, "bits": [8], "rank_share": [0.95, 0.3]})
    plain = parse_space(CHOICES).architecture({"attention": "local", "stages": 1}, base)
    small = space.architecture({"stages": 1, "bits": 8, "rank_share": 0.95}, base)
    assert scorer.score(plain) == scorer.score(plain) and 0 <= scorer.score(plain) <= 1
    assert 0 <= scorer.score(small) <= 1
    with pytest.raises(UnbuildableError, match=r"rank_share 0\.3"):
        scorer.score(replace(small, rank_share=0.3))
    assert any(hasattr(layer, "bits") for layer in scorer.network(small).modules())


def test_measured_precision(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves the shared weights and their norms as they are."""
    monkeypatch.setattr("muntin.training.precision.MAX_SHARE", 9.0)
    recipe = load_recipe(tiny.recipe)
    source = open_source(recipe.data, task=recipe.task, root=tiny.root)
    space, fp32 = parse_space(CHOICES), resolve_precision("fp32", "cpu")
    trainings = [
        SupernetTraining(space, base_config(recipe, source), recipe, source, folder=tmp_path, root=tiny.root, precision=precision)
        for precision in (fp32, replace(fp32, undecided=True))
    ]
    states = [training.supernet.state_dict() for training in trainings]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not trainings[0].notes and not trainings[1].precision.undecided
    assert trainings[1].notes[0].startswith(f"precision auto: {trainings[1].precision.name}, since BF16 is ")


def test_unsound_batches(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in a row are left out, and the batches after them are others; too many end the search."""
    recipe, count = load_recipe(tiny.recipe), 2
    run, calls = Supernet.run, []

    def unsound(self: Supernet, config: ModelConfig, images: torch.Tensor) -> torch.Tensor:
        scores = run(self, config, images)
        if config is self.largest:
            calls.append(images)
        return scores * torch.nan if config is self.largest and 2 < len(calls) <= 2 + count else scores

    monkeypatch.setattr(Supernet, "run", unsound)
    result, *_ = trained(recipe, tmp_path / "two", tiny.root)
    assert result.step == recipe.training.steps and len(calls) == result.step + 2 and len(result.notes) == 2
    assert "the loss is nan at step 3: its batch is skipped" in result.notes[0]
    assert all(parameter.isfinite().all() for parameter in result.supernet.parameters())
    assert all(buffer.isfinite().all() for buffer in result.supernet.buffers())
    assert not any(torch.equal(one, other) for one, other in pairwise(calls))
    count = 99
    calls.clear()
    with pytest.raises(MuntinError, match="the loss is nan at step 3, after 5 other unsound batches: lower"):
        trained(recipe, tmp_path / "many", tiny.root)


def test_classify_at_other_resolutions(write_tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "data")
    content = {**tiny.content, "task": "classify"}
    images = tiny.root / "train" / "images"
    for name in ("one", "two"):
        (images / name).mkdir()
    for index, file in enumerate(sorted(images.glob("*.png"))):
        for copy in range(2):
            (images / ("one", "two")[index % 2] / f"{copy}-{file.name}").write_bytes(file.read_bytes())
        file.unlink()
    content["data"] = {"source": "folders", "images": "train/images", "crop": 32, "validation": 0.3, "test": 0.2}
    recipe = Recipe.model_validate(content)
    source = open_source(recipe.data, task=recipe.task, root=tiny.root)
    base, space = base_config(recipe, source), parse_space({"resolution": [0.5, 1], "latents": [2, 4]})
    precision = resolve_precision("fp32", "cpu")
    training = SupernetTraining(space, base, recipe, source, folder=tmp_path / "search", root=tiny.root, precision=precision)
    result = training.run()
    scorer = CandidateScorer(result.supernet, recipe, source, precision)
    small = space.architecture({"resolution": 0.5, "latents": 2}, base)
    assert recipe_of(recipe, small).data.crop == 16
    assert 0 <= scorer.score(small) <= 1


@pytest.mark.parametrize("round_", [0, 1])
def test_sizes_rise_and_fall(round_: int, space: Space, base: ModelConfig) -> None:
    drawn = draw_round(space, base, 0, round_)
    macs = [layer_macs(one.config) for one in drawn]
    assert macs == sorted(macs, reverse=bool(round_)) and len(drawn) == ROUND * SAMPLED
    steps = [sampled_from(lambda number: draw_round(space, base, 0, number), round_ * ROUND + step) for step in range(ROUND)]
    assert [one for networks in steps for one in networks] == list(drawn)
