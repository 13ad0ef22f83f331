"""A whole profile: shapes, real pixels, sums, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from muntin.artifact import ClassInfo, LayerRecord, Signature, Sizes, open_artifact, write_artifact
from muntin.errors import DataError
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.kernels import Ceilings, Execution
from muntin.runtime.profiling.profile import above, default_shape, fill, notes, profile

CEILINGS = Ceilings(gmacs={"f32": 100.0, "bf16": 200.0, "i8": 400.0}, copy_gb_s=10.0, threads=1, others=0.0)


def rewritten(written: Any, path: Path, **changes: Any) -> Path:
    """The same artefact with other records."""
    manifest = written.artifact.manifest
    arguments: dict[str, Any] = {
        "model": onnx.load_model_from_string(written.artifact.model_bytes()),
        "signature": manifest.signature,
        "golden": list(written.artifact.golden_images()),
        "golden_tolerance": manifest.golden_tolerance,
        "layers": manifest.layers,
    }
    return write_artifact(path, **(arguments | changes)).path


def test_profile_of_an_artefact(convolutions: Any) -> None:
    result = profile(convolutions.path, SessionOptions(precision="f32", threads=1), shape=(2, 24, 40), rounds=3, ceilings=CEILINGS)
    assert (result.engine, result.precision, result.threads, result.shape, result.rounds) == ("openvino", "f32", 1, (2, 24, 40), 3)
    assert {kernel.layer for kernel in result.kernels if kernel.compute} == {"stem", "body", "depthwise", "head"}
    assert result.whole_ms > 0
    assert result.profiled_ms > 0
    assert result.kernels_ms == pytest.approx(sum(kernel.ms for kernel in result.kernels))
    assert result.ceilings is CEILINGS
    assert result.bytes == convolutions.artifact.bytes
    assert result.hardware["cores"] >= 1


def test_macs_scaled_by_the_area(convolutions: Any, tmp_path: Path) -> None:
    """The records hold multiply-adds of one image of 16 x 20."""
    each = {"stem": 3 * 32 * 9, "body": 32 * 32 * 9, "depthwise": 32 * 9, "head": 32 * 5}
    records = [LayerRecord(name=name, kind="Conv2d", weight_bits=8, activation_bits=8, macs=16 * 20 * macs) for name, macs in each.items()]
    path = rewritten(convolutions, tmp_path / "a", layers=records)
    result = profile(path, shape=(2, 32, 40), rounds=1, ceilings=CEILINGS)
    scale = 2 * 32 * 40 / (16 * 20)
    recorded = {record.name: record.macs for record in open_artifact(path).manifest.layers}
    assert {kernel.layer: kernel.macs for kernel in result.kernels if kernel.layer} == {
        name: scale * (macs or 0) for name, macs in recorded.items()
    }


def test_shape_that_is_not_allowed(convolutions: Any, tmp_path: Path) -> None:
    signature = convolutions.artifact.manifest.signature.model_copy(update={"sizes": Sizes.both(multiple=4)})
    golden = [(images[:, :4, :4], scores[:, :, :4, :4]) for images, scores in convolutions.artifact.golden_images()]
    path = rewritten(convolutions, tmp_path / "a", signature=signature, golden=golden)
    result = profile(path, SessionOptions(threads=1), shape=(2, 9, 12), rounds=1, ceilings=CEILINGS)
    assert result.shape == (2, 12, 12)
    assert "measured at 12 x 12, the nearest size to 9 x 12 that the model takes" in result.notes
    assert default_shape(open_artifact(path)) == (1, 512, 512)


def test_more_threads_than_cores(convolutions: Any) -> None:
    result = profile(convolutions.path, SessionOptions(threads=physical_cores() + 1), shape=(1, 8, 8), rounds=1, ceilings=CEILINGS)
    assert any(f"{physical_cores() + 1} threads on {physical_cores()} physical core" in note for note in result.notes)


def test_fill(images_of: Callable[..., Any]) -> None:
    images = images_of(3, batch=2, height=5, width=7)
    filled = fill(images, (3, 13, 4))
    assert filled.shape == (3, 13, 4, 3)
    assert filled.flags.c_contiguous
    assert np.array_equal(filled[:2, :5], images[:, :, :4])
    assert np.array_equal(filled[2], filled[0])
    assert np.array_equal(filled[0, 5:10], images[0, ::-1, :4])
    assert np.array_equal(filled[0, 10:13], images[0, :3, :4])


def test_default_shape(convolutions: Any, tmp_path: Path) -> None:
    assert default_shape(convolutions.artifact) == (1, 512, 512)
    assert default_shape(open_artifact(rewritten(convolutions, tmp_path / "example", example=(2, 64, 96)))) == (2, 64, 96)
    images = convolutions.artifact.golden_images()[0][0]
    classes = (ClassInfo(name="a", color=(0, 0, 0)), ClassInfo(name="b", color=(1, 1, 1)))
    for side, shape in ((48, (1, 48, 48)), (None, (1, *images.shape[1:3]))):
        signature = Signature(task="classify", channels=3, classes=classes, side=side)
        changes = {"signature": signature, "golden": [(images, np.zeros((len(images), 2), np.float32))]}
        assert default_shape(open_artifact(rewritten(convolutions, tmp_path / f"side-{side}", **changes))) == shape


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"options": SessionOptions(engine="onnxruntime-cuda")}, 'engine="onnxruntime-cuda": a profile is made in openvino'),
        ({"shape": (1, 0, 8)}, "three whole numbers from 1"),
        ({"shape": (8, 8)}, "three whole numbers from 1"),
        ({"shape": (1, 8.0, 8)}, "three whole numbers from 1"),
        ({"rounds": 0}, "rounds=0: give a whole number from 1 to 1000"),
        ({"rounds": 1001}, "from 1 to 1000"),
        ({"rounds": True}, "from 1 to 1000"),
    ],
)
def test_arguments_that_are_not_allowed(convolutions: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words.replace("(", r"\(")) as caught:
        profile(convolutions.path, ceilings=CEILINGS, **arguments)
    assert "\n" not in str(caught.value)


def test_images_larger_than_memory(convolutions: Any) -> None:
    with pytest.raises(DataError, match=r"scores alone take 3.5e\+05 GB, and this machine has .* GB: give a smaller size") as caught:
        profile(convolutions.path, shape=(100, 999_999, 99_999), ceilings=CEILINGS)
    assert "\n" not in str(caught.value)


def test_notes(convolutions: Any) -> None:
    result = profile(convolutions.path, SessionOptions(threads=1), shape=(1, 8, 8), rounds=1, ceilings=CEILINGS)
    manifest, total = convolutions.artifact.manifest, result.kernels_ms

    def notes_for(profiled: float, between: float, whole: float, kernels: Any = result.kernels) -> list[str]:
        execution = Execution(kernels=kernels, profiled_ms=profiled, between_ms=between, precision="f32", threads=1)
        return list(notes(manifest, execution, whole))

    assert notes_for(total, 0.0, total) == []
    assert any("the kernels' medians sum to" in note and "interruptions" in note for note in notes_for(3 * total, 0.0, 3 * total))
    assert any("an inference with counters on took" in note for note in notes_for(total, 0.0, 2 * total))
    (missing,) = notes_for(total, 0.0, total, tuple(kernel for kernel in result.kernels if kernel.layer != "body"))[-1:]
    assert missing == "1 recorded layer without a kernel of the same name: body"


def test_products_above_their_ceiling(convolutions: Any) -> None:
    result = profile(convolutions.path, SessionOptions(threads=1), shape=(1, 48, 48), rounds=1, ceilings=CEILINGS)
    low, high = (replace(CEILINGS, gmacs=dict.fromkeys(CEILINGS.gmacs, rate)) for rate in (1e-3, 1e9))
    (note,) = above(result.kernels, low)
    assert note.startswith("4 products faster than the ceiling of the precision, such as stem: ")
    (note,) = above([kernel for kernel in result.kernels if kernel.name == "stem"], low)
    assert note.startswith("1 product faster than the ceiling of the precision, such as stem: ")
    assert list(above(result.kernels, high)) == []
