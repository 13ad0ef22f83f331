"""A model of Triton's Python back end around the engine. The requests that Triton has batched are stacked, run, and split again."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving_peers.engine import Engine


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        given = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        self.output = config["output"][0]["name"]
        self.engine = Engine(given["artifact"], side=int(given["side"]), threads=int(given["threads"]), max_rows=config["max_batch_size"])

    def execute(self, requests: list[Any]) -> list[Any]:
        images = [pb_utils.get_input_tensor_by_name(request, "images").as_numpy() for request in requests]
        answers = self.engine(images[0] if len(images) == 1 else np.concatenate(images))
        ends = np.cumsum([len(part) for part in images])[:-1]
        return [pb_utils.InferenceResponse([pb_utils.Tensor(self.output, part)]) for part in np.split(answers, ends)]
