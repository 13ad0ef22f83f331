"""The manifest: what it admits, and that nobody changes a value in it unnoticed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from muntin.artifact import ClassInfo, GoldenTolerance, Manifest, Signature
from muntin.artifact.manifest import parse_manifest, render_manifest
from muntin.errors import ArtifactError

CLASSES = (ClassInfo(name="a", color=(1, 2, 3)), ClassInfo(name="b", color=(4, 5, 6)))


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "muntin": "0.1.0",
        "created": "2026-11-24T16:00:00+00:00",
        "signature": Signature(task="segment", channels=3, classes=CLASSES),
        "measured": {"miou": 0.61, "cpu": "Änderung", "rows": [1, None, True]},
        "golden_tolerance": {"openvino": {"bf16": GoldenTolerance(max_error=0.1, label_agreement=0.99)}},
    }
    return Manifest(**(fields | changes))


def test_round_trip() -> None:
    written, data = render_manifest(manifest())
    assert parse_manifest(data, "manifest.json") == written
    assert written.sha256 != ""


def test_indentation_may_change() -> None:
    written, data = render_manifest(manifest())
    assert parse_manifest(json.dumps(json.loads(data), indent=4, sort_keys=True).encode(), "m") == written


RENDERED = render_manifest(manifest())[1]


@given(position=st.integers(0, len(RENDERED) - 1), flip=st.integers(1, 255))
@settings(max_examples=300)
def test_changed_byte(position: int, flip: int) -> None:
    changed = bytearray(RENDERED)
    changed[position] ^= flip
    try:
        read = parse_manifest(bytes(changed), "manifest.json")
    except ArtifactError as error:
        assert "manifest.json" in str(error)
        assert "\n" not in str(error)
    else:  # another white space, another spelling of the same value
        assert read == parse_manifest(RENDERED, "manifest.json")


def test_newer_format() -> None:
    content = json.loads(RENDERED) | {"format": 4}
    with pytest.raises(ArtifactError, match=r"artefact format 4 is newer than this muntin reads \(3\): upgrade muntin"):
        parse_manifest(json.dumps(content).encode(), "manifest.json")
    with pytest.raises(ArtifactError, match="made by an earlier version: export again"):
        parse_manifest(json.dumps(content | {"format": 1}).encode(), "manifest.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"format": "1"}', b"[" * 100_000])
def test_no_manifest(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        parse_manifest(data, "manifest.json")


def test_unknown_field_is_named() -> None:
    content = json.loads(RENDERED) | {"hook": "os.system"}
    del content["sha256"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    content["sha256"] = hashlib.sha256(canonical).hexdigest()
    with pytest.raises(ArtifactError, match="`hook`"):
        parse_manifest(json.dumps(content).encode(), "manifest.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "segment", "channels": 3},
        {"task": "restore", "channels": 3, "classes": CLASSES},
        {"task": "classify", "channels": 3, "classes": CLASSES, "scale": 2},
        {"task": "segment", "channels": 0, "classes": CLASSES},
        {"task": "paint", "channels": 3, "classes": CLASSES},
        {"task": "segment", "channels": 3, "classes": CLASSES, "dtype": "float32"},
    ],
)
def test_wrong_signatures(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Signature(**fields)


def test_shapes_of_scores() -> None:
    assert Signature(task="segment", channels=3, classes=CLASSES, scale=2).scores_shape(1, 5, 7) == (1, 2, 10, 14)
    assert Signature(task="restore", channels=4).scores_shape(2, 5, 7) == (2, 4, 5, 7)
    assert Signature(task="classify", channels=1, classes=CLASSES).scores_shape(3, 5, 7) == (3, 2)


def test_file_names_are_a_fixed_set() -> None:
    with pytest.raises(ValidationError):
        manifest(files={"../../etc/passwd": "0" * 64})
