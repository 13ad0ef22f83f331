"""`muntin serve` as a process: it says where it listens, answers, and ends when it is told to."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from muntin.artifact import ClassInfo, GoldenTolerance, Signature, write_artifact
from muntin.errors import DataError
from muntin.serving.config import Bounds, ServeConfig, read_tokens
from muntin.serving.open_files import raise_descriptors
from muntin.serving.versions.rollout import Rollout
from server_process import server_process


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Segments by the brighter channel of two, with a few convolutions that take a while on a large image."""
    weights = np.zeros((2, 2, 1, 1), np.float32)
    weights[0, 0] = weights[1, 1] = 1
    idle = np.zeros((2, 2, 7, 7), np.float32)
    idle[0, 0, 3, 3] = idle[1, 1, 3, 3] = 1
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["x0"], name="to_nchw", perm=[0, 3, 1, 2]),
        *(helper.make_node("Conv", [f"x{n}", "idle"], [f"x{n + 1}"], name=f"body{n}", pads=[3] * 4) for n in range(6)),
        helper.make_node("Conv", ["x6", "weights"], ["scores"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "brighter",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 2])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", 2, "H", "W"])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(idle, "idle")],
    )
    images = np.random.default_rng(1).integers(0, 256, (1, 6, 8, 2)).astype(np.uint8)
    path = tmp_path_factory.mktemp("serve") / "brighter"
    write_artifact(
        path,
        model=helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10),
        signature=Signature(task="segment", channels=2, classes=tuple(ClassInfo(name=name, color=(0, 0, 0)) for name in "ab")),
        golden=[(images, images.transpose(0, 3, 1, 2).astype(np.float32))],
        golden_tolerance={"openvino": {name: GoldenTolerance(max_error=0.1, label_agreement=0.9) for name in ("f32", "bf16")}},
        example=(1, 8, 8),
    )
    return path


@contextmanager
def serving(path: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    with server_process(path, "--grpc-port", "0", *options, stderr=subprocess.PIPE) as started:
        yield started


def ask(address: str, images: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    tensor = {"name": "images", "datatype": "UINT8", "shape": images.shape, "parameters": {"binary_data_size": images.nbytes}}
    outputs = [{"name": "labels", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    request = urllib.request.Request(f"{address}/v2/models/brighter/infer", head + images.tobytes(), headers)  # noqa: S310
    with urllib.request.urlopen(request) as answer:  # noqa: S310
        length = int(answer.headers["Inference-Header-Content-Length"])
        body: bytes = answer.read()
        return body[length:]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_and_stops(artifact: Path, stop: signal.Signals) -> None:
    with serving(artifact, "--access-log", "--objective-ms", "60000") as (process, said):
        assert said["model"] == "brighter"
        assert said["version"] == "1"
        assert said["http"].startswith("http://127.0.0.1:")
        small = np.random.default_rng(2).integers(0, 256, (1, 30, 40, 2)).astype(np.uint8)
        assert ask(said["http"], small) == small.argmax(3).astype(np.uint8).tobytes()
        large = np.random.default_rng(3).integers(0, 256, (1, 1500, 1500, 2)).astype(np.uint8)
        found: list[bytes] = []
        thread = threading.Thread(target=lambda: found.append(ask(said["http"], large)))
        thread.start()
        while b"muntin_body_bytes 0.0" in urllib.request.urlopen(f"{said['http']}/metrics").read():  # noqa: S310
            pass
        process.send_signal(stop)
        out, err = process.communicate(timeout=60)
        thread.join()
    assert found == [large.argmax(3).astype(np.uint8).tobytes()]  # what was admitted is answered
    assert process.returncode == 0, err
    assert "stopped" in err
    assert "Traceback" not in err
    logged = [json.loads(line) for line in out.splitlines()]
    assert [entry["status"] for entry in logged if entry["path"].endswith("/infer")] == [200, 200]
    assert logged[0]["version"] == "1"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are listed in Linux's form")
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_serve_stops_while_loading(artifact: Path, stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "muntin", "serve", str(artifact), "--http-port", "0", "--no-grpc", "--threads", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            tasks = Path(f"/proc/{process.pid}/task")
            while not any(children.read_text() for children in tasks.glob("*/children")):  # the process that tries the version first
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(stop)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, ""), err
    assert "stopped" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective-ms", "0"], "--objective-ms"),
        (["--name", "a/b"], "--name"),
        (["--tls-key", "key.pem"], "muntin: TLS needs both a certificate and its key: give both --tls-certificate and --tls-key"),
        (["--queue", "2"], "muntin: 2 rows may wait, and a request may have 8"),
        (["--token-file", "{empty}"], "holds no token"),
        (["--token-file", "{words}"], "words, line 2: a bearer token is ASCII without spaces"),
        (["--engine", "nonsense"], "openvino, onnxruntime"),
        (["--dims", "tokens=8"], "--dims: the model takes images: give --sizes, or leave it out"),
    ],
)
def test_serve_mistakes(call: Any, artifact: Path, tmp_path: Path, options: list[str], message: str) -> None:
    files = {"empty": tmp_path / "empty", "words": tmp_path / "words"}
    files["empty"].write_text("\n")
    files["words"].write_text("secret\ntwo words\n")
    answer = call("serve", artifact, *(option.format(**files) for option in options))
    assert answer.code == 1
    assert message in answer.err
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize(
    ("cut_off", "said"),
    [
        (0, "muntin: stopped; every request that was admitted has been answered\n"),
        (1, "muntin: stopped; 1 request or call was still busy after 7 s and cut off; --drain-seconds gives more time\n"),
        (3, "muntin: stopped; 3 requests or calls were still busy after 7 s and cut off; --drain-seconds gives more time\n"),
    ],
)
def test_serve_reports_cut_off_calls(call: Any, monkeypatch: pytest.MonkeyPatch, cut_off: int, said: str) -> None:
    class Ended:
        def __init__(self, path: Path, config: Any, **_: Any) -> None:
            assert config.drain_seconds == 7
            self.cut_off, self.hurried = cut_off, False

        def run(self, **_: Any) -> None:
            return

    monkeypatch.setattr("muntin.serving.server.Server", Ended)
    answer = call("serve", "artefact", "--drain-seconds", "7")
    assert (answer.code, answer.out, answer.err) == (0, "", said)


def test_serve_options_reach_the_server(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Bounds] = []

    class Ended:
        cut_off, hurried = 0, False

        def __init__(self, path: Path, config: Any, **_: Any) -> None:
            told.append(config.bounds)

        def run(self, **_: Any) -> None:
            return

    monkeypatch.setattr("muntin.serving.server.Server", Ended)
    assert call("serve", "artefact").code == 0
    assert call("serve", "artefact", "--max-pixels", "5000", "--idle-seconds", "620", "--max-body", "7").code == 0
    changed = {"image_pixels": 5000, "idle_seconds": 620.0, "body_bytes": 7 << 20}
    assert told == [Bounds(), Bounds().model_copy(update=changed)]


def test_serve_maps_every_option(call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[ServeConfig] = []

    class Ended:
        cut_off, hurried = 0, False

        def __init__(self, path: Path, config: Any, **_: Any) -> None:
            told.append(config)

        def run(self, **_: Any) -> None:
            return

    monkeypatch.setattr("muntin.serving.server.Server", Ended)
    (tmp_path / "tokens").write_text("secret\n")
    words = (
        "--host ::1 --http-port 11 --grpc-port 12 --name m --objective-ms 13.5 --max-batch 14 --queue 15 --streams 3 --watch --canary 0.25 "
        "--shadow 0.5 --trial 16 --max-json 17 --max-body 18 --max-pixels 19 --idle-seconds 20 --max-connections 21 --drain-seconds 22 "
        f"--token-file {tmp_path / 'tokens'} --tls-certificate c.pem --tls-key k.pem --access-log --trace --engine onnxruntime "
        "--precision f32 --threads 4 --sizes 5x6 --dims tokens=7 --dims tokens=8,width=9"
    ).split()
    assert call("serve", "artefact", *words).code == 0
    assert told == [
        ServeConfig(
            host="::1", http_port=11, grpc_port=12, name="m", objective_ms=13.5, max_batch=14, queue_rows=15, streams=3, watch=True,
            rollout=Rollout(canary=0.25, shadow=0.5, for_requests=16),
            bounds=Bounds(
                json_bytes=17 << 20, body_bytes=18 << 20, held_bytes=512 << 20, image_pixels=19, idle_seconds=20.0, connections=21
            ),
            drain_seconds=22.0, tokens=("secret",), tls_certificate=Path("c.pem"), tls_key=Path("k.pem"), access_log=True, trace=True,
            engine="onnxruntime", precision="f32", threads=4, sizes=((5, 6),), dims=({"tokens": 7}, {"tokens": 8, "width": 9}),
        )
    ]  # fmt: skip
    assert call("serve", "artefact", "--no-grpc", "--no-page").code == 0
    assert told[-1] == ServeConfig(grpc_port=None, page=False)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1.5", "86401"])
def test_serve_drain_seconds_range(call: Any, seconds: str) -> None:
    answer = call("serve", "artefact", "--drain-seconds", seconds)
    assert (answer.code, "--drain-seconds" in answer.err) == (2, True)


@pytest.mark.parametrize("face", ["http", "grpc"])
def test_serve_on_a_used_port(artifact: Path, face: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"http": "0", "grpc": "0"} | {face: str(taken.getsockname()[1])}
        command = [sys.executable, "-m", "muntin", "serve", str(artifact), "--http-port", ports["http"], "--grpc-port", ports["grpc"]]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert (ended.stdout, ended.stderr.count("\n")) == ("", 1), ended.stderr
    assert ended.stderr.startswith(f"muntin: cannot listen on 127.0.0.1:{ports[face]} (Address already in use")
    assert ended.stderr.endswith(f": choose another --{face}-port or --host\n")


def test_serve_an_altered_artefact(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "altered").mkdir()
    for file in artifact.iterdir():
        (tmp_path / "altered" / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "altered" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    ended = subprocess.run([sys.executable, "-m", "muntin", "serve", str(weights.parent)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "weights.safetensors" in ended.stderr


@pytest.mark.parametrize(
    ("hard", "allowed", "soft", "told"),
    [(4096, 4096, 4096, False), (4096, 3178, 3168, False), (500, 500, 500, True), (4096, 100, 256, True), (-1, 1 << 30, -1, False)],
)
def test_serve_raises_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch, hard: int, allowed: int, soft: int, told: bool) -> None:
    """`allowed`: what it allows indeed."""
    resource = pytest.importorskip("resource")
    limits = [256, hard]

    def change(_: int, new: tuple[int, int]) -> None:
        if new[0] > allowed or (hard >= 0 and new[0] > hard):
            raise ValueError("not allowed to raise maximum limit")
        limits[:] = new

    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", change)
    line = raise_descriptors(ServeConfig(bounds=Bounds(connections=512)))
    assert limits == [soft, hard]
    assert ("wants 3,168" in line) == told
    assert bool(line) == told


def test_serve_token_file_encoding(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes("\ufeffone\ntwo\n".encode())
    assert read_tokens(path) == ("one", "two")
    path.write_bytes("one\ntwo\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"tokens is no UTF-8 \(byte 0\)"):
        read_tokens(path)
    with pytest.raises(DataError, match="No such file"):
        read_tokens(tmp_path / "nothing")
