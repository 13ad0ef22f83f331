"""The page's routes, by plain HTTP: files, headers, caching, tokens, and the documents that the page shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from muntin.images import encode_png
from muntin.serving.config import ServeConfig
from muntin.serving.http.page.routes import PageRoutes
from muntin.serving.server import Server

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
TOKEN = {"authorization": "Bearer secret"}
FILES = PageRoutes(cast(Any, None)).files


@pytest.fixture(scope="module")
def server(start_server: Any, write_pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with start_server(write_pixels(tmp_path_factory.mktemp("page") / "pixels"), tokens=("secret",)) as server:
        yield server


@pytest.mark.parametrize("path", sorted(FILES))
def test_files_without_a_token(server: Server, fetch: Any, path: str) -> None:
    status, headers, body = fetch(server, path)
    assert (status, body) == (200, FILES[path].content)
    assert headers["content-type"].partition(";")[0] == FILES[path].media_type
    assert headers["content-security-policy"] == POLICY
    assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert headers["cache-control"] == "no-cache"
    for tag in (headers["etag"], f'"other", W/{headers["etag"]}', "*"):
        status, again, nothing = fetch(server, path, None, {"if-none-match": tag})
        assert (status, nothing, again["etag"], again["content-security-policy"]) == (304, b"", headers["etag"], POLICY)
    assert fetch(server, path, None, {"if-none-match": '"other"'})[2] == body
    status, head, nothing = fetch(server, path, method="HEAD")
    assert (status, nothing, head["etag"], head["content-length"]) == (200, b"", headers["etag"], str(len(body)))


def test_page_loads_only_its_own_files() -> None:
    html = FILES["/"].content.decode()
    assert {f"/{name}" for name in re.findall(r'(?:href|src)="([^"]+)"', html)} <= set(FILES)
    assert not re.search(r"<style|\son\w+=|style=|<script(?! type=\"module\" src)", html)
    for path, file in FILES.items():
        if path.endswith(".js"):
            text = file.content.decode()
            assert {f"/page/{name}" for name in re.findall(r'from "\./([^"]+)"', text)} <= set(FILES)
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://(?!www\.w3\.org/2000/svg)", text)


@pytest.mark.parametrize(
    "path", ["/page/", "/page/app", "/page/index.html", "/page/..%2froutes.py", "/page/%2e%2e/routes.py", "/page//etc/passwd"]
)
def test_paths_outside_the_table(server: Server, fetch: Any, path: str) -> None:
    assert fetch(server, path, None, TOKEN)[0] == 404
    assert fetch(server, path)[0] == 401


def test_documents(server: Server, fetch: Any) -> None:
    assert fetch(server, "/page/status")[0] == fetch(server, "/page/model/1")[0] == 401
    status, headers, body = fetch(server, "/page/model/1", None, TOKEN)
    model = json.loads(body)
    assert (status, headers["cache-control"], model["task"], model["refusal"]) == (200, "no-store", "segment", "")
    assert [entry["name"] for entry in model["classes"]] == ["sea", "field", "roof"]
    assert model["classes"][1]["color"] == [1, 1, 1]
    assert fetch(server, "/page/model/7", None, TOKEN)[0] == 404
    before = json.loads(fetch(server, "/page/status", None, TOKEN)[2])
    picture = encode_png(np.zeros((8, 8, 3), np.uint8))
    answer = fetch(server, "/predict?version=1", picture, TOKEN)
    after = json.loads(fetch(server, "/page/status", None, TOKEN)[2])
    assert (answer[0], answer[1]["x-model-version"]) == (200, "1")
    assert (after["model"], after["current"], after["ready"], after["canary"]) == ("pixels", "1", True, 0)
    (version,) = after["versions"]
    assert (version["version"], version["state"], version["reason"], len(version["digest"])) == ("1", "READY", "current", 64)
    assert version["rows"] == before["versions"][0]["rows"] + 1
    for name in ("queue", "compute", "batch"):
        assert after["sums"][name][0] == before["sums"][name][0] + 1
    assert after["sums"]["batch"][1] == before["sums"]["batch"][1] + 1


def test_no_page(start_server: Any, fetch: Any, write_pixels: Any, tmp_path: Path) -> None:
    assert ServeConfig().page
    with start_server(write_pixels(tmp_path / "pixels"), page=False) as server:
        assert {fetch(server, path)[0] for path in ("/", "/page/app.js", "/page/status")} == {404}
        assert not [path for path in json.loads(fetch(server, "/openapi.json")[2])["paths"] if path == "/" or path.startswith("/page")]
