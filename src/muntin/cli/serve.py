"""`muntin serve` and `muntin triton`: an artefact behind muntin's server, or in a repository that a Triton serves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from muntin.cli.console import out, print_json, say, status
from muntin.cli.options import ArtifactArgument, EngineOption, JsonOption, PrecisionOption, ThreadsOption
from muntin.cli.profile import parse_dims, parse_size
from muntin.errors import DataError

if TYPE_CHECKING:
    from muntin.serving.config import ServeConfig
    from muntin.serving.server import Server
    from muntin.serving.telemetry.samples import SampleSettings

_MEGABYTE = 1 << 20
_MAX_LINES = 1000
"""Maximum number of lines that wait to be written to standard error."""
_ArtifactArgument = Annotated[Path, typer.Argument(help="An artefact's folder, or a folder of numbered ones: 1, 2, 3, ...")]
_HostOption = Annotated[str, typer.Option(help="Address to listen on. The default accepts only connections from this machine.")]
_HttpPortOption = Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0: any free port.")]
_GrpcPortOption = Annotated[int, typer.Option(min=0, max=65535, help="gRPC port; 0: any free port.")]
_NoGrpcOption = Annotated[bool, typer.Option("--no-grpc", help="HTTP only.")]
_NoPageOption = Annotated[bool, typer.Option("--no-page", help="No page at /.")]
_NameOption = Annotated[str | None, typer.Option(help="Name of the model; the folder's by default.")]
_ObjectiveMsOption = Annotated[
    float | None,
    typer.Option(help="Time limit of an answer, milliseconds: a request that cannot meet it is refused at once. No limit by default."),
]
_MaxBatchOption = Annotated[int, typer.Option(min=1, max=1024, help="Maximum number of images (rows) in one call.")]
_SizesOption = Annotated[
    str | None,
    typer.Option(
        help="Sizes of images to compile for, rows x columns, as in 480x640,1080x1920; beside the exported size. Others are slower."
    ),
]
_DimsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Sizes of free dimensions of named tensors to compile for, as in tokens=128; beside the exported ones. May be repeated."
    ),
]
_QueueOption = Annotated[int, typer.Option(min=1, help="Maximum number of images (rows) that wait.")]
_StreamsOption = Annotated[int, typer.Option(min=1, help="Batches that compute at the same time; they share the threads.")]
_WatchOption = Annotated[
    bool,
    typer.Option("--watch", help="Load new versions from the folder while serving; a broken version is reported and changes nothing."),
]
_CanaryOption = Annotated[float, typer.Option(min=0, max=1, help="Share of requests that a new version answers before it takes over.")]
_ShadowOption = Annotated[
    float, typer.Option(min=0, max=1, help="Share of requests that a new version also computes, for comparison only.")
]
_TrialOption = Annotated[
    int, typer.Option(min=1, help="Images (rows) that a new version must compute without failure before it takes over, and again after.")
]
_MaxJsonOption = Annotated[int, typer.Option(min=1, max=1024, help="MiB of the JSON part of one request, without its binary tensors.")]
_MaxBodyOption = Annotated[int, typer.Option(min=1, max=4096, help="MiB of one request.")]
_MaxPixelsOption = Annotated[
    int, typer.Option(min=1, max=1 << 30, help="Pixels of one image, height times width, checked before a picture is decoded.")
]
_IdleSecondsOption = Annotated[
    int, typer.Option(min=1, max=86400, help="Seconds after which an idle connection is closed; set it above a proxy's own limit.")
]
_MaxConnectionsOption = Annotated[
    int,
    typer.Option(
        min=1, max=65535,
        help="HTTP requests and gRPC calls at the same time; further ones get 503. HTTP connections beyond this number + 32 wait.",
    ),
]  # fmt: skip
_DrainSecondsOption = Annotated[
    int, typer.Option(min=1, max=86400, help="Seconds that requests in flight get after SIGTERM or Ctrl-C; then they are cut off.")
]
_KeepSamplesOption = Annotated[
    Path | None,
    typer.Option(help="Folder in which a share of the answered pictures is kept, for `muntin drift`; by default none are kept."),
]
_KeepShareOption = Annotated[float, typer.Option(min=0, max=1, help="Share of the pictures that --keep-samples keeps.")]
_KeepMegabytesOption = Annotated[float, typer.Option(min=1, help="MiB of all kept pictures; the oldest are removed.")]
_KeepDaysOption = Annotated[float, typer.Option(min=0.01, max=3650, help="Days after which a kept picture is removed.")]
_TokenFileOption = Annotated[Path | None, typer.Option(help="File of bearer tokens, one a line; a request must carry one of them.")]
_OpenControlOption = Annotated[
    bool, typer.Option("--open-control", help="Allow load and unload without tokens on addresses that other machines reach.")
]
_AllowedHostsOption = Annotated[
    list[str] | None,
    typer.Option(help="Name that requests without tokens may call the server by, beside localhost; repeatable."),
]
_TlsCertificateOption = Annotated[Path | None, typer.Option(help="PEM file; with --tls-key: HTTPS and gRPC over TLS.")]
_TlsKeyOption = Annotated[Path | None, typer.Option(help="PEM file.")]
_AccessLogOption = Annotated[bool, typer.Option("--access-log", help="Write a line of JSON for each request to standard output.")]
_TraceOption = Annotated[
    bool,
    typer.Option("--trace", help="Send an OpenTelemetry span for each inference to OTEL_EXPORTER_OTLP_ENDPOINT (extra `otel`)."),
]
_JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document with the addresses once it listens; lines of --access-log follow it.")
]

_RepositoryArgument = Annotated[Path, typer.Argument(help="Triton's model repository; created where it does not exist.")]
_VersionOption = Annotated[int, typer.Option(min=1, help="Version; a further one may be added to a model of the same inputs and outputs.")]
_BackendOption = Annotated[
    str,
    typer.Option(
        help="Triton's back end: python (the artefact in muntin), or onnxruntime, openvino, tensorrt, which run its ONNX file and "
        "were not run against a real Triton."
    ),
]
_TritonObjectiveOption = Annotated[
    float | None,
    typer.Option(
        help="Time of an answer to batch for, milliseconds; batches are measured here. Not promised: Triton refuses none as late."
    ),
]
_InstancesOption = Annotated[int, typer.Option(min=1, max=1024, help="Copies of the model that compute at the same time.")]
_InstanceThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads of each instance; the serving machine's physical cores, divided, by default.")
]


def serve_command(
    artifact: _ArtifactArgument,
    host: _HostOption = "127.0.0.1",
    http_port: _HttpPortOption = 8000,
    grpc_port: _GrpcPortOption = 8001,
    no_grpc: _NoGrpcOption = False,
    no_page: _NoPageOption = False,
    name: _NameOption = None,
    objective_ms: _ObjectiveMsOption = None,
    max_batch: _MaxBatchOption = 8,
    sizes: _SizesOption = None,
    dims: _DimsOption = None,
    queue: _QueueOption = 512,
    streams: _StreamsOption = 1,
    watch: _WatchOption = False,
    canary: _CanaryOption = 0.0,
    shadow: _ShadowOption = 0.0,
    trial: _TrialOption = 100,
    max_json: _MaxJsonOption = 4,
    max_body: _MaxBodyOption = 64,
    max_pixels: _MaxPixelsOption = 1 << 26,
    idle_seconds: _IdleSecondsOption = 75,
    max_connections: _MaxConnectionsOption = 512,
    drain_seconds: _DrainSecondsOption = 30,
    keep_samples: _KeepSamplesOption = None,
    keep_share: _KeepShareOption = 0.01,
    keep_megabytes: _KeepMegabytesOption = 500.0,
    keep_days: _KeepDaysOption = 7.0,
    token_file: _TokenFileOption = None,
    open_control: _OpenControlOption = False,
    allowed_hosts: _AllowedHostsOption = None,
    tls_certificate: _TlsCertificateOption = None,
    tls_key: _TlsKeyOption = None,
    access_log: _AccessLogOption = False,
    trace: _TraceOption = False,
    engine: EngineOption = "openvino",
    precision: PrecisionOption = "recorded",
    threads: ThreadsOption = None,
    json: _JsonOption = False,
) -> None:
    """Serve an artefact over HTTP and gRPC by the Open Inference Protocol; a model of images also as pictures over HTTP."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before grpc is imported: its C library writes to standard error
    from muntin.serving.config import Bounds, ServeConfig, read_tokens
    from muntin.serving.versions.rollout import Rollout

    with _one_line_errors():
        config = ServeConfig(
            host=host, http_port=http_port, grpc_port=None if no_grpc else grpc_port, page=not no_page, name=name, engine=engine,
            precision=precision, threads=threads, streams=streams, objective_ms=objective_ms, max_batch=max_batch, queue_rows=queue,
            watch=watch,
            sizes=_sizes(sizes),
            dims=tuple(map(parse_dims, dims or ())),
            rollout=Rollout(canary=canary, shadow=shadow, for_requests=trial),
            bounds=Bounds(
                body_bytes=max_body * _MEGABYTE, json_bytes=max_json * _MEGABYTE, held_bytes=max(512, 4 * max_body) * _MEGABYTE,
                connections=max_connections, image_pixels=max_pixels, idle_seconds=idle_seconds,
            ),
            samples=_samples(keep_samples, keep_share, keep_megabytes, keep_days),
            tokens=() if token_file is None else read_tokens(token_file), tls_certificate=tls_certificate, tls_key=tls_key,
            open_control=open_control, allowed_hosts=tuple(name.lower() for name in allowed_hosts or ()),
            access_log=access_log, trace=trace, drain_seconds=drain_seconds,
        )  # fmt: skip
    _run(artifact, config, json)


def triton_command(
    artifact: ArtifactArgument,
    repository: _RepositoryArgument,
    name: _NameOption = None,
    version: _VersionOption = 1,
    backend: _BackendOption = "python",
    objective_ms: _TritonObjectiveOption = None,
    max_batch: _MaxBatchOption = 8,
    instances: _InstancesOption = 1,
    threads: _InstanceThreadsOption = None,
    sizes: _SizesOption = None,
    dims: _DimsOption = None,
    engine: EngineOption = "openvino",
    precision: PrecisionOption = "recorded",
    json: JsonOption = False,
) -> None:
    """Write an artefact into a model repository that a Triton Inference Server serves."""
    from muntin.serving.triton.options import TritonOptions
    from muntin.serving.triton.repository import write_repository

    with _one_line_errors():
        options = TritonOptions(
            name=artifact.resolve().name if name is None else name, version=version, backend=backend,  # type: ignore[arg-type]
            objective_ms=objective_ms, max_batch=max_batch, instances=instances, threads=threads, engine=engine, precision=precision,
            sizes=_sizes(sizes), dims=tuple(map(parse_dims, dims or ())),
        )  # fmt: skip
    with status(f"writing {repository}") as stage:
        written = write_repository(artifact, repository, options, stage=stage)
    batching = written.batching
    if json:
        print_json(
            {
                "model": str(written.model),
                "version": version,
                "backend": backend,
                "batching": None if batching is None else asdict(batching),
            }
        )
        return
    out.print(f"{written.version}: back end {backend}")
    if batching is None:
        out.print(f"note      {written.model / 'config.pbtxt'} is unchanged: batching, instances, threads and engine are the model's")
    elif batching.latency_ms:
        times = ", ".join(f"{rows}: {ms:.2f} ms" for rows, ms in batching.latency_ms.items())
        out.print(f"measured  {times} (rows of a batch: median)")
        rows = "a full batch" if batching.preferred_rows is None else f"a batch of {batching.preferred_rows}"
        out.print(f"batching  requests wait at most {batching.delay_us} µs for {rows}")


def _run(artifact: Path, config: ServeConfig, json: bool) -> None:
    """Serve until the server is stopped, and print its addresses and end."""
    from muntin.serving.open_files import raise_descriptors
    from muntin.serving.server import Server
    from muntin.serving.telemetry.background_log import BackgroundLog

    if lack := raise_descriptors(config):
        say(f"muntin: {lack}")
    with BackgroundLog(lambda line: say(f"muntin: {line}"), _MAX_LINES) as lines, ExitStack() as loading:
        server = Server(artifact, config, notify=lines)
        loading.enter_context(status(f"loading {artifact}: verifying, compiling"))

        def up() -> None:
            loading.close()
            _print_addresses(server, config, json)

        server.run(up=up)
    if lines.lost:
        say(f"muntin: {lines.lost:,} lines were not read in time, and are lost")
    say(f"muntin: stopped; {_describe_end(server.cut_off, config.drain_seconds, hurried=server.hurried)}")


def _samples(folder: Path | None, share: float, megabytes: float, days: float) -> SampleSettings | None:
    from muntin.serving.telemetry.samples import SampleSettings

    return None if folder is None else SampleSettings(folder=folder, share=share, megabytes=megabytes, days=days)


def _sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    return () if text is None else tuple(parse_size(size, "--sizes") for size in text.split(","))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn a value out of its range into a DataError of one line."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = "".join(f"--{str(part).replace('_', '-')}: " for part in first["loc"][:1])
        # Not `from error`, whose text holds all values, including tokens.
        raise DataError(f"{option}{first['msg'].removeprefix('Value error, ')}") from None


def _describe_end(cut_off: int, seconds: float, *, hurried: bool = False) -> str:
    if not cut_off:
        return "every request that was admitted has been answered"
    calls = "1 request or call was" if cut_off == 1 else f"{cut_off} requests or calls were"
    if hurried:
        return f"{calls} still busy and cut off, because of a second signal"
    return f"{calls} still busy after {seconds:g} s and cut off; --drain-seconds gives more time"


def _print_addresses(server: Server, config: ServeConfig, json: bool) -> None:
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
    grpc = "" if document["grpc"] is None else f", gRPC on {document['grpc']}"
    say(f"muntin: {document['model']} on {document['http']}{grpc}; Ctrl-C ends it")
