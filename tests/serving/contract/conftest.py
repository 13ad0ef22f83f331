"""Clients of servers without sockets, and of a real Triton with the same artefacts.

`make test` installs Triton (`benchmarks/start_triton.py --install`); without it its
tests are skipped.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from muntin.artifact import Sides, Sizes
from muntin.serving.protocol.grpc_codec import SERVICE
from muntin.serving.triton.batching import TritonBatching
from muntin.serving.triton.options import TritonOptions
from muntin.serving.triton.repository import write_repository
from serving_protocols import Connection, OverGrpc, OverHttp
from tensor_models import write_tensors

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
PACKAGE = Path(sys.prefix) / "triton"
IN_TRITON = ("means", "pixels", "named")
"""Models that Triton serves, too."""


@pytest.fixture(scope="session")
def artifacts(
    write_pixels: Any,
    write_version: Any,
    signature_of: Any,
    every_type: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Means of the pixels (a classifier), the pixels (a segmentation), the same of some sizes only, 300 classes of which the last one is
    every pixel's, and named tensors, in a batch and of every type."""
    folder = tmp_path_factory.mktemp("contract")
    sizes = Sizes(height=Sides(min=2, max=16, multiple=2), width=Sides(min=8, max=8))
    many = signature_of(classes=tuple(f"class {number}" for number in range(300)))
    return {
        "means": write_pixels(folder / "means", task="classify"),
        "pixels": write_pixels(folder / "pixels"),
        "sized": write_pixels(folder / "sized", sizes=sizes),
        "many": write_version(folder / "many", 299, signature=many),
        "named": write_tensors(folder / "named").path,
        "types": every_type,
    }


@pytest.fixture(scope="module")
def servers(artifacts: dict[str, Path], socketless: Any) -> Iterator[dict[str, Any]]:
    """A server without sockets for each model."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(socketless(path, name=name)) for name, path in artifacts.items()}


@pytest.fixture(scope="module")
def ours(servers: dict[str, Any], call_error: type[Exception]) -> Callable[[str, str], Any]:
    """`ours(protocol, model)`: a client of a model's server. The classifier's takes what names no model."""

    def client(protocol: str, model: str) -> Any:
        server = servers.get(model, servers["means"])
        return OverGrpc(server.call, call_error) if protocol == "gRPC" else OverHttp(server.fetch, binary=protocol == "binary")

    return client


@pytest.fixture(scope="module")
def triton_server(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A real Triton that is ready: its ports, repository and log."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.syspath_prepend(str(BENCHMARKS))
        launcher = importlib.import_module("start_triton")
        if not launcher.is_installed(PACKAGE):
            pytest.skip(f"no Triton in {PACKAGE}: `make test` installs it (Linux on x86-64, glibc 2.35 or newer)")
        peers = importlib.import_module("serving_peers.servers")
        folder = tmp_path_factory.mktemp("triton")
        repository, log = folder / "models", folder / "log"
        for name in IN_TRITON:
            waits = TritonBatching(delay_us=20_000 if name == "pixels" else 0)  # so that requests are joined in a test
            write_repository(artifacts[name], repository, TritonOptions(name=name, max_batch=4, threads=1), batching=waits)
        http_port, grpc_port = peers.free_port(), peers.free_port()
        launch = launcher.triton_launch(PACKAGE, repository, http_port=http_port, grpc_port=grpc_port, explicit=True)
        launch.command.extend(f"--load-model={name}" for name in IN_TRITON)
        started = peers.Launch(command=launch.command, variables=launch.variables, ready="/v2/health/ready")
        stack.enter_context(peers.running(started, http_port, cores=os.sched_getaffinity(0), log=log))
        yield {"http": http_port, "grpc": grpc_port, "repository": repository, "log": log}


@pytest.fixture(scope="module")
def triton(triton_server: dict[str, Any]) -> Iterator[Callable[[str], Any]]:
    """`triton(protocol)`: a client of the real Triton."""

    def fetch(*request: Any) -> Any:
        with closing(Connection(triton_server["http"])) as connection:
            return connection.fetch(*request)

    with grpc.insecure_channel(f"127.0.0.1:{triton_server['grpc']}") as channel:

        def call(name: str, message: bytes) -> list[bytes]:
            return [channel.unary_unary(f"/{SERVICE}/{name}")(message, timeout=60)]

        def client(protocol: str) -> Any:
            if protocol == "gRPC":
                return OverGrpc(call, grpc.RpcError)
            return OverHttp(fetch, binary=protocol == "binary")

        yield client
