"""The schema of a report, and the one-line errors of values that do not fit it."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.errors import MuntinError
from muntin.reporting.profile_schema import ProfileRecord, parse_profile
from muntin.reporting.schema import Report, parse_report, report_values
from muntin.reporting.text import machine_facts

NOT_FINITE = (math.nan, math.inf, -math.inf)


def refusal(report: Any) -> str:
    with pytest.raises(MuntinError) as caught:
        parse_report(report)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_report_round_trip(report: dict[str, Any]) -> None:
    checked = parse_report(report)
    values = json.loads(json.dumps(report_values(checked), allow_nan=False))
    assert values == report
    assert parse_report(values) == checked


def test_report_of_the_required_keys(report: dict[str, Any]) -> None:
    needed = ("title", "created", "muntin", "hardware", "task", "steps")
    least = {key: report[key] for key in needed} | {"steps": [{**report["steps"][0], "iou": {}}]}
    checked = parse_report(least)
    assert (checked.format, checked.latency, checked.pictures, checked.layers) == (1, None, None, ())
    assert "recipe" not in report_values(checked)


def test_recommendation_is_an_artefact(report: dict[str, Any]) -> None:
    report["artifacts"]["take"] = "fp32"
    assert "artifacts.take is 'fp32'; the artefacts are ['int8', 'mixed']" in refusal(report)


def test_report_from_before_ranks(report: dict[str, Any]) -> None:
    del report["ranks"]
    for layer in report["layers"]:
        del layer["clipped"], layer["histogram"], layer["note"]
    checked = parse_report(report)
    assert checked.ranks == ()
    assert {(layer.clipped, layer.histogram, layer.note) for layer in checked.layers} == {(None, None, "")}
    assert report_values(checked) == report


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranks": [8, 8, 8]}, "ranks[1].ranks is"),
        ({"ranks": [0]}, "ranks[1].ranks[0] is 0"),
        ({"full": []}, "ranks[1].full is []"),
        ({"full": [64], "ranks": [8, 8]}, "different lengths"),
        ({"full": [64, 32], "ranks": [8, 48]}, "a rank is at most the full one"),
        ({"parameters_after": -1}, "ranks[1].parameters_after is -1"),
        ({"name": "stem.0"}, "ranks holds the name 'stem.0' twice"),
        ({"rank": [8]}, "ranks[1].rank is an unknown key; did you mean 'ranks'?"),
    ],
)
def test_invalid_ranks(report: dict[str, Any], change: dict[str, Any], words: str) -> None:
    report["ranks"][1].update(change)
    assert words in refusal(report)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"low": 1.0, "high": 1.0}, "low 1.0 is not below high 1.0"),
        ({"grid_low": 2.0, "grid_high": 1.0}, "grid_low 2.0 is not below grid_high 1.0"),
        ({"counts": [1]}, "histogram.counts is [1]"),
        ({"counts": [1] * 129}, "histogram.counts is"),
        ({"counts": [1, -1]}, "histogram.counts[1] is -1"),
        ({"high": math.inf}, "histogram.high is inf"),
        ({"bins": 2}, "histogram.bins is an unknown key; allowed here: low, high, counts, grid_low, grid_high"),
    ],
)
def test_invalid_histograms(report: dict[str, Any], change: dict[str, Any], words: str) -> None:
    next(layer for layer in report["layers"] if layer["histogram"])["histogram"].update(change)
    assert words in refusal(report)


def test_numpy_numbers(report: dict[str, Any]) -> None:
    report["steps"][0]["miou"] = np.float32(0.5)
    report["training"][0]["loss"] = np.float64(1.25)
    values = report_values(parse_report(report))
    assert (values["steps"][0]["miou"], values["training"][0]["loss"]) == (0.5, 1.25)


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("steps[2].miou", ("steps", 2, "miou")),
        ("steps[0].iou.ocean", ("steps", 0, "iou", "ocean")),
        ("steps[0].latency_ms", ("steps", 0, "latency_ms")),
        ("training[3].loss", ("training", 3, "loss")),
        ("agreement", ("agreement",)),
        ("latency.rows[1].p90_ms", ("latency", "rows", 1, "p90_ms")),
        ("layers[1].sqnr_db", ("layers", 1, "sqnr_db")),
        ("layers[1].clipped", ("layers", 1, "clipped")),
        ("seconds.train", ("seconds", "train")),
    ],
)
def test_numbers_that_are_not_finite(report: dict[str, Any], place: str, path: tuple[int | str, ...], value: float) -> None:
    part: Any = report
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    message = refusal(report)
    assert f"{place} is {value}" in message
    assert "finite" in message


def test_free_hardware_key_that_is_not_finite(report: dict[str, Any]) -> None:
    report["hardware"]["clock_ghz"] = math.nan
    assert "hardware.clock_ghz" in refusal(report)


def test_unknown_keys(report: dict[str, Any]) -> None:
    report["steps"][1]["mioU"] = 0.5
    assert "steps[1].mioU is an unknown key; did you mean 'miou'?" in refusal(report)
    del report["steps"][1]["mioU"]
    report["pictures"]["examples"][0]["zzzz"] = "x.png"
    assert "allowed here: name, image, truth, prediction, difference" in refusal(report)


def test_missing_keys(report: dict[str, Any]) -> None:
    del report["steps"][0]["bytes"], report["steps"][1]["engine"]
    message = refusal(report)
    assert "steps[0].bytes is missing" in message
    assert message.endswith("(and 1 more)")


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.png", "a/../../b.png", "a\\b.png", ""])
def test_picture_outside_the_folder(report: dict[str, Any], path: str) -> None:
    report["pictures"]["overlay"] = path
    assert "pictures.overlay" in refusal(report)


def test_inconsistent_report(report: dict[str, Any]) -> None:
    report["steps"][1]["iou"]["lava"] = 0.5
    assert "steps[1].iou names the class 'lava'" in refusal(report)
    del report["steps"][1]["iou"]["lava"]
    report["steps"][1]["miou"] = 65.1
    assert "steps[1].miou is 65.1; the metric of a segment report lies in 0 to 1" in refusal(report)
    report["steps"][1].update(miou=0.5, name="fp32")
    assert "'fp32' twice" in refusal(report)


def test_metric_of_a_restoration(report: dict[str, Any]) -> None:
    report["task"] = "restore"
    report["steps"][0]["miou"] = 31.7
    assert parse_report(report).steps[0].miou == 31.7


def test_newer_format(report: dict[str, Any]) -> None:
    assert refusal(report | {"format": 2}) == "report format 2 is newer than this muntin reads (1): upgrade muntin"
    assert "format" in refusal(report | {"format": 0})


def test_line_breaks_in_keys_and_values(report: dict[str, Any]) -> None:
    assert "unknown key" in refusal(report | {"two\nlines": 1})
    assert "created" in refusal(report | {"created": "yes\nterday"})
    assert "list" in refusal([report])


@pytest.mark.parametrize(("parse", "record"), [(parse_report, Report), (parse_profile, ProfileRecord)])
@given(data=st.data())
def test_any_other_values_give_one_line(parse: Any, record: type[Report | ProfileRecord], data: st.DataObject) -> None:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    keys = st.sampled_from(sorted(record.model_fields))
    values = data.draw(
        st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12)
    )
    with pytest.raises(MuntinError) as caught:
        parse(values)
    assert str(caught.value).splitlines() == [str(caught.value)]


def test_hardware_gpus(report: dict[str, Any]) -> None:
    report["hardware"]["gpus"] = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"]
    checked = parse_report(report)
    assert ("gpus", "NVIDIA H100 80GB HBM3, NVIDIA H100 80GB HBM3") in machine_facts(checked.hardware, checked.muntin)
    report["hardware"]["gpus"] = [{"name": "H100"}]
    assert "hardware.gpus" in refusal(report)
