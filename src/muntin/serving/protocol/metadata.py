"""Metadata, configuration and statistics of a model, and the repository's index: values, and the protocol's documents of them.

A document is the JSON body of the HTTP route (`json_codec.encode_json`) and, key by key, the gRPC message
(`open_inference_pb2.from_document`).

In shapes, -1 is any size. With `max_batch` above 0 the first axis of every tensor is the batch: metadata includes it, configuration leaves
it out, as in Triton. `perf_analyzer` needs the configuration's `max_batch_size`, `dynamic_batching`, `input`, `output` and
`model_transaction_policy`, and every duration of the statistics, those of a response cache included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

VERSION = version("muntin")
"""Version of the package, read from disk once."""
PLATFORM = "muntin"
"""Name of the platform and the back end in documents."""
EXTENSIONS = (
    "classification",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
"""Supported extensions of the protocol, by Triton's names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """An input or an output. `datatype`: a key of `tensors.DATATYPES`. `shape`: sizes, -1 for any, the batch first where there is one."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    """A model as clients see it. `versions`: names that requests may use. `max_batch`: maximum images of a request; 0: no batch axis."""

    name: str
    versions: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """Number of events, and their total time in nanoseconds."""

    count: int = 0
    ns: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchStatistics:
    """Executions of one batch size (images)."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Statistics of one version since the server started.

    `last_inference_ms`: arrival of the last request, milliseconds since 1970, 0 for none. `inference_count`: answered images;
    `execution_count`: their batches. `success` and `fail` count whole requests. The other durations are parts of `success`: waiting,
    reading the request, computing its batch, encoding the answer.
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
    """One version in the repository. `state`: READY, UNAVAILABLE, LOADING or UNLOADING. `reason`: why it has that state, or ""."""

    name: str
    version: str
    state: str
    reason: str = ""


def server_document(name: str, version: str) -> dict[str, Any]:
    """Return the server's metadata."""
    return {"name": name, "version": version, "extensions": list(EXTENSIONS)}


def metadata_document(model: ModelDescription) -> dict[str, Any]:
    """Return the model's metadata."""
    return {
        "name": model.name,
        "versions": list(model.versions),
        "platform": PLATFORM,
        "inputs": [_metadata(spec) for spec in model.inputs],
        "outputs": [_metadata(spec) for spec in model.outputs],
    }


def configuration_document(model: ModelDescription) -> dict[str, Any]:
    """Return the model's configuration: the fields of Triton's that apply to this server."""
    input_defaults = {"format": "FORMAT_NONE", "is_shape_tensor": False, "allow_ragged_batch": False, "optional": False}
    output_defaults = {"label_filename": "", "is_shape_tensor": False}
    document: dict[str, Any] = {
        "name": model.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": model.max_batch,
        "input": [_configuration(spec, model) | input_defaults for spec in model.inputs],
        "output": [_configuration(spec, model) | output_defaults for spec in model.outputs],
        "model_transaction_policy": {"decoupled": False},
    }
    if model.max_batch:
        document["dynamic_batching"] = {"preferred_batch_size": [], "max_queue_delay_microseconds": 0, "preserve_ordering": False}
    return document


def statistics_document(statistics: Iterable[Statistics]) -> dict[str, Any]:
    """Return the statistics of some versions. The durations of a response cache are 0: there is none."""
    return {"model_stats": [_statistics(item) for item in statistics]}


def index_document(entries: Iterable[IndexEntry]) -> list[dict[str, str]]:
    """Return the repository's index, which is the field `models` of the gRPC message."""
    return [asdict(entry) for entry in entries]


def _metadata(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _configuration(spec: TensorSpec, model: ModelDescription) -> dict[str, Any]:
    dims = spec.shape[1:] if model.max_batch else spec.shape
    data_type = "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"
    return {"name": spec.name, "data_type": data_type, "dims": list(dims)}


def _statistics(item: Statistics) -> dict[str, Any]:
    values = asdict(item)
    durations = {name: values[name] for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")}
    return {
        "name": item.name,
        "version": item.version,
        "last_inference": item.last_inference_ms,
        "inference_count": item.inference_count,
        "execution_count": item.execution_count,
        "inference_stats": durations | {"cache_hit": asdict(Duration()), "cache_miss": asdict(Duration())},
        "batch_stats": list(values["batches"]),
    }
