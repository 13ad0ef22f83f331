"""An artefact as a Ray Serve application: `serve run muntin.serving.ray:app artifact=/models/roofs replicas=2`.

    client -> Serve's proxy -> Ingress: limits of the body, retries -> Model, one of several: routes, batcher, engine

A replica of `Model` holds the parts of `muntin serve` except the listener, so that its answers are the same: batches, the objective and
repairs of the engine included. Serve ends the requests of a replica that dies with an error. `Ingress` sends them to another replica:
every route that it passes on can be repeated, because it changes nothing. `app` checks the version on the machine that deploys it, before
any replica is replaced.
"""

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any, Self

import ray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from muntin.artifact.store import such_as
from muntin.errors import ArtifactError
from muntin.serving.assembly import assemble, make_loader, make_slot, model_name
from muntin.serving.config import Bounds, ServeConfig, read_tokens
from muntin.serving.http.app import refusal_of
from muntin.serving.http.bodies import Body, ClientLeftError, Message, Scope
from muntin.serving.http.exchange import LEFT
from muntin.serving.memory_budget import MemoryBudget
from muntin.serving.protocol.json_codec import encode_json
from muntin.serving.protocol.messages import ProtocolError, RefusedRequestError
from muntin.serving.security.bearer_tokens import Tokens
from muntin.serving.security.same_origin import check_origin
from muntin.serving.versions.repository import Repository
from muntin.serving.worker.opening import Opened

ATTEMPTS = 3
"""Replicas that a request is sent to while they die, before it fails: it may be what kills them."""
READY_S = 5.0
"""Seconds in which a replica has to answer `/v2/health/ready`."""
ONGOING = 128
"""Requests that a replica holds at most; further ones wait in `Ingress`. The batcher's objective counts from here."""
INGRESS_ONGOING = 512
"""Requests that an ingress holds at most."""
END_S = 5.0
"""Seconds for the end of a replica's parts. Serve has waited for its requests before."""
SHARE = 0.25
"""Share of the requests that an objective leaves time for, at which replicas are added. On a busy machine each takes longer than timed."""
TIMED = 5
"""Calls of the model that are timed for autoscaling, of each size."""
POLL_S = 0.5
"""Interval at which a replica that ends checks whether its requests are answered, seconds."""
_SHARED = ("method", "path", "query_string", "headers", "client")
"""Fields of an ASGI scope that a replica needs."""
_READY = "/v2/health/ready"
_OF_ONE_REPLICA = ("/metrics", "/v2/models/stats")

PlainAnswer = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body of an answer."""


class RayOptions(BaseModel):
    """Arguments of `app`, on the command line of `serve run` or in a configuration of Serve. Paths are the same on all machines."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    artifact: Annotated[Path, Field(description="folder of an artefact, or of numbered ones")]
    version: Annotated[str | None, Field(description="number of the version; None: the newest when it is deployed")] = None
    name: Annotated[str | None, Field(description="of the model in URLs; None: the folder's")] = None
    replicas: Annotated[int, Field(ge=1, description="processes with an engine; the fewest, if max_replicas is larger")] = 1
    max_replicas: Annotated[int | None, Field(ge=1, description="autoscaling up to this number; None: no autoscaling")] = None
    target_requests: Annotated[
        float | None, Field(gt=0, le=ONGOING, description="in flight in each replica, which autoscaling aims at; None: see `scaling`")
    ] = None
    ingresses: Annotated[int, Field(ge=1, description="processes that read requests and repeat them; 2: one serves while one starts")] = 2
    threads: Annotated[int, Field(ge=1, description="of a replica's engine, and the CPUs that Ray reserves for it")] = 1
    engine: str = "openvino"
    precision: str = "recorded"
    objective_ms: Annotated[float | None, Field(gt=0, description="as of `muntin serve`, from a replica's receipt on")] = None
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 8
    sizes: tuple[tuple[int, int], ...] = ()
    dims: tuple[dict[str, int], ...] = ()
    token_file: Annotated[Path | None, Field(description="bearer tokens, one a line, one of which a request must carry")] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below replicas={self.replicas}: give at least as many")
        if self.target_requests is not None and self.max_replicas is None:
            raise ValueError("target_requests is for autoscaling: give max_replicas, too")
        return self

    def absolute(self) -> Self:
        """Return the same options with absolute paths: replicas have another working directory."""
        token_file = None if self.token_file is None else self.token_file.absolute()
        return self.model_copy(update={"artifact": self.artifact.absolute(), "token_file": token_file})

    def server(self) -> ServeConfig:
        """Return the settings of a replica. Raises ValueError for one out of range, DataError for a token file that cannot be read."""
        return ServeConfig(
            name=self.name or model_name(self.artifact), threads=self.threads, engine=self.engine, precision=self.precision,
            objective_ms=self.objective_ms, max_batch=self.max_batch, queue_rows=max(512, self.max_batch), sizes=self.sizes, dims=self.dims,
            tokens=() if self.token_file is None else read_tokens(self.token_file),
            page=False,  # a replica would show its own load as that of all
        )  # fmt: skip

    def scaling(self, opened: Opened) -> dict[str, Any]:
        """Return Serve's options for the number of replicas.

        Autoscaling aims at `target_requests` in flight in each replica; by default at one batch, and with an objective at `SHARE` of those
        that it leaves time for. A replica refuses requests that would be late, so that there are never many in flight. `opened`: the model,
        which is timed for the sizes that it is compiled for, if there are any.
        """
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        target = self.target_requests or min(self.max_batch, ONGOING)
        if self.target_requests is None and self.objective_ms is not None and opened.calls:
            target = min(ONGOING / 2, SHARE * self.objective_ms / 1e3 / _latency(opened))
        return {"autoscaling_config": {"min_replicas": self.replicas, "max_replicas": self.max_replicas, "target_ongoing_requests": target}}


class Model:
    """A replica: one version of the model behind the routes of `muntin serve`. Serve calls its methods on one event loop."""

    def __init__(self, options: RayOptions, version: str) -> None:
        config, repository = options.server(), Repository(options.artifact)
        slot = make_slot(options.artifact, config, notify=_log)
        try:
            slot.load(repository.find(version), version)
        except BaseException:
            slot.close()
            raise
        self._ending = AsyncExitStack()
        self._ending.push_async_callback(asyncio.to_thread, slot.close)
        self._parts = assemble(slot, repository, config, ending=self._ending, left=lambda: END_S, notify=_log, local=False)

    async def answer(self, scope: Scope, body: bytes) -> PlainAnswer:
        """Return the answer of the routes of `muntin serve` to a request."""
        request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        status, headers, chunks = 0, [], []

        async def receive() -> Message:
            if not request:
                await asyncio.get_running_loop().create_future()  # Serve cancels this call when the client leaves
            return request.pop()

        async def send(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message["headers"])
            else:
                chunks.append(message["body"])

        await self._parts.app({"type": "http", **scope}, receive, send)
        return status, headers, b"".join(chunks)

    def check_health(self) -> None:
        """Raise while no request would be admitted: after some checks Serve replaces the replica."""
        if not self._parts.service.ready:
            raise RuntimeError("the engine died several times in a row, or no version is loaded")

    async def __del__(self) -> None:
        await self._ending.aclose()


class Ingress:
    """Reads requests within the limits of `muntin serve`, and has a replica answer them, another one if it dies."""

    def __init__(self, model: Any, token_file: Path | None = None) -> None:
        self._answer = model.answer
        self._budget = MemoryBudget(Bounds())
        self._tokens = Tokens(() if token_file is None else read_tokens(token_file))

    async def __call__(self, request: Request) -> Response:
        scope = {name: request.scope[name] for name in _SHARED} | {"path": _path(request.scope)}
        body = Body(request.scope, self._budget)
        try:
            status, headers, content = await self._answered(scope, body, request)
        except ClientLeftError:
            return Response(status_code=LEFT)
        except Exception as error:  # noqa: BLE001 - answered, and reported to the loop's handler if unforeseen
            refusal, fields = refusal_of(error, scope)
            content = encode_json({"error": str(refusal)})
            return Response(content, refusal.status, headers=fields, media_type="application/json")
        finally:
            body.release()
        response = Response(content, status)
        response.raw_headers = headers
        return response

    async def _answered(self, scope: Scope, body: Body, request: Request) -> PlainAnswer:
        path = scope["path"]
        if path == "/v2/health/live":
            return 200, [(b"content-type", b"application/json")], encode_json({"live": True})
        if refused := _refused(path):
            raise ProtocolError(refused, status=501)
        if path != _READY:  # before memory is held for a stranger's body
            if self._tokens:
                self._tokens.check(request.headers.get("authorization", "").encode("latin-1"))
            else:
                check_origin(request.scope["headers"], local=False)
        await body.read(request.receive)
        if path != _READY:
            return await self._repeated(scope, bytes(body.data))
        try:
            async with asyncio.timeout(READY_S):
                return await self._repeated(scope, b"")
        except TimeoutError as error:
            raise RefusedRequestError(f"no replica answered within {READY_S:g} s") from error

    async def _repeated(self, scope: Scope, body: bytes) -> PlainAnswer:
        for _ in range(ATTEMPTS):
            try:
                answer: PlainAnswer = await self._answer.remote(scope, body)
                return answer
            except ray.exceptions.RayActorError:
                continue
        raise ProtocolError(f"{ATTEMPTS} replicas ended while they computed this request, perhaps for lack of memory", status=500)


def app(args: RayOptions) -> Any:
    """Build the application, after the version was opened and verified on this machine as a replica does it.

    Raises ArtifactError where there is no version, UnknownVersionError for one that is not there, and what opening it raises.
    """
    args = args.absolute()
    config, repository = args.server(), Repository(args.artifact)
    version = args.version or next(reversed(repository.scan()), None)
    if version is None:
        raise ArtifactError(f"{args.artifact}: neither an artefact nor a directory of numbered ones: name one{such_as(args.artifact)}")
    opened = make_loader(config).open(repository.find(version))
    try:
        scaling = args.scaling(opened)
    finally:
        opened.session.close()
    ending = {"graceful_shutdown_timeout_s": config.drain_seconds, "graceful_shutdown_wait_loop_s": POLL_S}
    model = serve.deployment(Model).options(**scaling, **ending, max_ongoing_requests=ONGOING, ray_actor_options={"num_cpus": args.threads})
    ingress = serve.deployment(Ingress).options(
        **ending, num_replicas=args.ingresses, max_ongoing_requests=INGRESS_ONGOING, ray_actor_options={"num_cpus": 0}
    )
    return ingress.bind(model.bind(args, version), args.token_file)


def _latency(opened: Opened) -> float:
    """Return the seconds of one row of the slowest size that the model is compiled for, the best of some calls."""
    sizes = {call.size: call for call in sorted(opened.calls, key=lambda call: call.order, reverse=True)}
    latencies = []
    for call in sizes.values():  # the smallest batch of each size
        timed = []
        for _ in range(TIMED):
            began = time.perf_counter()
            call.warm_up(opened.session)
            timed.append(time.perf_counter() - began)
        latencies.append(min(timed))
    return max(latencies)


def _path(scope: Scope) -> str:
    """Return the path below the application's route prefix."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) or "/" if root and path.startswith(f"{root}/") else path


def _refused(path: str) -> str | None:
    """Return why a route is refused that answers for one replica, or changes it."""
    if path in _OF_ONE_REPLICA or (path.startswith("/v2/models/") and path.endswith("/stats")):
        return f"{path}: each replica would answer for itself; Ray exports metrics of the application"
    if path.startswith("/v2/repository/models/"):
        return f"{path}: one replica alone would change; deploy the application again with another version"
    return None


def _log(line: str) -> None:
    logging.getLogger("ray.serve").warning(line)
