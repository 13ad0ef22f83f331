"""The HTTP face described for machines: an OpenAPI 3.1 document."""

from __future__ import annotations

from typing import Any

from muntin.serving.protocol.json_codec import HEADER_LENGTH
from muntin.serving.protocol.metadata import VERSION

_ERRORS = {
    400: "wrong request",
    401: "no token",
    403: "a web page of another site asks, or one that calls a server of this machine alone by another name",
    404: "unknown model or version",
    408: "the headers or the body did not come in time",
    409: "not loaded, what served goes on; or not in service",
    413: "too large",
    415: "packed by neither gzip nor deflate, or packed at all where no inference is asked for; or a form",
    500: "the model failed",
    501: "a model that comes with the request",
    503: "cannot be answered in time, or the server is full or going down (Retry-After says when to try again)",
}
_ANY = (401, 408, 413, 500, 503)
"""What every route may answer."""


def openapi(model: str) -> dict[str, Any]:
    """The document. `model`: the name that the examples show."""
    name = _parameter("model", "path", "the model's name", {"type": "string", "example": model})
    number = _parameter("version", "path", "one of the model's versions", {"type": "string", "example": "1"})
    paths: dict[str, Any] = {
        "/v2": _get("Name, version and extensions of the server."),
        "/v2/health/live": _open("200 as long as the process answers."),
        "/v2/health/ready": _open("200 when a model is ready, 503 before, and once the server is going down."),
        "/v2/models/stats": _get("Counts and durations of every version."),
        "/v2/repository/index": {
            "get": _operation("The versions there are, and their states.", 400, 415),
            "post": _operation("The same; `ready`: only those that answer.", 400, 415, body=_schema("Index")),
        },
        "/v2/repository/models/{model}/load": {
            "parameters": [name],
            "post": _operation(
                "Load the newest version, or that of `parameters.version`; answers when it serves.",
                400,
                403,
                404,
                409,
                415,
                501,
                body=_schema("Load"),
            ),
        },
        "/v2/repository/models/{model}/unload": {
            "parameters": [name],
            "post": _operation(
                "Take all versions, or the one in `parameters.version`, out of service.", 400, 403, 404, 409, 415, 501, body=_schema("Load")
            ),
        },
        "/predict": {"post": _predict()},
        "/metrics": {"get": _operation("What Prometheus scrapes.", content={"text/plain": {}})},
        "/openapi.json": _get("This document."),
    }
    for middle, parameters in (("", [name]), ("/versions/{version}", [name, number])):
        at = f"/v2/models/{{model}}{middle}"
        paths[at] = _get("Inputs and outputs: names, types, shapes.", 404) | {"parameters": parameters}
        paths[f"{at}/ready"] = _get("200 when it can answer, 503 otherwise.", 404) | {"parameters": parameters}
        paths[f"{at}/config"] = _get("The configuration, in Triton's form.", 404) | {"parameters": parameters}
        paths[f"{at}/stats"] = _get("Counts and durations.", 404) | {"parameters": parameters}
        paths[f"{at}/infer"] = {"parameters": parameters, "post": _infer()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "muntin", "version": VERSION, "description": "An artefact behind the Open Inference Protocol."},
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "responses": {
                "Error": _error("405 for a method that is not described here; else as the status says."),
                **{f"Error{status}": _error(text) for status, text in _ERRORS.items()},
            },
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _predict() -> dict[str, Any]:
    operation = _operation(
        "A picture file in; a mask, an overlay, an image or JSON out.",
        400,
        415,
        body={kind: {} for kind in ("image/png", "image/jpeg", "image/webp")},
        content={"image/png": {}, "application/json": {}},
    )
    text = "segment: mask (default: class numbers, coloured by a palette), overlay, labels (the same numbers as grey values), json; "
    schema = {"type": "string", "enum": ["mask", "overlay", "labels", "json", "image"]}
    operation["parameters"] = [_parameter("output", "query", f"{text}classify: json; restore: image", schema, required=False)]
    operation["requestBody"]["required"] = True
    return operation


def _infer() -> dict[str, Any]:
    operation = _operation(
        "Infer: images UINT8 (rows, height, width, channels) in; labels, scores or images out. The body may be packed (Content-Encoding).",
        400,
        404,
        415,
        body={"application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}}, "application/octet-stream": {}},
        content={"application/json": {"schema": {"$ref": "#/components/schemas/InferResponse"}}, "application/octet-stream": {}},
    )
    operation["parameters"] = [
        _parameter(HEADER_LENGTH, "header", "bytes of JSON before the binary tensors", {"type": "integer"}, required=False)
    ]
    operation["requestBody"]["required"] = True
    return operation


def _get(summary: str, *errors: int) -> dict[str, Any]:
    return {"get": _operation(summary, *errors)}


def _open(summary: str) -> dict[str, Any]:
    """Of what needs no token."""
    operation = _operation(summary)
    del operation["security"], operation["responses"]["401"]
    return {"get": operation}


def _operation(summary: str, *errors: int, body: dict[str, Any] | None = None, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """`errors`: the statuses that it may answer beside `_ANY`."""
    responses: dict[str, Any] = {"200": {"description": "done", "content": {"application/json": {}} if content is None else content}}
    for status in sorted({*_ANY, *errors}):
        responses[str(status)] = {"$ref": f"#/components/responses/Error{status}"}
    responses["default"] = {"$ref": "#/components/responses/Error"}
    operation: dict[str, Any] = {"summary": summary, "responses": responses, "security": [{}, {"token": []}]}
    if body is not None:
        operation["requestBody"] = {"content": body}
    return operation


def _error(text: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"error": {"type": "string"}}}
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _schema(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _parameter(name: str, place: str, text: str, schema: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    return {"name": name, "in": place, "description": text, "schema": schema, "required": required}


_PARAMETERS = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "datatype": {"type": "string", "example": "UINT8"},
        "parameters": _PARAMETERS | {"description": "`binary_data_size`: the data follows the JSON"},
        "data": {"type": "array", "description": "flat, or nested as the shape"},
    },
}
_SCHEMAS: dict[str, Any] = {
    "InferRequest": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": _PARAMETERS
            | {"description": "`priority` (1 is the most urgent), `timeout` (microseconds), `binary_data_output`"},
            "inputs": {"type": "array", "items": _TENSOR, "minItems": 1, "maxItems": 1},
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string", "enum": ["labels", "scores", "image"]},
                        "parameters": _PARAMETERS | {"description": "`binary_data`, `classification`"},
                    },
                },
            },
        },
    },
    "InferResponse": {
        "type": "object",
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "parameters": _PARAMETERS,
            "outputs": {"type": "array", "items": _TENSOR},
        },
    },
    "Index": {"type": "object", "properties": {"ready": {"type": "boolean"}}},
    "Load": {"type": "object", "properties": {"parameters": {"type": "object", "properties": {"version": {"type": "string"}}}}},
}
