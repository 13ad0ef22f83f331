from __future__ import annotations

import copy
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from muntin.data.config import Augmentation, DataConfig
from muntin.errors import RecipeError
from muntin.models import create_model
from muntin.tasks.classes import ClassSpec
from muntin.training.config import ModelChoice, QuantizationConfig, TrainingConfig
from muntin.training.recipe import Recipe, load_recipe, override_recipe, parse_recipe, recipe_text

FOLDERS: dict[str, Any] = {
    "data": {
        "source": "folders",
        "images": "a",
        "masks": "b",
        "validation": {"images": "c", "masks": "d"},
        "test": 0.2,
        "classes": [{"name": "sea"}, {"name": "land", "color": [1, 2, 3], "value": 7}],
        "augmentation": {"flip_vertical": 0.5},
    },
    "model": {"name": "hybrid-xs"},
    "training": {"steps": 10},
    "quantization": {},
}


def changed(place: str, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(FOLDERS)
    *parents, last = place.split(".")
    inside: Any = content
    for key in parents:
        inside = inside[int(key)] if isinstance(inside, list) else inside[key]
    inside[last] = value
    return content


def mistake(content: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as error:
        parse_recipe(content, where="recipe r.yaml")
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("recipe r.yaml: ")
    return text.removeprefix("recipe r.yaml: ")


@pytest.mark.parametrize(
    ("place", "near"),
    [
        ("trainings", "training"),
        ("data.crops", "crop"),
        ("data.validation.imags", "images"),
        ("data.classes.1.colour", "color"),
        ("data.augmentation.flip_horizontaly", "flip_horizontal"),
        ("model.nmae", "name"),
        ("training.learning_rat", "learning_rate"),
        ("quantization.min_sqnr", "min_sqnr_db"),
    ],
)
def test_unknown_key_with_a_near_one(place: str, near: str) -> None:
    assert mistake(changed(place, 1)).startswith(f"unknown key '{place}'; did you mean '{near}'? known here: ")


def test_unknown_key_first() -> None:
    assert mistake(changed("model.zzz", 1)) == "unknown key 'model.zzz'; known here: name, encoder, options, size_divisor, weights"
    content = changed("training.steps", -1)
    content["quantization"]["kep"] = []
    assert "unknown key 'quantization.kep'; did you mean 'keep'?" in mistake(content)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("training.steps", 0, "greater than or equal to 1 (got 0)"),
        ("training.steps", "ten", "(got 'ten')"),
        ("training.class_weights", "balanced", "Input should be 'auto' or keys with values (got 'balanced')"),
        ("training.loss", "crossentropy", "(got 'crossentropy'); did you mean 'cross-entropy'?"),
        ("training.batch_size", 5000, "less than or equal to 4096"),
        ("training.learning_rate", 0, "greater than 0"),
        ("training.learning_rate", float("nan"), "(got nan)"),
        ("training.warmup", 1, "less than 1"),
        ("training.clip", float("inf"), "finite"),
        ("training.average", 1, "less than 1"),
        ("training.precision", "fp8", "'auto', 'fp32', 'tf32', 'bf16' or 'fp16' (got 'fp8')"),
        ("training.threads", 0, "greater than or equal to 1"),
        ("quantization.min_sqnr_db", -1, "greater than or equal to 0"),
        ("quantization.calibration_images", 0, "greater than or equal to 1"),
        ("data.source", "mars", "'earth', 'earth:climate', 'earth:shore', 'folders' or 'shards' (got 'mars')"),
        ("data.validation", 2, "less than 1 or keys with values (got 2)"),
        ("data.classes.1.color", [1, 2, 300], "less than or equal to 255 (got 300)"),
        ("data.classes.1.value", [1, 2, 300], "value.2: Input should be less than or equal to 255 (got 300)"),
        ("name", "a b", "(got 'a b')"),
        ("seed", -1, "greater than or equal to 0"),
        ("task", "detect", "'segment', 'classify' or 'restore'"),
        ("training", None, "keys with values"),
    ],
)
def test_value_out_of_range(place: str, value: Any, says: str) -> None:
    text = mistake(changed(place, value))
    assert text.startswith(place)
    assert says in text


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("data.masks", None, "recipe: task: segment needs data.masks; if each class has a folder of its own, write task: classify"),
        ("task", "classify", "recipe: task: classify has no data.masks: leave it out, or write task: segment"),
    ],
)
def test_masks_by_task(place: str, value: Any, says: str) -> None:
    assert mistake(changed(place, value)) == says


def test_keys_that_are_no_words() -> None:
    assert "Keys should be strings" in mistake(FOLDERS | {1: 2})


# ---- files ----


def write(tmp_path: Path, content: Any = None, text: str | None = None) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(content) if text is None else text, encoding="utf-8")
    return path


def file_mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    assert "No such file" in file_mistake(tmp_path / "none.yaml")
    assert "`muntin init DIR`" in file_mistake(tmp_path / "none.yaml")
    assert "Is a directory" in file_mistake(tmp_path)


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\ta: 1", "!!python/object/apply:os.getcwd []", "a: &x [*y]"])
def test_not_yaml(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text=text)
    assert "not YAML" in file_mistake(path)
    path.write_bytes(b"\xff\xfe\x00name")
    assert "not YAML" in file_mistake(path)


@pytest.mark.parametrize("text", ["- 1\n- 2", "just words", "", "3"])
def test_file_without_keys(tmp_path: Path, text: str) -> None:
    assert "not keys and values" in file_mistake(write(tmp_path, text=text))


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, FOLDERS)
    overrides = [
        "training.steps=7",
        "seed=3",
        "training.steps=8",
        "quantization.keep=[a.b, c]",
        "training.compile=true",
        "data.ignore=null",
    ]
    recipe = load_recipe(path, [*overrides, "model.options={depths: [1, 1]}", "name=xy"])
    assert (recipe.training.steps, recipe.seed, recipe.training.compile, recipe.name) == (8, 3, True, "xy")
    assert recipe.quantization.keep == ("a.b", "c")
    assert recipe.data.ignore is None
    assert recipe.model.options == {"depths": [1, 1]}
    bare = load_recipe(write(tmp_path, {"name": "bare"}), ["data.augmentation.brightness=0"])
    assert bare.data.augmentation.brightness == 0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.steps", "write section.key=value"),
        ("=3", "write section.key=value"),
        ("name.steps=3", "'name' holds a value, not keys"),
        ("training.steps=[1", "is not a YAML value"),
        ("training.step=3", "did you mean 'steps'?"),
        ("steps=3", "unknown key 'steps'; did you mean 'training.steps'?"),
        ("training.steps=0", "training.steps: Input should be greater than or equal to 1"),
    ],
)
def test_wrong_override(tmp_path: Path, override: str, says: str) -> None:
    assert says in file_mistake(write(tmp_path, {"name": "a", **FOLDERS}), override)


def test_folder_in_place_of_its_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"give the path of a YAML file"):
        load_recipe(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RecipeError, match=r"did you mean .*recipe\.yaml\?"):
        load_recipe(tmp_path)


# ---- what is written reads back ----

SHARES = st.floats(0.01, 0.45)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True)
DATA = st.one_of(
    st.builds(DataConfig, source=st.sampled_from(["earth", "earth:climate", "earth:shore"]), crop=st.integers(8, 4096)),
    st.builds(
        DataConfig,
        source=st.just("folders"),
        images=st.sampled_from([Path("a"), Path("/b/c"), Path("../ü d")]),
        masks=st.just(Path("masks")),
        validation=SHARES,
        test=SHARES,
        classes=st.sampled_from(
            [
                (ClassSpec(name="a: b"), ClassSpec(name="#2", color=(0, 1, 255))),
                (ClassSpec(name="yes", value=(0, 0, 0)), ClassSpec(name="no", value=(0, 0, 1))),
            ]
        ),
        ignore=st.none() | st.integers(2, 65535),
        rare=st.floats(0, 1),
        augmentation=st.builds(Augmentation, brightness=st.floats(0, 0.99), scale=st.just((0.5, 2.0))),
    ),
)
RECIPES = st.builds(
    Recipe,
    name=NAMES,
    seed=st.integers(0, 2**31 - 1),
    data=DATA,
    model=st.builds(ModelChoice, options=st.dictionaries(st.sampled_from(["dims", "depths"]), st.lists(st.integers(1, 9)))),
    training=st.builds(
        TrainingConfig,
        steps=st.integers(1, 10**9),
        learning_rate=st.floats(0, 1, exclude_min=True),
        average=st.floats(0, 1, exclude_max=True),
        precision=st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
        compile=st.booleans(),
        threads=st.none() | st.integers(1, 1024),
    ),
    quantization=st.builds(QuantizationConfig, min_sqnr_db=st.floats(0, 60), keep=st.lists(st.text(max_size=5), max_size=2).map(tuple)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=RECIPES, defaults=st.booleans())
def test_round_trip(tmp_path: Path, recipe: Recipe, defaults: bool) -> None:
    values = recipe.model_dump(mode="json", exclude_defaults=not defaults)
    assert Recipe.model_validate(json.loads(json.dumps(values))) == recipe
    if values:
        assert load_recipe(write(tmp_path, text=recipe_text(recipe, defaults=defaults))) == recipe


def test_folded_line_break(tmp_path: Path) -> None:
    recipe = parse_recipe({**FOLDERS, "quantization": {"keep": ["a\x85b", "ä"]}}, where="test")
    assert load_recipe(write(tmp_path, text=recipe_text(recipe))) == recipe


def test_recipe_is_frozen() -> None:
    recipe = parse_recipe(FOLDERS, where="test")
    with pytest.raises(ValueError, match="frozen"):
        recipe.training.steps = 3  # type: ignore[misc]


# ---- recipes that come with muntin ----

SHIPPED = [entry.name for entry in (resources.files("muntin") / "recipes").iterdir() if entry.name.endswith(".yaml")]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes(name: str) -> None:
    with resources.as_file(resources.files("muntin") / "recipes" / name) as path:
        recipe = load_recipe(path)
        head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert recipe.name == Path(name).stem and "demo.yaml" in SHIPPED
    assert "# " in head
    assert "muntin " in head
    model = create_model(recipe.model.name, task=recipe.task, channels=recipe.data.channels, classes=6, options=recipe.model.options)
    assert sum(p.numel() for p in model.parameters()) > 0


@pytest.mark.parametrize("value", ["2024-13-45", "[" * 5000])
def test_values_that_yaml_cannot_build(tmp_path: Path, value: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: {value}")
    with pytest.raises(RecipeError, match="not YAML: ") as error:
        load_recipe(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    path.write_text("{}")
    with pytest.raises(RecipeError, match=r"^'name=.* is not a YAML value") as error:
        load_recipe(path, [f"name={value}"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_duplicate_key(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("training: {steps: 7}\nseed: 1\ntraining: {precision: fp32}\n")
    with pytest.raises(RecipeError, match=r"'training' is in line 1 and again in line 3: keep one"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ("data.augmentation.flip_vertical=true", "data.augmentation.flip_vertical"),
        ("data.rare=yes", "data.rare"),
        ("training.learning_rate=on", "training.learning_rate"),
        ("data.augmentation.scale=[true, 2]", "data.augmentation.scale"),
    ],
)
def test_boolean_for_a_number(change: str, place: str) -> None:
    with pytest.raises(RecipeError, match=rf"{re.escape(place)}: a number is required, "):
        override_recipe(Recipe(), [change])
    assert override_recipe(Recipe(), ["training.compile=yes"]).training.compile is True


def test_rare_without_masks() -> None:
    with pytest.raises(RecipeError, match=r"data\.rare 0\.5: .* classify lacks: remove it"):
        override_recipe(Recipe(), ["task=classify", "data.rare=0.5"])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "needs data.degrade"),
        ({"degrade": {"noise": 25}, "targets": "b"}, "remove `targets`"),
        ({"degrade": {"noise": 25}, "scale": 2}, "remove `scale`"),
        ({"degrade": {"jpeg": 50}, "channels": 4}, "JPEG has 1 or 3"),
        ({"degrade": {"noise": 25}, "rare": 0.5}, "restore lacks"),
        ({"degrade": {"noise": 25}, "classes": [{"name": "sea"}]}, "restore has no classes"),
        ({"degrade": {"scale": 2}, "source": "shards"}, "source: folders"),
    ],
)
def test_data_that_do_not_suit_restore(data: dict[str, Any], says: str) -> None:
    content = {"task": "restore", "data": {"source": "folders", "images": "a", **data}}
    with pytest.raises(RecipeError, match=says):
        parse_recipe(content, where="test")


def test_scale_of_restore() -> None:
    data = {"source": "folders", "images": "a"}
    recipe = parse_recipe({"task": "restore", "data": {**data, "degrade": {"scale": 2, "noise": [5, 50]}}}, where="test")
    assert (recipe.signature(()).scale, recipe.signature(()).task) == (2, "restore")
    assert parse_recipe(recipe.model_dump(mode="json"), where="test") == recipe
    pairs = parse_recipe({"task": "restore", "data": {**data, "targets": "b", "scale": 3}}, where="test")
    assert pairs.signature(()).scale == 3
    with pytest.raises(RecipeError, match="write task: restore"):
        parse_recipe({"task": "classify", "data": {**data, "degrade": {"noise": 5}}}, where="test")
