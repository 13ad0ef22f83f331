"""A version: its contract, its states, the times that it remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muntin.artifact import Sizes
from muntin.serving.versions.version import CALLS, TIMES, Latencies, Version, contract_difference
from muntin.serving.worker.opening import NotReadyError
from serving_parts import image_call
from tensor_models import SIGNATURE

SCORES, LABELS = image_call((2, 8, 8)), image_call((1, 4, 8), labels=True)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({}, ""),
        ({"classes": ("sea", "field", "roof", "road", "tree")}, ""),  # one more at the end
        ({"classes": ("sea", "field", "roof")}, 'class 3 is none where "road" is served'),
        ({"classes": ("field", "sea", "roof", "road")}, 'class 0 is "field" where "sea" is served'),
        ({"channels": 4}, "channels 4 where 3 is served"),
        ({"scale": 2}, "scale 2 where 1 is served"),
        ({"sizes": Sizes.both(multiple=2)}, "images of height and width multiples of 2 where every size is served"),
        ({"task": "classify"}, "task classify where segment is served"),
    ],
)
def test_contract(signature_of: Any, changes: dict[str, Any], difference: str) -> None:
    assert contract_difference(signature_of(**changes), signature_of()) == difference


def test_contract_with_more_sizes(signature_of: Any) -> None:
    assert contract_difference(signature_of(), signature_of(sizes=Sizes.only(32, 32))) == ""


def test_contract_of_named_tensors() -> None:
    narrower = SIGNATURE.model_copy(update={"outputs": SIGNATURE.outputs[:1]})
    assert contract_difference(narrower, SIGNATURE) == "output 1 is none where label int64 (batch) is served"


def test_latencies() -> None:
    latencies, first = Latencies(), image_call((7, 8, 8))
    latencies.add(first, 1.0)
    for seconds in range(TIMES + 5):
        latencies.add(SCORES, seconds)
    assert latencies.of(SCORES) == tuple(range(5, TIMES + 5))
    assert latencies.calls == (first, SCORES)
    for batch in range(CALLS - 2):
        latencies.add(image_call((batch + 8, 8, 8)), 1.0)
    latencies.add(SCORES, 1.0)
    latencies.add(LABELS, 1.0)
    assert len(latencies.calls) == CALLS
    assert latencies.of(first) == ()
    assert list(latencies.calls)[-2:] == [SCORES, LABELS]
    latencies.forget(LABELS)
    latencies.forget(LABELS)
    assert LABELS not in latencies.calls


def test_session_while_open(shelf: Any) -> None:
    version, path = Version(name="1", path=Path("1")), Path("1")
    for part in ("session", "signature"):
        with pytest.raises(NotReadyError, match="version 1 is loading"):
            getattr(version, part)
    opened = shelf.open(path)
    version.opened(opened)
    assert (version.state, version.session, version.digest) == ("ready", opened.session, opened.digest)
    opened.session.deaths, opened.session.last_death = 1, "killed"
    assert (version.new_death(), version.new_death()) == ("killed", "")
    assert version.close() is opened.session
    assert (version.open, version.able, version.deaths) == (False, False, 1)
    assert version.signature == opened.signature
