"""Allowed heights and widths: membership, the nearest ones, words, and their place in signatures and manifests."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from muntin.artifact import ClassInfo, Manifest, Sides, Signature, Sizes
from muntin.artifact.manifest import parse_manifest, render_manifest
from muntin.artifact.sizes import golden_sizes

CLASSES = (ClassInfo(name="a", color=(1, 2, 3)), ClassInfo(name="b", color=(4, 5, 6)))
ANY, FIXED = Sizes(), Sizes.only(224, 192)
STRIDED = Sizes.both(multiple=32, min=50, max=200)


def allowed(sides: Sides) -> list[int]:
    return [side for side in range(1, 400) if sides.takes(side)]


@given(low=st.integers(1, 90), span=st.none() | st.integers(0, 90), multiple=st.integers(1, 40), side=st.integers(1, 200))
def test_nearest_sides(low: int, span: int | None, multiple: int, side: int) -> None:
    most = None if span is None else low + span
    try:
        sides = Sides(min=low, max=most, multiple=multiple)
    except ValidationError as error:
        assert most is not None and f"no multiple of {multiple} from {low} to {most}: " in str(error)
        assert not [n for n in range(low, most + 1) if n % multiple == 0]
        return
    every = allowed(sides)
    assert every == [n for n in range(low, 400 if most is None else most + 1) if n % multiple == 0]
    assert sides.at_least(side) == next((n for n in every if n >= side), every[-1])
    assert sides.at_most(side) == next((n for n in reversed(every) if n <= side), every[0])
    assert (sides.fixed, sides.smallest) == (len(every) == 1, every[0])
    assert sides.dim == (every[0] if len(every) == 1 else -1)


@given(st.data())
def test_sides_that_cover_others(data: st.DataObject) -> None:
    def draw() -> Sides:
        multiple = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
        return Sides(min=data.draw(st.integers(1, 12)), max=data.draw(st.none() | st.integers(12 + multiple, 40)), multiple=multiple)

    one, other = draw(), draw()
    assert one.cover(other) == (set(allowed(one)) >= set(allowed(other)))


@pytest.mark.parametrize(
    ("sizes", "text", "dims", "square"),
    [
        (ANY, "every size", (-1, -1), 100),
        (Sizes.both(min=32), "height and width from 32", (-1, -1), 100),
        (Sizes.both(multiple=32), "height and width multiples of 32", (-1, -1), 96),
        (STRIDED, "height and width multiples of 32 from 64 to 200", (-1, -1), 96),
        (Sizes.both(min=128), "height and width from 128", (-1, -1), 128),
        (FIXED, "224 x 192", (224, 192), None),
        (Sizes.only(224, 224), "224 x 224", (224, 224), 224),
        (Sizes(height=Sides(min=64, max=64)), "height 64 and width any", (64, -1), 64),
        (Sizes(height=Sides(multiple=4), width=Sides(multiple=6)), "height multiples of 4 and width multiples of 6", (-1, -1), 96),
    ],
)
def test_words_and_squares(sizes: Sizes, text: str, dims: tuple[int, int], square: int | None) -> None:
    assert (sizes.text, sizes.dims, sizes.square(100)) == (text, dims, square)
    assert Sizes.model_validate_json(sizes.model_dump_json()) == sizes


def test_golden_sizes() -> None:
    assert golden_sizes(512, 300) == ((48, 48), (31, 43))
    assert golden_sizes(512, 300, STRIDED) == ((64, 64),)
    assert golden_sizes(512, 300, Sizes.both(multiple=16, min=32)) == ((48, 48), (32, 48))
    assert golden_sizes(512, 300, FIXED) == ((224, 192),)


def test_sizes_in_a_signature() -> None:
    fields = {"task": "classify", "channels": 3, "classes": CLASSES}
    assert Signature(**fields, side=224, sizes=Sizes.only(224, 224)).sizes.fixed  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="side 200: the model takes height and width multiples of 32 from 64 to 200"):
        Signature(**fields, side=200, sizes=STRIDED)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=r"example \(1, 48, 64\): the model takes height and width multiples of 32"):
        Manifest(muntin="1", created="now", signature=Signature(**fields, sizes=STRIDED), example={"batch": 1, "height": 48, "width": 64})  # type: ignore[arg-type]


def test_manifest_without_sizes() -> None:
    """Written before sizes were recorded."""
    signature = Signature(task="segment", channels=3, classes=CLASSES)
    content = json.loads(render_manifest(Manifest(muntin="1", created="now", signature=signature))[1])
    del content["sha256"], content["signature"]["sizes"]
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert parse_manifest(json.dumps(content).encode(), "m").signature == signature
