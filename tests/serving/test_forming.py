"""What of large answers a server may hold, and which are put into form beside the event loop."""

from __future__ import annotations

from typing import Any

import pytest

from muntin.serving.forming import COPIED, HELD_BYTES, INLINE, LISTED, TEXT, Forming, formed_apart
from muntin.serving.outputs import Wanted
from muntin.serving.protocol import RefusedRequestError


def wanted(nbytes: int, *, labels: bool = False, listed: int = 0, binary: bool = True, **changes: Any) -> Wanted:
    named = {"names": ("labels",) if labels else ("scores",), "as_it_is": binary and not listed}
    return Wanted(**(named | {"labels": labels, "nbytes": nbytes, "listed": listed, "binary": binary} | changes))


@pytest.mark.parametrize(
    ("what", "held"),
    [
        (wanted(4 * INLINE), 0),
        (wanted(4 * INLINE + 4), 4 * INLINE + 4),  # as it was computed, too: its client may not read it
        (wanted(4 * INLINE + 4, binary=False), TEXT * (4 * INLINE + 4)),
        (wanted(INLINE, labels=True, binary=False), 0),
        (wanted(INLINE + 1, labels=True), INLINE + 1),
        (wanted(100, listed=LISTED + 1), 100),
    ],
)
def test_large_answers_are_held(what: Wanted, held: int) -> None:
    forming = Forming()
    assert forming.hold(what) == forming.held == held
    forming.let_go(held)
    assert forming.held == 0
    forming.close()


def test_beyond_the_bound_only_who_is_alone_is_admitted() -> None:
    forming, huge = Forming(), wanted(2 * HELD_BYTES)
    held = forming.hold(huge)
    with pytest.raises(RefusedRequestError, match="large answers fill"):
        forming.hold(wanted(4 * INLINE + 4))
    assert forming.hold(wanted(4 * INLINE)) == 0
    forming.let_go(held)
    quarter = HELD_BYTES // TEXT // 4
    for _ in range(4):
        forming.hold(wanted(quarter, binary=False))
    with pytest.raises(RefusedRequestError):
        forming.hold(wanted(quarter, binary=False))
    assert forming.held == HELD_BYTES
    forming.close()


@pytest.mark.parametrize(
    ("what", "copies", "apart"),
    [
        (wanted(4 * INLINE, binary=False), False, False),
        (wanted(4 * INLINE + 4, binary=False), False, True),
        (wanted(8 * COPIED), False, False),
        (wanted(8 * COPIED), True, True),
        (wanted(COPIED), True, False),
        (wanted(8 * COPIED, as_it_is=False), False, True),
        (wanted(100, listed=LISTED + 1), False, True),
    ],
)
def test_what_takes_long_to_form_is_formed_beside_the_loop(what: Wanted, copies: bool, apart: bool) -> None:
    assert formed_apart(what, copies=copies) == apart
