"""What `health_pb2` offers, for type checkers."""

from typing import Any

from muntin.serving.open_inference_pb2 import Message

DESCRIPTOR: Any

class HealthCheckRequest(Message):
    service: str

class HealthCheckResponse(Message):
    ServingStatus: Any
    status: int
