"""Large answers, and the bound of the bytes that they hold."""

from __future__ import annotations

import pytest

from muntin.serving.inference.encoding import HELD_BYTES, INLINE_BYTES, INLINE_CLASSES, INLINE_NUMBERS, JSON_EXPANSION, AnswerEncoder
from muntin.serving.inference.requests import Wanted
from muntin.serving.protocol.messages import RefusedRequestError


def answer_of(nbytes: int, *, listed: int = 0, binary: bool = True) -> Wanted:
    return Wanted(names=("scores",), nbytes=nbytes, listed=listed, binary=binary)


@pytest.mark.parametrize(
    ("answer", "held"),
    [
        (answer_of(4 * INLINE_NUMBERS), 0),
        (answer_of(INLINE_BYTES + 4), INLINE_BYTES + 4),  # sent as it was computed: its client may not read it
        (answer_of(4 * INLINE_NUMBERS + 4, binary=False), JSON_EXPANSION * (4 * INLINE_NUMBERS + 4)),
        (answer_of(4 * INLINE_NUMBERS, binary=False), 0),
        (answer_of(INLINE_BYTES), 0),
        (answer_of(100, listed=INLINE_CLASSES + 1, binary=False), JSON_EXPANSION * 100),
    ],
)
def test_bytes_reserved_for_an_answer(answer: Wanted, held: int) -> None:
    encoder = AnswerEncoder()
    assert encoder.reserve(answer) == encoder.held_bytes == held
    encoder.release(held)
    assert encoder.held_bytes == 0
    encoder.close()


def test_reserve_beyond_the_bound() -> None:
    encoder, huge = AnswerEncoder(), answer_of(2 * HELD_BYTES)
    held = encoder.reserve(huge)
    with pytest.raises(RefusedRequestError, match="large answers fill"):
        encoder.reserve(answer_of(INLINE_BYTES + 4))
    assert encoder.reserve(answer_of(INLINE_BYTES)) == 0
    encoder.release(held)
    quarter = HELD_BYTES // JSON_EXPANSION // 4
    for _ in range(4):
        encoder.reserve(answer_of(quarter, binary=False))
    with pytest.raises(RefusedRequestError):
        encoder.reserve(answer_of(quarter, binary=False))
    assert encoder.held_bytes == HELD_BYTES
    encoder.close()
