"""Bearer tokens."""

from __future__ import annotations

import pytest

from muntin.serving.protocol.messages import ProtocolError
from muntin.serving.security.bearer_tokens import Tokens


def test_no_tokens() -> None:
    tokens = Tokens(())
    assert not tokens
    tokens.check(b"")
    tokens.check(b"Bearer anything")


@pytest.mark.parametrize("header", [b"Bearer one", b"Bearer two"])
def test_valid_token(header: bytes) -> None:
    Tokens(("one", "two")).check(header)


@pytest.mark.parametrize(
    "header", [b"", b"one", b"Bearer", b"Bearer ", b"Bearer onetwo", b"bear one", b"Basic one", "Bearer \xf6ne".encode()]
)
def test_invalid_token(header: bytes) -> None:
    with pytest.raises(ProtocolError, match="Bearer TOKEN") as caught:
        Tokens(("one", "two")).check(header)
    assert (caught.value.status, caught.value.grpc_code) == (401, "UNAUTHENTICATED")
