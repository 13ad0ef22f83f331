"""Models and their artefacts, each exported once for all tests of this room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import muntin
from muntin.artifact import Artifact
from muntin.errors import ExportError, MuntinError
from muntin.layers import ChannelGate, MapNorm, TokenNorm
from muntin.training.config import QuantizationConfig


class Built(nn.Module):
    """Layers under names, and what is done with them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@dataclass(frozen=True)
class Exported:
    """An artefact, and the PyTorch model that it was made of."""

    model: nn.Module
    artifact: Artifact

    def expected(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        return muntin.TorchSession(self.model, self.artifact.manifest.signature)(images_BHWC)


def make_pixels(*shape: int, seed: int = 0) -> Tensor:
    """Smooth pictures (noise has nothing that a network could look at), `(B, C, H, W)`, 0-255."""
    batch, channels, height, width = shape
    coarse = torch.rand(batch, channels, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 255).round()


def make_pictures(*shape: int, seed: int = 1) -> NDArray[np.uint8]:
    """The same as bytes, `(B, H, W, C)`."""
    batch, height, width, channels = shape
    return np.ascontiguousarray(make_pixels(batch, channels, height, width, seed=seed).permute(0, 2, 3, 1).numpy().astype(np.uint8))


def as_trained(model: nn.Module) -> nn.Module:
    """Statistics as training leaves them, and a head that answers something."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MapNorm | TokenNorm | nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
            elif isinstance(module, ChannelGate):
                module.logit.uniform_(-0.2, 1.2)
    return model.eval()


def as_lively(model: nn.Module) -> nn.Module:
    """Weights of a size at which every branch counts, and the statistics of norms that go with them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
        model.train()
        for seed in range(2):
            model(make_pixels(1, 3, 96, 96, seed=seed).repeat(8, 1, 1, 1))
    return model.eval()


@pytest.fixture(autouse=True)
def one_seed_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def build() -> type[Built]:
    """`build(run, name=layer, ...)`: a model of these layers."""
    return Built


@pytest.fixture(scope="session")
def pixels() -> Callable[..., Tensor]:
    """`pixels(B, C, H, W, seed=...)`: smooth pictures as floats."""
    return make_pixels


@pytest.fixture(scope="session")
def pictures() -> Callable[..., NDArray[np.uint8]]:
    """`pictures(B, H, W, C, seed=...)`: the same as bytes."""
    return make_pictures


@pytest.fixture(scope="session")
def trained() -> Callable[[nn.Module], nn.Module]:
    """Gives a model statistics as training leaves them."""
    return as_trained


@pytest.fixture(scope="session")
def lively() -> Callable[[nn.Module], nn.Module]:
    """Gives a model weights at which every branch counts."""
    return as_lively


@pytest.fixture(scope="session")
def tiny() -> Callable[[], nn.Module]:
    """`tiny()`: a model that exports in a second."""
    return lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))


@pytest.fixture(scope="session")
def refused() -> Callable[..., str]:
    """`refused(model, example, path, ...)`: the message of an `ExportError` for every size, one line, that leaves `path` empty."""

    def run(model: nn.Module, example: Tensor, path: Path, **arguments: Any) -> str:
        with pytest.raises(MuntinError) as caught:
            muntin.export(model, example, path / "artifact", **({"sizes": "any"} | arguments))
        assert isinstance(caught.value, ExportError), caught.value
        assert "\n" not in str(caught.value)
        assert not list(path.iterdir())
        return str(caught.value)

    return run


@pytest.fixture(scope="session")
def export_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """`export_model(model, quantized=..., sizes=...)` into a directory of its own. Free sizes take three times as long as fixed ones."""

    def run(model: nn.Module, *, quantized: bool, sizes: Any, example: Tensor | None = None, keep: tuple[str, ...] = ()) -> Exported:
        example = make_pixels(2, 3, 64, 64) if example is None else example
        config = {"calibration": [example], "quantization": QuantizationConfig(keep=keep, min_sqnr_db=0)} if quantized else {}
        path = tmp_path_factory.mktemp("export") / "artifact"
        return Exported(model, muntin.export(model, example, path, sizes=sizes, **config))

    return run


@pytest.fixture(scope="session")
def plain_scores() -> Callable[[Path, NDArray[np.uint8]], NDArray[np.float32]]:
    """`plain_scores(file, images)`: what a user of ONNX Runtime gets from an ONNX file, without muntin."""

    def run(file: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        onnx.checker.check_model(str(file), full_check=True)
        model = onnx.load(file)
        assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 20)} and not model.functions
        assert {value.name for value in model.graph.value_info} >= {node.output[0] for node in model.graph.node[:-1]}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        (scores,) = onnxruntime.InferenceSession(file, options).run(None, {"images": images})
        return scores  # type: ignore[no-any-return]

    return run


@pytest.fixture(scope="session")
def assert_standalone(plain_scores: Callable[..., NDArray[np.float32]]) -> Callable[[Artifact, Path], None]:
    """`assert_standalone(artifact, file)`: the plain file computes what the artefact's session does, bit for bit, and the golden scores."""

    def run(artifact: Artifact, file: Path) -> None:
        muntin.write_standalone(artifact, file)
        session = muntin.load(artifact.path, engine="onnxruntime", threads=1)
        for images, golden in artifact.golden_images():
            plain = plain_scores(file, images)
            np.testing.assert_array_equal(plain, session(images))
            assert np.abs(plain - golden).max() <= 0.1 * golden.std()
            assert (plain.argmax(1) == golden.argmax(1)).mean() > 0.98

    return run


@pytest.fixture(scope="session")
def assert_exact_tiles() -> Callable[[Artifact, int, int, int], None]:
    """`assert_exact_tiles(artifact, height, width, tile)`: tiles give the answer of one call."""

    def run(artifact: Artifact, height: int, width: int, tile: int) -> None:
        assert artifact.manifest.tile_plan is not None, artifact.manifest.measured
        session = muntin.load(artifact.path, precision="f32", shapes=(), engine="onnxruntime", cache=False)
        picture = make_pictures(1, height, width, 3, seed=0)[0]
        whole, tiled = (muntin.predict(session, picture, output="scores", **how) for how in ({}, {"exact": True, "tile": tile}))
        assert tiled.shape == whole.shape
        if artifact.manifest.integers:
            assert (tiled.argmax(0) == whole.argmax(0)).mean() >= 0.9999
        else:
            np.testing.assert_allclose(tiled, whole, rtol=0, atol=1e-5 * whole.std() + 1e-6)
        if session.signature.task == "segment":
            assert (muntin.predict(session, picture, exact=True, tile=tile) == tiled.argmax(0)).all()

    return run
