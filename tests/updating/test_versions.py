"""Pushes to a server that speaks the repository API."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from muntin.updating.versions import PushError, ServerClient, push


@pytest.fixture
def server() -> Iterator[Callable[..., tuple[ServerClient, list[Any]]]]:
    """`server(states, status)`: a client of a server whose index answers one state after the other; requests are recorded."""
    running: list[HTTPServer] = []

    def start(states: list[list[dict[str, str]]], status: int = 200, token: str | None = None, moved_to: str | None = None) -> Any:
        asked: list[Any] = []
        left = list(states)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                if moved_to is not None:
                    self.send_response(307)
                    self.send_header("location", moved_to)
                    self.send_header("content-length", "0")
                    self.end_headers()
                    return
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                asked.append((self.path, body, self.headers.get("authorization")))
                loads = self.path.endswith("/load")
                answer: Any = {"error": "another contract"} if loads and status != 200 else {}
                if self.path.endswith("/index"):
                    answer = left.pop(0) if len(left) > 1 else left[0]
                content = json.dumps(answer).encode()
                self.send_response(status if loads else 200)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        one = HTTPServer(("127.0.0.1", 0), Handler)
        running.append(one)
        threading.Thread(target=one.serve_forever, daemon=True).start()
        return ServerClient(f"http://127.0.0.1:{one.server_port}", token), asked

    yield start
    for one in running:
        one.shutdown()
        one.server_close()


def entry(version: str, state: str = "READY", reason: str = "") -> dict[str, str]:
    return {"name": "m", "version": version, "state": state, "reason": reason}


UNLOADED = [entry("1", reason="current"), entry("2", "UNAVAILABLE", "not loaded")]


def test_version_that_passes_its_probation(server: Any) -> None:
    client, asked = server(
        [UNLOADED, [entry("2", reason="current, on probation")], [entry("2", reason="current; update of 1a")]], token="t"
    )
    assert push(client, "2", "d" * 64, sleep=lambda seconds: None) == (True, "current; update of 1a")
    assert [path for path, _, _ in asked if "load" in path] == ["/v2/repository/models/m/load"]
    assert asked[1][1] == {"parameters": {"version": "2", "digest": "d" * 64}} and {key for _, _, key in asked} == {"Bearer t"}


def test_version_that_is_sent_back(server: Any) -> None:
    client, _ = server([UNLOADED, [entry("2", "UNAVAILABLE", "rolled back: slow")]])
    assert push(client, "2", "d", sleep=lambda seconds: None) == (False, "rolled back: slow")
    client, _ = server([UNLOADED], 409)
    serves, reason = push(client, "2", "d")
    assert not serves and "another contract" in reason


def test_probation_without_end(server: Any) -> None:
    client, _ = server([UNLOADED, [entry("2", reason="current, on probation")]])
    times = iter(range(100))
    assert push(client, "2", "d", wait_s=3, clock=lambda: next(times), sleep=lambda seconds: None)[0]


def test_server_of_another_folder(server: Any) -> None:
    client, _ = server([[entry("1", reason="current")]])
    with pytest.raises(PushError, match="has the versions 1, not 2: it serves another folder"):
        push(client, "2", "d")
    client, _ = server([UNLOADED], 401)
    with pytest.raises(PushError, match=r"refuses \(401\)"):
        push(client, "2", "d")


def test_redirect_is_not_followed(server: Any) -> None:
    """The token reaches the named server alone."""
    other, asked = server([UNLOADED])
    client, _ = server([UNLOADED], token="secret", moved_to=f"{other.url}/v2/repository/index")
    with pytest.raises(PushError, match=r"redirects \(307\) to"):
        client.index()
    assert asked == []


def test_long_answer(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = server([[entry("1", reason="x" * 1000)]])
    client.index()
    monkeypatch.setattr("muntin.updating.versions.LARGEST_ANSWER", 1000)
    with pytest.raises(PushError, match="more than 1,000 bytes"):
        client.index()


@pytest.mark.parametrize(
    ("url", "token", "noted"),
    [
        ("http://192.0.2.1:8000", "t", True), ("http://server.example", "t", True), ("https://server.example", "t", False),
        ("http://127.0.0.1:8000", "t", False), ("http://[::1]:8000", "t", False), ("http://localhost", "t", False),
        ("http://192.0.2.1:8000", None, False),
    ],
)  # fmt: skip
def test_tokens_in_the_clear(url: str, token: str | None, noted: bool) -> None:
    assert any("unencrypted" in note for note in ServerClient(url, token).notes) == noted
