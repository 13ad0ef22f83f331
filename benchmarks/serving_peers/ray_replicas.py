"""muntin's application of Ray Serve on a Ray of its own, on loopback, until SIGTERM.

python ray_replicas.py ARTIFACT --port P --name NAME --replicas N --max-rows N --scratch FOLDER
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
from pathlib import Path

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # replicas of Serve listen on all interfaces
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}  # read on import

import ray
from ray import serve

from muntin.serving.ray import RayOptions, app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--replicas", type=int, required=True)
    parser.add_argument("--max-rows", type=int, required=True)
    parser.add_argument("--scratch", required=True)
    given = parser.parse_args()
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # Ray's handlers would end this process without the ends of its parts
    ray.init(
        num_cpus=given.replicas + 1, include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False, logging_level="ERROR",
        _temp_dir=given.scratch,
    )  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    options = RayOptions(artifact=given.artifact, name=given.name, replicas=given.replicas, threads=1, max_batch=given.max_rows)
    serve.run(app(options), name=given.name)
    signal.sigwait(stop)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
