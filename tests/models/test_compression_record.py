"""The record of compression: from and to JSON, and damaged ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from muntin.models.compression_record import Change, CompressionRecord, TrainedRecord

RECORD = CompressionRecord(
    origin="0" * 64,
    steps=9,
    widths={"stage4.0": 16},
    ranks={"head": (8,), "stem": (4, 12)},
    qat={"stem": TrainedRecord(bits=4, unsigned=(False,)), "scores": TrainedRecord(bits=0, unsigned=(False, True))},
    changes=(
        Change(layer="head", pass_="low_rank", done="rank 8 of 16", ranks=(8,)),
        Change(layer="x", pass_="qat", done="kept", reason="y"),
    ),
)


def test_json_round_trip() -> None:
    content = json.loads(json.dumps(RECORD.model_dump(mode="json"), allow_nan=False))
    assert content["qat"] == {"stem": [4, 0], "scores": [0, 0, 1]} and content["ranks"] == {"head": [8], "stem": [4, 12]}
    assert CompressionRecord.model_validate(content) == RECORD


def test_zero_points() -> None:
    record = TrainedRecord(bits=4, unsigned=(True,), zero_points=(14,))
    content = record.model_dump(mode="json")
    assert content == {"bits": 4, "unsigned": [True], "zero_points": [14]}
    assert TrainedRecord.model_validate(content) == record
    with pytest.raises(ValidationError, match="2 zero_points for 1 grids"):
        TrainedRecord.model_validate(content | {"zero_points": [14, 2]})


def test_record_of_an_earlier_version() -> None:
    record = CompressionRecord.model_validate({"steps": 1, "origin": "1", "ranks": {"head": [8]}, "qat": None, "changes": []})
    assert (record.widths, record.qat) == ({}, None)


@pytest.mark.parametrize(
    ("part", "place"),
    [
        ({"steps": 0}, "steps"),
        ({"widths": {"stage4.0": 0}}, "widths.stage4.0"),
        ({"ranks": {"head": []}}, "ranks.head"),
        ({"ranks": {"head": [8, -1]}}, "ranks.head.1"),
        ({"qat": {"stem": [4]}}, "qat.stem.unsigned"),
        ({"qat": {"stem": [16, 0]}}, "qat.stem.bits"),
        ({"qat": {"stem": []}}, "qat.stem"),
        ({"changes": [{"layer": "head"}]}, "changes.0.pass_"),
        ({"rank": {}}, "rank"),
    ],
)
def test_damaged_record(part: dict[str, Any], place: str) -> None:
    with pytest.raises(ValidationError) as error:
        CompressionRecord.model_validate(RECORD.model_dump(mode="json") | part)
    assert ".".join(map(str, error.value.errors()[0]["loc"])) == place
