"""Bearer tokens."""

from __future__ import annotations

import hmac

from muntin.serving.protocol.messages import ProtocolError


class Tokens:
    """Tokens, one of which a request must carry. False if there are none: then every request is allowed."""

    def __init__(self, tokens: tuple[str, ...]) -> None:
        self._allowed = [token.encode() for token in tokens]

    def __bool__(self) -> bool:
        return bool(self._allowed)

    def check(self, authorization: bytes) -> None:
        """Raise ProtocolError 401 unless the header's value is "Bearer", in any case, and a token. Takes the same time for all others."""
        scheme, _, token = authorization.partition(b" ")
        matches = sum(hmac.compare_digest(token.strip(), allowed) for allowed in self._allowed)
        if self._allowed and not (matches and scheme.lower() == b"bearer"):
            raise ProtocolError("no valid token: send `authorization: Bearer TOKEN`", status=401)
