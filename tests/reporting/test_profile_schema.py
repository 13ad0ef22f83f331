"""The schema of a profile, and the one-line errors of values that do not fit it."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from muntin.errors import MuntinError
from muntin.reporting.profile_schema import parse_profile


def refusal(profile: Any) -> str:
    with pytest.raises(MuntinError) as caught:
        parse_profile(profile)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_profile_round_trip(profile: dict[str, Any]) -> None:
    checked = parse_profile(profile)
    values = json.loads(json.dumps(checked.model_dump(mode="json"), allow_nan=False))
    assert values == profile
    assert parse_profile(values) == parse_profile(checked) == checked


def test_profile_without_findings_and_notes(profile: dict[str, Any]) -> None:
    del profile["findings"], profile["notes"]
    assert (parse_profile(profile).findings, parse_profile(profile).notes) == ((), ())


def test_hardware_without_memory(profile: dict[str, Any]) -> None:
    profile["hardware"]["memory_gib"] = None
    assert parse_profile(profile).hardware.memory_gib is None


def test_numpy_numbers_and_unusual_names(profile: dict[str, Any]) -> None:
    profile["kernels"][0].update(ms=np.float32(0.5), name="", layer="層/🙂", implementation="")
    kernel = parse_profile(profile).kernels[0]
    assert (kernel.ms, kernel.name, kernel.layer) == (0.5, "", "層/🙂")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("whole_ms",), 0, "whole_ms is 0"),
        (("whole_ms",), math.nan, "a profile holds finite numbers only"),
        (("kernels", 1, "ms"), -1.0, "kernels[1].ms is -1.0"),
        (("kernels", 1, "ms"), math.inf, "kernels[1].ms is inf"),
        (("kernels", 1, "macs"), 0.5, "kernels[1].macs is 0.5"),
        (("kernels",), [], "kernels is []"),
        (("ceilings", "gmacs", "i8"), 0, "ceilings.gmacs.i8 is 0"),
        (("ceilings", "copy_gb_s"), None, "ceilings.copy_gb_s is None"),
        (("shape",), [512, 512], "shape[2] is missing"),
        (("threads",), 0, "threads is 0"),
        (("created",), "yesterday", "a moment is written as in"),
        (("findings", 0, "words"), "", "findings[0].words is ''"),
        (("kernels", 0, "kind"), "magic", "kinds lacks 'magic'"),
        (("kinds", 1, "kind"), "quantise / convert", "kinds holds the name 'quantise / convert' twice"),
        (("kernels", 0, "mac"), 1, "kernels[0].mac is an unknown key; did you mean 'macs'?"),
        (("format",), 2, "profile format 2 is newer than this muntin reads (1): upgrade muntin"),
    ],
)
def test_invalid_profile_values(profile: dict[str, Any], place: tuple[int | str, ...], value: Any, message: str) -> None:
    part: Any = profile
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    assert message in refusal(profile)


def test_missing_profile_keys(profile: dict[str, Any]) -> None:
    del profile["kernels"][0]["bytes"], profile["rounds"]
    message = refusal(profile)
    assert "is missing" in message
    assert message.endswith("(and 1 more)")
    assert "a profile is an object" in refusal([profile])
