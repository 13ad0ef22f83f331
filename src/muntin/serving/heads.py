"""Heads of HTTP requests that were parsed before: the same bytes say the same.

A client sends the same head, byte for byte, with every image of a size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

HEAD_BYTES = 1024
"""Of a head that is known, at most."""
_HEADS = 256
_CHANGING = frozenset({b"transfer-encoding", b"upgrade", b"expect"})
"""Headers by which a head is more than the length of its body; `connection` too, if it says more than that it stays open."""


class Known(NamedTuple):
    """What a request's head said: the ASGI scope, but for the client, and the length of the body."""

    scope: dict[str, Any]
    length: int


class KnownHeads(OrderedDict[bytes, Known]):
    """Those that were learned last, by their bytes."""

    def learn(self, head: bytes, known: Known) -> None:
        self[head] = known
        if len(self) > _HEADS:
            self.popitem(last=False)


def known_head(head: bytes, scope: Mapping[str, Any], target: bytes) -> Known | None:
    """What a head that was just parsed says, if whatever has the same bytes is a request with a body of the same length.

    `scope`: what was parsed out of it, of a connection that stays open; `target`: its request's, as it was sent.
    """
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    plain = scope["http_version"] == "1.1" and not any(
        name in _CHANGING or (name == b"connection" and value.lower() != b"keep-alive") for name, value in scope["headers"]
    )
    # A parser passes over empty lines before a request, and what is remembered must be one whole head: it begins with the
    # method and has a line for every header. With no line feed alone in it, the first empty line ends it, for any parser.
    whole = head.startswith(b"%s %s HTTP/1.1\r\n" % (scope["method"].encode(), target))
    whole = whole and head.count(b"\n") == head.count(b"\r\n") == len(scope["headers"]) + 2
    if plain and whole and len(lengths) == 1 and int(lengths[0]):
        return Known(dict(scope), int(lengths[0]))
    return None
