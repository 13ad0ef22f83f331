"""The description of the HTTP face: it names every route that there is, and no other."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from starlette.routing import Route

from muntin.serving.http.app import HttpApp
from muntin.serving.http.page.routes import PageRoutes
from muntin.serving.protocol.openapi import openapi


@pytest.mark.parametrize("page", [True, False])
def test_routes(page: bool) -> None:
    pages = PageRoutes(cast(Any, None)) if page else None
    table = [route for route in HttpApp._routes(object.__new__(HttpApp), pages) if isinstance(route, Route)]
    routes = {route.path: route.methods or set() for route in table if route.include_in_schema}
    assert {route.path for route in table} - set(routes) == {"/v2/"}  # another spelling
    infer = {f"/v2/models/{{model}}{middle}/infer": {"POST"} for middle in ("", "/versions/{version}")}
    wanted = routes | infer
    described: dict[str, dict[str, Any]] = openapi("m", page=page)["paths"]
    assert set(described) == set(wanted)
    for path, operations in described.items():
        assert {method.upper() for method in operations if method != "parameters"} == wanted[path] - {"HEAD"}  # which goes with every GET
        named = {part[1:-1] for part in path.split("/") if part.startswith("{")}
        assert named == {parameter["name"] for parameter in operations.get("parameters", []) if parameter["in"] == "path"}


def test_references() -> None:
    document = json.loads(json.dumps(openapi("m", page=True)))
    assert document["openapi"].startswith("3.1")

    def references(part: Any) -> list[str]:
        if isinstance(part, dict):
            own = [part["$ref"]] if "$ref" in part else []
            return own + [found for value in part.values() for found in references(value)]
        return [found for value in part for found in references(value)] if isinstance(part, list) else []

    found = references(document)
    assert found
    for reference in found:
        place = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]


def test_errors_and_security() -> None:
    paths: dict[str, dict[str, Any]] = openapi("m", page=True)["paths"]
    for path, methods in paths.items():
        for operation in (methods[method] for method in ("get", "post") if method in methods):
            errors = set(operation["responses"]) - {"200", "default"}
            assert errors >= {"408", "413", "500", "503"}, path
            if path.startswith("/v2/health") or path in ("/", "/page/{file}"):
                assert "security" not in operation
                assert "401" not in errors
            else:
                assert {"token": []} in operation["security"], path
                assert "401" in errors
    assert "409" in paths["/v2/repository/models/{model}/unload"]["post"]["responses"]
