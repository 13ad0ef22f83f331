"""LitServe around the engine, in an environment of its own: raw bytes in, raw bytes out, without JSON and base64.

One API process and one worker process, since both share one core. `--max-rows` above 1 turns on its dynamic batching.
"""

from __future__ import annotations

import argparse
from typing import Annotated, Any

import litserve
from fastapi import Body, Response

from serving_peers.engine import Engine, parse

Raw = Annotated[bytes, Body(media_type="application/octet-stream")]


class Api(litserve.LitAPI):
    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(max_batch_size=given.max_rows, batch_timeout=given.batch_timeout)
        self.given = given

    def setup(self, device: Any) -> None:
        self.engine = Engine(self.given.artifact, side=self.given.side, threads=self.given.threads, max_rows=self.given.max_rows)

    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return self.engine.image(request)

    def batch(self, inputs: list[Any]) -> Any:
        return inputs

    def predict(self, images: Any) -> Any:
        return self.engine.batch(images) if self.given.max_rows > 1 else self.engine(images[None])[0]

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output):  # type: ignore[no-untyped-def]
        return Response(output.tobytes(), media_type="application/octet-stream")


# LitServe reads annotations as objects, not as text.
Api.decode_request.__annotations__["request"] = Raw
Api.encode_response.__annotations__["return"] = Response

if __name__ == "__main__":
    given = parse()
    server = litserve.LitServer(Api(given), accelerator="cpu", workers_per_device=1, timeout=False)
    quiet = {"generate_client_file": False, "log_level": "warning", "access_log": False}
    server.run(host="127.0.0.1", port=given.port, num_api_servers=1, **quiet)
