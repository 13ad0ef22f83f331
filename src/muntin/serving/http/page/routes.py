"""Routes of the page: its files, and what it shows of the model and of the server.

    GET /, /page/FILE         HTML, styles, modules: a fixed table, read when the server starts; no token needed
    GET /page/status          versions and their rows, queue, sums for the charts
    GET /page/model/VERSION   task and classes of a version in service

The page computes nothing on the server but `/predict`. The content security policy allows it to load and call only this server.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from muntin.serving.http.page.documents import model_document, status_document
from muntin.serving.inference.service import Service
from muntin.serving.protocol.json_codec import encode_json

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # a browser asks each time and gets 304: a newer release replaces all modules at once
}
_SHARED = resources.files("muntin") / "reporting" / "templates" / "palette.css"
"""The colours of the reports; the package of the reports is not imported."""


class PageFile(NamedTuple):
    """A file of the page. `tag`: its entity tag."""

    content: bytes
    media_type: str
    tag: str


class PageRoutes:
    """`files`: path -> file."""

    def __init__(self, service: Service) -> None:
        self._service = service
        sources = [*(resources.files(__package__) / "files").iterdir(), _SHARED]
        self.files = {
            "/" if source.name == "index.html" else f"/page/{source.name}": _read(source.name, source.read_bytes()) for source in sources
        }

    def routes(self) -> list[Route]:
        return [
            Route("/", self._file),
            Route("/page/status", self._status),
            Route("/page/model/{version}", self._model),
            Route("/page/{file}", self._file),
        ]

    async def _file(self, request: Request) -> Response:
        file = self.files.get(request.scope["path"])
        if file is None:
            raise HTTPException(404)
        headers = HEADERS | {"etag": file.tag}
        tags = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if tags & {file.tag, "*"}:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.media_type)

    async def _status(self, request: Request) -> Response:
        return _answer(status_document(self._service))

    async def _model(self, request: Request) -> Response:
        return _answer(model_document(self._service, request.path_params["version"]))


def _answer(document: object) -> Response:
    return Response(encode_json(document), media_type="application/json", headers={"cache-control": "no-store"})


def _read(name: str, content: bytes) -> PageFile:
    digest = hashlib.sha256(content).hexdigest()[:24]
    return PageFile(content, MEDIA_TYPES[name.rpartition(".")[2]], f'"{digest}"')
