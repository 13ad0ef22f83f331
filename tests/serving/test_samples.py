"""A server that keeps samples: tensors over HTTP and gRPC, picture files, and a folder that cannot be written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from muntin.images import encode_png, read_image
from muntin.serving.protocol.open_inference_pb2 import ModelInferRequest
from muntin.serving.telemetry.samples import SampleSettings


def test_samples_of_every_kind_of_request(socketless: Any, write_pixels: Any, tmp_path: Path, wait_until: Any) -> None:
    folder = tmp_path / "kept"
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    request = ModelInferRequest(model_name="pixels", raw_input_contents=[images[:2].tobytes()])
    request.inputs.add(name="images", datatype="UINT8", shape=[2, 16, 16, 3])
    with socketless(write_pixels(tmp_path / "pixels"), samples=SampleSettings(folder=folder, share=1)) as server:

        def ask_over_http() -> None:
            answer = server.fetch("/v2/models/pixels/infer", images[2].tobytes(), {"Inference-Header-Content-Length": "0"})
            assert answer[0] == 200

        server.call("ModelInfer", request.SerializeToString())
        ask_over_http()
        assert server.fetch("/predict", encode_png(images[3]))[0] == 200
        wait_until(lambda: "muntin_samples_kept_total 4.0" in server.metrics())
        kept = [read_image(path).tobytes() for path in folder.glob("*.png")]
        assert sorted(kept) == sorted(image.tobytes() for image in images)

        shutil.rmtree(folder)
        folder.write_text("a file in place of the folder")
        for _ in range(3):
            ask_over_http()
        wait_until(lambda: 'muntin_samples_dropped_total{reason="unwritten"} 3.0' in server.metrics())


def test_no_samples_by_default(socketless: Any, write_pixels: Any, tmp_path: Path) -> None:
    with socketless(write_pixels(tmp_path / "pixels")) as server:
        assert not any("muntin_samples" in line for line in server.metrics())
