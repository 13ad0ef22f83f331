"""Whose page sent a request."""

from __future__ import annotations

import pytest

from muntin.serving.protocol.messages import ProtocolError
from muntin.serving.security.same_origin import check_origin


def ask(host: str | None = "models.example", *, local: bool = False, hosts: tuple[str, ...] = (), **headers: str) -> int:
    """The status of a refusal; 200 where there is none."""
    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    try:
        check_origin([*given, *([(b"host", host.encode())] if host is not None else [])], local=local, hosts=hosts)
    except ProtocolError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"sec_fetch_site": "none"}, 200),
        ({"sec_fetch_site": "same-origin", "origin": "http://models.example"}, 200),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"origin": "https://models.example"}, 200),  # before a proxy that ends TLS
        ({"origin": "https://MODELS.example:443"}, 200),
        ({"origin": "http://models.example:8080"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "file://"}, 403),
        ({"origin": "http://[::1"}, 403),
    ],
)
def test_page_of_another_site(headers: dict[str, str], status: int) -> None:
    assert ask(**headers) == status


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LOCALHOST", "a.localhost", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", None]
)
def test_names_of_a_local_server(host: str | None) -> None:
    assert ask(host, local=True) == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "10.0.0.1", "localhost.evil.example", "[::2]", "[::1", "a b:c"])
def test_other_names_of_a_local_server(host: str) -> None:
    assert ask(host, local=True) == 403
    assert ask(host) == 200


@pytest.mark.parametrize("local", [False, True])
def test_allowed_hosts(local: bool) -> None:
    hosts = ("models.example", "10.0.0.1")
    assert {ask(host, local=local, hosts=hosts) for host in ("Models.Example:8000", "10.0.0.1", "localhost")} == {200}
    assert ask("evil.example", local=local, hosts=hosts) == 403
