"""Accepted artefacts as numbered versions, and their offer to a running server.

    artifact + lineage -> DIR/3, where `muntin serve DIR` runs
                       -> POST /v2/repository/models/NAME/load {"version": "3", "digest": ...}
                       -> trial, probation -> serves, refused or rolled back

The server reads the version from its own folder, so DIR must be on a file system that both see. It compares the digest, and so loads no
other artefact of that number. Its rules of rollout hold (`muntin serve --canary --shadow --trial`).
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from muntin.artifact import Artifact, open_artifact
from muntin.artifact.file_lock import folder_in_use
from muntin.artifact.store import copy_artifact, read_manifest
from muntin.errors import ArtifactError, DataError, MuntinError
from muntin.runtime.host.loopback import is_loopback
from muntin.updating.gate import GateVerdict

UPDATE = "update"
"""Key of the lineage among the measured values of a manifest; `muntin serve` shows its summary."""
LOAD_S, ANSWER_S, POLL_S = 900.0, 30.0, 0.5
"""Seconds for the load of a version with its trial, for other answers, and between two looks at the state."""
LARGEST_ANSWER = 1 << 22
"""Bytes of an answer that are read."""
PROBATION_S = 90.0
"""Seconds for the probation, after which the outcome counts as open: the version serves."""


class PushError(MuntinError):
    """A server cannot be asked, or does not have the version."""


def lineage(verdict: GateVerdict) -> dict[str, Any]:
    """Origin of a version, for its manifest: digests of the parent's artefact and of the data, and the verdict."""
    origin = f"update of {verdict.parent[:8]} by data {verdict.data[:8]} ({verdict.strategy})"
    return {"summary": f"{origin}, {verdict.summary}", **verdict.model_dump(mode="json")}


def publish(artifact: Artifact, verdict: GateVerdict, repository: Path) -> tuple[str, Artifact]:
    """Copy an accepted artefact into `repository` under the next number, with its lineage. Returns the number and the copy.

    A copy that is there already is returned. Raises `DataError` for a refused one.
    """
    if not verdict.accepted or verdict.artifact != artifact.digest:
        raise DataError(f"{artifact.path}: not accepted by the gate: only accepted artefacts become versions")
    with folder_in_use(repository, "muntin update", name=".publish-lock"):
        numbers = sorted(int(path.name) for path in repository.iterdir() if path.name.isdecimal())
        for number in reversed(numbers):
            if _origin(repository / str(number)) == artifact.digest:  # of a run that was killed before it pushed
                return str(number), open_artifact(repository / str(number))
        number = numbers[-1] + 1 if numbers else 1
        return str(number), copy_artifact(artifact, repository / str(number), {UPDATE: lineage(verdict)})


def _origin(path: Path) -> str | None:
    """Digest of the judged artefact that a version is a copy of; None for other folders."""
    with suppress(ArtifactError):
        update = read_manifest(path).measured.get(UPDATE)
        digest = update.get("artifact") if isinstance(update, dict) else None
        return digest if isinstance(digest, str) else None
    return None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Answers a redirect as an error: the request carries a token, which is the named server's alone."""

    def redirect_request(self, *_: Any) -> None:
        return None


class ServerClient:
    """The repository API of a running server at `url`, such as http://127.0.0.1:8000. `token`: a bearer token.

    Follows no redirect, uses no proxy, and reads at most `LARGEST_ANSWER` bytes of an answer. Raises `PushError` if the server does not
    answer, or refuses. `notes`: what the user should know of the connection.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PushError(f"--push {url}: give the address of a server, such as http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.notes: tuple[str, ...] = ()
        if token is not None and parts.scheme == "http" and not is_loopback(parts.hostname):
            self.notes = (f"--push {url}: the token is sent unencrypted to another machine, and who reads it can load versions: use https",)
        self._headers = {"content-type": "application/json"} | ({} if token is None else {"authorization": f"Bearer {token}"})

    def index(self) -> list[dict[str, str]]:
        """The versions of the server's model, each with `name`, `version`, `state` and `reason`."""
        entries = self._post("/v2/repository/index", {}, ANSWER_S)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise PushError(f"--push {self.url}: its index is no list of versions: is it a server of `muntin serve`?")
        return entries

    def load(self, model: str, version: str, digest: str) -> None:
        """Load a version and wait until it has taken over."""
        self._post(f"/v2/repository/models/{quote(model, safe='')}/load", {"parameters": {"version": version, "digest": digest}}, LOAD_S)

    def _post(self, path: str, document: object, seconds: float) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(document).encode(), self._headers)  # noqa: S310 - checked above
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
        try:
            with opener.open(request, timeout=seconds) as answer:
                content = answer.read(LARGEST_ANSWER + 1)
                if len(content) > LARGEST_ANSWER:
                    raise PushError(f"{self.url} answers with more than {LARGEST_ANSWER:,} bytes: is it a server of `muntin serve`?")
                return json.loads(content or b"null")
        except urllib.error.HTTPError as error:
            with error:
                if 300 <= error.code < 400:
                    place = str(error.headers.get("location", "no address"))[:200]
                    raise PushError(
                        f"{self.url} redirects ({error.code}) to {place!r}, which is not followed: give --push that address if it is yours"
                    ) from error
                raise PushError(f"{self.url} refuses ({error.code}): {_reason(error.read(LARGEST_ANSWER))}") from error
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise PushError(f"{self.url} does not answer ({reason}): start `muntin serve`, or check the address") from error


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])[:300]
    except (ValueError, KeyError, TypeError, RecursionError):
        return body[:200].decode(errors="replace") or "no reason given"


def push(
    client: ServerClient,
    version: str,
    digest: str,
    *,
    wait_s: float = PROBATION_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[bool, str]:
    """Offer a version to a server, and wait for the end of its trial and, at most `wait_s`, of its probation.

    Returns whether it serves, and the server's words. Raises `PushError` if the server does not answer or does not list the version.
    """
    entries = client.index()
    listed = [entry.get("version") for entry in entries]
    if version not in listed:
        numbers = ", ".join(str(number) for number in listed) or "none"
        raise PushError(
            f"{client.url} has the versions {numbers}, not {version}: it serves another folder; start `muntin serve` with the folder of "
            "--repository, or name its folder there"
        )
    try:
        client.load(str(entries[0].get("name")), version, digest)
    except PushError as error:
        if " refuses (409)" not in str(error):
            raise
        return False, str(error)
    end = clock() + wait_s
    while True:
        entry = next((entry for entry in client.index() if entry.get("version") == version), {})
        state, reason = entry.get("state", ""), entry.get("reason", "")
        if state != "READY" or not reason.startswith("current"):
            return False, reason or "it is no longer listed"
        if not reason.startswith("current, on probation") or clock() >= end:
            return True, reason
        sleep(POLL_S)
