"""The messages: those of the `.proto` files, with the public protocol's names and numbers, beside another client's in one process."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseError
from tritonclient.grpc import model_config_pb2, service_pb2

import muntin.serving.protocol
from muntin.serving.protocol import open_inference_pb2 as messages

FOLDER = Path(muntin.serving.protocol.__path__[0])
TYPES = {value: name.removeprefix("TYPE_").lower() for name, value in vars(FieldDescriptor).items() if name.startswith("TYPE_")}
NAMES = sorted(messages.DESCRIPTOR.message_types_by_name)
PROTOS = {"open_inference.proto": messages.DESCRIPTOR, "health.proto": messages.HEALTH_DESCRIPTOR}


def fields(message: Any) -> dict[str, tuple[int, str, bool]]:
    """Return name -> (number, type, repeated) of the fields of a message and of the messages inside it."""
    types = {}
    for field in message.fields:
        kind = field.message_type or field.enum_type
        types[field.name] = (field.number, kind.full_name if kind else TYPES[field.type], field.is_repeated)
    for nested in message.nested_types:
        types |= {f"{nested.name}.{name}": value for name, value in fields(nested).items()}
    return types


def public(name: str) -> Any:
    for module in (service_pb2, model_config_pb2):
        if name in module.DESCRIPTOR.message_types_by_name:
            return module.DESCRIPTOR.message_types_by_name[name]
    raise AssertionError(f"{name} is not in the public protocol")


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_the_public_protocols(name: str) -> None:
    assert fields(messages.DESCRIPTOR.message_types_by_name[name]).items() <= fields(public(name)).items()


def test_enumerations_are_the_public_protocols() -> None:
    theirs = model_config_pb2.DESCRIPTOR
    for ours, public in (
        (messages.DESCRIPTOR.enum_types_by_name["DataType"], theirs.enum_types_by_name["DataType"]),
        (
            messages.DESCRIPTOR.message_types_by_name["ModelInput"].enum_types_by_name["Format"],
            theirs.message_types_by_name["ModelInput"].enum_types_by_name["Format"],
        ),
    ):
        assert {value.name: value.number for value in ours.values} == {value.name: value.number for value in public.values}


def declared(proto: str) -> dict[str, dict[str, int]]:
    """Return message -> field -> number, read from the lines of a `.proto`."""
    numbers: dict[str, dict[str, int]] = {}
    path: list[str] = []
    for line in (FOLDER / proto).read_text().splitlines():
        text = line.split("//")[0].strip()
        if opened := re.match(r"(message|enum|service|oneof) (\w+) \{", text):
            path.append(opened[2] if opened[1] == "message" else "" if opened[1] == "oneof" else "-")
            if opened[1] == "message":
                numbers[".".join(path)] = {}
        elif (field := re.match(r"(?:repeated )?(?:map<\w+, \w+>|\w+) (\w+) = (\d+);", text)) and "-" not in path:
            numbers[".".join(part for part in path if part)][field[1]] = int(field[2])
        if text.endswith("}"):
            path.pop()
    return numbers


def compiled(message: Any, prefix: str = "") -> dict[str, dict[str, int]]:
    name = f"{prefix}{message.name}"
    numbers = {name: {field.name: field.number for field in message.fields}}
    for nested in message.nested_types:
        if not nested.GetOptions().map_entry:
            numbers |= compiled(nested, f"{name}.")
    return numbers


@pytest.mark.parametrize("proto", PROTOS)
def test_compiled_messages_match_the_proto(proto: str) -> None:
    numbers: dict[str, dict[str, int]] = {}
    for message in PROTOS[proto].message_types_by_name.values():
        numbers |= compiled(message)
    assert numbers == declared(proto)


def test_type_stub_matches_the_protos() -> None:
    stub: dict[str, set[str]] = {}

    def visit(node: ast.ClassDef, prefix: str) -> None:
        name = f"{prefix}{node.name}"
        stub[name] = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)}
        for item in node.body:
            if isinstance(item, ast.ClassDef):
                visit(item, f"{name}.")

    for node in ast.parse((FOLDER / "open_inference_pb2.pyi").read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name not in ("DecodeError", "Field", "Message", "Messages"):
            visit(node, "")
    stub["HealthCheckResponse"].remove("ServingStatus")  # an enumeration
    assert stub == {name: set(numbers) for proto in PROTOS for name, numbers in declared(proto).items()}
    assert set(NAMES) <= set(vars(messages))


def test_health_messages_on_the_wire() -> None:
    assert messages.HealthCheckRequest(service="m").SerializeToString() == b"\x0a\x01m"
    states = messages.HealthCheckResponse.ServingStatus.items()
    assert states == [("UNKNOWN", 0), ("SERVING", 1), ("NOT_SERVING", 2), ("SERVICE_UNKNOWN", 3)]
    assert [messages.HealthCheckResponse(status=state).SerializeToString() for state in (0, 1)] == [b"", b"\x08\x01"]


def test_document_with_unknown_key() -> None:
    with pytest.raises(ParseError):
        messages.from_document({"alive": True}, messages.ServerLiveResponse)
    assert messages.from_document({"live": True}, messages.ServerLiveResponse).live


OURS = "from muntin.serving.protocol.open_inference_pb2 import ModelInferRequest as ours"
THEIRS = "from tritonclient.grpc.service_pb2 import ModelInferRequest as theirs"
BOTH = """
assert ours is not theirs
message = theirs(model_name="m", raw_input_contents=[b"ab"])
message.inputs.add(name="x", datatype="UINT8", shape=[2])
message.parameters["timeout"].int64_param = 3
assert theirs.FromString(ours.FromString(message.SerializeToString()).SerializeToString()) == message
"""


@pytest.mark.parametrize(("imports", "implementation"), [((OURS, THEIRS), "upb"), ((THEIRS, OURS), "python")])
def test_beside_tritonclients_messages(imports: tuple[str, str], implementation: str) -> None:
    code = "\n".join([*imports, BOTH])
    environment = {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": implementation}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
