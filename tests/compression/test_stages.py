"""The three stages on a tiny recipe: results, errors, interruptions."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model_helpers import answer, assert_same_state, by_layer, count, names, one_line, pixels
from muntin.compression import load_model, stages
from muntin.compression.channels.slimming import widths_of
from muntin.compression.low_rank.factored_layers import FactoredConv2d, FactoredLinear
from muntin.compression.quantization.qat import FLOAT, bits_of, qat_operations
from muntin.compression.stages import (
    FOLDER,
    CompressionRun,
    broken_off,
    compress_checkpoint,
    stage_checkpoints,
    stage_finished,
    stage_steps,
)
from muntin.deployment.run_artifacts import finished_stages
from muntin.errors import CheckpointError, DataError, MuntinError, RecipeError
from muntin.layers import Product, SoftmaxProduct
from muntin.layers.gate import BLOCK
from muntin.models.compression_record import STAGES, Stage
from muntin.training.checkpoint import Checkpoint, read_checkpoint, source_of
from muntin.training.config import CompressionConfig, QuantizationConfig
from muntin.training.distributed.stored_tensors import AVERAGE, MODEL, OPTIMIZER
from muntin.training.fitting import fit
from muntin.training.loop import LOG_EVERY
from muntin.training.progress.report import FitProgress
from muntin.training.trainer import Trainer
from muntin.updating.learner import base_steps

STEPS = LOG_EVERY + 1
FULL = {"share": 1.0, "learning_rate": 1e-3}
COMPRESSION = {
    "low_rank": {"parameters": 0.6, "multiple": 4},
    "average_bits": 6,
    "recover": FULL,
    "quantize": FULL,
    "mix": FULL,
    "average": 0.5,
}
ONE_STAGE = {"dims": [32], "depths": [1]}
Report = Callable[[Stage, FitProgress], None]


@dataclass(frozen=True)
class Compressed:
    """A trained run, its uninterrupted compression, and the trainers' averaged models. Shared by tests: copy before changing."""

    origin: Checkpoint
    run: CompressionRun
    averages: dict[Stage, nn.Module]

    def stage(self, stage: Stage) -> Checkpoint:
        return read_checkpoint(self.run.directory / f"{STAGES.index(stage) + 1}-{stage}")


def train(write_tiny: Callable[..., Any], root: Path, **sections: Any) -> Checkpoint:
    tiny = write_tiny(root / "data")
    options = tiny.content["model"]["options"] | ONE_STAGE
    shutil.rmtree(root / "data")
    training = {"steps": STEPS, "validate_every": 100, "checkpoint_every": 100}
    tiny = write_tiny(root / "data", **{"compression": COMPRESSION, "model": {"options": options}, "training": training} | sections)
    return read_checkpoint(fit(tiny.recipe, directory=root / "run").checkpoint)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Any]) -> Compressed:
    root = tmp_path_factory.mktemp("compressed")
    origin = train(write_tiny, root)
    trainers: list[Trainer] = []

    class Watched(Trainer):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            trainers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "Trainer", Watched)
        run = compress_checkpoint(origin, root / "run" / "compressed")
    return Compressed(origin, run, dict(zip(STAGES, (trainer.average.model for trainer in trainers), strict=True)))


@pytest.fixture
def train_foreign(tmp_path: Path, write_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Checkpoint]:
    """`train_foreign(code, **model)` trains the model of the code's `make` for three steps."""

    def run(code: str, **model: Any) -> Checkpoint:
        (tmp_path / "foreign_model.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "foreign_model", raising=False)
        tiny = write_tiny(tmp_path / "data", model={"name": "foreign_model:make", "options": {}, **model}, training={"steps": 3})
        return read_checkpoint(fit(tiny.recipe, directory=tmp_path / "run").checkpoint)

    return run


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# ---- what is left behind ----


def test_folders_and_results(compressed: Compressed) -> None:
    run = compressed.run
    assert not run.interrupted
    assert [(result.stage, result.step, result.steps) for result in run.stages] == [(stage, STEPS, STEPS) for stage in STAGES]
    assert all(result.seconds > 0 for result in run.stages)
    folders = [run.directory / name for name in ("1-low-rank", "2-w4a8", "3-mixed")]
    assert sorted(run.directory.iterdir()) == folders
    for folder, result in zip(folders, run.stages, strict=True):
        assert result.checkpoint == folder / "checkpoints" / f"step-{STEPS:08d}"
        assert (folder / "metrics.jsonl").is_file()
    assert stage_checkpoints(run.directory) == {result.stage: result.checkpoint for result in run.stages}
    assert run.checkpoint == folders[-1] / "checkpoints" / f"step-{STEPS:08d}"


def test_parameter_budget(compressed: Compressed) -> None:
    dense, factored = count(load_model(compressed.origin)), load_model(compressed.stage("low-rank"))
    assert 0.5 * dense < count(factored) <= 0.6 * dense
    assert len(names(factored, FactoredLinear, FactoredConv2d)) > 5


def test_changes_of_every_layer(compressed: Compressed) -> None:
    layers = names(load_model(compressed.origin), nn.Linear, nn.Conv2d)
    first, second, third = (compressed.stage(stage) for stage in STAGES)
    low_rank = by_layer(first.changes, "low_rank")
    assert sorted(low_rank) == sorted(layers) and len(first.changes) == len(low_rank)
    factored = load_model(first)
    ranks = {name: getattr(factored.get_submodule(name), "ranks", ()) for name in layers}
    assert {name: change.ranks for name, change in low_rank.items()} == ranks
    assert all(bool(change.reason) == change.kept for change in low_rank.values())

    assert second.changes[: len(low_rank)] == first.changes
    qat = by_layer(second.changes, "qat")
    assert sorted(qat) == sorted(names(factored, nn.Linear, nn.Conv2d, Product, SoftmaxProduct))
    in_training = qat_operations(load_model(second))
    assert sorted(name for name, change in qat.items() if not change.kept) == sorted(in_training)
    assert {change.pass_ for change in second.changes} == {"low_rank", "fold", "qat", "reconstruct"}
    assert sorted(by_layer(second.changes, "reconstruct")) == sorted(bits_of(load_model(second)))

    assert third.changes[: len(second.changes)] == second.changes
    mix, bits = by_layer(third.changes, "mix"), bits_of(load_model(third))
    assert sorted(mix) == sorted(bits_of(load_model(second)))
    for name, change in mix.items():
        assert change.done == (f"W{bits[name]}A8" if name in bits else "16 bits")
        assert "of the rounding error away" in change.reason


def test_bits_and_average(compressed: Compressed) -> None:
    second, third = load_model(compressed.stage("w4a8")), load_model(compressed.stage("mixed"))
    before, after = bits_of(second), bits_of(third)
    assert set(before.values()) == {4}
    weights = {name: second.get_parameter(f"{name}.weight").numel() for name in before}
    spent = sum(min(16, after.get(name, FLOAT)) * number for name, number in weights.items())
    assert 4 * sum(weights.values()) < spent <= 6 * sum(weights.values())
    measured = compressed.stage("w4a8").state.compression
    assert measured is not None and sorted(measured.sensitivity) == sorted(before)


def test_loaded_model_against_trained(compressed: Compressed) -> None:
    x = pixels(2, 3, 32, 32)
    assert list(compressed.averages) == list(STAGES)
    for stage, trained in compressed.averages.items():
        model = load_model(compressed.stage(stage))
        assert not any(module.training for module in model.modules())
        state = trained.state_dict()
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert bits_of(model) == bits_of(trained)
        due = answer(copy.deepcopy(trained), x)
        if torch.backends.cpu.get_cpu_capability() == "AVX2":  # sums come in another order there, and may round to the next integer
            assert (answer(model, x) - due).square().mean().sqrt() <= 0.02 * due.std()
        else:
            torch.testing.assert_close(answer(model, x), due, rtol=1e-4, atol=1e-5)


def test_stages_train(compressed: Compressed) -> None:
    for stage in STAGES:
        checkpoint = compressed.stage(stage)
        assert [point["step"] for point in checkpoint.state.training] == [LOG_EVERY, STEPS]
        assert [point["step"] for point in checkpoint.state.validation] == [STEPS]
        assert any(value.any() for name, value in checkpoint.tensors[OPTIMIZER].items() if name.startswith("exp_avg."))
    low_rank, quantised = (compressed.stage(stage).tensors[MODEL] for stage in ("low-rank", "w4a8"))
    scales = [name for name in quantised if name.endswith("input.log_scale")]
    assert scales and not any(name in low_rank for name in scales)


# ---- interrupted and resumed ----


def ctrl_c_in(stage: Stage, step: int = LOG_EVERY) -> Report:
    """A report that sends SIGINT to this process at a step of a stage."""

    def report(at: Stage, progress: FitProgress) -> None:
        if at == stage and progress.kind == "step" and progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return report


def test_interruption_in_stages(compressed: Compressed, tmp_path: Path) -> None:
    """One in the first stage: `test_interruption_in_a_last_step`."""
    for number, stage in enumerate(STAGES[1:], 1):
        run = compress_checkpoint(compressed.origin, tmp_path / "again", resume=number > 1, report=ctrl_c_in(stage))
        assert run.interrupted
        assert [(result.stage, result.step) for result in run.stages] == [
            *((before, STEPS) for before in STAGES[:number]),
            (stage, LOG_EVERY),
        ]
        load_model(read_checkpoint(run.checkpoint))
        torch.manual_seed(number)  # whatever else the process draws
    run = compress_checkpoint(compressed.origin, tmp_path / "again", resume=True)
    assert not run.interrupted and len(run.stages) == 3
    for stage, result in zip(STAGES, run.stages, strict=True):
        assert_same_state(compressed.stage(stage), read_checkpoint(result.checkpoint))


def test_interruption_in_a_last_step(compressed: Compressed, tmp_path: Path) -> None:
    run = compress_checkpoint(compressed.origin, tmp_path / "again", until="w4a8", report=ctrl_c_in("low-rank", STEPS))
    assert run.interrupted and [(result.stage, result.step, result.finished) for result in run.stages] == [("low-rank", STEPS, True)]
    run = compress_checkpoint(compressed.origin, tmp_path / "again", until="w4a8", resume=True, report=ctrl_c_in("w4a8", STEPS))
    assert not run.interrupted and len(run.stages) == 2  # nothing was left to do


def test_resuming_a_finished_run(compressed: Compressed) -> None:
    before = tree(compressed.run.directory)
    again = compress_checkpoint(compressed.origin, compressed.run.directory, resume=True)
    assert again == compressed.run
    assert tree(compressed.run.directory) == before


# ---- what is refused ----


def test_stages_of_another_run(compressed: Compressed, tmp_path: Path) -> None:
    origin, before = compressed.origin, tree(compressed.run.directory)
    shorter = read_checkpoint(fit(origin.recipe, root=origin.state.root, directory=tmp_path / "run", progress=stop_at_once).checkpoint)
    assert shorter.recipe == origin.recipe and shorter.state.step < STEPS
    other = origin.recipe.compression.model_copy(update={"average_bits": 7.0})
    made = "was made from another checkpoint or recipe: give another --output, or remove"
    cases: list[tuple[Checkpoint, dict[str, Any], str]] = [
        (origin, {}, "already holds stages; --resume goes on with them"),
        (origin, {"config": other, "resume": True}, made),
        (shorter, {"resume": True}, made),
        (origin, {"config": other}, made),
        (shorter, {}, made),
    ]
    for checkpoint, options, message in cases:
        with pytest.raises(CheckpointError, match=message) as error:
            compress_checkpoint(checkpoint, compressed.run.directory, **options)
        one_line(error)
    assert tree(compressed.run.directory) == before


def stop_at_once(progress: FitProgress) -> None:
    if progress.kind == "step" and progress.step == LOG_EVERY:
        os.kill(os.getpid(), signal.SIGINT)


def test_compressed_checkpoint(compressed: Compressed, tmp_path: Path) -> None:
    for stage in STAGES:
        with pytest.raises(CheckpointError, match="is compressed already: give the checkpoint of `muntin fit`") as error:
            compress_checkpoint(compressed.stage(stage), tmp_path / "twice")
        one_line(error)
    assert not (tmp_path / "twice").exists()


def test_budget_out_of_reach(compressed: Compressed, tmp_path: Path) -> None:
    config = CompressionConfig.model_validate(COMPRESSION | {"low_rank": {"parameters": 0.01, "multiple": 4}})
    with pytest.raises(MuntinError, match="out of reach") as error:
        compress_checkpoint(compressed.origin, tmp_path / "none", config=config)
    one_line(error)
    assert not (tmp_path / "none").exists()


# ---- checkpoints that lie elsewhere ----


def at(checkpoint: Checkpoint, **state: Any) -> Checkpoint:
    return replace(checkpoint, state=checkpoint.state.model_copy(update=state))


def test_copied_checkpoint_is_broken_off(compressed: Compressed, tmp_path: Path) -> None:
    copied = read_checkpoint(shutil.copytree(compressed.origin.path, tmp_path / "best"))
    assert broken_off(copied) == ()
    assert broken_off(at(copied, step=3)) == (f"step 3 of {STEPS}: `muntin fit RECIPE --resume` goes on",)


def test_missing_data_folder(compressed: Compressed, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"trained on data in .*/gone, .*: `muntin fit RECIPE --resume`") as error:
        source_of(at(compressed.origin, root=str(tmp_path / "gone")))
    one_line(error)
    with pytest.raises(DataError, match="does not exist") as error:  # the folder is there, and what it held is not
        source_of(at(compressed.origin, root=str(tmp_path)))
    assert "--resume" not in one_line(error)


def test_moved_data_folder(compressed: Compressed, tmp_path: Path) -> None:
    moved = shutil.copytree(compressed.origin.state.root, tmp_path / "moved")
    directory = shutil.copytree(compressed.run.directory, tmp_path / "stages")
    run = compress_checkpoint(at(compressed.origin, root=str(moved)), directory, resume=True, until="w4a8")
    assert [result.stage for result in run.stages] == ["low-rank", "w4a8"]
    for result in run.stages:
        checkpoint = read_checkpoint(result.checkpoint)
        assert checkpoint.state.root == str(moved)
        assert_same_state(compressed.stage(result.stage), checkpoint)


# ---- other configurations ----


def short(**changes: Any) -> CompressionConfig:
    """Stages without training."""
    none = {"share": 0, "learning_rate": 1e-3}
    return CompressionConfig.model_validate(COMPRESSION | {"recover": none, "quantize": none, "mix": none} | changes)


def test_stages_without_training(compressed: Compressed, tmp_path: Path) -> None:
    run = compress_checkpoint(compressed.origin, tmp_path / "short", config=short())
    assert [(result.stage, result.step, result.steps) for result in run.stages] == [(stage, 0, 0) for stage in STAGES]
    assert not run.interrupted
    assert compress_checkpoint(compressed.origin, tmp_path / "short", config=short(), resume=True) == run
    assert torch.isfinite(answer(load_model(read_checkpoint(run.checkpoint)), pixels(1, 3, 32, 32))).all()


def test_without_low_rank(compressed: Compressed, tmp_path: Path) -> None:
    config = short(low_rank=None)
    run = compress_checkpoint(compressed.origin, tmp_path / "dense", config=config)
    assert [result.stage for result in run.stages] == ["w4a8", "mixed"]
    assert sorted(path.name for path in (tmp_path / "dense").iterdir()) == ["2-w4a8", "3-mixed"]
    assert list(stage_checkpoints(tmp_path / "dense")) == ["w4a8", "mixed"]
    last = read_checkpoint(run.checkpoint)
    assert not names(load_model(last), FactoredLinear, FactoredConv2d)
    assert {change.pass_ for change in last.changes} == {"fold", "qat", "reconstruct", "mix"}
    with pytest.raises(RecipeError, match=r"compression\.low_rank is null, so there is no stage before 'w4a8'") as error:
        compress_checkpoint(compressed.origin, tmp_path / "none", config=config, until="low-rank")
    one_line(error)


@pytest.mark.parametrize("bits", [2, 8])
def test_bits_of_the_recipe(compressed: Compressed, tmp_path: Path, bits: int) -> None:
    run = compress_checkpoint(compressed.origin, tmp_path / "bits", config=short(weight_bits=bits, average_bits=bits), until="w4a8")
    assert set(bits_of(load_model(read_checkpoint(run.checkpoint))).values()) == {bits}


def test_layers_in_keep(compressed: Compressed, tmp_path: Path) -> None:
    kept = ("head.conv", "stages.0.blocks.0.mlp.expand")
    run = compress_checkpoint(compressed.origin, tmp_path / "keep", config=short(keep=kept))
    model = load_model(read_checkpoint(run.checkpoint))
    assert {type(model.get_submodule(name)) for name in kept} == {nn.Conv2d, nn.Linear}
    changes = read_checkpoint(run.checkpoint).changes
    for name in kept:
        assert by_layer(changes, "low_rank")[name].reason == by_layer(changes, "qat")[name].reason == "named in keep"
    with pytest.raises(MuntinError, match="keep names no layer: nosuch") as error:
        compress_checkpoint(compressed.origin, tmp_path / "unknown", config=short(keep=("nosuch",)))
    one_line(error)
    assert not (tmp_path / "unknown").exists()


def average_bits(model: nn.Module) -> float:
    """Average over all weights."""
    bits = bits_of(model)
    spent = {name: min(16, bits.get(name.removesuffix(".weight"), FLOAT)) for name, p in model.named_parameters() if p.ndim > 1}
    weights = {name: model.get_parameter(name).numel() for name in spent}
    return sum(spent[name] * count for name, count in weights.items()) / sum(weights.values())


def test_float_layers_count_for_the_average(tmp_path: Path, train_foreign: Callable[..., Checkpoint]) -> None:
    origin = train_foreign(UPSAMPLING, size_divisor=2)
    run = compress_checkpoint(origin, tmp_path / "met", config=short(low_rank=None, average_bits=12))
    met = average_bits(load_model(read_checkpoint(run.checkpoint)))
    assert 8 < met <= 12 and run.notes == ()
    over = compress_checkpoint(origin, tmp_path / "over", config=short(low_rank=None, average_bits=5))
    model = load_model(read_checkpoint(over.checkpoint))
    assert set(bits_of(model).values()) == {4}
    (note,) = over.notes
    assert note.startswith(f"a weight has {average_bits(model):.2f} bits on average, not compression.average_bits 5: 1,024 of ")
    assert compress_checkpoint(origin, tmp_path / "over", config=short(low_rank=None, average_bits=5), resume=True) == over


UPSAMPLING = """
from torch import nn

class Upsampling(nn.Sequential):
    def forward(self, x):
        return super().forward(x / 128 - 1)

def make(*, task, classes, channels):
    up = nn.ConvTranspose2d(16, 16, 2, stride=2)
    return Upsampling(nn.Conv2d(channels, 16, 4, 2, 1), nn.ReLU(), up, nn.ReLU(), nn.Conv2d(16, classes, 1))
"""


def test_quantization_settings(compressed: Compressed, tmp_path: Path) -> None:
    origin, said = compressed.origin, QuantizationConfig(calibration_images=3, keep=("head.conv",), min_sqnr_db=20)
    run = compress_checkpoint(origin, tmp_path / "keep", config=short(), quantization=said)
    last = read_checkpoint(run.checkpoint)
    assert last.recipe.quantization == said
    head = [change.reason for name, change in by_layer(last.changes, "qat").items() if name.startswith("head.conv")]
    assert head and set(head) == {"named in keep"}
    assert by_layer(last.changes, "low_rank")["head.conv"].reason != "named in keep"
    assert any(note.startswith("quantization.min_sqnr_db is for `muntin export`") for note in run.notes)
    few = [change for change in last.changes if change.note]
    (note,) = (note for note in run.notes if note.startswith("low rank: "))
    assert few and note.startswith(f"low rank: few calibration rows for {len(few)} layers ({few[0].layer}: {few[0].note})")
    assert note.endswith("set quantization.calibration_images (now 3) higher")
    with pytest.raises(MuntinError, match="keep names no layer: nosuch"):
        compress_checkpoint(origin, tmp_path / "unknown", config=short(), quantization=QuantizationConfig(keep=("nosuch",)))
    assert not (tmp_path / "unknown").exists()


def test_compile_setting_note(compressed: Compressed, tmp_path: Path) -> None:
    recipe = compressed.origin.recipe
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"compile": True})})
    origin = replace(compressed.origin, state=compressed.origin.state.model_copy(update={"recipe": recipe}))
    run = compress_checkpoint(origin, tmp_path / "compiled", config=short(), until="low-rank")
    assert "training.compile is for fit: the stages train without it" in run.notes


USED_TWICE = """
from torch import nn

class UsedTwice(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, classes, 1)

    def forward(self, x):
        x = self.stem(x / 64 - 2)
        return self.head((self.body(self.norm(x).relu()) + x).relu())

def make(*, task, classes, channels):
    return UsedTwice(classes, channels)
"""


def test_loading_a_kept_batch_norm(tmp_path: Path, train_foreign: Callable[..., Checkpoint]) -> None:
    origin = train_foreign(USED_TWICE)
    run = compress_checkpoint(origin, tmp_path / "compressed", config=short(low_rank=None))
    last = read_checkpoint(run.checkpoint)
    (kept,) = [change for change in last.changes if change.pass_ == "fold"]
    assert kept.kept and "changes the model's answer" in kept.reason
    model = load_model(last)
    assert isinstance(model.get_submodule("norm"), nn.BatchNorm2d)
    assert all(torch.equal(value, last.tensors[AVERAGE][name]) for name, value in model.state_dict().items())


STANDARDISED = """
from torch import nn

class Standardised(nn.Sequential):
    def forward(self, x):
        return super().forward((x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 1e-6))

def make(*, task, classes, channels):
    first = nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return Standardised(*first, nn.Conv2d(8, 8, 3, padding="same"), nn.ReLU(inplace=True), nn.BatchNorm2d(8), nn.Conv2d(8, classes, 1))
"""


def test_loading_folds_without_running_the_model(
    tmp_path: Path, train_foreign: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = train_foreign(STANDARDISED)
    last = read_checkpoint(compress_checkpoint(origin, tmp_path / "compressed", config=short()).checkpoint)
    assert [(change.layer, change.kept) for change in last.changes if change.pass_ == "fold"] == [("1", False)]
    kept = compress_checkpoint(origin, tmp_path / "kept", config=short(low_rank=None, keep=tuple("036")))
    with monkeypatch.context() as patch:
        patch.setattr(type(load_model(origin)), "forward", lambda model, x: nn.Sequential.forward(model, x) * float("nan"))
        model, unquantised = load_model(last), load_model(read_checkpoint(kept.checkpoint))
    assert names(unquantised, nn.Conv2d) == list("036")
    assert isinstance(model.get_submodule("3"), FactoredConv2d)  # whose padding was a word
    assert isinstance(model.get_submodule("5"), nn.BatchNorm2d) and not isinstance(model.get_submodule("1"), nn.BatchNorm2d)
    assert all(torch.equal(value, last.tensors[AVERAGE][name]) for name, value in model.state_dict().items())


THROUGH_A_LIST = """
from torch import nn

class Through(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.path = list(layers)

    def forward(self, x):
        x = x / 128 - 1
        for layer in self.path:
            x = layer(x)
        return x

def make(*, task, classes, channels):
    first = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
    return Through(*first, nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 1))
"""


def test_loading_a_model_with_a_plain_list(tmp_path: Path, train_foreign: Callable[..., Checkpoint]) -> None:
    origin = train_foreign(THROUGH_A_LIST)
    model = load_model(read_checkpoint(compress_checkpoint(origin, tmp_path / "compressed", config=short()).checkpoint))
    assert isinstance(model.get_submodule("3"), FactoredConv2d) and qat_operations(model)
    x = pixels(1, 3, 16, 16)
    assert torch.equal(answer(model, x), answer(nn.Sequential(*model.children()), x / 128 - 1))


def test_learning_rate_over_both_stages(write_tiny: Callable[..., Any], tmp_path: Path) -> None:
    rates = {"quantize": {"share": 1.0, "learning_rate": 1e-3}, "mix": {"share": 1.0, "learning_rate": 4e-4}}
    origin = train(write_tiny, tmp_path, compression={**COMPRESSION, "low_rank": None, **rates})
    run = compress_checkpoint(origin, tmp_path / "compressed")
    curves = {stage.stage: [point["learning_rate"] for point in read_checkpoint(stage.checkpoint).state.training] for stage in run.stages}
    first, second = curves["w4a8"], curves["mixed"]
    assert first[-1] == pytest.approx(4e-4, rel=0.1)
    assert first[-1] >= 4e-4 >= second[0]
    assert second == sorted(second, reverse=True)
    alone = compress_checkpoint(
        origin, tmp_path / "alone", config=CompressionConfig(low_rank=None, **rates | {"mix": {"share": 0}}), until="w4a8"
    )
    assert read_checkpoint(alone.checkpoint).state.training[-1]["learning_rate"] < 1e-4  # nothing follows: it falls to zero


def test_stage_limited_by_minutes(write_tiny: Callable[..., Any], tmp_path: Path) -> None:
    limits = {"steps": 10**6, "minutes": 0.005, "validate_every": 10**6, "checkpoint_every": 10**6}
    origin = train(write_tiny, tmp_path, training=limits, compression={**COMPRESSION, "low_rank": None})
    run = compress_checkpoint(origin, origin.path.parent.parent / FOLDER)
    last = read_checkpoint(run.stages[-1].checkpoint)
    assert not run.interrupted and last.state.step < stage_steps(last.recipe, "mixed") == 10**6
    assert base_steps(last) < 10**5
    assert stage_finished(last, "mixed")
    assert set(finished_stages(origin)) == {"w4a8", "mixed"}


def test_stages_of_a_run_that_ended_early(write_tiny: Callable[..., Any], tmp_path: Path) -> None:
    training = {"steps": 40, "patience": 1, "validate_every": 2, "learning_rate": 1e-9}  # no validation is better than the first
    origin = train(write_tiny, tmp_path, training=training, compression={**COMPRESSION, "low_rank": None, "mix": {"share": 0.5}})
    run = compress_checkpoint(origin, tmp_path / "compressed")
    assert origin.state.step == 4 and [stage.step for stage in run.stages] == [4, 2] and not run.interrupted
    assert base_steps(read_checkpoint(run.checkpoint)) == 4
    again = compress_checkpoint(origin, tmp_path / "compressed", resume=True)
    assert [stage.step for stage in again.stages] == [4, 2]


def test_closed_channels_are_cut_first(tmp_path: Path, write_tiny: Callable[..., Any]) -> None:
    origin = train(write_tiny, tmp_path, training={"steps": STEPS, "validate_every": 100, "checkpoint_every": 100, "gate_budget": 0.775})
    hidden = widths_of(load_model(origin))["stages.0.blocks.0.mlp"]
    run = compress_checkpoint(origin, tmp_path / "run" / "compressed")
    cut = {stage: read_checkpoint(run.directory / f"{n}-{stage}") for n, stage in enumerate(STAGES, 1)}
    for stage, checkpoint in cut.items():
        record = checkpoint.state.compression
        assert record is not None and record.widths["stages.0.blocks.0.mlp"] == BLOCK < hidden
        load_model(checkpoint)  # refuses weights of another shape
        changes = by_layer(checkpoint.changes, "slim")
        assert changes["stages.0.blocks.0.mlp"].done == f"{BLOCK} of {hidden} channels", stage
    assert widths_of(load_model(cut["low-rank"])) == cut["mixed"].state.compression.widths  # type: ignore[index]


def test_interrupted_validation(compressed: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **more: Any) -> None:
        raise DataError("a picture was damaged meanwhile")

    with monkeypatch.context() as patched:
        patched.setattr("muntin.training.loop.evaluate", broken)
        with pytest.raises(DataError, match="damaged meanwhile"):
            compress_checkpoint(compressed.origin, tmp_path / "again", until="low-rank")
    (folder,) = (path for path in (tmp_path / "again").iterdir() if path.is_dir())
    left = read_checkpoint(folder)
    assert (left.state.step, left.state.validation) == (STEPS, [])
    assert broken_off(left) == ("its last step was not validated: `muntin compress RUN --resume` does it",)
    run = compress_checkpoint(compressed.origin, tmp_path / "again", until="low-rank", resume=True)
    assert run.stages[0].score is not None
    assert_same_state(compressed.stage("low-rank"), read_checkpoint(run.checkpoint))
