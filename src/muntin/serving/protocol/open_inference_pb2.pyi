"""What `open_inference_pb2` offers, for type checkers: of protobuf's own interface, the part that muntin uses."""

# ruff: noqa: N802 - the names are protobuf's

from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence
from typing import Any, Protocol, Self, TypeVar

class Field(Protocol):
    name: str

class DecodeError(Exception): ...

class Message:
    def __init__(self, **fields: object) -> None: ...
    @classmethod
    def FromString(cls, data: bytes) -> Self: ...
    def SerializeToString(self) -> bytes: ...
    def ByteSize(self) -> int: ...
    def HasField(self, name: str) -> bool: ...
    def ListFields(self) -> list[tuple[Field, object]]: ...
    def WhichOneof(self, name: str) -> str | None: ...

M = TypeVar("M", bound=Message)
Item_co = TypeVar("Item_co", covariant=True)

class Messages(Protocol[Item_co]):
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Item_co]: ...
    def __getitem__(self, index: int) -> Item_co: ...
    def add(self, **fields: object) -> Item_co: ...

DESCRIPTOR: Any
HEALTH_DESCRIPTOR: Any

def from_document(document: Mapping[str, Any], message: type[M]) -> M: ...

class ServerLiveRequest(Message): ...

class ServerLiveResponse(Message):
    live: bool

class ServerReadyRequest(Message): ...

class ServerReadyResponse(Message):
    ready: bool

class ModelReadyRequest(Message):
    name: str
    version: str

class ModelReadyResponse(Message):
    ready: bool

class ServerMetadataRequest(Message): ...

class ServerMetadataResponse(Message):
    name: str
    version: str
    extensions: MutableSequence[str]

class ModelMetadataRequest(Message):
    name: str
    version: str

class ModelMetadataResponse(Message):
    class TensorMetadata(Message):
        name: str
        datatype: str
        shape: MutableSequence[int]

    name: str
    versions: MutableSequence[str]
    platform: str
    inputs: Messages[ModelMetadataResponse.TensorMetadata]
    outputs: Messages[ModelMetadataResponse.TensorMetadata]

class InferParameter(Message):
    bool_param: bool
    int64_param: int
    string_param: str
    double_param: float
    uint64_param: int

class InferTensorContents(Message):
    bool_contents: MutableSequence[bool]
    int_contents: MutableSequence[int]
    int64_contents: MutableSequence[int]
    uint_contents: MutableSequence[int]
    uint64_contents: MutableSequence[int]
    fp32_contents: MutableSequence[float]
    fp64_contents: MutableSequence[float]
    bytes_contents: MutableSequence[bytes]

class ModelInferRequest(Message):
    class InferInputTensor(Message):
        name: str
        datatype: str
        shape: MutableSequence[int]
        parameters: MutableMapping[str, InferParameter]
        contents: InferTensorContents

    class InferRequestedOutputTensor(Message):
        name: str
        parameters: MutableMapping[str, InferParameter]

    model_name: str
    model_version: str
    id: str
    parameters: MutableMapping[str, InferParameter]
    inputs: Messages[ModelInferRequest.InferInputTensor]
    outputs: Messages[ModelInferRequest.InferRequestedOutputTensor]
    raw_input_contents: MutableSequence[bytes]

class ModelInferResponse(Message):
    class InferOutputTensor(Message):
        name: str
        datatype: str
        shape: MutableSequence[int]
        parameters: MutableMapping[str, InferParameter]
        contents: InferTensorContents

    model_name: str
    model_version: str
    id: str
    parameters: MutableMapping[str, InferParameter]
    outputs: Messages[ModelInferResponse.InferOutputTensor]
    raw_output_contents: MutableSequence[bytes]

class ModelStreamInferResponse(Message):
    error_message: str
    infer_response: ModelInferResponse

class ModelConfigRequest(Message):
    name: str
    version: str

class ModelConfigResponse(Message):
    config: ModelConfig

class ModelInput(Message):
    name: str
    data_type: int
    format: int
    dims: MutableSequence[int]
    is_shape_tensor: bool
    allow_ragged_batch: bool
    optional: bool

class ModelOutput(Message):
    name: str
    data_type: int
    dims: MutableSequence[int]
    label_filename: str
    is_shape_tensor: bool

class ModelVersionPolicy(Message):
    class Latest(Message):
        num_versions: int

    class All(Message): ...

    class Specific(Message):
        versions: MutableSequence[int]

    latest: ModelVersionPolicy.Latest
    all: ModelVersionPolicy.All
    specific: ModelVersionPolicy.Specific

class ModelDynamicBatching(Message):
    preferred_batch_size: MutableSequence[int]
    max_queue_delay_microseconds: int
    preserve_ordering: bool
    priority_levels: int
    default_priority_level: int

class ModelTransactionPolicy(Message):
    decoupled: bool

class ModelConfig(Message):
    name: str
    platform: str
    version_policy: ModelVersionPolicy
    max_batch_size: int
    input: Messages[ModelInput]
    output: Messages[ModelOutput]
    dynamic_batching: ModelDynamicBatching
    backend: str
    model_transaction_policy: ModelTransactionPolicy

class ModelStatisticsRequest(Message):
    name: str
    version: str

class StatisticDuration(Message):
    count: int
    ns: int

class InferStatistics(Message):
    success: StatisticDuration
    fail: StatisticDuration
    queue: StatisticDuration
    compute_input: StatisticDuration
    compute_infer: StatisticDuration
    compute_output: StatisticDuration
    cache_hit: StatisticDuration
    cache_miss: StatisticDuration

class InferBatchStatistics(Message):
    batch_size: int
    compute_input: StatisticDuration
    compute_infer: StatisticDuration
    compute_output: StatisticDuration

class ModelStatistics(Message):
    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferStatistics
    batch_stats: Messages[InferBatchStatistics]

class ModelStatisticsResponse(Message):
    model_stats: Messages[ModelStatistics]

class ModelRepositoryParameter(Message):
    bool_param: bool
    int64_param: int
    string_param: str
    bytes_param: bytes

class RepositoryIndexRequest(Message):
    repository_name: str
    ready: bool

class RepositoryIndexResponse(Message):
    class ModelIndex(Message):
        name: str
        version: str
        state: str
        reason: str

    models: Messages[RepositoryIndexResponse.ModelIndex]

class RepositoryModelLoadRequest(Message):
    repository_name: str
    model_name: str
    parameters: MutableMapping[str, ModelRepositoryParameter]

class RepositoryModelLoadResponse(Message): ...

class RepositoryModelUnloadRequest(Message):
    repository_name: str
    model_name: str
    parameters: MutableMapping[str, ModelRepositoryParameter]

class RepositoryModelUnloadResponse(Message): ...

class HealthCheckRequest(Message):
    service: str

class HealthCheckResponse(Message):
    ServingStatus: Any
    status: int
