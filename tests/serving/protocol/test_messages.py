"""The protocol's values and the rules that both codecs hold requests against."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import grpc
import pytest

import muntin.serving
from muntin.errors import MuntinError, RecipeError
from muntin.serving.protocol.messages import (
    GRPC_CODES,
    InferRequest,
    Limits,
    ProtocolError,
    check_name,
    check_repository_parameters,
    check_request_parameters,
    check_requested,
    check_shape,
    check_tensor_parameters,
    shown,
)

LIMITS = Limits(tensors=3, rank=4, elements=1000, byte_strings=10, name_length=32, parameters=3)


def request(parameters: dict[str, Any]) -> InferRequest:
    return InferRequest(id="", inputs=(), outputs=(), parameters=check_request_parameters(parameters, LIMITS))


def test_protocol_error() -> None:
    error = ProtocolError("too large", status=413)
    assert isinstance(error, MuntinError)
    assert (error.status, error.grpc_code) == (413, "RESOURCE_EXHAUSTED")
    assert ProtocolError("wrong").status == 400


def test_grpc_codes() -> None:
    assert set(GRPC_CODES.values()) <= {code.name for code in grpc.StatusCode}


def test_standard_parameters() -> None:
    nothing = request({})
    assert (nothing.priority, nothing.timeout_us, nothing.binary_default) == (0, None, False)
    everything = request({"priority": 2, "timeout": 1500, "binary_data_output": True})
    assert (everything.priority, everything.timeout_us, everything.binary_default) == (2, 1500, True)
    assert request({"timeout": 0}).timeout_us is None


def test_empty_sequence_parameters() -> None:
    none = {"sequence_id": 0, "sequence_start": False, "sequence_end": False}
    assert request(none).parameters == request({"sequence_id": ""}).parameters == {}


def test_own_parameters() -> None:
    own = {"a": "text", "b": 1.5, "c": True}
    assert request(own).parameters == own


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sequence_id": 7}, '"sequence_id".*no state'),
        ({"sequence_start": True}, "sequence_start"),
        ({"sequence_end": True}, "sequence_end"),
        ({"priority": -1}, '"priority" is -1: give a whole number'),
        ({"priority": True}, '"priority" is true'),
        ({"priority": "1"}, "\"priority\" is '1'"),
        ({"timeout": 1.5}, '"timeout" is 1.5.*microseconds'),
        ({"timeout": -3}, '"timeout" is -3'),
        ({"binary_data_output": 1}, '"binary_data_output" of the request is 1: give true or false'),
        ({"own": None}, "'own' of the request is nothing: give a string"),
        ({"own": [1]}, "'own' of the request is an array"),
        ({"own": {}}, "'own' of the request is an object"),
        ({"far too long" * 3: 1}, "at most 32 characters"),
        (dict.fromkeys("abcd", 1), "4 parameters.*at most 3"),
    ],
)
def test_refused_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ProtocolError, match=message) as caught:
        request(parameters)
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"])
def test_shared_memory(name: str) -> None:
    with pytest.raises(ProtocolError, match=rf'"{name}".*shares no memory.*binary data'):
        check_tensor_parameters({name: 1}, "x", Limits())
    with pytest.raises(ProtocolError, match=name):
        check_requested("x", {name: 1}, binary_default=False, limits=Limits())


def test_binary_of_a_requested_output() -> None:
    assert check_requested("x", {}, binary_default=True, limits=LIMITS).binary
    assert not check_requested("x", {"binary_data": False}, binary_default=True, limits=LIMITS).binary
    assert check_requested("x", {"binary_data": True}, binary_default=False, limits=LIMITS).binary


@pytest.mark.parametrize(("given", "classes"), [(0, None), (1, 1), (10, 10)])
def test_classes_of_a_requested_output(given: int, classes: int | None) -> None:
    assert check_requested("x", {"classification": given}, binary_default=True, limits=LIMITS).classification == classes


@pytest.mark.parametrize("given", [-1, 11, True, "3", 2.0])
def test_invalid_numbers_of_classes(given: Any) -> None:
    with pytest.raises(ProtocolError, match=r"output 'x': classification is .*1 to 10"):
        check_requested("x", {"classification": given}, binary_default=True, limits=LIMITS)


def test_model_in_a_request() -> None:
    assert check_repository_parameters({"unload_dependents": True}, Limits()) == {"unload_dependents": True}
    for name in ("config", "file:1/model.onnx"):
        with pytest.raises(ProtocolError, match="takes no model from a request") as caught:
            check_repository_parameters({name: "e30="}, Limits())
        assert (caught.value.status, caught.value.grpc_code) == (501, "UNIMPLEMENTED")


@pytest.mark.parametrize(
    ("shape", "elements"), [((), 1), ((0,), 0), ((1000,), 1000), ((10, 10, 10), 1000), ((0, 1000), 0), ((1, 1, 1, 1), 1)]
)
def test_valid_shapes(shape: tuple[int, ...], elements: int) -> None:
    assert check_shape(list(shape), "x", LIMITS) == (shape, elements)


@pytest.mark.parametrize(
    ("shape", "status", "message"),
    [
        ((1,) * 5, 400, "5 axes.*at most 4"),
        ((-1,), 400, "has -1 in its shape"),
        ((True,), 400, "has true in its shape"),
        ((1.0,), 400, "has 1.0 in its shape"),
        (("1",), 400, "has '1' in its shape"),
        ((None,), 400, "has nothing in its shape"),
        ((1001,), 413, r"more than 1,000 elements.*\(--max-body\)"),
        ((10, 10, 11), 413, "more than 1,000 elements"),
        ((2**40, 2**40, 2**40), 413, "more than 1,000 elements"),
        ((2**32, 2**32), 413, "more than 1,000 elements"),
        ((0, 2**40, 2**40), 413, "more than 1,000 elements"),
        ((2**62, 0), 413, "more than 1,000 elements"),
    ],
)
def test_invalid_shapes(shape: tuple[Any, ...], status: int, message: str) -> None:
    with pytest.raises(ProtocolError, match=message) as caught:
        check_shape(shape, "x", LIMITS)
    assert caught.value.status == status


@pytest.mark.parametrize("name", ["", "x" * 33, None, 1, ["x"]])
def test_invalid_names(name: Any) -> None:
    with pytest.raises(ProtocolError, match="1 to 32 characters"):
        check_name(name, "one of inputs", LIMITS)


@pytest.mark.parametrize("changed", [{"rank": 0}, {"elements": True}, {"json_bytes": 1.5}, {"rank": 33}, {"elements": 1 << 62}])
def test_invalid_limits(changed: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(changed))):
        Limits(**changed)


@pytest.mark.parametrize("value", ["a\nb\r\x00", "x" * 10**6, [1] * 10**5, {"a": "\n"}, None, True, 2**64, 1e300, b"bytes"])
def test_values_in_errors(value: Any) -> None:
    text = shown(value)
    assert len(text) < 100
    assert text.isprintable()


SOURCES = sorted(Path(muntin.serving.__path__[0]).rglob("*.py"))
CODE = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code", "torch"}
CALLS = {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_no_code_from_data(source: Path) -> None:
    """No module that does, no built-in that does, and no numpy array of pickled objects."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            assert not CODE & {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in CODE
        elif isinstance(node, ast.Name):
            assert node.id not in CALLS
        elif isinstance(node, ast.Attribute):
            assert node.attr not in {"loads_pickle", "unsafe_load", "full_load", "load_module", "exec_module"}
        elif isinstance(node, ast.keyword):
            assert node.arg not in {"allow_pickle", "shell"}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in CODE - {"code", "torch"}  # importlib.import_module("pickle")
