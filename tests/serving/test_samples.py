"""A real server that keeps samples: tensors over HTTP and gRPC, picture files, and a folder that cannot be written."""

from __future__ import annotations

import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from muntin.images import encode_png, read_image
from muntin.serving.config import ServeConfig
from muntin.serving.server import Server
from muntin.serving.telemetry.samples import SampleSettings

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


def ask(server: Server, client: object, images: np.ndarray) -> None:
    module = triton_http if isinstance(client, triton_http.InferenceServerClient) else triton_grpc
    tensor = module.InferInput("images", images.shape, "UINT8")
    tensor.set_data_from_numpy(images)
    answer = client.infer(server.slot.name, [tensor]).as_numpy("labels")  # type: ignore[attr-defined]
    assert answer.shape == images.shape[:3]


def metrics(server: Server) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics") as answer:
        return str(answer.read().decode())


def test_samples_of_every_kind_of_request(write_pixels: Callable[..., Path], tmp_path: Path, wait_until: Callable[..., None]) -> None:
    folder = tmp_path / "kept"
    settings = SampleSettings(folder=folder, share=1)
    config = ServeConfig(http_port=0, grpc_port=0, threads=1, samples=settings)
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3)).astype(np.uint8)
    with Server(write_pixels(tmp_path / "pixels"), config) as server:
        with triton_http.InferenceServerClient(f"127.0.0.1:{server.http_port}") as http:
            ask(server, http, images[:2])
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as grpc:
            ask(server, grpc, images[2:3])
        address = f"http://127.0.0.1:{server.http_port}/predict"
        request = urllib.request.Request(address, data=encode_png(images[3]), headers={"content-type": "image/png"})
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            assert answer.status == 200
        wait_until(lambda: "muntin_samples_kept_total 4.0" in metrics(server))
        kept = [read_image(path).tobytes() for path in folder.glob("*.png")]
        assert sorted(kept) == sorted(image.tobytes() for image in images)

        shutil.rmtree(folder)
        folder.write_text("a file in place of the folder")
        with triton_http.InferenceServerClient(f"127.0.0.1:{server.http_port}") as http:
            for _ in range(3):
                ask(server, http, images[:1])
        wait_until(lambda: 'muntin_samples_dropped_total{reason="unwritten"} 3.0' in metrics(server))


def test_no_samples_by_default(write_pixels: Callable[..., Path], tmp_path: Path) -> None:
    with Server(write_pixels(tmp_path / "pixels"), ServeConfig(http_port=0, grpc_port=None, threads=1)) as server:
        assert "muntin_samples" not in metrics(server)
