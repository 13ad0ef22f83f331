"""`/predict`: what pictures give, in every form that they are sent in."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from muntin.artifact import Sides, Sizes
from muntin.serving.config import Bounds
from tensor_models import write_tensors

CURL = {"content-type": "application/x-www-form-urlencoded"}


def image_of(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)


def encoded(image: NDArray[Any], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def decoded(content: bytes) -> NDArray[Any]:
    return np.array(Image.open(io.BytesIO(content)))


@pytest.fixture(scope="module")
def pixels(socketless: Any, write_pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A model whose labels are the brightest channel of each pixel."""
    with socketless(write_pixels(tmp_path_factory.mktemp("predict") / "pixels")) as server:
        yield server


def refusal(server: Any, body: Any, headers: dict[str, str] | None = None, query: str = "") -> tuple[int, str]:
    status, _, content = server.fetch(f"/predict{query}", body, headers)
    return status, json.loads(content)["error"]


def test_outputs(pixels: Any) -> None:
    image = image_of(40, 50)
    status, headers, body = pixels.fetch("/predict", encoded(image))
    assert (status, headers["content-type"], headers["x-model-version"]) == (200, "image/png", "1")
    mask = Image.open(io.BytesIO(body))
    assert mask.mode == "P"
    np.testing.assert_array_equal(np.array(mask), image.argmax(2))
    np.testing.assert_array_equal(decoded(pixels.fetch("/predict?output=labels", encoded(image))[2]), image.argmax(2))
    shares = json.loads(pixels.fetch("/predict?output=json", encoded(image))[2])
    assert [entry["share"] for entry in shares["classes"]] == pytest.approx([float((image.argmax(2) == k).mean()) for k in range(3)])
    assert decoded(pixels.fetch("/predict?output=overlay", encoded(image, "WEBP"))[2]).shape == image.shape


def test_version_and_times(pixels: Any) -> None:
    _, headers, _ = pixels.fetch("/predict?version=1", encoded(image_of(8, 8)))
    times = {name: float(value) for name, value in re.findall(r"(\w+);dur=([\d.]+)", headers["server-timing"])}
    assert set(times) == {"wait", "compute", "total"}
    assert 0 < times["compute"] <= times["total"]
    assert refusal(pixels, encoded(image_of(8, 8)), query="?version=7") == (404, "pixels: no version '7': there is 1")


def test_many_classes(socketless: Any, write_version: Any, signature_of: Any, tmp_path: Path) -> None:
    """16 bits a pixel, because a palette has at most 256 colours."""
    signature, image = signature_of(classes=tuple(f"class {number}" for number in range(300))), encoded(image_of(20, 24))
    with socketless(write_version(tmp_path / "many", 299, signature=signature)) as server:
        for output in ("mask", "labels"):
            assert (decoded(server.fetch(f"/predict?output={output}", image)[2]) == 299).all()
        document = json.loads(server.fetch("/predict?output=json", image)[2])
        assert document["classes"][299] == {"name": "class 299", "share": 1.0}
        assert server.fetch("/predict?output=overlay", image)[0] == 200


def test_large_picture(pixels: Any) -> None:
    image = image_of(1100, 1300)
    assert (decoded(pixels.fetch("/predict", encoded(image, "BMP"))[2]) == image.argmax(2)).mean() > 0.999


def test_sizes_that_the_model_does_not_take(socketless: Any, write_pixels: Any, tmp_path: Path) -> None:
    sizes = Sizes(height=Sides(min=2, max=16, multiple=2), width=Sides(min=8, max=8))
    with socketless(write_pixels(tmp_path / "sized", sizes=sizes)) as server:
        for height, width in ((5, 3), (16, 8), (21, 30)):
            image = image_of(height, width)
            np.testing.assert_array_equal(decoded(server.fetch("/predict?output=labels", encoded(image))[2]), image.argmax(2))


def test_classifier(socketless: Any, write_pixels: Any, tmp_path: Path) -> None:
    image = np.zeros((30, 30, 3), np.uint8)
    image[:, :, 1] = 9
    with socketless(write_pixels(tmp_path / "classes", task="classify")) as server:
        answer = json.loads(server.fetch("/predict", encoded(image, "JPEG"))[2])
    assert answer["classes"][0]["name"] == "field"
    assert sum(entry["probability"] for entry in answer["classes"]) == pytest.approx(1)


@pytest.mark.parametrize(("kind", "side"), [("PNG", 7), ("TIFF", 500), ("BMP", 7)])
def test_picture_in_a_form(pixels: Any, kind: str, side: int) -> None:
    image = image_of(side, side)
    headers = {"content-type": "multipart/form-data; boundary=b"}
    part = b'--b\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n' + encoded(image, kind)
    for body in (part + b"\r\n--b--", [part[:50], part[50:], b"\r\n--b--"]):  # the second one in chunks
        status, _, answer = pixels.fetch("/predict?output=labels", body, headers)
        assert status == 200
        np.testing.assert_array_equal(decoded(answer), image.argmax(2))
    status, error = refusal(pixels, part + b"\r\n--b\r\n", headers)
    assert (status, "several parts" in error) == (400, True)
    status, error = refusal(pixels, b"", headers)
    assert (status, "does not begin with its boundary" in error) == (400, True)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_picture_sent_by_curl(pixels: Any, kind: str) -> None:
    content = encoded(image_of(20, 24), kind)
    status, error = refusal(pixels, content.translate(None, b"\r\n\0"), CURL)  # by `curl -d @FILE`
    assert (status, "--data-binary @FILE" in error, ".npy" in error) == (400, True, False), error
    assert "PNG, JPEG, WebP, TIFF or BMP" in error or kind in ("JPEG", "BMP")  # whose head is whole
    status, _, answer = pixels.fetch("/predict", content, CURL)  # by --data-binary, of the same type
    assert (status, b"--data-binary" in answer) == (200, False)


def test_refused_picture_sent_by_curl(pixels: Any) -> None:
    """A whole file of 16 bits a channel: how it was sent is not the mistake."""
    status, error = refusal(pixels, encoded(np.zeros((7, 9), np.uint16), "TIFF"), CURL)
    assert (status, "more than 8 bits" in error, "--data-binary" in error) == (400, True, False), error


def test_packed_picture(pixels: Any) -> None:
    for headers in ({"Content-Encoding": "gzip"}, {"Content-Encoding": "gzip", "Content-Type": "multipart/form-data; boundary=x"}):
        status, error = refusal(pixels, b"x" * 50_000, headers)
        assert (status, "'gzip': only requests for inference" in error) == (415, True)
    assert pixels.fetch("/predict", encoded(image_of(8, 8)), {"Content-Encoding": "Identity"})[0] == 200


def test_decompression_bomb(socketless: Any, write_pixels: Any, tmp_path: Path) -> None:
    bomb = encoded(np.zeros((3000, 3000, 3), np.uint8))
    assert len(bomb) < 100_000
    with socketless(write_pixels(tmp_path / "pixels"), bounds=Bounds(image_pixels=1_000_000)) as server:
        status, error = refusal(server, bomb)
        assert (status, "limit of 1,000,000: cut it into smaller pictures (--max-pixels)" in error) == (413, True)
        entry = {"name": "images", "datatype": "UINT8", "shape": [1, 1001, 1000, 3], "parameters": {"binary_data_size": 3_003_000}}
        head = json.dumps({"inputs": [entry]}).encode()
        status, _, body = server.fetch(
            "/v2/models/pixels/infer", head + bytes(3_003_000), {"Inference-Header-Content-Length": str(len(head))}
        )
        assert (status, b"1000x1001 pixels" in body) == (413, True)


def test_model_of_named_tensors(socketless: Any, tmp_path: Path) -> None:
    with socketless(write_tensors(tmp_path / "m").path) as server:
        status, error = refusal(server, b"\x89PNG")
        assert (status, "the model takes named tensors" in error) == (400, True)
        status, _, body = server.fetch("/v2/models/m/infer", b"12345678", {"Inference-Header-Content-Length": "0"})
        assert (status, b"raw bytes without JSON" in body) == (400, True)
