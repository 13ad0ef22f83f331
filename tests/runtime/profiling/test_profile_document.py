"""The document is plain JSON, fits the schema that the page reads, and its rows sum to the time measured."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from muntin.artifact import open_artifact
from muntin.errors import DataError
from muntin.reporting import write_profile
from muntin.reporting.profile_schema import parse_profile
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.kernels import BETWEEN, INTERRUPTIONS, Ceilings
from muntin.runtime.profiling.profile import Profile, profile
from muntin.runtime.profiling.profile_document import kinds, profile_dict
from tensor_models import write_tensors

CEILINGS = Ceilings(gmacs={"f32": 100.0, "i8": 400.0}, copy_gb_s=10.0, threads=1, others=0.0)


@pytest.fixture(scope="module")
def result(convolutions: Any) -> Profile:
    return profile(convolutions.path, SessionOptions(precision="f32", threads=1), shape=(1, 24, 40), rounds=2, ceilings=CEILINGS)


def test_document_fits_the_schema(result: Profile) -> None:
    document = json.loads(json.dumps(profile_dict(result), allow_nan=False))
    parse_profile(document)
    assert document["format"] == 1
    assert document["shape"] == [1, 24, 40]
    assert document["artifact"] == {
        "path": str(result.artifact.path), "bytes": result.artifact.bytes, "sha256": result.artifact.digest,
    }  # fmt: skip
    assert document["ceilings"] == {"gmacs": {"f32": 100.0, "i8": 400.0}, "copy_gb_s": 10.0}
    assert [kernel["name"] for kernel in document["kernels"]] == [kernel.name for kernel in result.kernels]
    body = next(kernel for kernel in document["kernels"] if kernel["name"] == "body")
    assert body["layer"] == "body"
    assert body["macs"] == 24 * 40 * 32 * 32 * 9
    assert body["share"] == pytest.approx(body["ms"] / document["profiled_ms"])
    assert body["ceiling_share"] == pytest.approx(body["attainable_ms"] / body["ms"])


def test_title_of_the_current_folder(result: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(result.artifact.path)
    document = profile_dict(replace(result, artifact=open_artifact(Path())))
    assert (document["title"], document["artifact"]["path"]) == ("convolutions: 1 x 24 x 40", ".")


def test_path_that_is_no_utf_8(result: Profile, tmp_path: Path) -> None:
    document = profile_dict(replace(result, artifact=replace(result.artifact, path=tmp_path / os.fsdecode(b"caf\xe9"))))
    assert document["title"] == "caf\\udce9: 1 x 24 x 40"
    assert document["artifact"]["path"] == f"{tmp_path}/caf\\udce9"
    parse_profile(document)


def test_kinds_sum_to_the_whole(result: Profile) -> None:
    quiet = replace(result, profiled_ms=result.kernels_ms + 0.5, between_ms=0.5)
    rows = kinds(quiet)
    assert sum(row["ms"] for row in rows) == pytest.approx(quiet.profiled_ms)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(row["count"] for row in rows) == len(quiet.kernels)
    assert {kernel.words for kernel in quiet.kernels} == {row["kind"] for row in rows} - {BETWEEN}
    assert [row["ms"] for row in rows if row["kind"] == BETWEEN] == [pytest.approx(0.5)]


def test_interruptions(result: Profile) -> None:
    disturbed = replace(result, profiled_ms=3 * result.kernels_ms, between_ms=0.25 * result.kernels_ms)
    rows = {row["kind"]: row["ms"] for row in kinds(disturbed)}
    assert rows[BETWEEN] == pytest.approx(0.25 * result.kernels_ms)
    assert rows[INTERRUPTIONS] == pytest.approx(1.75 * result.kernels_ms)
    assert sum(rows.values()) == pytest.approx(disturbed.profiled_ms)
    rows = {row["kind"]: row["ms"] for row in kinds(replace(result, profiled_ms=0.9 * result.kernels_ms))}  # medians need not add up
    assert rows[BETWEEN] == 0
    assert INTERRUPTIONS not in rows


def test_kernel_without_ceiling(result: Profile) -> None:
    document = profile_dict(replace(result, ceilings=replace(CEILINGS, gmacs={"bf16": 1.0})))
    assert {kernel["ceiling_share"] for kernel in document["kernels"] if kernel["macs"]} == {None}
    parse_profile(document)


def test_document_of_named_tensors(tmp_path: Path) -> None:
    artifact = write_tensors(tmp_path / "text")
    options = SessionOptions(precision="f32", threads=1)
    result = profile(artifact.path, options, dims={"batch": 4}, rounds=2, ceilings=CEILINGS)
    assert (result.shape, result.dims, result.size) == (None, {"batch": 4, "tokens": 8}, "batch 4, tokens 8")
    document = profile_dict(result)
    page = write_profile(tmp_path / "out", document).read_text()
    assert document["title"] == "text: batch 4, tokens 8"
    assert "batch 4, tokens 8" in page
    assert sum(kernel["macs"] for kernel in document["kernels"]) == 4 * 16 * 32 + 4 * 32 * 24  # OpenVINO may join the two
    assert not any("the image" in finding["words"] or "the scores" in finding["words"] for finding in document["findings"])
    with pytest.raises(DataError, match=r"takes named tensors: give dims, sizes of its free dimensions \(batch, tokens\)"):
        profile(artifact.path, options, shape=(1, 8, 8))
    with pytest.raises(DataError, match="dims with sizes of batch, tokens, words: give one of each free dimension"):
        profile(artifact.path, options, dims={"words": 4})
