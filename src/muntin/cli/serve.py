"""`muntin serve`."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muntin.cli.console import print_json, say, status
from muntin.cli.deploy import Engine, Precision, Threads
from muntin.errors import DataError

if TYPE_CHECKING:
    from muntin.serving.config import ServeConfig

_MEGABYTE = 1 << 20
_MAX_LINES = 1000
"""Lines that may wait to be written to standard error."""


def serve_command(
    artifact: Annotated[Path, typer.Argument(help="An artefact's folder, or a folder of numbered ones: 1, 2, 3, ...")],
    host: Annotated[str, typer.Option(help="Address to listen on. Others than this machine reach it only if this says so.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8001,
    no_grpc: Annotated[bool, typer.Option("--no-grpc", help="HTTP only.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the model; the folder's by default.")] = None,
    objective_ms: Annotated[
        float | None,
        typer.Option(help="Answer every admitted request within so many milliseconds; refuse early what cannot be. No promise by default."),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Images that are computed in one call at most.")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="Images that may wait.")] = 512,
    streams: Annotated[int, typer.Option(min=1, help="Batches that compute at the same time, each with its share of the threads.")] = 1,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Load versions that come to the folder while serving; a broken one is told, and changes nothing."),
    ] = False,
    canary: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that a new version answers before it takes over.")] = 0.0,
    shadow: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that a new version computes too, to be compared.")] = 0.0,
    trial: Annotated[int, typer.Option(min=1, help="Images that a new version has to stand before, and again after, it takes over.")] = 100,
    max_json: Annotated[int, typer.Option(min=1, max=1024, help="MiB of one request's JSON; tensors in binary are no part of it.")] = 4,
    max_body: Annotated[int, typer.Option(min=1, max=4096, help="MiB of one request.")] = 64,
    max_pixels: Annotated[
        int, typer.Option(min=1, max=1 << 30, help="Pixels of one image, height times width; of a picture before it is unpacked.")
    ] = 1 << 26,
    idle_seconds: Annotated[
        int, typer.Option(min=1, max=86400, help="Seconds that a connection may do nothing; more than a proxy in front keeps its own.")
    ] = 75,
    max_connections: Annotated[int, typer.Option(min=1, max=65535, help="Connections at the same time.")] = 512,
    drain_seconds: Annotated[
        int, typer.Option(min=1, max=86400, help="Seconds that requests in flight get after SIGTERM or Ctrl-C; then they are cut off.")
    ] = 30,
    token_file: Annotated[Path | None, typer.Option(help="File of bearer tokens, one a line; a request must carry one of them.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file; with --tls-key: HTTPS and gRPC over TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line of JSON for each request, on standard output.")] = False,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace", help="A span of OpenTelemetry for each inference (extra `otel`; OTEL_EXPORTER_OTLP_ENDPOINT says where to)."
        ),
    ] = False,
    engine: Engine = "openvino",
    precision: Precision = "recorded",
    threads: Threads = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document once it listens: where; the lines of --access-log come after it.")
    ] = False,
) -> None:
    """Serve an artefact over HTTP and gRPC: the Open Inference Protocol, and pictures in, pictures out."""
    from pydantic import ValidationError

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before grpc is imported: its C library writes to standard error what is told here
    from muntin.serving.config import Bounds, ServeConfig
    from muntin.serving.open_files import raise_descriptors
    from muntin.serving.server import Server
    from muntin.serving.telemetry.background_log import BackgroundLog
    from muntin.serving.versions.rollout import Rollout

    try:
        config = ServeConfig(
            host=host, http_port=http_port, grpc_port=None if no_grpc else grpc_port, name=name, engine=engine, precision=precision,
            threads=threads, streams=streams, objective_ms=objective_ms, max_batch=max_batch, queue_rows=queue, watch=watch,
            rollout=Rollout(canary=canary, shadow=shadow, for_requests=trial),
            bounds=Bounds(
                body_bytes=max_body * _MEGABYTE, json_bytes=max_json * _MEGABYTE, held_bytes=max(512, 4 * max_body) * _MEGABYTE,
                connections=max_connections, image_pixels=max_pixels, idle_seconds=idle_seconds,
            ),
            tokens=_tokens(token_file), tls_certificate=tls_certificate, tls_key=tls_key, access_log=access_log, trace=trace,
            drain_seconds=drain_seconds,
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"--{str(part).replace('_', '-')}: " for part in first["loc"][:1])
        # Not `from error`, whose text shows what it was given, tokens too.
        raise DataError(f"{where}{first['msg'].removeprefix('Value error, ')}") from None
    if lack := raise_descriptors(config):
        say(f"muntin: {lack}")
    with BackgroundLog(lambda line: say(f"muntin: {line}"), _MAX_LINES) as lines, ExitStack() as loading:
        server = Server(artifact, config, notify=lines)
        loading.enter_context(status(f"loading {artifact}: verifying, compiling"))

        def up() -> None:
            loading.close()
            _tell(server, config, json)

        server.run(up=up)
    if lines.lost:
        say(f"muntin: {lines.lost:,} lines were not read in time, and are lost")
    say(f"muntin: stopped; {_ended(server.cut_off, drain_seconds, hurried=server.hurried)}")


def _ended(cut_off: int, seconds: int, *, hurried: bool = False) -> str:
    if not cut_off:
        return "every request that was admitted has been answered"
    what = "1 connection or call was" if cut_off == 1 else f"{cut_off} connections or calls were"
    if hurried:
        return f"{what} still busy and cut off, since it was told twice to end"
    return f"{what} still busy after {seconds} s and cut off; --drain-seconds gives more time"


def _tokens(path: Path | None) -> tuple[str, ...]:
    from muntin.serving.config import is_token

    if path is None:
        return ()
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a mark first
    except OSError as error:
        raise DataError(f"--token-file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--token-file {path} is no UTF-8 (byte {error.start:,}): write it as plain text, one token a line") from error
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    for number, line in enumerate(text.splitlines(), 1):
        if not is_token(line.strip()) and line.strip():
            raise DataError(f"--token-file {path}, line {number}: a bearer token is ASCII without spaces: write one such token a line")
    if not found:
        raise DataError(f"{path} holds no token: write one a line, or leave --token-file out")
    return found


def _tell(server: Any, config: ServeConfig, json: bool) -> None:
    scheme = "http" if config.tls_certificate is None else "https"
    host = f"[{config.host}]" if ":" in config.host else config.host
    current = server.slot.current
    document = {
        "model": server.slot.name,
        "version": None if current is None else current.name,
        "http": f"{scheme}://{host}:{server.http_port}",
        "grpc": None if config.grpc_port is None else f"{host}:{server.grpc_port}",
    }
    if json:
        print_json(document)
        return
    over = "" if document["grpc"] is None else f", gRPC on {document['grpc']}"
    say(f"muntin: {document['model']} on {document['http']}{over}; Ctrl-C ends it")
