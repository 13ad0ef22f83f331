from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muntin.compression import load_model
from muntin.errors import CheckpointError
from muntin.models import PRESETS
from muntin.training.checkpoint import STATE, checkpoints_in, digest_of, find_checkpoint, read_checkpoint
from muntin.training.distributed.stored_tensors import AVERAGE, MODEL, OPTIMIZER
from muntin.training.optimizer import load_optimizer, make_optimizer, optimizer_tensors
from muntin.training.recipe import Recipe
from muntin.training.weights import build_model, structure_of

Save = Callable[..., Path]


def mistake(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(read_checkpoint(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(path: Path, **changes: Any) -> None:
    """Change `checkpoint.json` and its digest, like another version of muntin."""
    content = json.loads((path / STATE).read_text()) | changes
    content["sha256"][STATE] = digest_of(content)
    (path / STATE).write_text(json.dumps(content))


def test_round_trip(tmp_path: Path, save_step: Save, recipe: Recipe) -> None:
    path = save_step(tmp_path / "checkpoints", 7)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    assert sorted(p.name for p in path.iterdir()) == sorted([STATE, MODEL, AVERAGE, OPTIMIZER])
    checkpoint = read_checkpoint(path)
    assert checkpoint.recipe == recipe
    assert (checkpoint.state.step, checkpoint.state.root, checkpoint.state.pending) == (7, "/data", [0.25])
    assert [c.name for c in checkpoint.state.classes] == ["sea", "field", "roof"]
    assert checkpoint.bytes == (path / AVERAGE).stat().st_size
    model = load_model(checkpoint)
    assert not model.training
    state = model.state_dict()
    assert state.keys() == checkpoint.tensors[AVERAGE].keys()
    assert all(torch.equal(state[name], value) for name, value in checkpoint.tensors[AVERAGE].items())


def test_file_formats(tmp_path: Path, save_step: Save) -> None:
    for file in save_step(tmp_path, 1).iterdir():
        assert file.suffix in (".json", ".safetensors")


def test_newest_two_are_kept(tmp_path: Path, save_step: Save) -> None:
    for step in (99_999_999, 100_000_000, 100_000_001):  # names of 8 and of 9 digits
        save_step(tmp_path / "checkpoints", step)
    assert [p.name for p in checkpoints_in(tmp_path / "checkpoints")] == ["step-100000000", "step-100000001"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_find_checkpoint(tmp_path: Path, save_step: Save) -> None:
    old, new = (save_step(tmp_path / "checkpoints", step) for step in (1, 2))
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "checkpoints") == find_checkpoint(str(new)) == new
    assert find_checkpoint(old) == old


@pytest.mark.parametrize(
    ("inside", "name", "step"),
    [
        ("checkpoints/step-00000001", ".", 1),
        ("checkpoints/step-00000002", "../step-00000001", 1),
        ("checkpoints", "step-00000001", 1),
        (".", "checkpoints/step-00000001", 1),
        ("checkpoints", ".", 2),
    ],
)
def test_find_checkpoint_from_inside_a_run(
    tmp_path: Path, save_step: Save, monkeypatch: pytest.MonkeyPatch, inside: str, name: str, step: int
) -> None:
    for number in (1, 2):
        save_step(tmp_path / "run" / "checkpoints", number)
    monkeypatch.chdir(tmp_path / "run" / inside)
    checkpoint = find_checkpoint(name)
    assert checkpoint.parent.parent.resolve() == tmp_path / "run"
    assert checkpoint.name == f"step-{step:08}"


@pytest.mark.parametrize(
    ("name", "says"),
    [("", "holds no checkpoint"), ("none", "does not exist"), ("file", "holds no checkpoint")],
)
def test_find_checkpoint_missing(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "file").write_text("x")
    text = mistake(tmp_path / name)
    assert says in text
    assert "`muntin fit`" in text


@pytest.mark.parametrize("name", [MODEL, AVERAGE, OPTIMIZER])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
def test_flipped_byte_in_tensors(tmp_path: Path, save_step: Save, name: str, place: float) -> None:
    path = save_step(tmp_path, 1)
    data = bytearray((path / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (path / name).write_bytes(data)
    text = mistake(path)
    assert name in text
    assert "use an older step beside it" in text


def test_flipped_byte_in_json(tmp_path: Path, save_step: Save) -> None:
    path = save_step(tmp_path, 1)
    data = (path / STATE).read_bytes()
    own_name = data.index(f'"{STATE}"'.encode())  # changing the digest's own name changes nothing that is said
    places = [i for i in range(0, len(data), 37) if not own_name <= i < own_name + len(STATE) + 2 and data[i : i + 1].strip()]
    assert len(places) > 20
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1
        if json_or_none(changed) == json.loads(data):
            continue  # 1e-3 and 1E-3
        (path / STATE).write_bytes(changed)
        assert STATE in mistake(path) or "newer" in mistake(path)


def json_or_none(data: bytes | bytearray) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


@pytest.mark.parametrize("name", [MODEL, AVERAGE, OPTIMIZER])
@pytest.mark.parametrize("how", ["missing", "empty", "truncated"])
def test_missing_or_truncated_file(tmp_path: Path, save_step: Save, name: str, how: str) -> None:
    path = save_step(tmp_path, 1)
    data = (path / name).read_bytes()
    if how == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes(b"" if how == "empty" else data[: len(data) // 2])
    assert name in mistake(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"format": 1}', "\x00", "[" * 100_000], ids=range(8))
def test_broken_json(tmp_path: Path, save_step: Save, text: str) -> None:
    path = save_step(tmp_path, 1)
    (path / STATE).write_text(text)
    assert "corrupted" in mistake(path)


def test_newer_format(tmp_path: Path, save_step: Save) -> None:
    path = save_step(tmp_path, 1)
    rewrite(path, format=3, something="new")
    assert "format 3 is newer than this muntin reads (2): upgrade muntin" in mistake(path)


def test_unknown_field(tmp_path: Path, save_step: Save, recipe: Recipe) -> None:
    path = save_step(tmp_path, 1)
    other = recipe.model_dump(mode="json")
    other["training"]["gate_cost"] = 0.0
    rewrite(path, recipe=other)
    text = mistake(path)
    assert "recipe.training.gate_cost: Extra inputs are not permitted (got 0.0): corrupted, or written by another version of" in text


def test_damaged_compression_record(tmp_path: Path, save_step: Save) -> None:
    path = save_step(tmp_path, 1)
    rewrite(path, compression={"steps": 0, "origin": "", "ranks": {}, "changes": []})
    text = mistake(path)
    assert "compression.steps: Input should be greater than 0 (got 0): corrupted, or written by" in text
    assert "use an older step beside it" in text


def test_weights_of_another_model(tmp_path: Path, save_step: Save, recipe: Recipe) -> None:
    path = save_step(tmp_path, 1)
    other = recipe.model_dump(mode="json")
    other["model"]["options"]["decoder"] = 24
    rewrite(path, recipe=other, structure=None)
    text = mistake(path)
    assert "weights of another model than its recipe makes" in text and "use the version that trained it" in text


def test_preset_that_changed(tmp_path: Path, save_step: Save, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint keeps the network that was trained, and its recipe then says all of its options."""
    path = save_step(tmp_path, 1)
    before = load_model(read_checkpoint(path))
    monkeypatch.setitem(PRESETS, recipe.model.name, {**PRESETS[recipe.model.name], "latents": 5, "finest": 8})
    checkpoint = read_checkpoint(path)
    after = load_model(checkpoint)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    assert torch.equal(before(x), after(x))
    assert checkpoint.recipe.model.options.keys() > recipe.model.options.keys()
    assert structure_of(checkpoint.recipe, checkpoint.state.classes) == checkpoint.state.structure
    assert structure_of(recipe, checkpoint.state.classes) != checkpoint.state.structure


def test_mixed_files(tmp_path: Path, save_step: Save) -> None:
    one, other = save_step(tmp_path, 1), save_step(tmp_path, 2)
    shutil.copy(one / MODEL, other / MODEL)
    assert f"{MODEL}: corrupted" in mistake(other)


def test_optimizer_round_trip(tmp_path: Path, save_step: Save, recipe: Recipe) -> None:
    checkpoint = read_checkpoint(save_step(tmp_path, 3))
    model = build_model(recipe, checkpoint.state.classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, recipe.training)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    torch.manual_seed(99)
    load_optimizer(model, optimizer, scaler, checkpoint.tensors[OPTIMIZER])
    again = optimizer_tensors(model, optimizer, scaler)
    assert again.keys() == checkpoint.tensors[OPTIMIZER].keys()
    assert all(torch.equal(again[name], value) for name, value in checkpoint.tensors[OPTIMIZER].items())
    assert any(name.startswith("exp_avg_sq.") for name in again)


def test_fp16_scale_round_trip() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for _ in range(4):  # grows once, and counts one towards the next
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    tensors = optimizer_tensors(model, optimizer, scaler)
    fresh = torch.amp.GradScaler("cpu", growth_interval=3)
    load_optimizer(model, optimizer, fresh, tensors)
    assert fresh.state_dict() == scaler.state_dict()
    assert (fresh.get_scale(), fresh.state_dict()["_growth_tracker"]) == (2048.0, 1)


def test_write_error(tmp_path: Path, save_step: Save) -> None:
    folder = tmp_path / "checkpoints"
    save_step(folder, 1)
    (folder / "step-00000002").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written") as error:
        save_step(folder, 2)
    assert "artefact" not in str(error.value).split("(")[0]
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000001", "step-00000002"]
    read_checkpoint(folder / "step-00000001")
