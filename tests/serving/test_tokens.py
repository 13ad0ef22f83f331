"""Bearer tokens."""

from __future__ import annotations

import pytest

from muntin.serving.protocol import ProtocolError
from muntin.serving.tokens import Tokens


def test_without_tokens_everybody_may_ask() -> None:
    tokens = Tokens(())
    assert not tokens
    tokens.check(b"")
    tokens.check(b"Bearer anything")


@pytest.mark.parametrize("given", [b"Bearer one", b"Bearer two"])
def test_one_of_the_tokens_is_enough(given: bytes) -> None:
    Tokens(("one", "two")).check(given)


@pytest.mark.parametrize(
    "given", [b"", b"one", b"Bearer", b"Bearer ", b"Bearer onetwo", b"bear one", b"Basic one", "Bearer \xf6ne".encode()]
)
def test_anything_else_is_not(given: bytes) -> None:
    with pytest.raises(ProtocolError, match="Bearer TOKEN") as caught:
        Tokens(("one", "two")).check(given)
    assert (caught.value.status, caught.value.grpc_code) == (401, "UNAUTHENTICATED")
