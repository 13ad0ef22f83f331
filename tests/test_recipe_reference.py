"""docs/recipe.md against the models that check a recipe."""

from __future__ import annotations

import io
import re
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from pydantic import BaseModel

from muntin.data.config import Augmentation, DataConfig
from muntin.models.config import ModelConfig
from muntin.tasks.classes import ClassSpec
from muntin.tasks.folders import FolderPair
from muntin.training.config import (
    AcceptConfig,
    CompressionConfig,
    ModelChoice,
    QuantizationConfig,
    StageConfig,
    TrainingConfig,
    UpdateConfig,
)
from muntin.training.recipe import Recipe

DOCS = Path(__file__).parents[1] / "docs"
PARTS: tuple[type[BaseModel], ...] = (
    *(Recipe, DataConfig, Augmentation, ClassSpec, FolderPair, ModelChoice, TrainingConfig, QuantizationConfig, CompressionConfig),
    *(StageConfig, UpdateConfig, AcceptConfig),
)


@pytest.fixture(scope="module")
def page() -> str:
    """The page that the command writes."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        runpy.run_path(str(DOCS / "make_recipe_reference.py"), run_name="__main__")
    return printed.getvalue()


def test_page_is_current(page: str) -> None:
    committed = (DOCS / "recipe.md").read_text(encoding="utf-8")
    assert committed == page, "write it again: python docs/make_recipe_reference.py > docs/recipe.md"


def test_every_key_is_explained(page: str) -> None:
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    notes = {row[0].removeprefix("| ").strip("`") for row in rows}
    fixed = {"task", "classes", "channels", "scale"}  # of a model: the recipe says them elsewhere
    assert notes >= {key for part in PARTS for key in part.model_fields} | (set(ModelConfig.model_fields) - fixed)
    assert not [row for row in rows if len(row) != 4 or len(row[3].rstrip(" |")) < 5]


def test_ranges_and_defaults(page: str) -> None:
    assert re.search(r"\| `learning_rate` \| number above 0 to 1 \| `0\.004` \|", page)
    assert re.search(r"\| `warmup` \| number from 0 below 1 \| `0\.08` \|", page)
    assert re.search(r"\| `images` \| path \| needed \|", page)
    assert "| `precision` | `auto`, `fp32`, `tf32`, `bf16`, `fp16` |" in page
    for stage, share in (("recover", "0.2"), ("quantize", "0.05"), ("mix", "0.25")):  # each has a default of its own
        section = page.partition(f"## compression.{stage}\n")[2]
        assert f"| `share` | number from 0 to 10 | `{share}` |" in section.partition("## ")[0]
