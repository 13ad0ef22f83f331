"""What a server says of itself and of its model: metadata, configuration, statistics, the repository's index.

Plain values, and for each the document that the protocol has for it. A document is the JSON body of the HTTP route
(`json_codec.encode_json`) and, key by key, the gRPC message (`open_inference_pb2.from_document`): there is one description of each, and
two ways to write it.

Shapes say -1 for any size. With `max_batch` above 0 the first axis of every tensor is the batch: metadata shows it, configuration leaves
it out, as Triton has it. `perf_analyzer` reads the configuration's `max_batch_size`, `dynamic_batching`, `input`, `output` and
`model_transaction_policy`, and of the statistics every duration, those of a response cache included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

from muntin.serving.protocol.tensors import DATATYPES

VERSION = version("muntin")
"""Read from disk, so once."""
PLATFORM = "muntin"
"""What this server calls its back end."""
EXTENSIONS = (
    "classification",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
"""The extensions of the protocol that this server speaks, by Triton's names."""
CONFIGURATION_TYPES: Mapping[str, str] = MappingProxyType(
    {name: "TYPE_STRING" if name == "BYTES" else f"TYPE_{name}" for name in DATATYPES},
)
"""The protocol's name of a type of elements -> the name that configurations use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """An input or an output. `datatype`: a key of `tensors.DATATYPES`. `shape`: sizes, -1 for any, the batch first where there is one."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    """A model as clients see it. `versions`: those to ask for. `max_batch`: images that one request may bring; 0: no batch axis."""

    name: str
    versions: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """How often something happened, and how many nanoseconds it took in all."""

    count: int = 0
    ns: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchStatistics:
    """The executions of one batch size, in images."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """What one version of the model did since the server started.

    `last_inference_ms`: when the last request came, in milliseconds since 1970, 0 for never. `inference_count`: images that were answered;
    `execution_count`: batches they went through. `success` and `fail` are whole requests; the other durations are parts of those that
    succeeded: waiting, reading the request, computing its batch, putting the answer into form. Together they are `success`.
    """

    name: str
    version: str
    last_inference_ms: int = 0
    inference_count: int = 0
    execution_count: int = 0
    success: Duration = Duration()
    fail: Duration = Duration()
    queue: Duration = Duration()
    compute_input: Duration = Duration()
    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()
    batches: tuple[BatchStatistics, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexEntry:
    """One version in the repository. `state`: "READY", "UNAVAILABLE", "LOADING" or "UNLOADING"; `reason`: for that state, or ""."""

    name: str
    version: str
    state: str
    reason: str = ""


def server_document(name: str, version: str) -> dict[str, Any]:
    """The server's metadata."""
    return {"name": name, "version": version, "extensions": list(EXTENSIONS)}


def metadata_document(model: ModelDescription) -> dict[str, Any]:
    """The model's metadata."""
    return {
        "name": model.name,
        "versions": list(model.versions),
        "platform": PLATFORM,
        "inputs": [_metadata(spec) for spec in model.inputs],
        "outputs": [_metadata(spec) for spec in model.outputs],
    }


def configuration_document(model: ModelDescription) -> dict[str, Any]:
    """The model's configuration, as Triton would have it: the part of it that means something here."""
    document: dict[str, Any] = {
        "name": model.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": model.max_batch,
        "input": [
            _configuration(spec, model)
            | {"format": "FORMAT_NONE", "is_shape_tensor": False, "allow_ragged_batch": False, "optional": False}
            for spec in model.inputs
        ],
        "output": [_configuration(spec, model) | {"label_filename": "", "is_shape_tensor": False} for spec in model.outputs],
        "model_transaction_policy": {"decoupled": False},
    }
    if model.max_batch:
        document["dynamic_batching"] = {"preferred_batch_size": [], "max_queue_delay_microseconds": 0, "preserve_ordering": False}
    return document


def statistics_document(statistics: Iterable[Statistics]) -> dict[str, Any]:
    """The statistics of some versions. What they say of a response cache is nothing: there is none."""
    return {"model_stats": [_statistics(item) for item in statistics]}


def index_document(entries: Iterable[IndexEntry]) -> list[dict[str, str]]:
    """The repository's index. The gRPC message holds this list in its field `models`."""
    return [{"name": item.name, "version": item.version, "state": item.state, "reason": item.reason} for item in entries]


def _metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _configuration(spec: TensorSpec, model: ModelDescription) -> dict[str, Any]:
    dims = spec.shape[1:] if model.max_batch else spec.shape
    return {"name": spec.name, "data_type": CONFIGURATION_TYPES[spec.datatype], "dims": list(dims)}


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}


def _statistics(item: Statistics) -> dict[str, Any]:
    return {
        "name": item.name,
        "version": item.version,
        "last_inference": item.last_inference_ms,
        "inference_count": item.inference_count,
        "execution_count": item.execution_count,
        "inference_stats": {
            "success": _duration(item.success),
            "fail": _duration(item.fail),
            "queue": _duration(item.queue),
            "compute_input": _duration(item.compute_input),
            "compute_infer": _duration(item.compute_infer),
            "compute_output": _duration(item.compute_output),
            "cache_hit": _duration(Duration()),
            "cache_miss": _duration(Duration()),
        },
        "batch_stats": [
            {
                "batch_size": batch.batch_size,
                "compute_input": _duration(batch.compute_input),
                "compute_infer": _duration(batch.compute_infer),
                "compute_output": _duration(batch.compute_output),
            }
            for batch in item.batches
        ],
    }
