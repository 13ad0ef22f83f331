"""What the commands under `benchmarks/` make of rows: goals, differences, what is kept and what is left out. Nothing is measured.

None of it needs the extra `bench`, nor do the modules at their import.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from muntin.artifact import Signature
from muntin.data import DataConfig, EarthSource, open_source
from muntin.errors import DataError
from muntin.training.recipe import Recipe

Row = dict[str, Any]
FOLDER = Path(__file__).parents[1] / "benchmarks"
PEERS = (
    "pan-mobilenet-v2",
    "segformer-mit-b0",
    "linknet-resnet18",
    "unet-resnet18",
    "fpn-efficientvit-b0",
    "fpn-mobilenetv4-conv-small",
    "deeplabv3plus-efficientnet-b0",
    "yolo26n-sem",
)
HERE: Row = {"cpu": "this", "cores": 2, "features": ["avx2"], "openvino": "1", "torch": "2", "memory_gib": 8}


@pytest.fixture(scope="module", autouse=True)
def path_of_the_benchmarks() -> Iterator[None]:
    """Their modules can be imported, and are forgotten afterwards."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield
    for module in set(sys.modules) - before:
        if (getattr(sys.modules[module], "__file__", None) or "").startswith(str(FOLDER)):
            del sys.modules[module]


@pytest.fixture
def report() -> ModuleType:
    return importlib.import_module("segmentation_peers.report")


@pytest.fixture
def peers() -> ModuleType:
    return importlib.import_module("peers")


@pytest.fixture
def ablation() -> ModuleType:
    return importlib.import_module("ablation")


@pytest.fixture
def kept() -> ModuleType:
    return importlib.import_module("kept")


def summed(model: str, miou: float, ms: float, spread: float | None) -> Row:
    """Of a row of `summarise` what is judged."""
    figures = {"miou": {"mean": miou, "spread": spread}, "ms": {"512": {"mean": ms, "spread": None}}}
    return {"model": model, "hybrid": model.startswith("hybrid"), **figures}


def field(*, hybrid: float = 0.70, hybrid_ms: float = 4.0, best_ms: float = 20.0, spread: float | None = 0.01) -> list[Row]:
    """A hybrid; the best peer, with .66; the fastest one, in 9 ms unless the best is faster; the others."""
    best, fastest, *others = PEERS
    rows = [summed("hybrid-xxs", hybrid, hybrid_ms, spread), summed(best, 0.66, best_ms, spread), summed(fastest, 0.60, 9.0, spread)]
    return rows + [summed(name, 0.55, 12.0, spread) for name in others]


def verdicts(goals: Sequence[Row]) -> list[bool | None]:
    return [goal["met"] for goal in goals]


def test_variant_within_half_a_point_of_floats(report: ModuleType) -> None:
    scores = {"float f32": 0.5, "float bf16": 0.52, "int8 f32": 0.4951, "int8 bf16": 0.4949}
    variants = {name: {"validation": 0.0, "admission": score, "test": 0.0} for name, score in scores.items()}
    assert report.admitted(variants) == ["float f32", "float bf16", "int8 f32"]


def trained(model: str, seed: int, **tests: float) -> Row:
    """A row of a model with what `summarise` reads; a variant a test score."""
    sizes = {"float": 4000, "small": 1000}
    variants: Row = {}
    for name, test in tests.items():
        variants[name] = {
            "validation": test / 2,
            "admission": test / 3,
            "test": test,
            "iou": {"sea": test, "ice": None},
            "bytes": sizes[name],
        }
    figures = {"minutes": 2.0 + seed, "samples": 100, "images_per_s": 10.0, "parameters": 5, "learning_rate": 0.004}
    return {"model": model, "seed": seed, "variants": variants, **figures}


def test_summary_of_the_deployed_variant(report: ModuleType) -> None:
    rows = [
        trained("hybrid-xxs", 0, float=0.71, small=0.72),
        trained("hybrid-xxs", 1, float=0.70, small=0.60),
        trained("pan-mobilenet-v2", 1, float=0.66),
    ]
    latencies = {
        0: {
            "chosen": {"hybrid-xxs": "small"},
            "ms": {"512": {"hybrid-xxs": 4.0}},
            "variants": {"hybrid-xxs": {"float": 7.0, "small": 4.0}},
        },
        1: {
            "chosen": {"hybrid-xxs": "float", "pan-mobilenet-v2": "float"},
            "ms": {"512": {"hybrid-xxs": 6.0, "pan-mobilenet-v2": 20.0}},
            "variants": {"hybrid-xxs": {"float": 6.0, "small": 5.0}, "pan-mobilenet-v2": {"float": 20.0}},
        },
    }
    hybrid, peer = report.summarise(rows, latencies)
    assert (hybrid["model"], hybrid["hybrid"], hybrid["seeds"], hybrid["deployed"]) == ("hybrid-xxs", True, [0, 1], ["small", "float"])
    assert hybrid["miou"]["mean"] == pytest.approx(0.71)
    assert hybrid["miou"]["spread"] == pytest.approx(0.02 / 2**0.5)
    assert hybrid["iou"]["sea"]["mean"] == pytest.approx(0.71)
    assert hybrid["iou"]["ice"] == {"mean": None, "spread": None}
    assert hybrid["ms"]["512"]["mean"] == 5.0
    assert hybrid["variants"]["small"]["test"]["mean"] == pytest.approx(0.66)
    assert hybrid["variants"]["small"]["validation"]["mean"] == pytest.approx(0.33)
    assert hybrid["variants"]["small"]["admission"]["mean"] == pytest.approx(0.22)
    assert hybrid["variants"]["small"]["ms"]["mean"] == 4.5
    assert (hybrid["bytes"], hybrid["minutes"]) == (2500, 2.5)
    assert (peer["model"], peer["hybrid"], peer["seeds"]) == ("pan-mobilenet-v2", False, [1])
    assert peer["miou"] == {"mean": 0.66, "spread": None}
    assert peer["ms"] == {"512": {"mean": 20.0, "spread": None}}


def test_score_goal_of_one_seed(report: ModuleType) -> None:
    goals = report.judge(field(spread=None), "earth")
    assert [goal["goal"] for goal in goals] == [
        "a hybrid has the best mIoU, by more than both spreads",
        "by at least 0.02",
        "512²: a hybrid reaches the best peer in a quarter of its time, and half of the fastest peer's",
    ]
    assert verdicts(goals) == [None, None, None]
    assert goals[0]["told"] == goals[1]["told"] == "hybrid-xxs 0.7000, pan-mobilenet-v2 0.6600: +0.0400"


@pytest.mark.parametrize(
    ("hybrid", "spread", "met"),
    [
        (0.70, 0.01, [True, True, True]),
        (0.70, 0.03, [False, True, True]),
        (0.67, 0.001, [True, False, True]),
    ],
)
def test_lead_of_several_seeds(report: ModuleType, hybrid: float, spread: float, met: list[bool]) -> None:
    goals = report.judge(field(hybrid=hybrid, spread=spread), "earth")
    assert verdicts(goals) == met
    assert goals[0]["told"] == f"hybrid-xxs {hybrid:.4f} ± {spread:.4f}, pan-mobilenet-v2 0.6600 ± {spread:.4f}: {hybrid - 0.66:+.4f}"


def test_lead_goal_on_earth_only(report: ModuleType) -> None:
    assert verdicts(report.judge(field(), "earth:climate")) == [True, True]


@pytest.mark.parametrize(
    ("hybrid_ms", "best_ms", "most", "met"),
    [(4.4, 20.0, 4.5, True), (4.6, 20.0, 4.5, False), (4.4, 16.0, 4.0, False), (2.1, 8.0, 2.0, False), (1.9, 8.0, 2.0, True)],
)
def test_goals_of_a_hybrid(report: ModuleType, hybrid_ms: float, best_ms: float, most: float, met: bool) -> None:
    goal = report.judge(field(hybrid_ms=hybrid_ms, best_ms=best_ms), "earth")[-1]
    best = f"pan-mobilenet-v2 0.6600 ± 0.0100 in {best_ms:.2f} ms"
    fastest = best if best_ms < 9 else "segformer-mit-b0 0.6000 ± 0.0100 in 9.00 ms"
    asked = f"best peer {best}, fastest {fastest}: at most {most:.2f} ms"
    assert goal["told"] == f"{asked}; hybrid-xxs 0.7000 ± 0.0100 in {hybrid_ms:.2f} ms"
    assert goal["met"] is met


def test_goals_of_a_slow_hybrid(report: ModuleType) -> None:
    goals = report.judge(field(hybrid=0.64), "earth")
    assert verdicts(goals) == [False, False, False]
    assert goals[0]["told"].endswith(": -0.0200")
    assert goals[2]["told"].endswith(": at most 4.50 ms; no hybrid reaches the best peer")


def test_goals_with_missing_peers(report: ModuleType) -> None:
    told = [goal["told"] for goal in report.judge(field()[:3], "earth")]
    assert [text.rpartition("; ")[2] for text in told] == ["against 2 of 8 peers"] * 3
    assert not any("against" in goal["told"] for goal in report.judge(field(), "earth"))


@pytest.mark.parametrize("kind", ["hybrid", "peer"])
def test_goals_without_a_peer_or_hybrid(report: ModuleType, kind: str) -> None:
    alone = [row for row in field() if row["hybrid"] is (kind == "hybrid")]
    assert report.judge(alone, "earth") == [{"goal": "hybrids against peers", "met": None, "told": "needs at least one of each"}]


@pytest.mark.parametrize(
    ("made", "common"),
    [([], []), ([("a", 1), ("a", 0)], [0, 1]), ([("a", 0), ("a", 1), ("b", 1), ("b", 2)], [1]), ([("a", 0), ("b", 1)], [])],
)
def test_goals_by_common_seeds(peers: ModuleType, made: list[tuple[str, int]], common: list[int]) -> None:
    assert peers.seeds_of_all([{"model": model, "seed": seed} for model, seed in made]) == common


class OddError(Exception):
    """As NNCF raises its own: of no kind but Exception."""


@pytest.mark.parametrize(
    ("best", "tried", "at_an_end"),
    [
        (4e-3, [2e-3, 4e-3, 8e-3], False),
        (1e-3, [5e-4, 1e-3, 2e-3, 4e-3, 8e-3], False),
        (16e-3, [2e-3, 4e-3, 8e-3, 16e-3, 32e-3], False),
        (1e-9, [5e-4, 1e-3, 2e-3, 4e-3, 8e-3], True),
        (1.0, [2e-3, 4e-3, 8e-3, 16e-3, 32e-3], True),
    ],
)
def test_learning_rate_search_at_the_ends(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: float, tried: list[float], at_an_end: bool
) -> None:
    def tried_(self: object, entry: Any, rate: float) -> Row:
        return {"model": entry.model, "learning_rate": rate, "held_out": -abs(math.log(rate / best))}

    monkeypatch.setattr(peers.Comparison, "_tried", tried_)
    setting = peers.Setting(source="earth", recipe=Recipe(), root=Path(), precision="fp32", threads=1)
    comparison = peers.Comparison(setting=setting, budget=peers.Budget(minutes=1.0), sides=(512,), rounds=1, folder=tmp_path)
    rows = comparison.searched(peers.ENTRIES["pan-mobilenet-v2"])
    assert [row["learning_rate"] for row in rows] == pytest.approx(tried)
    assert peers.best_rate(rows)["learning_rate"] == pytest.approx(min(tried, key=lambda rate: abs(math.log(rate / best))))
    assert peers.at_an_end(rows) == (["pan_mobilenet_v2"] if at_an_end else [])


def test_choice_split_of_folders(tmp_path: Path) -> None:
    tuning = importlib.import_module("segmentation_peers.tuning")
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(20):
        for folder, shape in (("images", (8, 8, 3)), ("masks", (8, 8))):
            Image.fromarray(np.full(shape, number % 2, np.uint8)).save(tmp_path / folder / f"{number}.png")
    classes = ({"name": "dark", "value": 0}, {"name": "light", "value": 1})
    config = DataConfig.model_validate({"source": "folders", "images": "images", "masks": "masks", "classes": classes})
    source = open_source(config, root=tmp_path)
    held = tuning.HeldPictures(source)
    trained, chosen = ([sample.name for sample in held.split(name)] for name in ("train", "validation"))
    assert len(chosen) == -(-len(source.split("train")) // 5)
    assert sorted(trained + chosen) == sorted(sample.name for sample in source.split("train"))
    with pytest.raises(ValueError, match="test split"):
        held.split("test")
    assert tuning.admission(source)[0].name == source.split("validation")[0].name
    few = DataConfig.model_validate({**config.model_dump(), "validation": 0.4, "test": 0.4})
    with pytest.raises(DataError, match="4 pictures to train on"):
        tuning.HeldPictures(open_source(few, root=tmp_path))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("task: classify\ndata: {source: folders, images: images}", "all these models segment"),
        ("data: {crop: 64}", "data.crop 64: PAN takes no less than 128; give --crop"),
        ("training: {gate_budget: 0.8}", "training.gate_budget 0.8: peers have no gates; set it to 1"),
        ("training: {compile: true}", "training.compile: compiling would count as training"),
        ("training: {learning_rate: 0.1, final_learning_rate: 0.01}", "training.final_learning_rate 0.01: rates from 0.0005 on"),
        ("data: {crops: 64}", "unknown key 'data.crops'"),
    ],
)
def test_peers_with_unsuitable_recipes(
    peers: ModuleType, text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["peers.py", "--recipe", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "rows")])
    with pytest.raises(SystemExit):
        peers.main()
    assert told in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


def test_peers_train_by_the_recipe(peers: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nmodel: {name: hybrid-m, options: {window: 16}}\ntraining: {batch_size: 4, weight_decay: 0.5}", encoding="utf-8"
    )
    given = argparse.Namespace(recipe=path, sources=list(peers.SOURCES), crop=192, batch=None)
    ((source, recipe),) = peers.recipes_of(given).items()
    assert source == "recipe mine"
    setting = peers.Setting(source=source, recipe=recipe, root=tmp_path, precision="fp32", threads=1)
    assert str(tmp_path) not in json.dumps(setting.identity)
    entry, budget = peers.ENTRIES["hybrid-xxs"], peers.Budget(samples=100)
    made = peers.recipe_for(entry, setting, budget, seed=3, learning_rate=0.01, stages=False)
    assert (made.model.name, made.model.options, made.seed, made.data.crop) == ("hybrid-xxs", {}, 3, 192)
    assert (made.training.batch_size, made.training.weight_decay, made.training.learning_rate, made.training.steps) == (4, 0.5, 0.01, 25)
    other = peers.Setting(source=source, recipe=Recipe(), root=tmp_path, precision="fp32", threads=1)
    told = peers.differences(setting.identity, other.identity)
    assert "recipe.training.batch_size 4 (now 8)" in told


def test_peers_row_keys_of_folders(peers: ModuleType, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / folder / "1.png")
    classes = [{"name": "dark", "value": 0}, {"name": "light", "value": 1}]
    recipe = Recipe.model_validate({"data": {"source": "folders", "images": "images", "masks": "masks", "classes": classes}})

    def identity() -> Row:
        found: Row = peers.Setting(source="mine", recipe=recipe, root=tmp_path, precision="fp32", threads=1).identity
        return found

    before = identity()
    assert identity() == before
    Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / "masks" / "1.png")  # another label
    assert [told.partition(" ")[0] for told in peers.differences(before, identity())] == ["pictures"]


def test_peer_padding(tmp_path: Path) -> None:
    deployment = importlib.import_module("segmentation_peers.deployment")
    openvino = deployment.openvino
    image = openvino.opset13.parameter([-1, -1, -1, 3], openvino.Type.u8)
    scores = openvino.opset13.transpose(openvino.opset13.convert(image, "f32"), openvino.opset13.constant([0, 3, 1, 2]))
    openvino.save_model(openvino.Model([scores], [image], "as it is"), tmp_path / "model.xml", compress_to_fp16=False)
    signature = Signature(task="segment", channels=3, classes=[{"name": str(n), "color": (n, n, n)} for n in range(3)])
    (tmp_path / deployment.SIGNATURE).write_text(signature.model_dump_json(), encoding="utf-8")
    session = deployment.PeerSession(tmp_path / "model.xml", precision="f32", threads=1)
    for shape in ((2, 40, 33, 3), (1, 64, 32, 3)):
        images_BHWC = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        np.testing.assert_array_equal(session(images_BHWC), images_BHWC.transpose(0, 3, 1, 2))
    padded = [compiled.model.input().shape for compiled in session._compiled.values()]
    assert [tuple(shape) for shape in padded] == [(2, 40, 33, 3), (1, 64, 32, 3)]


@pytest.mark.parametrize("change", ["seed=5", "model.name=hybrid-m", "data.source=earth:shore", "training.steps=5"])
def test_regions_options(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    regions = importlib.import_module("regions")
    monkeypatch.setattr(sys, "argv", ["regions.py", "--set", change, "--output", str(tmp_path / "rows")])
    with pytest.raises(SystemExit):
        regions.main()
    assert f"--set {change.partition('=')[0]}: give --" in capsys.readouterr().err


def test_choice_split_has_every_class() -> None:
    tuning = importlib.import_module("segmentation_peers.tuning")
    source = EarthSource("cover")
    samples = list(tuning.admission(source))
    assert set(np.concatenate([np.unique(sample.labels) for sample in samples]).tolist()) == set(range(len(source.classes)))
    for tested in source.split("test"):
        assert not any(np.shares_memory(tested.image[:1], sample.image[:1]) for sample in samples)


def fail(peers: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> Row:
    """What a comparison of a peer over two seeds says where making a model raises an error."""

    def model(self: object, entry: object, seed: int) -> NoReturn:
        raise error

    monkeypatch.setattr(peers.Comparison, "model", model)
    setting = peers.Setting(source="earth", recipe=Recipe(), root=Path(), precision="fp32", threads=1)
    comparison = peers.Comparison(setting=setting, budget=peers.Budget(minutes=1.0), sides=(512,), rounds=1, folder=folder)
    found: Row = comparison.run([peers.ENTRIES["pan-mobilenet-v2"]], [0, 1])
    return found


@pytest.mark.parametrize("kind", [OddError, RuntimeError])
def test_failed_model_is_left_out(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    found = fail(peers, tmp_path, monkeypatch, kind("no scales"))
    assert found["left_out"] == [f"pan-mobilenet-v2, seed {seed}: {kind.__name__}: no scales" for seed in (0, 1)]
    assert found["rows"] == found["summary"] == found["latencies"] == []


@pytest.mark.parametrize("kind", ["Interrupted", "Refused"])
def test_interrupt_ends_a_comparison(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    with pytest.raises(getattr(peers, kind)):
        fail(peers, tmp_path, monkeypatch, getattr(peers, kind)())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sides", "512", "64"], "argument --sides: 64: give at least 128"),
        (["--crop", "96"], "argument --crop: 96: give at least 128"),
        (["--rounds", "0"], "argument --rounds: 0: give at least 1"),
        (["--threads", "0"], "argument --threads: 0: give at least 1"),
        (["--batch", "0"], "argument --batch: 0: give at least 1"),
        (["--minutes", "0"], "--minutes 0: give more than 0"),
        (["--minutes", "nan"], "--minutes nan: give more than 0"),
        (["--samples", "7"], "--samples 7: a step takes 8: give more"),
        (["--sources", "earth", "--recipe", "mine.yaml"], "argument --recipe: not allowed with argument --sources"),
    ],
)
def test_peers_with_impossible_numbers(
    peers: ModuleType, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", *words])
    monkeypatch.setattr(peers, "find_spec", lambda module: None)  # what is not refused ends there
    with pytest.raises(SystemExit) as ended:
        peers.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"\npeers.py: error: {told}\n")


def test_peers_with_missing_packages(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", "--samples", "8"])
    monkeypatch.setattr(peers, "find_spec", lambda module: None if module in ("nncf", "segmentation_models_pytorch") else module)
    with pytest.raises(SystemExit) as ended:
        peers.main()
    assert ended.value.code == "peers.py: segmentation-models-pytorch, nncf missing: pip install '.[bench]'"


def test_standard_error_of_a_difference(ablation: ModuleType) -> None:
    found = ablation.difference([1.0, 2.0, 3.0])
    assert (found.mean, found.error) == (2.0, pytest.approx(3**-0.5))
    assert ablation.difference([2.0]) == ablation.Difference(mean=2.0, error=None)


@pytest.mark.parametrize(
    ("points", "slower", "said"),
    [
        ((-3.0, None), (9.0, None), "one seed: none"),
        ((-0.5, 0.2), (0.0, 1.0), "earns its place"),
        ((0.5, 0.2), (9.0, 1.0), "costs score"),
        ((0.5, 0.25), (9.0, 1.0), "earns its place by speed"),
        ((-0.5, 0.25), (-9.0, 1.0), "slower, no better"),
        ((0.1, 0.2), (2.0, 1.0), "not told apart"),
    ],
)
def test_verdict_beyond_two_standard_errors(
    ablation: ModuleType, points: tuple[float, float | None], slower: tuple[float, float | None], said: str
) -> None:
    assert ablation.verdict(*(ablation.Difference(mean=mean, error=error) for mean, error in (points, slower))) == said


def test_summary_of_paired_variants(ablation: ModuleType) -> None:
    scores = [
        {"variant": name, "seed": seed, "miou": miou, "gmac": 2.0, "parameters": 7}
        for name, seed, miou in [("base", 0, 0.70), ("serial", 0, 0.69), ("no gate", 0, 0.71), ("base", 1, 0.72), ("serial", 1, 0.70)]
    ]
    latencies = [
        {"seed": 0, "ms": {"base": {"f32": 9.0, "bf16": 8.0}, "serial": {"f32": 9.0, "bf16": 12.0}, "no gate": {"f32": 9.0, "bf16": 4.0}}},
        {"seed": 1, "ms": {"base": {"f32": 9.5, "bf16": 10.0}, "serial": {"f32": 11.0, "bf16": 15.0}}},
    ]
    found = ablation.summary(scores, latencies)
    assert list(found) == ["base", "serial", "no gate"]
    assert found["base"]["ms"] == {"f32": 9.25, "bf16": 9.0}
    assert (found["base"]["points"], found["base"]["slower_percent"], found["base"]["verdict"]) == (0.0, 0.0, "")
    serial = found["serial"]
    assert serial["miou"] == pytest.approx(0.695)
    assert serial["miou_spread"] == pytest.approx(0.01 / 2**0.5)
    assert (serial["points"], serial["points_error"]) == (pytest.approx(-1.5), pytest.approx(0.5))
    assert (serial["slower_percent"], serial["slower_error"], serial["slower_in"]) == (pytest.approx(50), pytest.approx(0), "bf16")
    assert serial["verdict"] == "earns its place"
    alone = found["no gate"]
    assert alone["ms"] == {"f32": 9.0, "bf16": 4.0}
    assert (alone["points"], alone["points_error"], alone["miou_spread"]) == (pytest.approx(1.0), None, None)
    assert (alone["slower_percent"], alone["verdict"]) == (-50.0, "one seed: none")


@pytest.mark.parametrize(
    ("between", "said"), [((1.3, 1.5), "met"), ((1.0, 1.29), "MISSED"), ((1.2, 1.3), "within the range"), ((1.2, 1.4), "within the range")]
)
def test_goal_over_all_passes(ablation: ModuleType, between: tuple[float, float], said: str) -> None:
    assert ablation.met(between, 1.3) == said


@pytest.mark.parametrize(
    ("points", "error", "told"),
    [
        (-0.2, 0.1, "points lost +0.20 ±0.10: met (goal 0.5)"),
        (-0.4, 0.1, "points lost +0.40 ±0.10: not told apart (goal 0.5)"),
        (0.3, 0.6, "points lost -0.30 ±0.60: not told apart (goal 0.5)"),
        (-0.8, 0.1, "points lost +0.80 ±0.10: MISSED (goal 0.5)"),
        (0.2, 0.1, "points lost -0.20 ±0.10: met (goal 0.5)"),
        (-0.6, None, "points lost +0.60: one seed (goal 0.5)"),
    ],
)
def test_points_lost_with_standard_error(ablation: ModuleType, points: float, error: float | None, told: str) -> None:
    assert ablation.points_lost(ablation.Difference(mean=points, error=error)) == told


def test_goals_in_document_and_table(ablation: ModuleType) -> None:
    found = {"gate budget 0.25": {"points": 0.36, "points_error": 0.53}}
    rows = [{"way": "eager f32", "range": [1.31, 1.33]}, {"way": "compile f32", "cannot": "no compiler"}]
    assert ablation.judgements(found, "gate budget 0.25", rows) == {"eager f32": "met", "points_lost": "not told apart"}
    assert ablation.judgements({}, "serial", rows[:1]) == {"eager f32": "met"}


def test_ablation_row_of_a_failed_variant(ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def checkpoint(self: object, name: str, seed: int) -> NoReturn:
        raise ablation.MuntinError("the loss is\n  no longer finite")

    monkeypatch.setattr(ablation.Setting, "checkpoint", checkpoint)
    setting = ablation.Setting(preset="hybrid-xxs", output=tmp_path, steps=1, precision="fp32", threads=1, rounds=1)
    row = ablation.score_row(setting, "serial", 1)
    assert row == {"variant": "serial", "seed": 1, "cannot": "the loss is no longer finite"}


def without(*failing: tuple[str, int]) -> Any:
    """A `score_row` by which some variants of some seeds fail."""

    def score_row(setting: object, name: str, seed: int) -> Row:
        row: Row = {"variant": name, "seed": seed}
        if (name, seed) in failing:
            return row | {"cannot": "no memory"}
        return row | {"miou": 0.5, "gmac": 1.0, "parameters": 7}

    return score_row


def test_ablation_after_a_failed_variant(
    ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def latency_row(setting: object, names: list[str], seed: int) -> Row:
        return {"seed": seed, "ms": {name: {"f32": 2.0} for name in names}, "others": None}

    def pair_row(*given: object) -> NoReturn:
        raise AssertionError("the serial variant of the first seed is left out")

    monkeypatch.setattr(ablation, "score_row", without(("serial", 0)))
    monkeypatch.setattr(ablation, "latency_row", latency_row)
    monkeypatch.setattr(ablation, "pair_row", pair_row)
    words = ["--variants", "serial", "no gate", "--seeds", "0", "0", "1", "--output", str(tmp_path), "--json"]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *words])
    ablation.main()
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert [(row["variant"], row["seed"], row["cannot"]) for row in document["left_out"]] == [("serial", 0, "no memory")]
    timed = [(row["seed"], list(row["ms"])) for row in document["latencies"]]
    assert timed == [(0, ["base", "no gate"]), (1, ["base", "serial", "no gate"])]
    assert document["pairs"] == {}
    assert document["summary"]["serial"]["verdict"] == "one seed: none"
    assert "left out: serial, seed 0: no memory\n" in captured.err


def test_ablation_without_its_base(ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "score_row", without(("base", 0)))
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--seeds", "0", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        ablation.main()
    assert ended.value.code == "the base, seed 0, cannot be trained or exported: no memory"


@pytest.mark.parametrize("option", ["--steps", "--rounds", "--threads"])
def test_ablation_with_impossible_numbers(
    ablation: ModuleType, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def go_on() -> NoReturn:
        raise AssertionError(f"{option} 0 was taken")

    monkeypatch.setattr(ablation, "describe_hardware", go_on)
    monkeypatch.setattr(sys, "argv", ["ablation.py", option, "0"])
    with pytest.raises(SystemExit) as ended:
        ablation.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"\nablation.py: error: argument {option}: 0: give at least 1\n")


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        ({"steps": 6, "training": {"rate": 0.1}, "sides": [512]}, "steps 5 (now 6)"),
        ({"steps": 5, "training": {"rate": 0.2}, "sides": [512]}, "training.rate 0.1 (now 0.2)"),
        ({"steps": 5, "training": {"rate": 0.1}}, "sides [512] (now None)"),
        (
            {"steps": 6, "training": {"rate": 0.2}, "sides": [], "x": 1, "y": 2, "z": 3},
            "steps 5 (now 6); training.rate 0.1 (now 0.2); sides [512] (now []); x None (now 1) and 2 more",
        ),
    ],
)
def test_resumed_row_of_other_settings(kept: ModuleType, tmp_path: Path, settings: Row, differs: str) -> None:
    path = tmp_path / "row.json"
    row: Row = {"settings": {"steps": 5, "training": {"rate": 0.1}, "sides": [512]}, "ms": 1.5}
    kept.write_whole(path, row)
    assert kept.read_row(path, {**row["settings"], "sides": (512,)}) == row
    with pytest.raises(SystemExit) as ended:
        kept.read_row(path, settings)
    assert ended.value.code == f"{path} was measured with {differs}: give another --output"


def test_resumed_row_of_another_machine(kept: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    row: Row = {"settings": {}, "ms": 1.5, "hardware": {**HERE, "cpu": "another", "features": []}}
    kept.write_whole(path, row)
    assert kept.read_row(path, {}) == row
    assert kept.read_row(path, {}, {**row["hardware"], "memory_gib": 1}) == row
    with pytest.raises(SystemExit) as ended:
        kept.read_row(path, {}, HERE)
    differs = "hardware.cpu another (now this); hardware.features [] (now ['avx2'])"
    assert ended.value.code == f"{path} was measured with {differs}: give another --output"


def test_resumed_row_without_settings(kept: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    kept.write_whole(path, [1, 2])
    with pytest.raises(SystemExit) as ended:
        kept.read_row(path, {})
    assert ended.value.code == f"{path} does not say what it was measured with: give another --output"


def test_resumed_rows_and_failures(kept: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "row.json"
    answers: list[Row] = [{"cannot": "no memory"}, {"ms": 1.5}]
    measured = iter(answers)

    def row() -> Row:
        found: Row = kept.kept_row(path, {"steps": 5}, lambda: next(measured), hardware=HERE)
        return found

    assert row()["cannot"] == "no memory"
    assert not path.exists()
    made = row()
    assert {key: made[key] for key in ("settings", "ms", "hardware")} == {"settings": {"steps": 5}, "ms": 1.5, "hardware": HERE}
    assert row() == made
    assert [file.name for file in path.parent.iterdir()] == ["row.json"]
    assert json.loads(path.read_text(encoding="utf-8")) == made


def test_resumed_failure_is_no_row(kept: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    assert kept.read_row(path, {}) is None
    kept.write_whole(path, {"settings": {"steps": 6}, "cannot": "no memory"})
    assert kept.read_row(path, {"steps": 5}) is None


def test_scaling_folder_of_a_changed_preset(tmp_path: Path) -> None:
    scaling = importlib.import_module("scaling")
    options = dict(scaling.option(text) for text in ("stem=[8, 16]", "pairs=[0]", "attention=dense"))
    assert options == {"stem": [8, 16], "pairs": [0], "attention": "dense"}
    changed, plain = scaling.Network(preset="hybrid-xxs", options=options), scaling.Network(preset="hybrid-xxs", options={})
    assert changed.structure["stem"] == [8, 16]
    assert plain.structure["stem"] == [8, 16, 32]
    assert plain.folder(tmp_path) == tmp_path / "hybrid-xxs"
    folders = {scaling.Network(preset="hybrid-xxs", options=dict([option])).folder(tmp_path) for option in options.items()}
    assert len(folders | {changed.folder(tmp_path), plain.folder(tmp_path)}) == 5
    assert changed.name == 'hybrid-xxs, stem=[8, 16], pairs=[0], attention="dense"'


@pytest.mark.parametrize("text", ["stem", "width=3", "stem=[8, 16"])
def test_scaling_with_unknown_options(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(text)):
        importlib.import_module("scaling").option(text)


def test_scaling_goals() -> None:
    scaling = importlib.import_module("scaling")
    rows = [
        {"kind": kind, "side": side, "ms": ms, "mib": mib}
        for kind, side, ms, mib in [
            ("hybrid int8", 512, 4.0, 10.0), ("hybrid int8", 1024, 16.0, 40.0), ("hybrid int8", 4096, 256.0, 800.0),
            ("dense eager", 512, 88.0, 10.0), ("dense eager", 1024, 480.0, 60.0),
        ]
    ]  # fmt: skip
    found = scaling.summary([*rows, {"kind": "dense eager", "side": 2048, "cannot": "not within 180 s"}])
    assert found["slopes"]["hybrid int8, ms"] == pytest.approx(1)
    assert found["ratios"] == {"dense eager over hybrid int8, 512": 22.0, "dense eager over hybrid int8, 1024": 30.0}
    assert [goal["met"] for goal in scaling.judge(found)] == [True, False, True, False]
    assert [goal["met"] for goal in scaling.judge(scaling.summary(rows[:1]))] == [None] * 4
    shorter = [*rows[:2], {"kind": "hybrid int8", "side": 2048, "ms": 64.0, "mib": 160.0}]
    assert scaling.summary(shorter)["slopes"] == {}  # none from 1024 to 4096


def test_load_without_answers() -> None:
    swap = importlib.import_module("swap")
    answered = {"requests": 100, "failures": {"503": 2}, "goodput_per_s": 4.5, "seconds": 20, "p99_ms": 30.0, "worst_ms": 41.0}
    silent = {"requests": 7, "failures": {"503": 5, "late": 2}, "goodput_per_s": 0.0, "seconds": 20, "p99_ms": None, "worst_ms": None}
    both = swap._together([answered, silent])
    assert both == {"requests": 107, "failures": {"503": 7, "late": 2}, "later": 8, "p99_ms": 30.0, "worst_ms": 41.0}
    assert swap._together([silent])["worst_ms"] is None


def test_size_cost_of_integers() -> None:
    areas = importlib.import_module("areas")

    def row(floats: Sequence[float], integers: Sequence[float], largest: float = 68.0) -> Row:
        sizes = (1.0, 4.0, 16.0, largest)
        forms = dict.fromkeys(areas.FORMS[1:], integers) | {areas.FLOATS: floats}
        return {
            "forms": {
                form: [{"area": area, "miou": miou, "labels": 0.9} for area, miou in zip(sizes, scores, strict=True)]
                for form, scores in forms.items()
            }
        }

    steady = row([0.70, 0.69, 0.68, 0.60], [0.69, 0.68, 0.67, 0.588])  # loses 1.0 point everywhere, 1.2 at the largest
    worse = row([0.70, 0.69, 0.68, 0.60], [0.69, 0.68, 0.67, 0.578])  # and 2.2 there
    found = areas.figures([steady, worse], "INT8", 3)
    assert (found["area"], found["miou"]) == (68.0, [0.588, 0.578])
    assert found["points"] == pytest.approx([-1.2, -2.2]) and found["more"] == pytest.approx([-0.2, -1.2])
    small = row([0.7] * 4, [0.7] * 4, largest=27.0)
    told = {
        "one seed": [steady], "met": [steady, steady], "not told apart": [steady, worse], "MISSED": [worse, worse],
        "not asked: the images are too small": [small, small],
    }  # fmt: skip
    for word, rows in told.items():
        assert areas.goals(rows) == dict.fromkeys(areas.FORMS[1:], word)


def test_list_of_architectures(tmp_path: Path) -> None:
    entries = importlib.import_module("architecture_sweep.entries")
    listed = entries.read_list()
    assert len({entry.source for entry in listed}) == len(listed) >= 80
    assert {entry.kind for entry in listed} == {"timm", "torchvision", "smp", "hf", "onnx"}
    assert [entry.size for entry in entries.select(listed, ["torchvision:lraspp"])] == [256]
    with pytest.raises(SystemExit, match="no model of the list"):
        entries.select(listed, ["resnet-18"])
    for line, reason in {"timm:resnet18 64 64": "is no model", "timm:lcnet_050\ntimm:lcnet_050 64": "is there twice"}.items():
        (tmp_path / "list.txt").write_text(line)
        with pytest.raises(SystemExit, match=reason):
            entries.read_list(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("program", "outcome", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", "crashed", "SIGSEGV: it printed nothing"),
        ("raise ValueError('five')", "crashed", "exit status 1: ValueError: five"),
        ("import time; time.sleep(60)", "too long", "not done after 1 s"),
        ("print('{}')", "crashed", "exit status 0: {}"),
        ("WRITE({'outcome': 'refused', 'reason': 'no'})", "refused", "no"),
        ("WRITE({'outcome': 'exported', 'verified': False, 'db': 30.0})", "unverified", None),
        ("WRITE({'outcome': 'exported', 'verified': True, 'db': 10.0})", "agrees", None),
        ("WRITE({'outcome': 'exported', 'verified': True, 'db': 9.9, 'noise_db': 12.0})", "noisy", None),
        ("WRITE({'outcome': 'exported', 'verified': True, 'db': 9.9, 'noise_db': 40.0})", "differs", None),
        ("WRITE({'outcome': 'exported', 'verified': True, 'db': 9.9})", "differs", None),
    ],
)
def test_outcome_of_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, outcome: str, reason: str | None) -> None:
    architectures = importlib.import_module("architectures")
    entry = importlib.import_module("architecture_sweep.entries").Entry(source="timm:resnet18")
    script = tmp_path / "script.py"
    head = "import json, sys, pathlib\nWRITE = lambda row: pathlib.Path(sys.argv[-1]).write_text(json.dumps(row))\n"
    script.write_text(head + program)
    monkeypatch.setattr(architectures, "__file__", str(script))
    row = architectures.measure_apart(entry, 1 if outcome == "too long" else 60, None)
    assert (row["outcome"], row.get("reason"), row.get("cannot")) == (outcome, reason, reason)
    assert entry.source in architectures.line_of(entry.source, {"reason": "", **row})
