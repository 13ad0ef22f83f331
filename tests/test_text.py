"""Texts that go out."""

from __future__ import annotations

import os

import pytest

from muntin.text import count, plain


@pytest.mark.parametrize(("text", "told"), [("a.txt", "a.txt"), ("été", "été"), (os.fsdecode(b"\xe9t\xe9"), "\\udce9t\\udce9")])
def test_plain_text(text: str, told: str) -> None:
    assert plain(text) == told
    assert plain(told) == told


def test_count() -> None:
    assert [count(1, "pass"), count(2, "pass"), count(2, "thread")] == ["1 pass", "2 passes", "2 threads"]
