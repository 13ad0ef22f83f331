"""A realistic report and a realistic profile, the pictures they name, and a reader of their pages."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from muntin.reporting import page, profile_page
from muntin.reporting.files import template

Row = dict[str, Any]
VOID = {"meta", "link", "img", "br", "wbr"}

CLASSES = {
    "ocean": (28, 72, 130),
    "moist land": (66, 140, 74),
    "steppe": (196, 186, 98),
    "desert": (226, 176, 106),
    "tundra": (150, 130, 170),
    "ice": (236, 242, 246),
}
FP32 = (0.948, 0.812, 0.274, 0.466, 0.548, 0.858)
MIXED = (0.948, 0.811, 0.271, 0.464, 0.547, 0.857)
LOW_RANK = (0.948, 0.813, 0.272, 0.465, 0.547, 0.858)
W4A8 = (0.945, 0.802, 0.254, 0.449, 0.531, 0.851)
DEPLOYED = (0.947, 0.811, 0.270, 0.463, 0.546, 0.857)


def _step(name: str, engine: str, iou: tuple[float, ...], size: int, latency: float | None, *, thin: bool = True) -> Row:
    return {
        "name": name,
        "miou": sum(iou) / len(iou),
        "iou": dict(zip(CLASSES, iou, strict=True)),
        "params": 1_242_710 if thin else 2_812_346,
        "bytes": size,
        "gmacs": 1.48 if thin else 3.11,
        "latency_ms": latency,
        "engine": engine,
    }


def _training(rows: int) -> list[Row]:
    rng = np.random.default_rng(7)
    out = []
    for index in range(rows):
        done = index / rows
        rate = 1.5e-3 * (min(1.0, done / 0.05) if done < 0.05 else 0.5 * (1 + math.cos(math.pi * (done - 0.05) / 0.95)))
        loss = 0.42 + 1.35 * math.exp(-5 * done) + 0.09 * rng.standard_normal()
        speed = 51 + 2.5 * rng.standard_normal() if index else None
        row = {"step": 5 * index, "seconds": 0.1 * index, "loss": loss, "learning_rate": rate, "images_per_s": speed}
        out.append({**row, "waiting": 0.03 if index else None})
    return out


def _validation(rows: int) -> list[Row]:
    out = []
    for index in range(rows):
        grown = 1 - math.exp(-3.2 * (index + 1) / rows)
        iou = {name: value * grown * (1 - 0.06 * math.sin(index + value * 40)) for name, value in zip(CLASSES, FP32, strict=True)}
        out.append({"step": 140 * (index + 1), "miou": sum(iou.values()) / len(iou), "iou": iou})
    return out


def _original() -> list[Row]:
    """Return the layers of the original model in network order, with the shape of each weight as (outputs, inputs, kernel)."""
    rows = [_weight("stem.0", "Conv2d", (32, 3, 3), 256**2)]
    for stage, width in enumerate((32, 64, 128, 256)):
        for block in range(2 + stage // 2):
            name, pixels = f"stages.{stage}.{block}", (512 // 2 ** (stage + 2)) ** 2
            rows.append(_weight(f"{name}.depthwise", "Conv2d", (width, 1, 3), pixels))
            if stage > 1:
                shapes = {"qkv": (3 * width, width), "mix": (width, width), "mlp.0": (4 * width, width), "mlp.2": (width, 4 * width)}
                rows += [_weight(f"{name}.{part}", "Linear", (*shape, 1), pixels) for part, shape in shapes.items()]
            else:
                rows += [_weight(f"{name}.{part}", "Conv2d", (width, width, 3), pixels) for part in ("conv1", "conv2")]
    rows.append(_weight("decoder.lateral", "Conv2d", (64, 256, 1), 64**2))
    rows.append(_weight("head", "Conv2d", (6, 64, 1), 128**2))
    return rows


def _weight(name: str, kind: str, shape: tuple[int, int, int], pixels: int) -> Row:
    outputs, inputs, kernel = shape
    parameters = outputs * inputs * kernel**2
    return {"name": name, "kind": kind, "shape": shape, "parameters": parameters, "macs": parameters * pixels}


def _kept(row: Row) -> str:
    """Return why a layer stays dense, '' for a layer that does not."""
    if row["name"] in ("stem.0", "head"):
        return "the first and the last layer stay as they are"
    if "depthwise" in row["name"]:
        return "a depthwise kernel has no rank to cut"
    if row["parameters"] < 16_000:
        return "no rank saves parameters within the error"
    return ""


def _factors(row: Row) -> tuple[list[int], list[int], dict[str, int]]:
    """Return full ranks, ranks and the parameters of each thin layer: two of these layers, or three for Tucker-2."""
    outputs, inputs, kernel = row["shape"]
    if kernel > 1:
        full, ranks = [inputs, outputs], [inputs // 2, outputs * 5 // 8]
        return full, ranks, {"reduce": inputs * ranks[0], "core": ranks[0] * ranks[1] * kernel**2, "expand": ranks[1] * outputs}
    full_rank = min(outputs, inputs)
    rank = full_rank * (2 + len(row["name"]) % 3) // 12
    return [full_rank], [rank], {"reduce": rank * inputs, "expand": rank * outputs}


def _ranks() -> list[Row]:
    rows = []
    for row in _original():
        full, ranks, parts = _factors(row)
        kept = _kept(row)
        rows.append(
            {
                "name": row["name"],
                "kind": row["kind"],
                "full": full,
                "ranks": [] if kept else ranks,
                "parameters_before": row["parameters"],
                "parameters_after": row["parameters"] if kept else sum(parts.values()),
                "reason": kept,
            }
        )
    return rows


def _layers() -> list[Row]:
    rows = []
    for row in _original():
        pixels = row["macs"] // row["parameters"]
        if _kept(row):
            rows.append(_layer(row["name"], row["kind"], row["parameters"], pixels))
        else:
            parts = _factors(row)[2]
            rows += [_layer(f"{row['name']}.{part}", row["kind"], parameters, pixels) for part, parameters in parts.items()]
    worst = sorted((row for row in rows if row["sqnr_db"] is not None), key=lambda row: row["sqnr_db"])
    for row in worst[:4]:
        row["histogram"] = _histogram(len(row["name"]))
    return rows


def _layer(name: str, kind: str, parameters: int, pixels: int) -> Row:
    weight_bits, activation_bits, executed, note = 4, 8, "i8", ""
    if name in ("stem.0", "head"):
        weight_bits, activation_bits, executed, note = 16, None, "bf16", "the first and the last layer"
    elif "depthwise" in name:
        weight_bits, note = 8, "depthwise: 4 bits save little"
    elif name.startswith("decoder"):
        weight_bits, executed = 8, "f32"
    elif name.startswith("stages.3.2.mlp"):
        weight_bits, note = 8, "4 bits cost 0.4 points, more than in any other layer"
    return {
        "name": name,
        "kind": kind,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "executed": executed,
        "parameters": parameters,
        "macs": parameters * pixels,
        "sqnr_db": 24 + 9 * math.sin(len(name) * 1.7 + parameters) if activation_bits else None,
        "clipped": 0.002 * abs(math.sin(parameters)) if activation_bits else None,
        "histogram": None,
        "note": note,
    }


def _histogram(seed: int) -> Row:
    """Return inputs after a GELU: a peak at zero and a tail to the right, which the grid cuts."""
    normal = np.random.default_rng(seed).standard_normal(40_000) * 2.2
    values = np.concatenate([normal / (1 + np.exp(-1.7 * normal)), [11.5, 13.0, 15.5]])
    counts, edges = np.histogram(values, bins=64)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist(), "grid_low": -0.29, "grid_high": 8.6 + seed / 20}


def _artifact(name: str, path: str, engine: str, validation: float, test: float, size: int, ms: float) -> Row:
    shares = {"same_labels": 1.0 if name == "fp32" else 0.9731, "bytes": size, "median_ms": ms, "p90_ms": 1.1 * ms, "peak_mib": None}
    return {"name": name, "path": path, "engine": engine, "validation": validation, "test": test, **shares}


def sample_report(*, examples: int = 3) -> Row:
    """Return a whole report; `draw_pictures` draws the pictures that it names."""
    return {
        "format": 1,
        "title": "earth: ground cover from a photograph",
        "created": "2026-11-24T16:30:00+00:00",
        "muntin": "0.1.0",
        "hardware": {
            "cpu": "Intel Xeon Platinum 8481C",
            "cores": 2,
            "memory_gib": 7.8,
            "features": ["avx512", "amx_bf16", "amx_int8"],
            "torch": "2.13.0",
            "openvino": "2026.4.1",
        },
        "task": "segment",
        "seconds": {"train": 121.4, "quantize": 23.9, "export": 8.25, "evaluate": 61.0},
        "classes": [{"name": name, "color": list(color)} for name, color in CLASSES.items()],
        "steps": [
            _step("fp32", "PyTorch eager, f32", FP32, 11_310_080, 41.3, thin=False),
            _step("low-rank", "PyTorch eager, f32", LOW_RANK, 5_012_480, 27.9),
            _step("w4a8", "PyTorch eager, 4-bit weights simulated", W4A8, 5_012_480, None),
            _step("mixed", "PyTorch eager, 4- and 8-bit weights simulated", MIXED, 5_012_480, None),
            _step("deployed", "OpenVINO, i8 + bf16", DEPLOYED, 812_304, 6.87),
        ],
        "artifacts": {
            "height": 512,
            "width": 512,
            "rounds": 60,
            "size_reason": "the size of the export",
            "samples": {"validation": 1, "test": 2},
            "rows": [
                _artifact("fp32", "runs/earth/checkpoints/step-00000660", "PyTorch eager, f32", 0.662, 0.651, 11_310_080, 41.3),
                _artifact("int8", "runs/earth/artifact-int8", "OpenVINO, i8 + bf16", 0.655, 0.643, 3_912_304, 8.2),
                _artifact("mixed", "runs/earth/artifact", "OpenVINO, i8 + bf16", 0.658, 0.649, 812_304, 6.87),
            ],
            "take": "mixed",
            "rule": "the fastest whose validation score is at most 0.01 below the best artefact's",
        },
        "latency": {
            "height": 512,
            "width": 512,
            "rounds": 60,
            "rows": [
                {"name": "fp32", "engine": "PyTorch eager, f32", "median_ms": 41.3, "p90_ms": 46.8},
                {"name": "fp32 exported", "engine": "OpenVINO, f32", "median_ms": 19.4, "p90_ms": 20.6},
                {"name": "16-bit", "engine": "OpenVINO, bf16", "median_ms": 8.9, "p90_ms": 9.7},
                {"name": "deployed", "engine": "OpenVINO, i8 + bf16", "median_ms": 6.87, "p90_ms": 7.4},
            ],
        },
        "agreement": 0.99731,
        "training": _training(280),
        "validation": _validation(10),
        "ranks": _ranks(),
        "layers": _layers(),
        "pictures": {
            "overlay": "overlay.png",
            "examples": [
                {
                    "name": f"test {index + 1}",
                    **{part: f"examples/{index}-{part}.png" for part in ("image", "truth", "prediction", "difference")},
                }
                for index in range(examples)
            ],
        },
        "notes": [
            "The test part is two bands of longitude that the training never saw; 2° at every border belong to neither.",
            "Steppe and desert differ by rainfall, which a photograph shows only in part: seeds differ by 2 to 3 points there.",
        ],
        "recipe": "# two minutes on two cores; mIoU 0.62\nmodel: hybrid-s\ndata:\n  source: earth\nfit:\n  minutes: 2\n",
    }


def draw_pictures(directory: Path, *, examples: int = 3, width: int = 720) -> None:
    """Draw continents of filtered noise, their classes, and predictions with errors along the coasts."""
    (directory / "examples").mkdir(parents=True, exist_ok=True)
    photo, labels, guess = _world(1, width // 2, width)
    overlay = Image.fromarray((0.45 * photo + 0.55 * _painted(guess)).astype(np.uint8))
    pen = ImageDraw.Draw(overlay)
    for band in (1, 2, 5, 6):
        pen.line([(band * width // 8, 0), (band * width // 8, width // 2)], fill=(255, 255, 255), width=max(1, width // 400))
    overlay.save(directory / "overlay.png")
    for index in range(examples):
        photo, labels, guess = _world(index + 2, width // 4, width // 4)
        wrong = np.where((labels != guess)[..., None], np.uint8([222, 60, 70]), (photo // 3 + 40).astype(np.uint8))
        parts = {"image": photo, "truth": _painted(labels), "prediction": _painted(guess), "difference": wrong.astype(np.uint8)}
        for part, pixels in parts.items():
            Image.fromarray(pixels).save(directory / "examples" / f"{index}-{part}.png")


def _painted(labels: np.ndarray) -> np.ndarray:
    return np.uint8(list(CLASSES.values()))[labels]


def _world(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)

    def noise(cell: int) -> np.ndarray:
        coarse = rng.integers(0, 256, (height // cell + 2, width // cell + 2), dtype=np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 255

    relief = 0.55 * noise(height // 4) + 0.3 * noise(height // 9) + 0.15 * noise(max(2, height // 24))
    wet = noise(height // 3)
    cold = np.abs(np.linspace(-1, 1, height))[:, None] + 0.2 * (wet - 0.5)

    def classes(shift: np.ndarray) -> np.ndarray:
        land = np.where(wet + shift > 0.52, 1, np.where(wet + shift > 0.42, 2, 3))
        land = np.where(cold > 0.72, 4, land)
        labels = np.where(relief + shift > 0.5, land, 0)
        return np.where(cold > 0.9, 5, labels).astype(np.uint8)

    truth, guess = classes(np.zeros_like(relief)), classes(0.03 * (noise(max(2, height // 12)) - 0.5))
    photo = _painted(truth) * 0.55 + 50 * relief[..., None] + rng.normal(0, 6, (height, width, 1))
    return np.clip(photo, 0, 255).astype(np.uint8), truth, guess


PROFILED = (
    # name, kind, implementation, precision, ms, MACs, bytes
    ("image", "quantise / convert", "Reorder, ref_any", "i8", 0.021, None, 1_572_864),
    ("stem.conv", "convolution", "Convolution, brgconv_avx512_amx_i8", "i8", 0.412, 75_497_472, 1_067_008),
    ("stages.0.blocks.0.attention.project", "matrix product", "FullyConnected, brgemm_avx512_amx_i8", "i8", 0.633, 167_772_160, 1_739_264),
    ("stages.0.blocks.0.attention.scores", "matrix product", "MatMul, brgemm_avx512_amx_bf16", "bf16", 0.204, 4_194_304, 401_408),
    ("stages.0.blocks.0.softmax", "element-wise", "Subgraph, jit_avx512_f32", "f32", 0.310, None, 2_097_152),
    ("stages.0.blocks.0.reorder", "layout change", "Reorder, jit_uni_f32", "f32", 0.188, None, 2_097_152),
    ("stages.0.blocks.0.view", "layout change", "Reshape, unknown", "i8", 0.0, None, None),
    ("decoder.lateral", "convolution", "Convolution, brgconv_avx512_amx_i8", "i8", 0.121, 16_777_216, 4_300_000),
    ("decoder.smooth", "convolution", "Convolution, brgconv_avx512_amx_i8", "i8", 1.912, 603_979_776, 2_134_016),
    ("scores", "layout change", "DepthToSpace, jit_avx512_f32", "f32", 0.540, None, 12_582_912),
)
GMACS = {"f32": 110.0, "bf16": 420.0, "i8": 900.0}
COPY_GB_S = 25.0


def _kernel(row: tuple[Any, ...], whole: float) -> Row:
    name, kind, implementation, precision, ms, macs, size = row
    least = None if size is None else max((macs or 0) / GMACS[precision] / 1e6, size / COPY_GB_S / 1e6)
    return {
        "name": name,
        "kind": kind,
        "implementation": implementation,
        "precision": precision,
        "compute": macs is not None,
        "layer": name if macs else None,
        "ms": ms,
        "share": ms / whole,
        "macs": macs,
        "bytes": size,
        "attainable_ms": least,
        "ceiling_share": least / ms if least and ms else None,
    }


def sample_profile() -> Row:
    """Return the profile of a segmentation: ten kernels, two of them bound by memory, and 0.3 ms between kernels."""
    total = sum(row[4] for row in PROFILED)
    profiled = total + 0.3
    kernels = [_kernel(row, profiled) for row in PROFILED]
    kinds: list[Row] = []
    for kind in dict.fromkeys(row["kind"] for row in kernels):
        own = [row["ms"] for row in kernels if row["kind"] == kind]
        kinds.append({"kind": kind, "ms": sum(own), "share": sum(own) / profiled, "count": len(own)})
    kinds.append({"kind": "between kernels", "ms": 0.3, "share": 0.3 / profiled, "count": 0})
    return {
        "format": 1,
        "title": "earth, INT8: 1 × 512 × 512",
        "created": "2026-11-24T16:30:00+00:00",
        "muntin": "0.1.0",
        "hardware": {"cpu": "Intel Xeon Platinum 8481C", "cores": 2, "memory_gib": 7.8, "features": ["amx_int8"], "openvino": "2026.4.1"},
        "artifact": {"path": "runs/earth/artifact", "bytes": 812_304, "sha256": "3f" * 32},
        "engine": "openvino",
        "precision": "bf16",
        "threads": 2,
        "shape": [1, 512, 512],
        "dims": None,
        "rounds": 30,
        "whole_ms": 4.5,
        "profiled_ms": profiled,
        "kernels_ms": total,
        "others": 0.0,
        "ceilings": {"gmacs": dict(GMACS), "copy_gb_s": COPY_GB_S},
        "kernels": kernels,
        "kinds": kinds,
        "findings": [
            {"kind": "layout", "words": "4% of the time is layout changes: a Reorder before the softmax", "saves_ms": 0.19},
            {"kind": "output", "words": "12% of the time is writing the scores; labels of one byte would be 0.26 MB", "saves_ms": 0.5},
            {"kind": "float", "words": "one product runs in BF16", "saves_ms": 0.1},
            {"kind": "busy", "words": "other processes were at work", "saves_ms": None},
            {"kind": "small", "words": "one product is small", "saves_ms": 0.05},
        ],
        "notes": ["an inference with counters on is slower than one without"],
    }


class Page(HTMLParser):
    """The elements and the text of a page; raises AssertionError where its tags do not nest or an element has an attribute twice."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def identifiers(self) -> list[str | None]:
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]

    @property
    def has_handlers(self) -> bool:
        return any(name.startswith("on") for _, attrs in self.elements for name in attrs)


@pytest.fixture(scope="session", autouse=True)
def templates() -> Iterator[None]:
    """A template is compiled once for all pages: that takes a quarter of a second."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (page, profile_page):
            patch.setattr(module, "template", functools.cache(template))
        yield


@pytest.fixture
def read_page() -> Callable[[str], Page]:
    return Page


@pytest.fixture
def profile() -> Row:
    return sample_profile()


@pytest.fixture
def report() -> Row:
    return sample_report()


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sample's pictures. Tests that write files use `run_directory`."""
    directory = tmp_path_factory.mktemp("pictures")
    draw_pictures(directory)
    return directory


@pytest.fixture
def run_directory(drawn: Path, tmp_path: Path) -> Path:
    """A folder of this test alone, with the pictures in it."""
    directory = tmp_path / "run"
    for source in drawn.rglob("*.png"):
        target = directory / source.relative_to(drawn)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return directory
