"""Refuses requests that a browser sends for a page of another site.

A browser sends a plain POST for any page, without asking the server first. If only the address protects a server, a page in a browser on
this machine could so ask it, change what is served, and plant pictures. Browsers name the page's site and the host that they call: a host
name of the page's own that resolves to this machine's address (DNS rebinding) is not a name of this machine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from urllib.parse import urlsplit

from muntin.runtime.host.loopback import is_loopback
from muntin.serving.protocol.messages import ProtocolError, shown

_PORTS = {"http": 80, "https": 443}
_FIELDS = (b"host", b"origin", b"sec-fetch-site")


def check_origin(headers: Iterable[tuple[bytes, bytes]], *, local: bool, hosts: Collection[str] = ()) -> None:
    """Raise ProtocolError 403 for a request of another site's page. `headers`: names in lower case.

    `local`: only this machine reaches the server, which may be called by this machine's names and those of `hosts` then. Another server may
    be called by any name, or by these if there are some.
    """
    fields = {name: value.decode("latin-1") for name, value in headers if name in _FIELDS}
    host, origin = fields.get(b"host", ""), fields.get(b"origin")
    site = fields.get(b"sec-fetch-site", "none")
    if site not in ("same-origin", "none") or (origin is not None and not _same(origin, host)):
        whose = shown(origin) if origin is not None else "another site"
        raise ProtocolError(f"a page of {whose} asks for this: ask without a browser, or from a page of this host", status=403)
    if not host or not (local or hosts):
        return
    name = _place("http", host)[0]
    if not is_loopback(name) and name not in hosts:
        allowed = ", ".join(("localhost", *hosts))
        raise ProtocolError(
            f"host {shown(host)}: this server asks for no token and is called {allowed}; add names with --allowed-hosts, or give it tokens",
            status=403,
        )


def _same(origin: str, host: str) -> bool:
    scheme, _, place = origin.partition("://")
    return scheme in _PORTS and _place(scheme, place) == _place(scheme, host) != ("", 0)


def _place(scheme: str, host: str) -> tuple[str, int]:
    """Return (name, port), or ("", 0) for an invalid host."""
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname or "", parts.port or _PORTS[scheme]
    except ValueError:
        return "", 0
