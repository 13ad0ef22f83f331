"""The file of the table, what makes it valid, and plans from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model_helpers import one_line, pixels
from muntin.budgeting.forms.plans import Form
from muntin.budgeting.tables import FILE, FormRow, Tables, assign_forms, build_tables, model_digest
from muntin.errors import DataError, MuntinError

TABLES = Tables(
    layers={
        "a, b": (
            FormRow(form=Form(None, 4), parameters=10, bytes=5, macs=10.5, harm=0.1, ms=0.25),
            FormRow(form=Form(None, 16), parameters=10, bytes=20, macs=10.5, harm=0.0, ms=0.5),
        ),
        "c": (
            FormRow(form=Form(16, 8), parameters=9, bytes=9, macs=9.0, harm=1 / 3, ms=0.1),
            FormRow(form=Form(None, 16), parameters=20, bytes=40, macs=20.0, harm=0.0, ms=1.0),
        ),
    },
    reasons={"c": ('it is "kept",\nfor a reason',)},
    model="m",
    calibration="c",
    latency={"engine": "openvino", "threads": 2},
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 48, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(48, 5)).eval()


def batches() -> list[Tensor]:
    return [pixels(4, 3, 16, 16), pixels(4, 3, 16, 16)]


def test_file_round_trip(tmp_path: Path) -> None:
    TABLES.write(tmp_path)
    assert Tables.read(tmp_path) == TABLES
    lines = (tmp_path / FILE).read_text().splitlines()
    assert lines[1] == "layer,rank,bits,parameters,bytes,macs,harm,ms"
    assert lines[2] == '"a, b",,4,10,5,10.5,0.1,0.25' and lines[4].startswith("c,16,8,9,9,9.0,0.333")
    untimed = {name: tuple(replace(row, ms=None) for row in rows) for name, rows in TABLES.layers.items()}
    without = replace(TABLES, layers=untimed, latency=None)
    without.write(tmp_path)
    assert Tables.read(tmp_path) == without
    with pytest.raises(ValueError, match='build it with objective="latency"'):
        without.options("latency")


@pytest.mark.parametrize("text", ["", "# {}\nlayer\n", '# {"format": 9}\n', "layer,rank\n", '# {"format": 1}\nlayer\n'])
def test_file_of_another_kind(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError) as error:
        Tables.read(tmp_path)
    assert "delete the file to measure again" in one_line(error)


def test_plans_within_a_limit() -> None:
    plan = assign_forms(TABLES, 0.2, "size")
    assert plan.forms == {"a, b": Form(None, 4), "c": Form(None, 16)}
    assert (plan.harm, plan.cost, plan.gap) == (0.1, 45, 0)
    assert assign_forms(TABLES, 0.35, "latency").forms == {"a, b": Form(None, 16), "c": Form(16, 8)}
    equal = {name: tuple(replace(row, ms=0.5) for row in rows) for name, rows in TABLES.layers.items()}
    assert assign_forms(replace(TABLES, layers=equal), 1.0, "latency").forms == {"a, b": Form(None, 4), "c": Form(16, 8)}
    with pytest.raises(MuntinError, match="out of reach"):
        assign_forms(TABLES, -1.0, "size")


def test_table_without_forms_of_named_layers() -> None:
    rows = [FormRow(form=Form(rank, bits), parameters=1, bytes=1, macs=1, harm=0) for rank, bits in ((None, 16), (None, 4), (8, 4))]
    tables = Tables(layers={"a.0": tuple(rows), "a.1": tuple(rows), "b": tuple(rows)}, reasons={}, model="", calibration="")
    found = tables.without(["a.0"], ["a.*"]).layers
    assert {name: [row.form for row in left] for name, left in found.items()} == {
        "a.0": [Form(None, 16)], "a.1": [Form(None, 16), Form(None, 4)], "b": [Form(None, 16), Form(None, 4), Form(8, 4)],
    }  # fmt: skip


def test_table_is_read_again_and_a_changed_model_is_noticed(tmp_path: Path) -> None:
    model, calibration = network(), batches()
    digest, steps = model_digest(model), []
    tables = build_tables(model, calibration, tmp_path, objective="size", progress=lambda step, done, total: steps.append(step))
    assert set(steps) == {"forms", "harm"} and model_digest(model) == digest == tables.model
    assert list(tables.layers) == ["0", "2", "6"]
    written = (tmp_path / FILE).stat().st_mtime_ns
    assert build_tables(network(), calibration, tmp_path, objective="size") == tables
    assert (tmp_path / FILE).stat().st_mtime_ns == written
    other = network()
    other[2].weight.data[0, 0, 0, 0] += 1e-3
    with pytest.raises(MuntinError) as error:
        build_tables(other, calibration, tmp_path, objective="size")
    assert "measured with another model, or other weights: give another folder" in one_line(error)
    with pytest.raises(MuntinError, match="measured with other calibration batches"):
        build_tables(model, [batches()[0]], tmp_path, objective="size")


def test_same_inputs_give_the_same_file(tmp_path: Path) -> None:
    calibration = batches()
    for folder in ("one", "other"):
        build_tables(network(), calibration, tmp_path / folder, objective="size")
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "other" / FILE).read_bytes()


@pytest.mark.slow
def test_milliseconds_are_added(tmp_path: Path) -> None:
    model, calibration = network(), batches()
    sizes = build_tables(model, calibration, tmp_path, objective="size")
    timed = build_tables(model, calibration, tmp_path, objective="latency", threads=1)
    assert timed.latency is not None and timed.latency["threads"] == 1
    assert all(row.ms is not None for rows in timed.layers.values() for row in rows)
    assert {name: tuple(replace(row, ms=None) for row in rows) for name, rows in timed.layers.items()} == sizes.layers
    assert Tables.read(tmp_path) == timed == build_tables(model, calibration, tmp_path, objective="latency", threads=1)
    assert assign_forms(timed, 1.0, "latency").cost > 0
