"""An artefact without training, and folders of pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from muntin.artifact import ClassInfo, GoldenTolerance, Signature, write_artifact
from muntin.images import write_image


@pytest.fixture(scope="session")
def write_channels() -> Callable[[Path], Path]:
    """`write_channels(path)`: an artefact for "segment" whose scores are the pixels' channels."""

    def write(path: Path) -> Path:
        nodes = [
            helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["scores"], perm=[0, 3, 1, 2]),
        ]
        graph = helper.make_graph(
            nodes,
            "channels",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", 3, "H", "W"])],
        )
        images = np.random.default_rng(1).integers(0, 256, (1, 6, 8, 3)).astype(np.uint8)
        write_artifact(
            path,
            model=helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
            signature=Signature(
                task="segment", channels=3, classes=tuple(ClassInfo(name=name, color=(0, 0, 0)) for name in ("roof", "field", "sea"))
            ),
            golden=[(images, images.transpose(0, 3, 1, 2).astype(np.float32))],
            golden_tolerance={"openvino": {"f32": GoldenTolerance(max_error=0.05, label_agreement=0.9)}},
            example=(1, 8, 8),
        )
        return path

    return write


@pytest.fixture(scope="session")
def draw_scene() -> Callable[..., NDArray[np.uint8]]:
    """`draw_scene(seed)`: patches of colour under noise, uint8 (48, 48, 3)."""

    def draw(seed: int) -> NDArray[np.uint8]:
        generator = np.random.default_rng(seed)
        patches = generator.normal(120, 40, (6, 6, 3)).repeat(8, 0).repeat(8, 1)
        return np.clip(patches + generator.normal(0, 4, patches.shape), 0, 255).astype(np.uint8)

    return draw


@pytest.fixture(scope="session")
def write_scenes(draw_scene: Callable[..., NDArray[np.uint8]]) -> Callable[..., Path]:
    """`write_scenes(folder, count, seed, change)`: a folder of scenes, each changed by a function."""

    def write(
        folder: Path, count: int, seed: int, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = lambda picture: picture
    ) -> Path:
        folder.mkdir(parents=True)
        for number in range(count):
            write_image(folder / f"{number:03d}.png", change(draw_scene(1000 * seed + number)))
        return folder

    return write
