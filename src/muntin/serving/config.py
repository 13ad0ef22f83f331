"""Settings of a server. Each field states its unit and range."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from muntin.errors import DataError
from muntin.runtime.options import SessionOptions
from muntin.serving.telemetry.samples import SampleSettings
from muntin.serving.versions.rollout import Rollout

MEGABYTE = 1 << 20
DAY_S = 86_400.0


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Bounds(_Settings):
    """Limits on one request and on all together. Requests beyond them are refused."""

    body_bytes: Annotated[int, Field(ge=1024, description="of one request")] = 64 * MEGABYTE
    json_bytes: Annotated[int, Field(ge=1024, description="of one request's JSON; parsed, 13 to 50 times as much")] = 4 * MEGABYTE
    image_pixels: Annotated[int, Field(ge=1, description="height times width of one picture, decoded")] = 1 << 26
    held_bytes: Annotated[int, Field(ge=1024, description="of all bodies in work, and of large answers being sent")] = 512 * MEGABYTE
    connections: Annotated[int, Field(ge=1, description="open at the same time, and requests in flight; over gRPC: calls")] = 512
    body_seconds: Annotated[float, Field(gt=0, le=DAY_S, description="from the end of the headers to the end of the body")] = 60.0
    idle_seconds: Annotated[float, Field(gt=0, le=DAY_S, description="of a connection without complete headers, or a stream")] = 75.0


def is_token(text: str) -> bool:
    """Return True if the text can be a bearer token in a header."""
    return bool(text) and text.isascii() and not any(c.isspace() for c in text)


def read_tokens(path: Path) -> tuple[str, ...]:
    """Return the bearer tokens of a file, one a line. Raises DataError if it cannot be read, holds none, or one that `is_token` refuses."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except OSError as error:
        raise DataError(f"--token-file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--token-file {path} is no UTF-8 (byte {error.start:,}): write it as plain text, one token a line") from error
    lines = [line.strip() for line in text.splitlines()]
    for number, line in enumerate(lines, 1):
        if line and not is_token(line):
            raise DataError(f"--token-file {path}, line {number}: a bearer token is ASCII without spaces: write one such token a line")
    if not any(lines):
        raise DataError(f"{path} holds no token: write one a line, or leave --token-file out")
    return tuple(filter(None, lines))


class ServeConfig(_Settings):
    """The settings of `muntin serve`."""

    host: Annotated[str, Field(description="address to listen on; by default only this machine reaches it")] = "127.0.0.1"
    http_port: Annotated[int, Field(ge=0, le=65535, description="0: any that is free")] = 8000
    grpc_port: Annotated[int | None, Field(ge=0, le=65535, description="0: any that is free; None: no gRPC")] = 8001
    page: Annotated[bool, Field(description="a page for people at /")] = True
    name: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="of the model; None: its folder's")] = None
    engine: str = "openvino"
    precision: str = "recorded"
    threads: Annotated[int | None, Field(ge=1, description="of the engine; None: the usable physical cores")] = None
    streams: Annotated[int, Field(ge=1, description="batches that compute at the same time, each with its share of the threads")] = 1
    objective_ms: Annotated[float | None, Field(gt=0, description="within which an admitted request is answered; None: no promise")] = None
    max_batch: Annotated[int, Field(ge=1, le=1024, description="rows (images) that are computed in one call")] = 8
    sizes: Annotated[
        tuple[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], ...],
        Field(max_length=32, description="(height, width) of images to compile for, beside the exported size"),
    ] = ()
    dims: Annotated[
        tuple[dict[str, Annotated[int, Field(ge=1)]], ...],
        Field(max_length=32, description="sizes of the free dimensions of named tensors to compile for, without the batch"),
    ] = ()
    queue_rows: Annotated[int, Field(ge=1, description="rows that may wait, as many as a batch has at least")] = 512
    watch: Annotated[bool, Field(description="load versions that come to the directory while it serves")] = False
    watch_seconds: Annotated[float, Field(gt=0, description="between two looks at it")] = 2.0
    rollout: Annotated[Rollout, Field(description="how a new version takes over from the one that serves")] = Rollout()
    bounds: Bounds = Bounds()
    samples: Annotated[SampleSettings | None, Field(description="pictures to keep as files; None: none are kept")] = None
    tokens: Annotated[tuple[str, ...], Field(description="bearer tokens, one of which a request must carry; none: open to all")] = ()
    open_control: Annotated[bool, Field(description="load and unload without tokens beyond this machine, too")] = False
    allowed_hosts: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[a-z0-9._:-]+$")], ...],
        Field(description="names in lower case, without a port, that requests without tokens may call the server by, beside localhost"),
    ] = ()
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    access_log: Annotated[bool, Field(description="a line of JSON for each request on standard output")] = False
    trace: Annotated[bool, Field(description="a span of OpenTelemetry for each request, exported as the environment says")] = False
    drain_seconds: Annotated[float, Field(ge=0, le=DAY_S, description="that requests in flight get after SIGTERM")] = 30.0

    @property
    def session_options(self) -> SessionOptions:
        """How every version is opened. Raises DataError for an engine or a precision that does not exist."""
        return SessionOptions(engine=self.engine, precision=self.precision, threads=self.threads, streams=self.streams, dynamic=True)

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both a certificate and its key: give both --tls-certificate and --tls-key, or neither")
        if self.queue_rows < self.max_batch:
            raise ValueError(
                f"{self.queue_rows} rows may wait, and a request may have {self.max_batch}: let at least as many wait (--queue)"
            )
        if not all(map(is_token, self.tokens)):
            raise ValueError("a bearer token is ASCII without spaces, and not empty")
        return self
