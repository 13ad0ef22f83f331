"""LitServe around the engine: raw bytes in, raw bytes out.

    python litserve_app.py ARTIFACT --port P --side N --threads N --max-rows N [--batch-timeout S]

A request's body reaches `decode_request` as bytes by FastAPI's own rules, and the answer leaves as a Response: no JSON, no base64.
One API process and one worker process, since both share one core. `--max-rows` above 1 turns on its dynamic batching.
"""

from __future__ import annotations

import argparse
from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body, Response

from serving_peers.engine import Engine

Raw = Annotated[bytes, Body(media_type="application/octet-stream")]


class Api(litserve.LitAPI):
    def __init__(self, artifact: str, side: int, threads: int, rows: int, wait_s: float) -> None:
        super().__init__(max_batch_size=rows, batch_timeout=wait_s)
        self.artifact, self.side, self.threads, self.rows = artifact, side, threads, rows

    def setup(self, device: Any) -> None:
        self.engine = Engine(self.artifact, side=self.side, threads=self.threads, max_rows=self.rows)

    def decode_request(self, request: Raw):  # type: ignore[no-untyped-def]
        return self.engine.image(request)

    def batch(self, inputs: list[Any]) -> Any:
        return inputs

    def predict(self, images: Any) -> Any:
        return self.engine.batch(images) if self.rows > 1 else self.engine(images[None])[0]

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output: np.ndarray) -> Response:
        return Response(output.tobytes(), media_type="application/octet-stream")


# LitServe reads the annotations as they are at run time, not their text.
Api.decode_request.__annotations__["request"] = Raw
Api.encode_response.__annotations__["return"] = Response


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-rows", type=int, default=1)
    parser.add_argument("--batch-timeout", type=float, default=0.0)
    given = parser.parse_args()
    api = Api(given.artifact, given.side, given.threads, given.max_rows, given.batch_timeout)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=given.port, num_api_servers=1, generate_client_file=False, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
