"""Requests over HTTP, without a socket: wrong and hostile ones, packed bodies, pages of other sites, tokens, metrics."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.images import encode_png
from muntin.serving.config import Bounds
from muntin.serving.protocol.open_inference_pb2 import ModelInferRequest

INFER = "/v2/models/pixels/infer"
LOAD = "/v2/repository/models/pixels/load"
PIXEL = b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 0, 0]}]}'
LENGTH = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def path(write_pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixels(tmp_path_factory.mktemp("requests") / "pixels")


@pytest.fixture(scope="module")
def pixels(socketless: Any, path: Path) -> Iterator[Any]:
    with socketless(path, page=True) as server:
        yield server


def described(path: str) -> str:
    """The path as /openapi.json has it."""
    path = re.sub(r"/models/(?!stats)[^/]+", "/models/{model}", path.partition("?")[0])
    return re.sub(r"/versions/[^/]+", "/versions/{version}", path)


@pytest.mark.parametrize(
    ("route", "body", "headers", "status", "message"),
    [
        ("/predict", b"no picture", {}, 400, "PNG, JPEG, WebP, TIFF or BMP"),
        ("/predict", b"", {}, 400, "PNG, JPEG, WebP, TIFF or BMP"),
        ("/predict", b"\x89PNG\r\n\x1a\n" + b"x" * 50, {}, 400, "the picture"),
        ("/predict", b"MM\x00*" + b"x" * 50, {}, 400, "the picture is damaged"),
        ("/predict?output=poem", b"x", {}, 400, "mask, overlay, labels, json"),
        ("/predict?path=/etc/passwd", b"x", {}, 400, "path"),
        ("/predict?" + "a=1&" * 20, b"x", {}, 400, "16 fields"),
        ("/predict?output=%FF%FE", b"x", {}, 400, "mask, overlay, labels, json"),
        (INFER, b"", {}, 400, "JSON"),
        (INFER, b"{}", {}, 400, "inputs"),
        (INFER, b"[" * 100_000, {}, 400, ""),
        (INFER, PIXEL.replace(b"1, 1, 1, 3", b"1,99999999,99999999,3"), {}, 413, "elements"),
        (INFER, PIXEL.replace(b"UINT8", b"FP32").replace(b"0, 0, 0", b"NaN,1,1"), {}, 400, "JSON"),
        (INFER, b"{}", {"content-encoding": "br"}, 415, "gzip, deflate"),
        ("/v2/models/other/infer", PIXEL, {}, 404, "this server has pixels"),
        ("/v2/models/other", None, {}, 404, "this server has pixels"),
        ("/v2/nowhere", b"x", {}, 404, "openapi.json"),
        ("/predict/", b"x", {}, 404, "openapi.json"),
        ("/v2/trace/settings", b"x", {}, 404, "openapi.json"),
        (LOAD, b'{"parameters":{"version":"../../etc"}}', {}, 404, "no version"),
        (LOAD, b'{"parameters":{"config":"{}"}}', {}, 501, "no model from a request"),
        (LOAD, b'{"parameters":{"file:1/model.onnx":"AAAA"}}', {}, 501, "no model from a request"),
        ("/v2/repository/models/pixels/unload", b"", {"origin": "null"}, 403, "null"),
        ("/v2/repository/index", b'{"ready": 1}', {}, 400, "ready"),
        ("/v2/repository/index", b"{}", {"content-encoding": "gzip"}, 415, "only requests for inference"),
    ],
)
def test_wrong_requests(pixels: Any, route: str, body: bytes | None, headers: dict[str, str], status: int, message: str) -> None:
    """Each status is in the description of its route."""
    found, fields, answer = pixels.fetch(route, body, headers)
    assert found == status, answer
    assert fields["content-type"].startswith("application/json")
    assert message in json.loads(answer)["error"]
    assert pixels.fetch("/v2/health/ready")[0] == 200
    routes = json.loads(pixels.fetch("/openapi.json")[2])["paths"]
    if "openapi.json" not in message:
        assert str(status) in routes[described(route)]["get" if body is None else "post"]["responses"]


def test_health(pixels: Any) -> None:
    """As KServe's own client reads it."""
    assert pixels.fetch("/v2/")[::2] == pixels.fetch("/v2")[::2]
    found = [json.loads(pixels.fetch(path)[2]) for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/pixels/ready")]
    assert found == [{"live": True}, {"live": True, "ready": True}, {"name": "pixels", "ready": True}]


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "x-gzip", "Deflate", "Identity", ""])
def test_content_codings(pixels: Any, coding: str) -> None:
    body = zlib.compress(PIXEL, wbits=31) if "gzip" in coding.lower() else zlib.compress(PIXEL) if coding == "Deflate" else PIXEL
    assert pixels.fetch(INFER, body, {"Content-Encoding": coding})[0] == 200


def test_bodies_packed_wrongly(socketless: Any, path: Path) -> None:
    with socketless(path, bounds=Bounds(body_bytes=2_000_000)) as server:
        for packed, status, message in (
            (zlib.compress(b"x" * 3_000_000), 413, "2,000,000"),
            (zlib.compress(b"{}")[:-3], 400, "ends too early"),
            (zlib.compress(b"{}") + b"more", 400, "something follows"),
            (b"no zip", 400, "neither gzip nor deflate"),
        ):
            found, _, answer = server.fetch(INFER, packed, {"Content-Encoding": "deflate"})
            assert found == status and message in json.loads(answer)["error"]


def test_large_answer_in_json(pixels: Any) -> None:
    images = np.random.default_rng(8).integers(0, 256, (1, 300, 400, 3)).astype(np.uint8)
    entry = {"name": "images", "datatype": "UINT8", "shape": images.shape, "parameters": {"binary_data_size": images.size}}
    head = json.dumps({"inputs": [entry]}).encode()
    status, headers, body = pixels.fetch(INFER, head + images.tobytes(), {LENGTH: str(len(head))})
    assert status == 200 and headers["content-type"] == "application/json"
    outputs = {output["name"]: output for output in json.loads(body)["outputs"]}
    np.testing.assert_array_equal(np.array(outputs["labels"]["data"]).reshape(300, 400), images[0].argmax(2))
    assert len(outputs["scores"]["data"]) == images.size


def test_image_without_json(pixels: Any) -> None:
    images = np.random.default_rng(3).integers(0, 256, (1, 16, 16, 3)).astype(np.uint8)
    status, headers, body = pixels.fetch(INFER, images.tobytes(), {LENGTH: "0"})
    assert status == 200
    at = int(headers[LENGTH.lower()])
    assert [output["name"] for output in json.loads(body[:at])["outputs"]] == ["labels", "scores"]
    assert body[at : at + 256] == images.argmax(3).astype(np.uint8).tobytes()


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example", "sec-fetch-site": "cross-site"}, {"host": "evil.example"}])
def test_request_of_a_web_page(pixels: Any, headers: dict[str, str]) -> None:
    """A request that a browser sends without asking before."""
    posted = {LOAD: b"", "/v2/repository/models/pixels/unload": b"", "/predict": b"a picture"}
    for path, body in (posted | dict.fromkeys(("/v2/models/pixels", "/metrics", "/page/status"))).items():
        status, _, answer = pixels.fetch(
            path, body, {"Content-Type": "text/plain", **{name.lower(): text for name, text in headers.items()}}
        )
        assert (status, "evil.example" in json.loads(answer)["error"]) == (403, True), path
    assert pixels.fetch("/v2/models/pixels/ready")[0] == 200
    assert pixels.fetch("/v2/health/ready", None, headers)[0] == 200


def test_no_redirect_to_the_requested_host(pixels: Any) -> None:
    for host, due in (("evil.example", 403), ("localhost", 404)):
        status, headers, _ = pixels.fetch("/v2/health/ready/", None, {"host": host})
        assert (status, "location" in headers) == (due, False)


def test_tokens(socketless: Any, path: Path) -> None:
    with socketless(path, tokens=("secret",)) as server:
        assert server.fetch("/v2/health/ready")[0] == 200
        for route, body in (*dict.fromkeys(("/v2", "/metrics", "/v2/models/pixels", "/openapi.json")).items(), (INFER, PIXEL)):
            status, headers, answer = server.fetch(route, body)
            assert (status, headers["www-authenticate"], b"TOKEN" in answer) == (401, "Bearer", True)
            assert server.fetch(route, body, {"Authorization": "bearer secret"})[0] == 200


def test_metrics(socketless: Any, path: Path) -> None:
    images, request = np.zeros((3, 8, 8, 3), np.uint8), ModelInferRequest(model_name="pixels")
    request.inputs.add(name="images", datatype="UINT8", shape=list(images.shape))
    request.raw_input_contents.append(images.tobytes())
    with socketless(path, objective_ms=10_000) as server:
        server.call("ModelInfer", request.SerializeToString())
        server.fetch(INFER, PIXEL)
        server.fetch(INFER, b"{}")
        server.fetch("/predict", encode_png(images[0]))
        server.fetch("/predict?more=1", b"")
        server.slot.unload()
        assert server.fetch("/predict", b"")[0] == 503
        server.slot.load(path, "1")
        lines = server.metrics()
    for line in (
        'muntin_requests_total{face="http",outcome="answered"} 2.0',
        'muntin_requests_total{face="grpc",outcome="answered"} 1.0',
        'muntin_requests_total{face="http",outcome="wrong"} 2.0',
        'muntin_requests_total{face="http",outcome="refused"} 1.0',
        'muntin_rows_total{version="1"} 5.0',
        "muntin_ready 1.0",
        "muntin_request_seconds_count 2.0",
        "muntin_objective_missed_total 0.0",
        "muntin_admitted_total 3.0",
        "muntin_dropped_total 0.0",
        "muntin_cancelled_total 0.0",
        "muntin_rows_one_by_one_total 0.0",
        "muntin_images_in_tiles_total 0.0",
        "muntin_hanging 0.0",
        'muntin_engine_deaths_total{version="1"} 0.0',
        'muntin_refused_total{reason="late"} 0.0',
        'muntin_refused_total{reason="large answers"} 0.0',
        'muntin_refused_total{reason="pictures"} 0.0',
        'muntin_refused_total{reason="no version"} 1.0',
    ):
        assert line in lines, line


def test_metrics_of_a_reloaded_version(socketless: Any, path: Path) -> None:
    """An artefact that is loaded again keeps its name, and the one before stays warm for a while."""
    with socketless(path) as server:
        server.slot.load(path, "1")
        assert [version.name for version in server.slot.open] == ["1", "1"]
        lines = [line.partition(" ")[0] for line in server.metrics() if not line.startswith("#")]
    assert 'muntin_engine_deaths_total{version="1"}' in lines
    assert len(lines) == len(set(lines))
