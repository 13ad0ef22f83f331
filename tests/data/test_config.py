from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from muntin.data.config import Augmentation, DataConfig, open_source
from muntin.images import write_image

FOLDERS: dict[str, Any] = {
    "source": "folders",
    "images": "images",
    "masks": "masks",
    "classes": [{"name": "sea", "value": 0}, {"name": "land", "value": [200, 30, 0]}],
}


def test_source_by_default() -> None:
    source = open_source(DataConfig(), task="segment", root=Path())
    assert [entry.name for entry in source.classes] == ["ocean", "moist land", "steppe", "desert", "tundra", "ice"]
    assert len(open_source(DataConfig(source="earth:shore"), task="segment", root=Path()).classes) == 3


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"source": "moon"}, "earth:climate"),
        ({"images": "photos"}, "`images` belongs to `source: folders`"),
        ({"channels": 4}, "have 3"),
        ({"crop": 4}, "crop"),
        ({"colour": 1}, "colour"),
        ({"augmentation": {"scale": [2, 1]}}, "smaller zoom comes first"),
        ({"augmentation": {"flip_vertical": 2}}, "flip_vertical"),
        ({"source": "folders"}, "needs `images`"),
        ({**FOLDERS, "classes": []}, "at least two `classes`"),
        ({**FOLDERS, "validation": 0.5, "test": 0.6}, "add up to 1.1: make them less than 1"),
        ({**FOLDERS, "validation": 0}, "validation"),
        ({**FOLDERS, "channels": 17}, "channels"),
        ({**FOLDERS, "classes": [{"name": "", "value": 0}, {"name": "a"}]}, "name"),
        ({**FOLDERS, "classes": [{"name": "b", "value": [0, 0, 256]}, {"name": "a"}]}, "value"),
    ],
)
def test_config_with_wrong_values(values: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError) as error:
        DataConfig.model_validate(values)
    assert word in str(error.value)


def test_config_with_described_fields() -> None:
    for model in (DataConfig, Augmentation):
        for name, field in model.model_fields.items():
            assert field.description, name


def test_config_round_trip() -> None:
    for config in (DataConfig(source="earth:climate", rare=0.5), DataConfig.model_validate(FOLDERS)):
        assert DataConfig.model_validate(config.model_dump(mode="json")) == config


def test_source_with_relative_folders(tmp_path: Path) -> None:
    for number in range(20):
        for name in ("images", "masks"):
            (tmp_path / name).mkdir(exist_ok=True)
            write_image(tmp_path / name / f"{number}.png", np.zeros((4, 4) if name == "masks" else (4, 4, 3), dtype=np.uint8))
    config = DataConfig.model_validate({**FOLDERS, "classes": [{"name": "a"}, {"name": "b"}]})
    assert sum(len(open_source(config, task="segment", root=tmp_path).split(name)) for name in ("train", "validation", "test")) == 20
    for name in ("images", "masks"):
        shutil.copytree(tmp_path / name, tmp_path / "own" / name)
    own = DataConfig.model_validate({**config.model_dump(), "test": {"images": "own/images", "masks": "own/masks"}})
    assert len(open_source(own, task="segment", root=tmp_path).split("test")) == 20
