"""A realistic report: fixed numbers, drawn pictures. Slow to look at, quick to make."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

Row = dict[str, Any]

CLASSES = {
    "ocean": (28, 72, 130),
    "moist land": (66, 140, 74),
    "steppe": (196, 186, 98),
    "desert": (226, 176, 106),
    "tundra": (150, 130, 170),
    "ice": (236, 242, 246),
}
FP32 = (0.948, 0.812, 0.274, 0.466, 0.548, 0.858)
FAKE = (0.948, 0.811, 0.271, 0.464, 0.547, 0.857)
DEPLOYED = (0.947, 0.811, 0.270, 0.463, 0.546, 0.857)


def _step(name: str, engine: str, iou: tuple[float, ...], size: int, latency: float | None) -> Row:
    return {
        "name": name,
        "miou": sum(iou) / len(iou),
        "iou": dict(zip(CLASSES, iou, strict=True)),
        "params": 2_812_346,
        "bytes": size,
        "gmacs": 3.11,
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
        out.append({"step": 5 * index, "loss": loss, "learning_rate": rate, "images_per_s": speed})
    return out


def _validation(rows: int) -> list[Row]:
    out = []
    for index in range(rows):
        grown = 1 - math.exp(-3.2 * (index + 1) / rows)
        iou = {name: value * grown * (1 - 0.06 * math.sin(index + value * 40)) for name, value in zip(CLASSES, FP32, strict=True)}
        out.append({"step": 140 * (index + 1), "miou": sum(iou.values()) / len(iou), "iou": iou})
    return out


def _layers() -> list[Row]:
    rows = [_layer("stem.0", "Conv2d", 16, None, "bf16", 864, 56_623_104)]
    channels = (32, 64, 128, 256)
    for stage, width in enumerate(channels):
        for block in range(2 + stage // 2):
            name, pixels = f"stages.{stage}.{block}", (512 // 2 ** (stage + 2)) ** 2
            rows.append(_layer(f"{name}.depthwise", "Conv2d (depthwise)", 8, 8, "i8", 9 * width, 9 * width * pixels))
            for part in ("qkv", "mix", "mlp.0", "mlp.2") if stage > 1 else ("conv1", "conv2"):
                grow = {"qkv": 3, "mix": 1, "mlp.0": 4, "mlp.2": 4}.get(part, 9)
                kind = "Linear" if stage > 1 else "Conv2d"
                rows.append(_layer(f"{name}.{part}", kind, 8, 8, "i8", grow * width * width, grow * width * width * pixels))
    rows.append(_layer("decoder.lateral", "Conv2d", 8, 8, "f32", 16_384, 67_108_864))
    rows.append(_layer("head", "Conv2d", 16, None, "bf16", 390, 6_291_456))
    return rows


def _layer(name: str, kind: str, weight_bits: int, activation_bits: int | None, executed: str, parameters: int, macs: int) -> Row:
    sqnr = 24 + 9 * math.sin(len(name) * 1.7) if activation_bits else None
    return {
        "name": name,
        "kind": kind,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "executed": executed,
        "parameters": parameters,
        "macs": macs,
        "sqnr_db": sqnr,
    }


def sample_report(*, examples: int = 3) -> Row:
    """The numbers; the pictures they name are those of `draw_pictures`."""
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
            _step("fp32", "PyTorch eager, f32", FP32, 11_310_080, 41.3),
            _step("fake-quantised", "PyTorch eager, f32", FAKE, 11_310_080, None),
            _step("deployed", "OpenVINO, i8 + bf16", DEPLOYED, 3_064_812, 6.87),
        ],
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
    """Continents of filtered noise, the classes they imply, and predictions that err along the coasts."""
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


@pytest.fixture
def report() -> Row:
    return sample_report()


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sample's pictures; tests that write use `run_directory`."""
    directory = tmp_path_factory.mktemp("pictures")
    draw_pictures(directory)
    return directory


@pytest.fixture
def run_directory(drawn: Path, tmp_path: Path) -> Path:
    """A run's folder of its own, with the pictures in it."""
    directory = tmp_path / "run"
    for source in drawn.rglob("*.png"):
        target = directory / source.relative_to(drawn)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return directory
