"""The messages of `grpc.health.v1`, made of the few fields that they have, in a descriptor pool of their own.

That is why it is not grpcio-health-checking's module: as with `open_inference_pb2`, a process may have those beside ours.

https://github.com/grpc/grpc-proto/blob/master/grpc/health/v1/health.proto
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_STATES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


def _file() -> Any:
    """The file's descriptor, in a new pool, which lives as long as it does."""
    file = FileDescriptorProto(name="health.proto", package="grpc.health.v1", syntax="proto3")
    request, response = file.message_type.add(name="HealthCheckRequest"), file.message_type.add(name="HealthCheckResponse")
    one = FieldDescriptorProto.LABEL_OPTIONAL
    request.field.add(name="service", number=1, label=one, type=FieldDescriptorProto.TYPE_STRING)
    states = response.enum_type.add(name="ServingStatus")
    for number, name in enumerate(_STATES):
        states.value.add(name=name, number=number)
    kind = ".grpc.health.v1.HealthCheckResponse.ServingStatus"
    response.field.add(name="status", number=1, label=one, type=FieldDescriptorProto.TYPE_ENUM, type_name=kind)
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindFileByName(file.name)


DESCRIPTOR = _file()
HealthCheckRequest = GetMessageClass(DESCRIPTOR.message_types_by_name["HealthCheckRequest"])
HealthCheckResponse = GetMessageClass(DESCRIPTOR.message_types_by_name["HealthCheckResponse"])
