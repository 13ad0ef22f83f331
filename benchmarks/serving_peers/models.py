"""The two models that are served, their requests, and the expected answers.

The weights are untrained: they change neither time nor bytes. Their norms have statistics as training leaves them, so that answers to
different images differ and a server that mixes them up is noticed.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving_peers.load import Exchange, same

IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and how it is used. `max_rows`: largest batch of every server. `concurrency`: tried in search of the saturation.

    `objective_calls`: the latency objective in calls of the engine with one image, so that a fast and a slow machine can keep it.
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
    def dtype(self) -> str:
        return "uint8" if self.output == "labels" else "float32"

    @property
    def path(self) -> str:
        """Path of inference in the Open Inference Protocol."""
        return f"/v2/models/{self.name}/infer"


SEGMENT = Workload(name="segment", preset="hybrid-s", classes=6, side=512, max_rows=4, objective_calls=5, concurrency=(2, 4, 8))
CLASSIFY = Workload(
    name="classify", preset="hybrid-xs", classes=10, side=64, max_rows=16, objective_calls=16, concurrency=(8, 16, 32, 64)
)  # fmt: skip
WORKLOADS = {"segment": SEGMENT, "classify": CLASSIFY}
TITLES = {"segment": "512 x 512", "classify": "classifier"}


def make_artifact(workload: Workload, path: Path, *, seed: int = 0) -> None:
    """Quantise and export the workload's model, with the seed's weights, unless it is there and neither preset nor export has changed:
    about a minute."""
    import torch

    import muntin
    from muntin.artifact import open_artifact
    from muntin.errors import ArtifactError
    from muntin.layers import MapNorm, TokenNorm
    from resumed import network_of

    origin = json.dumps({"workload": asdict(workload), "seed": seed, **network_of(workload.preset)}, sort_keys=True)
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
    batch = torch.from_numpy(sample_images(workload.side)[:2]).permute(0, 3, 1, 2).float()
    muntin.export(model.eval(), batch, path, calibration=[batch], measured={"origin": origin})


def sample_images(side: int) -> NDArray[np.uint8]:
    """`IMAGES` smooth images, uint8 (B, side, side, 3)."""
    coarse = np.random.default_rng(0).integers(0, 256, (IMAGES, 8, 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)) for image in coarse])


def exchange(
    workload: Workload, images: NDArray[np.uint8], *versions: NDArray[Any], path: str | None = None, **how: Any
) -> Exchange:  # fmt: skip
    """Requests of one image each, and the answers of one or several versions. `path`: raw bytes are sent to it; None: tensors of the Open
    Inference Protocol. `how`: see `Exchange`."""
    answers = [tuple(np.ascontiguousarray(answer, workload.dtype).tobytes() for answer in version) for version in versions]
    requests = tuple(_tensor_request(workload, image) if path is None else _post(path, "", image.tobytes()) for image in images)
    return Exchange(requests=requests, answers=answers[0], others=tuple(answers[1:]), dtype=workload.dtype, **how)


def engine_answers(workload: Workload, artifact: Path, images: NDArray[np.uint8]) -> NDArray[Any]:
    """Answers of the engine, which is called in this process."""
    import muntin

    session = muntin.load(artifact, threads=1, shapes=(), cache=False)  # servers compile for themselves
    call = session.labels if workload.output == "labels" else session
    return np.concatenate([call(image[None]) for image in images])


def check_distinct(found: Exchange) -> None:
    """Raises ValueError where two images, or two versions of a model, have the same answer: a mix-up would not be noticed."""
    for answers in zip(found.answers, *found.others, strict=True) if found.others else [found.answers]:
        if any(same(one, other, found.dtype, spread=found.spread) for one, other in combinations(answers, 2)):
            raise ValueError("two images, or two versions of the model, have the same answer: take other weights")


def _tensor_request(workload: Workload, image: NDArray[np.uint8]) -> bytes:
    tensor = {"name": "images", "shape": [1, *image.shape], "datatype": "UINT8", "parameters": {"binary_data_size": image.nbytes}}
    header = json.dumps({"inputs": [tensor], "outputs": [{"name": workload.output, "parameters": {"binary_data": True}}]}).encode()
    return _post(workload.path, f"Inference-Header-Content-Length: {len(header)}\r\n", header + image.tobytes())


def _post(path: str, headers: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n{headers}Content-Length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body
