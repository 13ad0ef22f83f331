"""The HTTP face described for machines: an OpenAPI 3.1 document."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from muntin.serving.json_codec import HEADER_LENGTH

_ERROR = {"$ref": "#/components/responses/Error"}


def openapi(model: str) -> dict[str, Any]:
    """The document. `model`: the name that the examples show."""
    name = _parameter("model", "path", "the model's name", {"type": "string", "example": model})
    number = _parameter("version", "path", "one of the model's versions", {"type": "string", "example": "1"})
    paths: dict[str, Any] = {
        "/v2": _get("Name, version and extensions of the server."),
        "/v2/health/live": _get("200 as long as the process answers."),
        "/v2/health/ready": _get("200 when a model is ready, 503 before, and once the server is going down."),
        "/v2/models/stats": _get("Counts and durations of every version."),
        "/v2/repository/index": {"post": _operation("The versions there are, and their states.", body=_schema("Index"))},
        "/v2/repository/models/{model}/load": {
            "parameters": [name],
            "post": _operation("Load the newest version, or that of `parameters.version`; answers when it serves.", body=_schema("Load")),
        },
        "/v2/repository/models/{model}/unload": {
            "parameters": [name],
            "post": _operation("Take all versions, or the one in `parameters.version`, out of service.", body=_schema("Load")),
        },
        "/predict": {
            "post": {
                "summary": "A picture file in; a mask, an overlay, an image or JSON out.",
                "parameters": [
                    _parameter(
                        "output",
                        "query",
                        "segment: mask (default), overlay, labels, json; classify: json; restore: image",
                        {"type": "string", "enum": ["mask", "overlay", "labels", "json", "image"]},
                        required=False,
                    )
                ],
                "requestBody": {"required": True, "content": {kind: {} for kind in ("image/png", "image/jpeg", "image/webp")}},
                "responses": _responses({"image/png": {}, "application/json": {}}),
            }
        },
        "/metrics": {"get": _operation("What Prometheus scrapes.", content={"text/plain": {}})},
    }
    for middle, parameters in (("", [name]), ("/versions/{version}", [name, number])):
        at = f"/v2/models/{{model}}{middle}"
        paths[at] = _get("Inputs and outputs: names, types, shapes.") | {"parameters": parameters}
        paths[f"{at}/ready"] = _get("200 when it can answer, 503 otherwise.") | {"parameters": parameters}
        paths[f"{at}/config"] = _get("The configuration, in Triton's form.") | {"parameters": parameters}
        paths[f"{at}/stats"] = _get("Counts and durations.") | {"parameters": parameters}
        paths[f"{at}/infer"] = {"parameters": parameters, "post": _infer()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "muntin", "version": version("muntin"), "description": "An artefact behind the Open Inference Protocol."},
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "responses": {
                "Error": {
                    "description": "400 wrong request, 401 no token, 404 unknown model or version, 413 too large, 415 packed by neither "
                    "gzip nor deflate, 503 cannot be answered in time (Retry-After says when to try again).",
                    "content": {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "string"}}}}},
                }
            },
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _infer() -> dict[str, Any]:
    operation = _operation(
        "Infer: images UINT8 (rows, height, width, channels) in; labels, scores or images out.",
        body={"application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}}, "application/octet-stream": {}},
        content={"application/json": {"schema": {"$ref": "#/components/schemas/InferResponse"}}, "application/octet-stream": {}},
    )
    operation["parameters"] = [
        _parameter(HEADER_LENGTH, "header", "bytes of JSON before the binary tensors", {"type": "integer"}, required=False)
    ]
    return operation


def _get(summary: str) -> dict[str, Any]:
    return {"get": _operation(summary)}


def _operation(summary: str, *, body: dict[str, Any] | None = None, content: dict[str, Any] | None = None) -> dict[str, Any]:
    given = {"application/json": {}} if content is None else content
    operation: dict[str, Any] = {"summary": summary, "responses": _responses(given), "security": [{}, {"token": []}]}
    if body is not None:
        operation["requestBody"] = {"content": body}
    return operation


def _responses(content: dict[str, Any]) -> dict[str, Any]:
    return {"200": {"description": "done", "content": content}, "default": _ERROR}


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
