"""OpenAPI 3.1 description of the HTTP routes."""

from __future__ import annotations

from typing import Any

from muntin.serving.protocol.json_codec import HEADER_LENGTH
from muntin.serving.protocol.metadata import VERSION

Schema = dict[str, Any]

_ERRORS = {
    400: "wrong request",
    401: "no token",
    403: "a web page of another site asks, or one that calls the server by a name that it does not have; load and unload are off",
    404: "unknown model or version",
    408: "the body did not arrive in time",
    409: "not loaded, what served goes on; or not in service",
    413: "too large; the message names the option of `muntin serve` that sets the limit, if there is one",
    415: "packed by neither gzip nor deflate, or packed at all where no inference is asked for",
    500: "the model failed",
    501: "a model that comes with the request",
    503: "cannot be answered in time, or the server is full or going down (Retry-After says when to try again)",
}
_COMMON_ERRORS = (401, 403, 408, 413, 500, 503)
"""Statuses that every route may answer."""
_LOAD_ERRORS = (400, 404, 409, 415, 501)
_JSON, _OCTETS = "application/json", "application/octet-stream"


def openapi(model: str, *, page: bool) -> dict[str, Any]:
    """Return the document. `model`: name shown in examples. `page`: whether there is a page."""
    name = _parameter("model", "path", "the model's name", {"type": "string", "example": model})
    number = _parameter("version", "path", "one of the model's versions", {"type": "string", "example": "1"})
    paths: dict[str, Any] = {
        "/v2": _get("Name, version and extensions of the server."),
        "/v2/health/live": _get("200 as long as the process answers.", token=False),
        "/v2/health/ready": _get("200 when a model is ready, 503 before, and once the server is going down.", token=False),
        "/v2/models/stats": _get("Counts and durations of every version."),
        "/v2/repository/index": _get("The versions there are, and their states.", 400, 415)
        | {"post": _operation("The same; `ready`: only those that answer.", 400, 415, body=_content(_JSON, schema="Index"))},
        "/predict": {"post": _predict()},
        "/metrics": {"get": _operation("What Prometheus scrapes.", answer=_content("text/plain"))},
        "/openapi.json": _get("This document."),
    }
    if page:
        file = _parameter("file", "path", "one of the files that the page loads", _STRING)
        paths["/"] = {
            "get": _operation("A page for people: pictures and their answers, versions, load.", answer=_content("text/html"), token=False)
        }
        paths["/page/{file}"] = {
            "parameters": [file],
            "get": _operation("A file of the page.", 404, answer=_content("text/css", "text/javascript"), token=False),
        }
        paths["/page/status"] = _get("Versions, queue and sums, for the page; it changes with the page.")
        paths["/page/model/{version}"] = _get("Task and classes of a version, for the page.", 404) | {"parameters": [number]}
    for action, summary in (
        ("load", "Load the newest version, or that of `parameters.version`; answers when it serves."),
        ("unload", "Take all versions, or the one in `parameters.version`, out of service."),
    ):
        operation = _operation(summary, *_LOAD_ERRORS, body=_content(_JSON, schema="Load"))
        paths[f"/v2/repository/models/{{model}}/{action}"] = {"parameters": [name], "post": operation}
    for middle, parameters in (("", [name]), ("/versions/{version}", [name, number])):
        for end, summary in (
            ("", "Inputs and outputs: names, types, shapes."),
            ("/ready", "200 when it can answer, 503 otherwise."),
            ("/config", "The configuration, in Triton's form."),
            ("/stats", "Counts and durations."),
        ):
            paths[f"/v2/models/{{model}}{middle}{end}"] = _get(summary, 404) | {"parameters": parameters}
        paths[f"/v2/models/{{model}}{middle}/infer"] = {"parameters": parameters, "post": _infer()}
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
    text = "segment: mask (default: class numbers, coloured by a palette), overlay, labels (the same numbers as grey values), json; "
    schema = {"type": "string", "enum": ["mask", "overlay", "labels", "json", "image"]}
    operation = _operation(
        "A picture file in, alone or as the one file of a form; a mask, an overlay, an image or JSON out.",
        *(400, 404, 415),
        body=_picture_body(),
        answer=_content("image/png", _JSON),
    )
    return operation | {
        "parameters": [
            _parameter("output", "query", f"{text}classify: json; restore: image", schema),
            _parameter("version", "query", "a version in service, in place of the one that would answer", _STRING),
        ]
    }


def _picture_body() -> dict[str, Any]:
    body = _content(*(f"image/{kind}" for kind in ("png", "jpeg", "webp", "tiff", "bmp")), "multipart/form-data")
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    body["content"]["multipart/form-data"] = {"schema": _object("file", file=file)}
    return body | {"required": True}


def _infer() -> dict[str, Any]:
    operation = _operation(
        "Infer: images UINT8 (rows, height, width, channels) in, or the tensors that the model's metadata list; labels, scores, images "
        "or the model's own outputs out. The body may be packed (Content-Encoding).",
        *(400, 404, 415),
        body=_content(_JSON, _OCTETS, schema="InferRequest") | {"required": True},
        answer=_content(_JSON, _OCTETS, schema="InferResponse"),
    )
    return operation | {"parameters": [_parameter(HEADER_LENGTH, "header", "bytes of JSON before the binary tensors", {"type": "integer"})]}


def _get(summary: str, *errors: int, token: bool = True) -> dict[str, Any]:
    return {"get": _operation(summary, *errors, token=token)}


def _operation(
    summary: str, *errors: int, body: dict[str, Any] | None = None, answer: dict[str, Any] | None = None, token: bool = True
) -> dict[str, Any]:
    """Describe an operation. `errors`: statuses that it may answer beside `_COMMON_ERRORS`. `token`: whether it needs one."""
    responses: dict[str, Any] = {"200": {"description": "done"} | (answer or _content(_JSON))}
    for status in sorted({*_COMMON_ERRORS, *errors} - (set() if token else {401, 403})):
        responses[str(status)] = {"$ref": f"#/components/responses/Error{status}"}
    responses["default"] = {"$ref": "#/components/responses/Error"}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if token:
        operation["security"] = [{}, {"token": []}]
    if body is not None:
        operation["requestBody"] = body
    return operation


def _content(*types: str, schema: str | None = None) -> dict[str, Any]:
    """Describe a body of one of these media types. `schema`: of JSON."""
    described = {"schema": {"$ref": f"#/components/schemas/{schema}"}} if schema else {}
    return {"content": {media_type: described if media_type == _JSON else {} for media_type in types}}


def _parameter(name: str, place: str, text: str, schema: Schema) -> dict[str, Any]:
    return {"name": name, "in": place, "description": text, "schema": schema, "required": place == "path"}


def _error(text: str) -> dict[str, Any]:
    return {"description": text, "content": {_JSON: {"schema": _object(error=_STRING)}}}


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


def _array(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


_STRING: Schema = {"type": "string"}
_PARAMETERS: Schema = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
_TENSOR = _object(
    *("name", "shape", "datatype"),
    name=_STRING,
    shape=_array({"type": "integer", "minimum": 0}),
    datatype={"type": "string", "example": "UINT8"},
    parameters=_PARAMETERS | {"description": "`binary_data_size`: the data follows the JSON"},
    data={"type": "array", "description": "flat, or nested as the shape"},
)
_OUTPUT = _object(
    "name",
    name=_STRING | {"description": "images: labels, scores or image; otherwise as the model's metadata list them"},
    parameters=_PARAMETERS | {"description": "`binary_data`, `classification`"},
)
_SCHEMAS = {
    "InferRequest": _object(
        "inputs",
        id=_STRING,
        parameters=_PARAMETERS | {"description": "`priority` (1 is the most urgent), `timeout` (microseconds), `binary_data_output`"},
        inputs=_array(_TENSOR, minItems=1),
        outputs=_array(_OUTPUT),
    ),
    "InferResponse": _object(model_name=_STRING, model_version=_STRING, id=_STRING, parameters=_PARAMETERS, outputs=_array(_TENSOR)),
    "Index": _object(ready={"type": "boolean"}),
    "Load": _object(parameters=_object(version=_STRING)),
}
