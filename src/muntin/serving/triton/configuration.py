"""The text of `config.pbtxt`: a model's inputs, outputs and batching in Triton's form (its `model_config.proto`).

Inputs and outputs are those that muntin's own server shows (`metadata.configuration_document`). Triton knows no tensor without dimensions
beside the batch: it is declared with one of size 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from muntin.artifact import Manifest, Signature
from muntin.errors import DataError
from muntin.serving.inference.requests import Requests
from muntin.serving.protocol.metadata import ModelDescription, configuration_document
from muntin.serving.triton.batching import TritonBatching
from muntin.serving.triton.options import TritonOptions

ONNX_FILE = "model.onnx"
LABELS = "labels.txt"
"""File of a classifier's names, one a line."""
MAX_PIXELS = 1 << 26
"""Largest number of pixels of one image, as in `muntin serve`."""
UNTESTED = "This back end was not run against a real Triton: its configuration was checked for its form only."


def describe(manifest: Manifest, options: TritonOptions) -> ModelDescription:
    """Return the model as clients of its back end see it: an ONNX file of images gives scores only."""
    inputs, outputs, max_batch = Requests(options.max_batch, MAX_PIXELS).specs(manifest.signature)
    if options.backend != "python" and isinstance(manifest.signature, Signature):
        outputs = tuple(spec for spec in outputs if spec.name == "scores")
    return ModelDescription(name=options.name, versions=(str(options.version),), inputs=inputs, outputs=outputs, max_batch=max_batch)


def has_labels_file(manifest: Manifest) -> bool:
    """Return True if the model's configuration names a file of class names."""
    return manifest.signature.task == "classify"


def configuration_text(manifest: Manifest, options: TritonOptions, batching: TritonBatching) -> str:
    """Return the content of `config.pbtxt`. Raises DataError for tensors that an engine of Triton cannot have."""
    lines = [f"# Written by muntin {version('muntin')} (`muntin triton`)."]
    if options.backend != "python":
        lines.append(f"# {UNTESTED}")
    if options.objective_ms is not None:
        times = ", ".join(f"{rows}: {ms:.2f}" for rows, ms in batching.latency_ms.items())
        lines.append(f"# Batching is for answers within {options.objective_ms:g} ms; measured ms by rows of a batch: {times}")
    lines += contract_lines(manifest, options)
    kind = "KIND_GPU" if options.backend == "tensorrt" else "KIND_CPU"
    lines.append(f"instance_group [ {{ count: {options.instances} kind: {kind} }} ]")
    if describe(manifest, options).max_batch:
        lines.append(_dynamic_batching(batching))
    return "\n".join([*lines, *_ENGINE_LINES[options.backend](options)]) + "\n"


def contract_lines(manifest: Manifest, options: TritonOptions) -> list[str]:
    """Return the lines that all versions of a model share: name, back end, largest batch, inputs and outputs."""
    model = describe(manifest, options)
    backend = "onnxruntime" if options.backend == "tensorrt" else options.backend
    lines = [f"name: {_text(model.name)}", f"backend: {_text(backend)}", f"max_batch_size: {model.max_batch}"]
    if options.backend != "python":
        lines.append(f"default_model_filename: {_text(ONNX_FILE)}")
    document = configuration_document(model)
    for field in ("input", "output"):
        for tensor in document[field]:
            lines.append(
                f"{field} [ {{ name: {_text(tensor['name'])} data_type: {tensor['data_type']} {_dims(tensor, model, options)} }} ]"
            )
    if has_labels_file(manifest):  # of the last output, the scores
        lines[-1] = lines[-1].removesuffix(" } ]") + f" label_filename: {_text(LABELS)} }} ]"
    return lines


def _dims(tensor: dict[str, Any], model: ModelDescription, options: TritonOptions) -> str:
    if tensor["dims"]:
        return f"dims: [ {', '.join(map(str, tensor['dims']))} ]"
    if model.max_batch:
        return "dims: [ 1 ] reshape { shape: [ ] }"
    if options.backend == "python":  # which reshapes it
        return "dims: [ 1 ]"
    raise DataError(f'"{tensor["name"]}" has no dimensions, which --backend {options.backend} cannot have: take the back end python')


def _dynamic_batching(batching: TritonBatching) -> str:
    """Return the queue's settings: neither priorities nor a limit of the time in it. With either, Triton 2.51 lets about one request in a
    thousand wait for half a second although the model is idle."""
    preferred = "" if batching.preferred_rows is None else f"preferred_batch_size: [ {batching.preferred_rows} ] "
    return f"dynamic_batching {{ {preferred}max_queue_delay_microseconds: {batching.delay_us} }}"


def _muntin(options: TritonOptions) -> list[str]:
    values = {"engine": options.engine, "precision": options.precision, "threads": "" if options.threads is None else str(options.threads)}
    values |= {"sizes": json.dumps(options.sizes), "dims": json.dumps(options.dims)}
    return [_parameter(name, value) for name, value in values.items()]


def _onnxruntime(options: TritonOptions) -> list[str]:
    return [] if options.threads is None else [_parameter("intra_op_thread_count", str(options.threads))]


def _openvino(options: TritonOptions) -> list[str]:
    threads = [] if options.threads is None else [_parameter("INFERENCE_NUM_THREADS", str(options.threads))]
    return [*threads, _parameter("NUM_STREAMS", "1")]


def _tensorrt(options: TritonOptions) -> list[str]:
    """ONNX Runtime with TensorRT, which builds its plans on the serving GPU: a plan fits one kind of GPU only."""
    accelerator = 'optimization { execution_accelerators { gpu_execution_accelerator: [ { name: "tensorrt" } ] } }'
    return [accelerator, *_onnxruntime(options)]


_ENGINE_LINES: dict[str, Callable[[TritonOptions], list[str]]] = {
    "python": _muntin,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
}


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}"


def _text(text: str) -> str:
    """Return a string of protobuf's text format: its bytes, those outside printable ASCII as octal numbers."""
    return '"' + "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode()) + '"'
