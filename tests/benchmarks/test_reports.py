"""What the commands under `benchmarks/` make of rows: goals, differences, what is kept and what is left out. Nothing is measured.

None of it needs the extra `bench`, nor do the modules at their import.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from muntin.artifact import Signature
from muntin.data import DataConfig, EarthSource, open_source
from muntin.errors import DataError, MuntinError
from muntin.training.recipe import Recipe

Row = dict[str, Any]
HERE: Row = {"cpu": "this", "cores": 2, "features": ["avx2"], "openvino": "1", "torch": "2", "memory_gib": 8}
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


@pytest.fixture
def report() -> ModuleType:
    return importlib.import_module("segmentation_peers.report")


@pytest.fixture
def peers() -> ModuleType:
    return importlib.import_module("peers")


@pytest.fixture
def ablation() -> ModuleType:
    return importlib.import_module("ablation")


def document_of(rows: list[Row]) -> Any:
    return importlib.import_module("documents").Document(benchmark="", created="2026-12-01", machine={}, rows=rows, settings={})


def run_of(options: Any) -> Any:
    return importlib.import_module("harness").Run(options=options, hardware=HERE)


def document(*models: tuple[str, float, float], spread: float | None = 0.01, source: str = "earth") -> Any:
    """A comparison of models, each with its mIoU and ms, over two seeds whose scores have this standard deviation, or over one seed."""
    rows: list[Row] = []
    shifts = [0.0] if spread is None else [-spread / 2**0.5, spread / 2**0.5]
    names = {"source": source, "budget": "minutes-1"}
    for seed, shift in enumerate(shifts):
        for name, miou, _ in models:
            variants = {"float f32": {"test": miou + shift, "iou": {}, "bytes": 1000}}
            rows.append({"part": "model", **names, "model": name, "seed": seed, "variants": variants, "parameters": 5, "minutes": 1.0})
        ms = {name: value for name, _, value in models}
        chosen = dict.fromkeys(ms, "float f32")
        rows.append({"part": "latency", **names, "seed": seed, "chosen": chosen, "ms": {"512": ms}, "variants": {}})
    return document_of(rows)


def field(hybrid: float = 0.70, hybrid_ms: float = 4.0, best_ms: float = 20.0) -> list[tuple[str, float, float]]:
    """A hybrid; the best peer, with .66; the fastest one, in 9 ms unless the best is faster; another one."""
    best, fastest, other, *_ = PEERS
    return [("hybrid-xxs", hybrid, hybrid_ms), (best, 0.66, best_ms), (fastest, 0.60, 9.0), (other, 0.55, 12.0)]


def met(peers: ModuleType, document: Any) -> list[bool | None]:
    """For each goal of the comparison whether it is met; None where it cannot be judged."""
    met = []
    for goal in peers.BENCHMARK.goals:
        cases = goal.cases(document)
        met.append(all(map(goal.met, cases.values())) if cases else None)
    return met


def test_variant_within_half_a_point_of_floats() -> None:
    scores = {"float f32": 0.5, "float bf16": 0.52, "int8 f32": 0.4951, "int8 bf16": 0.4949}
    assert importlib.import_module("segmentation_peers.deployment").admitted(scores) == ["float f32", "float bf16", "int8 f32"]


def trained(model: str, seed: int, **tests: float) -> Row:
    """A row of a model with what `summarise` reads; its variants by name, each with a test score."""
    variants = {
        name.replace("floats", "float f32"): {
            "validation": test / 2, "admission": test / 3, "test": test, "iou": {"sea": test, "ice": None},
            "bytes": 4_000_000 if name == "floats" else 1_000_000,
        }
        for name, test in tests.items()
    }  # fmt: skip
    figures = {"minutes": 2.0 + seed, "samples": 100, "images_per_s": 10.0, "parameters": 5, "learning_rate": 0.004}
    return {"part": "model", "source": "earth", "budget": "minutes-2", "model": model, "seed": seed, "variants": variants, **figures}


def test_summary_of_the_deployed_variant(report: ModuleType) -> None:
    names = {"part": "latency", "source": "earth", "budget": "minutes-2"}
    rows = [
        trained("hybrid-xxs", 0, floats=0.71, small=0.72),
        trained("hybrid-xxs", 1, floats=0.70, small=0.60),
        trained("pan-mobilenet-v2", 1, floats=0.66),
        {
            **names, "seed": 0, "chosen": {"hybrid-xxs": "small"}, "ms": {"512": {"hybrid-xxs": 4.0}},
            "variants": {"hybrid-xxs": {"float f32": 7.0, "small": 4.0}},
        },
        {
            **names, "seed": 1, "chosen": {"hybrid-xxs": "float f32", "pan-mobilenet-v2": "float f32"},
            "ms": {"512": {"hybrid-xxs": 6.0, "pan-mobilenet-v2": 20.0}},
            "variants": {"hybrid-xxs": {"float f32": 6.0, "small": 5.0}, "pan-mobilenet-v2": {"float f32": 20.0}},
        },
    ]  # fmt: skip
    hybrid, peer = report.summarise(rows)
    assert (hybrid["model"], hybrid["hybrid"], hybrid["seeds"], hybrid["deployed"]) == ("hybrid-xxs", True, 2, "small, float f32")
    assert (hybrid["miou"], hybrid["test"], hybrid["float"]) == ([0.72, 0.70], "0.710 ± 0.014", "0.705 ± 0.007")
    assert hybrid["iou"] == {"sea": "0.710 ± 0.014", "ice": "–"}
    assert (hybrid["ms"], hybrid["mb"], hybrid["minutes"]) == ({"512": 5.0}, 2.5, 2.5)
    assert (peer["model"], peer["hybrid"], peer["seeds"], peer["test"], peer["ms"]) == (
        "pan-mobilenet-v2",
        False,
        1,
        "0.660",
        {"512": 20.0},
    )
    small = next(row for row in report.variants(rows) if row["variant"] == "small")
    assert (small["test"], small["validation"], small["ms"]) == ("0.660 ± 0.085", "0.330 ± 0.042", 4.5)


@pytest.mark.parametrize(
    ("hybrid", "spread", "expected"),
    [(0.70, 0.01, [True, True]), (0.70, 0.03, [False, True]), (0.67, 0.001, [True, False]), (0.70, None, [None, None])],
)
def test_lead_of_several_seeds(peers: ModuleType, hybrid: float, spread: float | None, expected: list[bool | None]) -> None:
    assert met(peers, document(*field(hybrid), spread=spread))[:2] == expected


def test_lead_goal_on_earth_only(peers: ModuleType) -> None:
    assert met(peers, document(*field(), source="earth:climate")) == [True, None, True, True]


@pytest.mark.parametrize(
    ("hybrid_ms", "best_ms", "expected"),
    [
        (4.4, 20.0, [True, True]),
        (4.6, 20.0, [True, False]),
        (4.4, 16.0, [False, True]),
        (2.1, 8.0, [False, None]),
        (1.9, 8.0, [True, None]),
    ],
)
def test_goals_of_a_hybrid(peers: ModuleType, hybrid_ms: float, best_ms: float, expected: list[bool | None]) -> None:
    assert met(peers, document(*field(hybrid_ms=hybrid_ms, best_ms=best_ms)))[2:] == expected


def test_goals_of_a_hybrid_behind_the_peers(report: ModuleType, peers: ModuleType) -> None:
    behind = document(*field(0.64))
    assert met(peers, behind) == [False, False, False, False]
    assert report.goals(behind)["best"] == {"512²": math.inf}
    assert met(peers, document(*field(0.64), spread=None)) == [False, None, False, False]


@pytest.mark.parametrize("hybrid", [True, False])
def test_goals_without_a_peer_or_hybrid(peers: ModuleType, hybrid: bool) -> None:
    alone = [model for model in field() if model[0].startswith("hybrid") is hybrid]
    assert met(peers, document(*alone)) == [None] * 4


@pytest.mark.parametrize(
    ("made", "common"),
    [([], set()), ([("a", 1), ("a", 0)], {0, 1}), ([("a", 0), ("a", 1), ("b", 1), ("b", 2)], {1}), ([("a", 0), ("b", 1)], set())],
)
def test_goals_by_common_seeds(report: ModuleType, made: list[tuple[str, int]], common: set[int]) -> None:
    assert report.seeds_of_all([{"part": "model", "model": model, "seed": seed} for model, seed in made]) == common


def test_claim_of_the_peers(report: ModuleType) -> None:
    models = [("hybrid-xxs", 0.70, 4.0), *((name, 0.66, 20.0) for name in PEERS[:7])]
    longer = document(*models)
    for row in longer.rows:
        row["budget"] = "minutes-2"
    told = "after one minute of training +4.0 points on 1 label sets; after longer training +4.0 to +4.0. 20 to 20 % of the time"
    assert report.claim([document(*models), longer]) == told


class OddError(Exception):
    """As NNCF raises its own: of no kind but Exception."""


def comparison(peers: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(peers, "versions", dict)
    run = run_of(peers.PeersOptions(output=folder))
    setting = peers.Setting(source="earth", recipe=Recipe(), root=Path(), precision="fp32", threads=1)
    return peers.Comparison(run=run, setting=setting, budget=peers.Budget(minutes=1.0))


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
    peers: ModuleType, report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: float, tried: list[float], at_an_end: bool
) -> None:
    def tried_(self: object, entry: Any, rate: float) -> Row:
        return {"part": "rate", "model": entry.model, "learning_rate": rate, "held_out": -abs(math.log(rate / best))}

    monkeypatch.setattr(peers.Comparison, "_tried", tried_)
    rows = comparison(peers, tmp_path, monkeypatch).searched(peers.ENTRIES["pan-mobilenet-v2"])
    assert [row["learning_rate"] for row in rows] == pytest.approx(tried)
    (chosen,) = [row for row in report.rates(rows) if row["choice"]]
    assert chosen["learning_rate"] == pytest.approx(min(tried, key=lambda rate: abs(math.log(rate / best))))
    assert chosen["choice"] == ("best, at an end" if at_an_end else "best")


def test_choice_split_of_folders(tmp_path: Path) -> None:
    training = importlib.import_module("segmentation_peers.training")
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(20):
        for folder, shape in (("images", (8, 8, 3)), ("masks", (8, 8))):
            Image.fromarray(np.full(shape, number % 2, np.uint8)).save(tmp_path / folder / f"{number}.png")
    classes = ({"name": "dark", "value": 0}, {"name": "light", "value": 1})
    config = DataConfig.model_validate({"source": "folders", "images": "images", "masks": "masks", "classes": classes})
    source = open_source(config, task="segment", root=tmp_path)
    held = training.held_images(source)
    trained, chosen = ([sample.name for sample in held.split(name)] for name in ("train", "validation"))
    assert len(chosen) == -(-len(source.split("train")) // 5)
    assert sorted(trained + chosen) == sorted(sample.name for sample in source.split("train"))
    with pytest.raises(ValueError, match="test split"):
        held.split("test")
    assert training.admission(source)[0].name == source.split("validation")[0].name
    few = DataConfig.model_validate({**config.model_dump(), "validation": 0.4, "test": 0.4})
    with pytest.raises(DataError, match="4 pictures to train on"):
        training.held_images(open_source(few, task="segment", root=tmp_path))


def test_choice_split_of_strips() -> None:
    training = importlib.import_module("segmentation_peers.training")
    source = EarthSource("cover")
    held = training.held_strips(source)
    train, chosen = ([tuple(map(int, sample.name.split("-"))) for sample in held.split(name)] for name in ("train", "validation"))
    degree = source.picture()[0].shape[1] / 360
    ((start, end),) = chosen
    assert (start / degree - 180, end / degree - 180) == pytest.approx((-21.5, 44.0), abs=0.05)
    for start, end in train:
        assert all(end <= first - degree or start >= last + degree for first, last in chosen)


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
def test_peers_with_unsuitable_recipes(peers: ModuleType, text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        peers.BENCHMARK.parse(["--recipe", str(tmp_path / "mine.yaml")])
    assert told in capsys.readouterr().err


def test_peers_train_by_the_recipe(peers: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nmodel: {name: hybrid-m, options: {window: 16}}\ntraining: {batch_size: 4, weight_decay: 0.5}", encoding="utf-8"
    )
    ((source, recipe),) = peers.PeersOptions(recipe=path, crop=192).recipes.items()
    assert source == "recipe mine"
    setting = peers.Setting(source=source, recipe=recipe, root=tmp_path, precision="fp32", threads=1)
    assert str(tmp_path) not in json.dumps(setting.identity)
    entry, budget = peers.ENTRIES["hybrid-xxs"], peers.Budget(samples=100)
    made = peers.recipe_for(entry, setting, budget, seed=3, learning_rate=0.01, compressed=False)
    assert (made.model.name, made.model.options, made.seed, made.data.crop) == ("hybrid-xxs", {}, 3, 192)
    assert (made.training.batch_size, made.training.weight_decay, made.training.learning_rate, made.training.steps) == (4, 0.5, 0.01, 25)


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
    assert [key for key, value in identity().items() if before[key] != value] == ["pictures"]


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


def test_choice_split_has_every_class() -> None:
    training = importlib.import_module("segmentation_peers.training")
    source = EarthSource("cover")
    samples = list(training.admission(source))
    assert set(np.concatenate([np.unique(sample.labels) for sample in samples]).tolist()) == set(range(len(source.classes)))
    for tested in source.split("test"):
        assert not any(np.shares_memory(tested.image[:1], sample.image[:1]) for sample in samples)


@pytest.mark.parametrize("kind", [OddError, RuntimeError, SystemExit])
def test_failed_model_is_left_out(
    peers: ModuleType, report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def searched(self: object, entry: object) -> NoReturn:
        raise kind("no scales")

    monkeypatch.setattr(peers.Comparison, "searched", searched)
    entries, found = [peers.ENTRIES["pan-mobilenet-v2"]], comparison(peers, tmp_path, monkeypatch)
    if kind is SystemExit:  # of a training that was interrupted
        with pytest.raises(SystemExit):
            found.rows(entries, [0, 1])
        return
    rows = list(report.models(found.rows(entries, [0, 1])))
    assert [(row["model"], row["cannot"]) for row in rows] == [
        ("pan-mobilenet-v2", f"seed {seed}: {kind.__name__}: no scales") for seed in (0, 1)
    ]
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--sides", "512", "64"], "argument --sides: 64: give at least 128"),
        (["--crop", "96"], "argument --crop: 96: give at least 128"),
        (["--minutes", "0"], "--minutes 0: give more than 0"),
        (["--minutes", "nan"], "--minutes nan: give more than 0"),
        (["--samples", "7"], "--samples 7: a step takes 8: give more"),
        (["--sources", "earth", "--recipe", "mine.yaml"], "argument --recipe: not allowed with argument --sources"),
    ],
)
def test_peers_with_impossible_numbers(peers: ModuleType, words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        peers.BENCHMARK.parse(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {told}\n")


def test_peers_with_missing_packages(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda module: None if module in ("nncf", "segmentation_models_pytorch") else module)
    with pytest.raises(SystemExit) as ended:
        next(peers.rows(run_of(peers.PeersOptions(samples=8, output=tmp_path))))
    assert ended.value.code == "peers.py: segmentation-models-pytorch, nncf missing: pip install '.[bench]'"


def test_standard_error_of_a_difference(ablation: ModuleType) -> None:
    assert ablation.error([1.0, 2.0, 3.0]) == pytest.approx(3**-0.5)
    assert ablation.error([2.0]) == math.inf
    assert (ablation.shown([1.0, 2.0, 3.0]), ablation.shown([2.0], ".2f")) == ("+2.0 ± 0.6", "+2.00")


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
    def values(mean: float, error: float | None) -> list[float]:
        return [mean] if error is None else [mean - error, mean + error]

    assert ablation.verdict(values(*points), values(*slower)) == said


def scores(*rows: tuple[str, int, float]) -> list[Row]:
    figures = {"part": "score", "gmac": 2.0, "parameters": 7}
    return [{**figures, "variant": name, "seed": seed, "miou": miou} for name, seed, miou in rows]


def latency(seed: int, **ms: dict[str, float]) -> Row:
    return {"part": "latency", "seed": seed, "others": None, "ms": {name.replace("_", " "): values for name, values in ms.items()}}


def test_summary_of_paired_variants(ablation: ModuleType) -> None:
    rows = scores(("base", 0, 0.70), ("serial", 0, 0.69), ("no gate", 0, 0.71), ("base", 1, 0.72), ("serial", 1, 0.70))
    rows += [
        latency(0, base={"f32": 9.0, "bf16": 8.0}, serial={"f32": 9.0, "bf16": 12.0}, no_gate={"f32": 9.0, "bf16": 4.0}),
        latency(1, base={"f32": 9.5, "bf16": 10.0}, serial={"f32": 11.0, "bf16": 15.0}),
    ]
    base, serial, alone = ablation.summary(rows)
    assert (base["variant"], base["ms"], "points" in base) == ("base", {"f32": 9.25, "bf16": 9.0}, False)
    assert (serial["miou"], serial["verdict"], serial["slower_in"]) == ("0.695 ± 0.007", "earns its place", "bf16")
    assert serial["points"] == pytest.approx([-1.0, -2.0])
    assert serial["slower"] == pytest.approx([50.0, 50.0])
    assert serial["shown"] == {"points": "-1.50 ± 0.50", "slower": "+50.0 ± 0.0"}
    assert (alone["ms"], alone["shown"], alone["verdict"]) == (
        {"f32": 9.0, "bf16": 4.0}, {"points": "+1.00", "slower": "-50.0"}, "one seed: none"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("points", "lost"),
    [([-0.3, -0.1], 0.4), ([0.1, 0.3], 0.0), ([-0.5, -0.3], 0.6), ([-0.6], 0.6), ([-0.4], None)],
)
def test_points_lost_with_standard_error(ablation: ModuleType, points: list[float], lost: float | None) -> None:
    cut = [(name, seed, 0.7 + value / 100) for seed, change in enumerate(points) for name, value in (("base", 0), (ablation.CUT, change))]
    rows = scores(*cut)
    rows += [latency(seed, base={"f32": 2.0}) for seed in range(len(points))]
    for row in rows[-len(points) :]:
        row["ms"][ablation.CUT] = {"f32": 1.0}
    assert ablation.points_lost(document_of(rows)) == {ablation.CUT: None if lost is None else pytest.approx(lost)}


def test_ablation_row_of_a_failed_variant(ablation: ModuleType) -> None:
    def fail() -> NoReturn:
        raise MuntinError("the loss is\n  no longer finite")

    assert ablation.attempt({"variant": "serial"}, fail) == {"variant": "serial", "cannot": "the loss is no longer finite"}


def run_ablation(ablation: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, failing: tuple[str, int], *words: str) -> list[Row]:
    """The rows of a run whose measurements are replaced, and in which one variant fails with one seed."""

    def score(network: Any) -> Row:
        if (network.name, network.seed) == failing:
            raise RuntimeError("no memory")
        return {"miou": 0.5, "gmac": 1.0, "parameters": 7}

    def latencies(networks: list[Any], options: object) -> Row:
        return latency(networks[0].seed) | {"ms": {network.name: {"f32": 2.0} for network in networks}}

    monkeypatch.setattr(ablation, "score", score)
    monkeypatch.setattr(ablation, "latencies", latencies)
    return list(ablation.rows(run_of(ablation.BENCHMARK.parse([*words, "--output", str(folder)]))))


def test_ablation_after_a_failed_variant(ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--variants", "serial", "no gate", "--seeds", "0", "0", "1"]
    rows = run_ablation(ablation, tmp_path, monkeypatch, ("serial", 0), *words)
    assert [(row["variant"], row["seed"], row["cannot"]) for row in rows if "cannot" in row] == [("serial", 0, "no memory")]
    timed = [(row["seed"], list(row["ms"])) for row in rows if row["part"] == "latency"]
    assert timed == [(0, ["base", "no gate"]), (1, ["base", "serial", "no gate"])]
    assert not ablation.pairs(rows)  # the serial variant of the first seed is left out
    assert [row["cannot"] for row in ablation.summary(rows) if "cannot" in row] == ["seed 0: no memory"]


def test_ablation_without_its_base(ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        run_ablation(ablation, tmp_path, monkeypatch, ("base", 0), "--seeds", "0")
    assert ended.value.code == "the base, seed 0, cannot be trained or exported: no memory"


def test_scaling_folder_of_a_changed_preset(tmp_path: Path) -> None:
    scaling = importlib.import_module("scaling")
    words = ["--model", "hybrid-xxs", "--output", str(tmp_path)]
    changes = ("stem=[8, 16]", "pairs=[0]", "attention=dense")
    changed = scaling.BENCHMARK.parse([*words, "--options", *changes])
    plain = scaling.BENCHMARK.parse(words)
    assert dict(changed.options) == {"stem": [8, 16], "pairs": [0], "attention": "dense"}
    assert (changed.structure["stem"], plain.structure["stem"]) == ([8, 16], [8, 16, 32])
    assert plain.folder == tmp_path / "hybrid-xxs"
    folders = {scaling.BENCHMARK.parse([*words, "--options", change]).folder for change in ("stem=[16, 16, 32]", "depths=[1]", changes[2])}
    assert len(folders | {changed.folder, plain.folder}) == 5


@pytest.mark.parametrize("text", ["stem", "width=3", "stem=[8, 16"])
def test_scaling_with_unknown_options(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module("scaling").BENCHMARK.parse(["--options", text])
    assert text in capsys.readouterr().err


def test_scaling_goals() -> None:
    scaling = importlib.import_module("scaling")
    rows = [
        {"kind": kind, "side": side, "ms": ms, "mib": mib}
        for kind, side, ms, mib in [
            ("hybrid int8", 512, 4.0, 10.0), ("hybrid int8", 1024, 16.0, 40.0), ("hybrid int8", 4096, 256.0, 800.0),
            ("dense eager", 512, 88.0, 10.0), ("dense eager", 1024, 480.0, 60.0),
        ]
    ]  # fmt: skip
    failed = {"kind": "dense eager", "side": 2048, "cannot": "not within 180 s"}
    found = {goal.name: goal.cases(document_of([*rows, failed])) for goal in scaling.BENCHMARK.goals}
    assert found["slope of the hybrid in INT8"] == pytest.approx({"time": 1, "memory": math.log(20, 16)})
    assert [list(cases.values()) for cases in found.values()][1:] == [[22.0], [30.0]]
    assert [goal.cases(document_of(rows[:1])) for goal in scaling.BENCHMARK.goals] == [{}] * 3


def test_load_without_answers() -> None:
    load = importlib.import_module("serving_peers.load")
    answered = {"requests": 100, "failures": {"503": 2}, "goodput_per_s": 4.5, "seconds": 20, "p99_ms": 30.0, "worst_ms": 41.0}
    silent = {"requests": 7, "failures": {"503": 5, "late": 2}, "goodput_per_s": 0.0, "seconds": 20, "p99_ms": None, "worst_ms": None}
    both = load.together([answered, silent])
    assert both == {"requests": 107, "failures": {"503": 7, "late": 2}, "later": 8, "p99_ms": 30.0, "worst_ms": 41.0}
    assert load.together([silent])["worst_ms"] is None


def test_size_cost_of_integers() -> None:
    areas = importlib.import_module("areas")
    (goal,) = areas.BENCHMARK.goals

    def rows(seed: int, floats: Sequence[float], integers: Sequence[float], largest: float = 68.0) -> list[Row]:
        sizes = (1.0, 4.0, 16.0, largest)
        return [
            {"seed": seed, "form": form, "tile": place, "area": size, "miou": scores[place], "labels": 0.9}
            for form, scores in ((areas.FLOATS, floats), ("INT8", integers))
            for place, size in enumerate(sizes)
        ]

    steady = ([0.70, 0.69, 0.68, 0.60], [0.69, 0.68, 0.67, 0.588])  # loses 1.0 point everywhere, 1.2 at the largest
    worse = ([0.70, 0.69, 0.68, 0.60], [0.69, 0.68, 0.67, 0.578])  # and 2.2 there
    both = [*rows(0, *steady), *rows(1, *worse)]
    *_, large = areas.figures(both)
    assert (large["area"], large["miou"]) == (68.0, [0.588, 0.578])
    assert large["points"] == pytest.approx([-1.2, -2.2]) and large["more"] == pytest.approx([-0.2, -1.2])
    same = goal.cases(document_of([*rows(0, *steady), *rows(1, *steady)]))
    assert same == pytest.approx({"INT8": -0.2}) and goal.met(same["INT8"])
    apart = goal.cases(document_of(both))
    assert apart == pytest.approx({"INT8": -0.7 - 2 * 0.5}) and not goal.met(apart["INT8"])
    assert goal.cases(document_of(rows(0, *steady))) == {}  # one seed has no standard error
    assert goal.cases(document_of([*rows(0, *steady, 27.0), *rows(1, *steady, 27.0)])) == {}  # the images are too small


def test_list_of_architectures(tmp_path: Path) -> None:
    architectures = importlib.import_module("architectures")
    listed = architectures.read_list()
    assert len(listed) >= 80
    assert {source.partition(":")[0] for source in listed} == {"timm", "torchvision", "smp", "hf", "onnx"}
    assert list(architectures.read_list(patterns=["torchvision:lraspp"]).values()) == [256]
    with pytest.raises(SystemExit, match="no model of the list"):
        architectures.read_list(patterns=["resnet-18"])
    for line, reason in {"timm:resnet18 64 64": "is no model", "timm:lcnet_050\ntimm:lcnet_050 64": "is there twice"}.items():
        (tmp_path / "list.txt").write_text(line)
        with pytest.raises(SystemExit, match=reason):
            architectures.read_list(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        ({"cannot": "its process ended with status -11"}, "crashed"),
        ({"cannot": "not within 1 s"}, "too long"),
        ({"outcome": "refused", "cannot": "no"}, "refused"),
        ({"outcome": "exported", "verified": False, "db": 30.0}, "unverified"),
        ({"outcome": "exported", "verified": True, "db": 10.0}, "agrees"),
        ({"outcome": "exported", "verified": True, "db": 9.9, "noise_db": 12.0}, "noisy"),
        ({"outcome": "exported", "verified": True, "db": 9.9, "noise_db": 40.0}, "differs"),
        ({"outcome": "exported", "verified": True, "db": 9.9}, "differs"),
    ],
)
def test_outcome_of_a_model(monkeypatch: pytest.MonkeyPatch, row: Row, outcome: str) -> None:
    architectures = importlib.import_module("architectures")
    monkeypatch.setattr(architectures, "apart", lambda *_, **__: dict(row))
    assert architectures.measure_apart("timm:resnet18", None, None, 1) == {**row, "outcome": outcome}


def test_fewest_bytes_within_a_budget() -> None:
    """Baselines that keep the budget on unseen inputs are compared; without one there is no comparison."""
    budget, documents = importlib.import_module("budget"), importlib.import_module("documents")

    def rows(max_drop: float, drops: dict[str, float]) -> list[Row]:
        facts = {"part": "form", "network": "minilm", "seed": 0, "budget": max_drop, "ms": 1.0}
        sizes = {"muntin": 10, "bits": 15, "nncf": 30}
        return [{**facts, "form": form, "bytes": sizes[form], "holdout": {"drop": drop}} for form, drop in drops.items()]

    found = [
        {"part": "network", "network": "minilm", "fp32_bytes": 60},
        *rows(0.01, {"muntin": 0.010000000000000004, "bits": 0.009, "nncf": 0.0}),  # within it but for rounding
        *rows(0.02, {"muntin": 0.021, "bits": 0.01, "nncf": 0.03}),
        *rows(0.03, {"muntin": 0.01, "bits": 0.04, "nncf": 0.05}),
    ]
    document = documents.Document(benchmark="budget", created="2026-12-01T00:00:00+00:00", machine={}, rows=found, settings={})
    assert budget.fewest_bytes(document) == {"minilm 0.01": 1.5, "minilm 0.02": 0.0}
    assert list(budget.over_budget(document).values()) == pytest.approx([0.0, 0.1, -2.0])
