"""Written repositories: their configuration as Triton's own message, versions, refusals, nothing half-written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from google.protobuf import text_format
from pydantic import ValidationError
from tritonclient.grpc import model_config_pb2

from muntin.artifact import Sides, Sizes, open_artifact
from muntin.artifact.store import MANIFEST
from muntin.errors import ArtifactError, DataError
from muntin.serving.triton.batching import TritonBatching
from muntin.serving.triton.options import BACKENDS, TritonOptions
from muntin.serving.triton.repository import write_repository
from tensor_models import SIGNATURE, write_tensors


def parsed(model: Path) -> Any:
    """Return `config.pbtxt` as Triton's message."""
    return text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def tensors(specs: Any) -> dict[str, tuple[str, list[int]]]:
    return {spec.name: (model_config_pb2.DataType.Name(spec.data_type), list(spec.dims)) for spec in specs}


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_configuration_of_images(write_pixels: Any, tmp_path: Path) -> None:
    path = write_pixels(tmp_path / "pixels", sizes=Sizes(width=Sides(min=8, max=8)))
    options = TritonOptions(name="m", max_batch=16, instances=2, threads=3, objective_ms=20, sizes=((16, 8),))
    batching = TritonBatching(delay_us=700, preferred_rows=4, latency_ms={1: 2.0})
    model = write_repository(path, tmp_path / "models", options, batching=batching).model
    assert "within 20 ms; measured ms by rows of a batch: 1: 2.00" in (model / "config.pbtxt").read_text()
    config = parsed(model)
    assert (config.name, config.backend, config.max_batch_size) == ("m", "python", 16)
    assert tensors(config.input) == {"images": ("TYPE_UINT8", [-1, 8, 3])}
    assert tensors(config.output) == {"labels": ("TYPE_UINT8", [-1, 8]), "scores": ("TYPE_FP32", [3, -1, 8])}
    assert config.dynamic_batching.max_queue_delay_microseconds == 700
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert {name: value.string_value for name, value in config.parameters.items()} == {
        "engine": "openvino", "precision": "recorded", "threads": "3", "sizes": "[[16, 8]]", "dims": "[]",
    }  # fmt: skip
    assert open_artifact(model / "1" / "artifact").digest == open_artifact(path).digest


def test_configuration_of_a_classifier(write_pixels: Any, tmp_path: Path) -> None:
    model = write_repository(write_pixels(tmp_path / "means", task="classify"), tmp_path / "models", TritonOptions(name="m")).model
    labels, scores = parsed(model).output
    assert (labels.dims, labels.HasField("reshape"), list(labels.reshape.shape)) == ([1], True, [])
    assert scores.label_filename == "labels.txt"
    assert (model / "labels.txt").read_text() == "sea\nfield\nroof\n"


def test_configuration_without_a_batch(tmp_path: Path) -> None:
    signature = SIGNATURE.model_copy(update={"batch": None})
    write_tensors(tmp_path / "alone", signature=signature)
    config = parsed(write_repository(tmp_path / "alone", tmp_path / "models", TritonOptions(name="m")).model)
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert tensors(config.input) == {"ids": ("TYPE_INT64", [-1, -1]), "mask": ("TYPE_BOOL", [-1, -1])}


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "python"])
def test_configuration_of_other_back_ends(write_pixels: Any, tmp_path: Path, backend: Any) -> None:
    options = TritonOptions(name="m", backend=backend, threads=2)
    model = write_repository(write_pixels(tmp_path / "pixels"), tmp_path / "models", options).model
    assert files_of(model) == {"config.pbtxt", "1", "1/model.onnx"}
    assert "not run against a real Triton" in (model / "config.pbtxt").read_text()
    config = parsed(model)
    gpu = backend == "tensorrt"
    kinds = model_config_pb2.ModelInstanceGroup
    assert (config.backend, config.instance_group[0].kind) == ("onnxruntime" if gpu else backend, kinds.KIND_GPU if gpu else kinds.KIND_CPU)
    assert [entry.name for entry in config.optimization.execution_accelerators.gpu_execution_accelerator] == (["tensorrt"] if gpu else [])
    threads = "INFERENCE_NUM_THREADS" if backend == "openvino" else "intra_op_thread_count"
    assert config.parameters[threads].string_value == "2"
    session = onnxruntime.InferenceSession(model / "1" / config.default_model_filename)
    for specs, given in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        dims = {tensor.name: [size if isinstance(size, int) else -1 for size in tensor.shape[1:]] for tensor in given}
        assert {name: shape for name, (_, shape) in tensors(specs).items()} == dims


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ValidationError, match="engine is of the back end python, and this is openvino: leave it out"):
        TritonOptions(name="m", backend="openvino", engine="onnxruntime")
    with pytest.raises(DataError, match='engine="openvino2": give one of'):
        TritonOptions(name="m", engine="openvino2")


def test_further_versions(write_pixels: Any, tmp_path: Path) -> None:
    pixels, models = write_pixels(tmp_path / "pixels"), tmp_path / "models"
    write_repository(pixels, models, TritonOptions(name="m"))
    config = (models / "m" / "config.pbtxt").read_bytes()
    assert write_repository(pixels, models, TritonOptions(name="m", version=2)).version == models / "m" / "2"
    assert files_of(models / "m" / "1") == files_of(models / "m" / "2")
    assert (models / "m" / "config.pbtxt").read_bytes() == config
    before = files_of(models)
    with pytest.raises(DataError, match=r"m/2 exists and is not replaced: give another --version or --name"):
        write_repository(pixels, models, TritonOptions(name="m", version=2))
    with pytest.raises(DataError, match=r"has no line `max_batch_size: 2`"):
        write_repository(pixels, models, TritonOptions(name="m", version=3, max_batch=2))
    write_tensors(tmp_path / "named")
    with pytest.raises(DataError, match="the model has other inputs or outputs; give another --name"):
        write_repository(tmp_path / "named", models, TritonOptions(name="m", version=3))
    assert files_of(models) == before


def test_nothing_is_left_of_a_failed_write(write_pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, models = write_pixels(tmp_path / "pixels"), tmp_path / "models"

    def full(source: Path, target: Path) -> None:
        if target.name == MANIFEST:
            target.touch()
            return
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr("muntin.serving.triton.repository.shutil.copyfile", full)
        with pytest.raises(ArtifactError, match=re.escape(f"{models / 'm'}: cannot be written (No space left on device)")):
            write_repository(pixels, models, TritonOptions(name="m"))
        with pytest.raises(DataError, match="--dims: the model takes images"):
            write_repository(pixels, models, TritonOptions(name="m", dims=({"tokens": 8},)))
    assert files_of(models) == set()
    (pixels / MANIFEST).write_text("{}")
    with pytest.raises(ArtifactError):
        write_repository(pixels, models, TritonOptions(name="m"))
    assert files_of(models) == set()


def test_base_install_suffices() -> None:
    """Neither the server's packages nor torch are imported by what Triton's process imports."""
    absent = ("granian", "uvloop", "starlette", "orjson", "grpc", "prometheus_client", "torch")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); import muntin.serving.triton.backend, muntin.serving.triton.repository"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
