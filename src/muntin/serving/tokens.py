"""Bearer tokens: who may ask."""

from __future__ import annotations

import hmac

from muntin.serving.protocol import ProtocolError


class Tokens:
    """The tokens of which a request must carry one; none: everybody may ask."""

    def __init__(self, tokens: tuple[str, ...]) -> None:
        self._allowed = [token.encode() for token in tokens]

    def __bool__(self) -> bool:
        return bool(self._allowed)

    def check(self, authorization: bytes) -> None:
        """Raises ProtocolError 401 unless the header's value is "Bearer", in any case, and one of them. Takes as long whatever is wrong."""
        scheme, _, token = authorization.partition(b" ")
        right = sum(hmac.compare_digest(token.strip(), allowed) for allowed in self._allowed)
        if self._allowed and not (right and scheme.lower() == b"bearer"):
            raise ProtocolError("no valid token: send `authorization: Bearer TOKEN`", status=401)
