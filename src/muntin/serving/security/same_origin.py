"""Whether a browser sent a request for a page of somebody else's.

A browser sends a plain POST wherever a page has it sent, and asks nobody before. Where nothing but the address keeps strangers away, a page
that somebody on this machine looks at could so change what is served here. Browsers say whose page it is, and what they call this server: a
name of the page's own that leads to this machine's address (DNS rebinding) is none that this machine has.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

from muntin.serving.protocol.messages import ProtocolError, shown

_PORTS = {"http": 80, "https": 443}


def check_origin(headers: Iterable[tuple[bytes, bytes]], *, local: bool) -> None:
    """Raises ProtocolError 403 for a request of another site's page. `headers`: names in lower case. `local`: only this machine reaches the
    server, and no token is asked for."""
    found = {name: value.decode("latin-1") for name, value in headers}
    host, origin = found.get(b"host", ""), found.get(b"origin")
    site = found.get(b"sec-fetch-site", "none")
    if site not in ("same-origin", "none") or (origin is not None and not _same(origin, host)):
        whose = shown(origin) if origin is not None else "another site"
        raise ProtocolError(f"a page of {whose} asks for this: ask without a browser, or from a page of this host", status=403)
    if local and host and not is_loopback(_place("http", host)[0]):
        raise ProtocolError(
            f"host {shown(host)}: this server is this machine's alone and asks for no token; call it localhost, or give it tokens",
            status=403,
        )


def is_loopback(name: str) -> bool:
    """Whether a name or an address can only be this machine's."""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _same(origin: str, host: str) -> bool:
    scheme, _, place = origin.partition("://")
    return scheme in _PORTS and _place(scheme, place) == _place(scheme, host) != ("", 0)


def _place(scheme: str, host: str) -> tuple[str, int]:
    """(name, port), ("", 0) where it is neither."""
    try:
        found = urlsplit(f"//{host}")
        return found.hostname or "", found.port or _PORTS[scheme]
    except ValueError:
        return "", 0
