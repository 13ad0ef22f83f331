"""The two models that are served, their requests, and the expected answers.

The weights are untrained: they change neither time nor bytes. Their norms are given statistics as training leaves them, so that the
answers to different pictures differ and a server that mixes them up is found out.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving_peers.load import Exchange

PICTURES = 8


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and how it is used. `max_rows`: of a batch, in every server. `concurrency`: those that saturation is looked for with.

    `objective_calls`: the latency objective, as so many calls of the engine with one picture: one that a machine can keep, fast or slow.
    """

    name: Literal["segment", "classify"]
    preset: str
    classes: int
    side: int
    max_rows: int
    objective_calls: int
    concurrency: tuple[int, ...]

    @property
    def output(self) -> str:
        return "labels" if self.name == "segment" else "scores"

    @property
    def structure(self) -> dict[str, Any]:
        """Structure of the preset, as it is now."""
        from muntin.models import PRESETS, ModelConfig

        return ModelConfig(**PRESETS[self.preset]).model_dump(mode="json")

    @property
    def dtype(self) -> str:
        return "uint8" if self.output == "labels" else "float32"

    @property
    def answer_shape(self) -> tuple[int, ...]:
        """Shape of the answer to one picture."""
        return (self.side, self.side) if self.output == "labels" else (self.classes,)


WORKLOADS = {
    "segment": Workload(name="segment", preset="hybrid-s", classes=6, side=512, max_rows=4, objective_calls=5, concurrency=(2, 4, 8)),
    "classify": Workload(
        name="classify", preset="hybrid-xs", classes=10, side=64, max_rows=16, objective_calls=16, concurrency=(8, 16, 32, 64)
    ),
}


def origin_of(path: Path) -> str | None:
    """Return the origin of an artefact; None if there is no artefact."""
    try:
        return str(json.loads((path / "manifest.json").read_text(encoding="utf-8"))["measured"]["origin"])
    except (OSError, ValueError, KeyError):
        return None


def make_artifact(workload: Workload, path: Path, *, seed: int = 0) -> None:
    """Quantises and exports the workload's model with weights of its own, where it is not there yet, or was made by another state of the
    preset or of the export: about a minute."""
    import torch

    import muntin
    from muntin.artifact import open_artifact
    from muntin.deployment.checkpoint_export import REVISION
    from muntin.errors import ArtifactError
    from muntin.layers import MapNorm, TokenNorm

    origin = json.dumps({"workload": asdict(workload), "structure": workload.structure, "seed": seed, "revision": REVISION}, sort_keys=True)
    with suppress(ArtifactError):  # none, or an altered one
        if open_artifact(path).manifest.measured.get("origin") == origin:
            return

    torch.manual_seed(seed)
    model = muntin.create_model(workload.preset, task=workload.name, classes=workload.classes)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, MapNorm | TokenNorm):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.1)
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.5, 2)
    batch = torch.from_numpy(pictures(workload.side)[:2]).permute(0, 3, 1, 2).float()
    muntin.export(model.eval(), batch, path, calibration=[batch], measured={"origin": origin})


def pictures(side: int) -> NDArray[np.uint8]:
    """`PICTURES` smooth pictures, uint8 (B, side, side, 3)."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (PICTURES, 8, 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)) for image in coarse])


def exchange(workload: Workload, images: NDArray[np.uint8], answers: NDArray[Any], *, path: str, tensors: bool) -> Exchange:
    """The requests to `path`, one picture each, and their answers: as tensors of the Open Inference Protocol, or as raw bytes."""
    encode = _tensor_request if tensors else _raw_request
    return Exchange(
        requests=tuple(encode(workload, path, image) for image in images),
        answers=tuple(np.ascontiguousarray(answer, workload.dtype).tobytes() for answer in answers),
        dtype=workload.dtype,
    )


def check_distinct(found: Exchange) -> None:
    """Raises ValueError where two pictures have the same answer: a mix-up would not be seen."""
    for one in range(len(found.answers)):
        for other in range(one):
            if found.alike(one, found.answers[other]):
                raise ValueError(f"the model answers pictures {other} and {one} alike: take another artefact")


def _raw_request(workload: Workload, path: str, image: NDArray[np.uint8]) -> bytes:
    return _post(path, "", image.tobytes())


def _tensor_request(workload: Workload, path: str, image: NDArray[np.uint8]) -> bytes:
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "images",
                    "shape": [1, *image.shape],
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": image.nbytes},
                }
            ],
            "outputs": [{"name": workload.output, "parameters": {"binary_data": True}}],
        }
    ).encode()
    return _post(path, f"Inference-Header-Content-Length: {len(header)}\r\n", header + image.tobytes())


def _post(path: str, headers: str, body: bytes) -> bytes:
    lines = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    )
    return lines.encode() + body
