"""Settings of a search: what they refuse, and their file."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from muntin.errors import MuntinError, RecipeError
from muntin.searching.settings import FILE, SearchFile, SearchSettings
from muntin.searching.space import parse_space
from muntin.training import load_recipe

SPACE = parse_space({"latents": [2, 4]})
SETTINGS = SearchSettings(candidates=8, minutes=9.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"objective": "speed"}, "objective 'speed'"), ({"minutes": 0}, "minutes 0"), ({"minutes": math.inf}, "minutes inf"),
     ({"candidates": 0}, "candidates 0"), ({"sampler": "grid"}, "sampler 'grid'")],
)  # fmt: skip
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SearchSettings(**settings)


@pytest.mark.parametrize(
    ("changes", "space", "settings", "message"),
    [
        (["training.steps=9"], {}, {}, r"recipe\.training\.steps was 6, is 9"),
        ([], {"latents": [2, 8]}, {}, r"space\.latents was \[2, 4\], is \[2, 8\]"),
        ([], {}, {"minutes": None}, r"settings\.minutes was 9\.0, is None"),
        ([], {}, {"candidates": 7}, r"settings\.candidates was 8, is 7"),
    ],
)
def test_other_settings(changes: list[str], space: Any, settings: Any, message: str, tiny: Any, tmp_path: Path) -> None:
    SearchFile(tmp_path, load_recipe(tiny.recipe), SPACE, SETTINGS).save()
    other = parse_space({"latents": [2, 4], **space})
    with pytest.raises(RecipeError, match=rf"holds a search with other settings \({message}\): give those again"):
        SearchFile(tmp_path, load_recipe(tiny.recipe, changes), other, replace(SETTINGS, **settings))


def test_settings_that_may_change(tiny: Any, tmp_path: Path) -> None:
    first = SearchFile(tmp_path, load_recipe(tiny.recipe), SPACE, SETTINGS)
    first.seconds, first.reference_ms, first.scored, first.study_seconds = 3.0, 0.5, 4, 2.0
    assert not (tmp_path / FILE).exists()
    first.save()
    free = load_recipe(tiny.recipe, ["data.workers=3", "data.cache_mib=9"])
    for changes in ({"candidates": 90, "minutes": 2.0}, {"candidates": 91, "minutes": 20.0}):
        more = SearchFile(tmp_path, free, SPACE, replace(SETTINGS, **changes))
        assert (more.seconds, more.reference_ms, more.scored, more.study_seconds) == (3.0, 0.5, 4, 2.0)
        assert more.first == SETTINGS and not more.notes
        more.save()


def test_file_of_another_format(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"format": 2, "settings": {}}')
    with pytest.raises(RecipeError, match=r"a search of format 2, by another version of muntin; this one goes on with format \d"):
        SearchFile(tmp_path, load_recipe(tiny.recipe), SPACE, SETTINGS)


def test_latencies_of_other_conditions(tiny: Any, tmp_path: Path) -> None:
    SearchFile(tmp_path, load_recipe(tiny.recipe), SPACE, SETTINGS).save()
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text().replace('"cpu": "', '"cpu": "Another '))
    notes = SearchFile(tmp_path, load_recipe(tiny.recipe), SPACE, SETTINGS).notes
    assert len(notes) == 1 and "cpu was 'Another" in notes[0]


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"seconds": 1, "table_seconds": 1, "settings": {}}'])
def test_file_of_something_else(content: str, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(MuntinError, match="not the settings of a search"):
        SearchFile(tmp_path, load_recipe(tiny.recipe), SPACE, SETTINGS)
