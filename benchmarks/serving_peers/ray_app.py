"""Ray Serve around the engine: raw bytes in, raw bytes out.

    python ray_app.py ARTIFACT --port P --side N --scratch FOLDER [--threads N] [--max-rows N] [--batch-timeout S]

One replica. `--max-rows` above 1 goes through `serve.batch`. Ray's helpers (its control store, the raylet, the proxy) run where this
process may run, without a dashboard. Its settings are environment variables, see `servers.ray`.
"""

from __future__ import annotations

import argparse
import signal

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from serving_peers.engine import Engine


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
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-rows", type=int, default=1)
    parser.add_argument("--batch-timeout", type=float, default=0.0)
    parser.add_argument("--scratch", required=True)
    given = parser.parse_args()
    ray.init(  # of the CPUs that it schedules by, the proxy and the controller want some too
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=given.scratch,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    serve.run(application(given), route_prefix="/predict")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
