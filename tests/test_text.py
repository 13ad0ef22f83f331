"""Texts that go out."""

from __future__ import annotations

import os

import pytest

from muntin.text import plain


@pytest.mark.parametrize(("text", "told"), [("a.txt", "a.txt"), ("été", "été"), (os.fsdecode(b"\xe9t\xe9"), "\\udce9t\\udce9")])
def test_a_name_that_is_no_text_is_made_one(text: str, told: str) -> None:
    assert plain(text) == told
    assert plain(told) == told
