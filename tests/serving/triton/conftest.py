"""A real Triton and muntin's own server with the same artefacts.

`make test` installs the server (`benchmarks/start_triton.py --install`); without it these tests are skipped.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from muntin.serving.config import ServeConfig
from muntin.serving.server import Server
from muntin.serving.triton.batching import TritonBatching
from muntin.serving.triton.options import TritonOptions
from muntin.serving.triton.repository import write_repository
from tensor_models import write_tensors

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
PACKAGE = Path(sys.prefix) / "triton"
ROWS = 4


@dataclass(frozen=True, kw_only=True)
class Ports:
    """HTTP and gRPC port by model, of one kind of server."""

    http: dict[str, int] = field(default_factory=dict)
    grpc: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both servers, and Triton's repository and log."""

    ours: Ports
    triton: Ports
    repository: Path
    log: Path


@pytest.fixture(scope="session")
def real_triton() -> Any:
    """The modules that start a real Triton."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        launcher = importlib.import_module("start_triton")
        if not launcher.is_installed(PACKAGE):
            pytest.skip(f"no Triton in {PACKAGE}: `make test` installs it (Linux on x86-64, glibc 2.35 or newer)")
        yield launcher, importlib.import_module("serving_peers.servers")


@pytest.fixture(scope="session")
def artifacts(write_pixels: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier (means of the pixels), a segmentation (the pixels), and named tensors."""
    folder = tmp_path_factory.mktemp("artifacts")
    write_tensors(folder / "named")
    return {
        "means": write_pixels(folder / "means", task="classify"),
        "pixels": write_pixels(folder / "pixels"),
        "named": folder / "named",
    }


@pytest.fixture(scope="session")
def servers(real_triton: Any, artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Both servers, ready, with each of the artefacts."""
    launcher, peers = real_triton
    folder = tmp_path_factory.mktemp("triton")
    repository, log = folder / "models", folder / "log"
    for name, path in artifacts.items():
        waits = TritonBatching(delay_us=20_000 if name == "pixels" else 0)  # so that requests are joined in a test
        write_repository(path, repository, TritonOptions(name=name, max_batch=ROWS, threads=1), batching=waits)
    http_port, grpc_port = peers.free_port(), peers.free_port()
    launch = launcher.triton_launch(PACKAGE, repository, http_port=http_port, grpc_port=grpc_port, explicit=True)
    launch.command.extend(f"--load-model={name}" for name in artifacts)
    with ExitStack() as stack:
        started = peers.Launch(command=launch.command, variables=launch.variables, ready="/v2/health/ready")
        stack.enter_context(peers.running(started, http_port, cores=os.sched_getaffinity(0), log=log, variables={}))
        ours = Ports()
        for name, path in artifacts.items():
            config = ServeConfig(http_port=0, grpc_port=0, threads=1, name=name, max_batch=ROWS)
            server = stack.enter_context(Server(path, config))
            ours.http[name], ours.grpc[name] = server.http_port, server.grpc_port or 0
        triton = Ports(http=dict.fromkeys(artifacts, http_port), grpc=dict.fromkeys(artifacts, grpc_port))
        yield Pair(ours=ours, triton=triton, repository=repository, log=log)
