"""Ray Serve on loopback until SIGTERM: the engine around raw bytes; with `--replicas` above 0 muntin's own application.

The first has one replica, and `--max-rows` above 1 goes through `serve.batch`. Ray's helpers (its control store, the raylet, the proxy) run
where this process may run, without a dashboard. Its settings are environment variables, see `servers`.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from serving_peers.engine import Engine, parse


def application(given: argparse.Namespace) -> serve.Application:
    rows, wait_s = given.max_rows, given.batch_timeout

    @serve.deployment(num_replicas=1, max_ongoing_requests=max(16, 2 * rows), ray_actor_options={"num_cpus": 0.5})
    class Model:
        def __init__(self, artifact: str, side: int, threads: int) -> None:
            self.engine = Engine(artifact, side=side, threads=threads, max_rows=rows)

        @serve.batch(max_batch_size=rows, batch_wait_timeout_s=wait_s)
        async def several(self, bodies: list[bytes]) -> list[bytes]:
            return [answer.tobytes() for answer in self.engine.batch([self.engine.image(body) for body in bodies])]

        async def __call__(self, request: Request) -> Response:
            body = await request.body()
            answer = await self.several(body) if rows > 1 else self.engine(self.engine.image(body)[None])[0].tobytes()
            return Response(answer, media_type="application/octet-stream")

    return Model.bind(given.artifact, given.side, given.threads)


def main() -> None:
    given = parse("scratch", "name", "replicas")
    replicas, stop = int(given.replicas), {signal.SIGTERM, signal.SIGINT}
    if replicas:  # Ray's handlers would end this process before the replicas have ended
        signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    ray.init(
        num_cpus=replicas + 1 if replicas else 4,  # of these the proxy and the controller take some, too
        include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False, logging_level="ERROR",
        _node_ip_address="127.0.0.1", _temp_dir=given.scratch,
    )  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    if replicas:
        from muntin.serving.ray import RayOptions, app

        options = RayOptions(artifact=Path(given.artifact), name=given.name, replicas=replicas, threads=1, max_batch=given.max_rows)
        serve.run(app(options), name=given.name)
    else:
        serve.run(application(given), route_prefix="/predict")
    signal.sigwait(stop)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
