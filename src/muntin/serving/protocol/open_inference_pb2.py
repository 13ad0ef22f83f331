"""The messages of `open_inference.proto` and `health.proto`, made from these files compiled, in a descriptor pool of their own.

What protoc generates would put them into the process's default pool, which takes each name once. Other clients of the protocol, such as
tritonclient, put theirs there under the same names (`inference.ModelInferRequest`): a process could not import both. Messages of different
pools know nothing of each other; they are exchanged as bytes. Nor does generated code tie the version of protoc to that of protobuf: from
5.29 on, any works. (grpcio-health-checking is not used for the same reasons: it needs protobuf 7.35, which tritonclient does not allow.)

After a change of a `.proto`, run this in its folder, and make the change in the `.pyi`:

    python -m grpc_tools.protoc --proto_path=. --descriptor_set_out=open_inference.binpb open_inference.proto health.proto
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError as DecodeError
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

M = TypeVar("M", bound=Message)


def _descriptors() -> list[Any]:
    """The descriptors of the files, in a new pool, which lives as long as they do."""
    pool = DescriptorPool()
    files = FileDescriptorSet.FromString(Path(__file__).with_name("open_inference.binpb").read_bytes()).file
    for file in files:
        pool.AddSerializedFile(file.SerializeToString())
    return [pool.FindFileByName(file.name) for file in files]


def from_document(document: Mapping[str, Any], message: type[M]) -> M:
    """Return the message with the contents of a JSON document, whose keys are the message's fields. Raises ParseError for any other key."""
    return ParseDict(document, message())


DESCRIPTOR, HEALTH_DESCRIPTOR = _descriptors()
for _file in (DESCRIPTOR, HEALTH_DESCRIPTOR):
    globals().update({name: GetMessageClass(descriptor) for name, descriptor in _file.message_types_by_name.items()})
