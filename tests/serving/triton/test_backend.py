"""What Triton's process runs, with values in place of Triton's objects: groups, errors of single requests, every type."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from muntin.runtime.engines.registry import load
from muntin.serving.triton.backend import TritonModel
from muntin.serving.triton.options import TritonOptions
from muntin.serving.triton.repository import write_repository
from tensor_models import Array, text_inputs, write_tensors


@dataclass
class Capsule:
    """Hands a DLPack capsule to numpy."""

    capsule: Any

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


@dataclass
class Tensor:
    name: str
    data: Array

    @staticmethod
    def from_dlpack(name: str, capsule: Any) -> Tensor:
        return Tensor(name, np.from_dlpack(Capsule(capsule)))

    def __dlpack__(self, **options: Any) -> Any:
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.data.__dlpack_device__()


@dataclass
class TritonError:
    message: str
    code: str

    INVALID_ARG = "INVALID_ARG"
    INTERNAL = "INTERNAL"


@dataclass
class Response:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    @property
    def arrays(self) -> dict[str, Array]:
        assert self.error is None, self.error
        return {tensor.name: tensor.data for tensor in self.output_tensors}


@dataclass
class Request:
    inputs: dict[str, Array]
    outputs: tuple[str, ...]

    def requested_output_names(self) -> list[str]:
        return list(self.outputs)


PB_UTILS = SimpleNamespace(
    Tensor=Tensor,
    TritonError=TritonError,
    InferenceResponse=Response,
    get_input_tensor_by_name=lambda request, name: Tensor(name, request.inputs[name]),
)


def opened(path: Path, folder: Path, **options: Any) -> TritonModel:
    """Return the model as Triton opens it from a written repository."""
    model = write_repository(path, folder / "models", TritonOptions(name="m", threads=1, **options)).model
    config = text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    document = json_format.MessageToDict(config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    arguments = {"model_config": json.dumps(document), "model_repository": str(model), "model_version": "1"}
    return TritonModel(arguments, PB_UTILS)


def images(rows: int, height: int = 8) -> Array:
    return np.random.default_rng(rows).integers(0, 256, (rows, height, 8, 3)).astype(np.uint8)


def test_requests_of_several_groups(write_pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pixels(tmp_path / "pixels")
    model, session = opened(path, tmp_path), load(path, threads=1)
    given = [(images(1), "labels"), (images(2, 6), "labels"), (images(2), "labels"), (images(1), "scores"), (images(1)[:, :0], "labels")]
    calls = []
    compute = type(model._session).infer

    def noting(session: Any, inputs: Any, dims: Any, outputs: Any) -> Any:
        calls.append((len(inputs["images"]), *outputs))
        return compute(session, inputs, dims, outputs)

    monkeypatch.setattr(type(model._session), "infer", noting)
    *responses, refused = model.execute([Request({"images": batch}, (name,)) for batch, name in given])
    assert calls == [(3, "labels"), (2, "labels"), (1, "scores")]
    for (batch, name), response in zip(given, responses, strict=False):
        ((answered, array),) = response.arrays.items()
        assert answered == name
        np.testing.assert_array_equal(array, session.labels(batch) if name == "labels" else session(batch))
    assert refused.error.code == "INVALID_ARG" and "no side of 0" in refused.error.message
    model.close()


def test_failure_of_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path / "named")
    model = opened(tmp_path / "named", tmp_path)
    infer = type(model._session).infer

    def fails(self: Any, inputs: Any, *rest: Any) -> Any:
        if (inputs["ids"] == 49).any():
            raise RuntimeError("no such row")
        return infer(self, inputs, *rest)

    monkeypatch.setattr(type(model._session), "infer", fails)
    good, bad = text_inputs(1, 8), text_inputs(2, 8)
    good["ids"][:], bad["ids"][:] = 1, 49
    first, failed, last = model.execute([Request(inputs, ("embedding",)) for inputs in (good, bad, good)])
    assert (failed.error.code, failed.error.message) == ("INTERNAL", "the model failed: RuntimeError: no such row")
    np.testing.assert_array_equal(first.arrays["embedding"], last.arrays["embedding"])
