"""TorchSession: a live model with a deployed one's interface. Axes: B images, H W map, C channels, K scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from muntin.artifact import ClassInfo, Signature
from muntin.errors import DataError, DependencyError, MuntinError
from muntin.models import TorchSession, create_model
from muntin.models.session import BUFFERS, pipelined, require_compiler

CLASSES = (ClassInfo(name="sea", color=(0, 0, 255)), ClassInfo(name="land", color=(0, 255, 0)))
SEGMENT = Signature(task="segment", channels=3, classes=CLASSES)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_answer_against_the_model() -> None:
    model = create_model("hybrid-xs").eval()
    images_BHWC = images(2, 33, 40, 3)
    scores = TorchSession(model, SEGMENT)(images_BHWC)
    assert scores.dtype == np.float32 and scores.shape == SEGMENT.scores_shape(2, 33, 40)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float())
    np.testing.assert_array_equal(scores, expected.numpy())


def test_half_precision_model() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1)).eval()
    images_BHWC = images(2, 9, 8, 3)
    scores = TorchSession(model, SEGMENT)(images_BHWC)
    half = TorchSession(model.bfloat16(), SEGMENT)(images_BHWC)
    assert TorchSession(model, SEGMENT).precision == "bf16" and TorchSession(model.half(), SEGMENT).precision == "f16"
    assert half.dtype == np.float32 and 0 < np.abs(half - scores).max() < 0.02 * np.abs(scores).max()


def test_mixed_types() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1)).eval()
    model.temperature = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    assert next(model.parameters()).dtype == torch.float64
    assert TorchSession(model, SEGMENT)(images(1, 9, 8, 3)).shape == (1, 2, 9, 8)


def test_answer_that_is_no_tensor() -> None:
    class Named(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": x}

    with pytest.raises(MuntinError, match="the model answers with a dict: wrap it in a module that returns the tensor of its scores"):
        TorchSession(Named(), SEGMENT)(images(1, 9, 8, 3))


def test_memory_orders() -> None:
    session = TorchSession(create_model("hybrid-xs"), SEGMENT)
    images_BHWC = images(2, 33, 40, 3)
    np.testing.assert_array_equal(session(np.asfortranarray(images_BHWC)), session(images_BHWC))
    np.testing.assert_array_equal(session(images_BHWC[:, ::-1]), session(images_BHWC[:, ::-1].copy()))


def test_model_in_training_mode() -> None:
    model = create_model("hybrid-xs").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    session = TorchSession(model, SEGMENT)
    first = session(images(2, 33, 40, 3))
    np.testing.assert_array_equal(first, session(images(2, 33, 40, 3)))
    labels = TorchSession(model.train(), SEGMENT).labels(images(2, 33, 40, 3))
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, first.argmax(1))
    np.testing.assert_array_equal(session.labels(images(2, 33, 40, 3)[0]), labels[0])
    assert session.class_names == tuple(entry.name for entry in CLASSES)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("task", ["classify", "restore"])
def test_other_tasks(task: str) -> None:
    scale = 2 if task == "restore" else 1
    signature = Signature(task=task, channels=3, scale=scale, classes=() if task == "restore" else CLASSES)
    scores = TorchSession(create_model("hybrid-xs", task=task, scale=scale), signature)(images(2, 5, 7, 3))
    assert scores.shape == signature.scores_shape(2, 5, 7)


def test_reported_precision_and_threads() -> None:
    model = create_model("hybrid-xs")
    plain, short = TorchSession(model, SEGMENT), TorchSession(model, SEGMENT, dtype=torch.bfloat16)
    assert (plain.precision, short.precision, plain.threads) == ("f32", "bf16", torch.get_num_threads())
    reference, rounded = plain(images(1, 33, 40, 3)), short(images(1, 33, 40, 3))
    assert rounded.dtype == np.float32
    assert 0 < np.abs(reference - rounded).max() < 0.1 * np.abs(reference).max()


@pytest.mark.parametrize("wrong", [images(1, 5, 5, 4), images(5, 5, 3), images(1, 5, 5, 3).astype(np.float32), images(1, 0, 5, 3), [[0]]])
def test_wrong_images(wrong: object) -> None:
    with pytest.raises(DataError):
        TorchSession(create_model("hybrid-xs"), SEGMENT)(wrong)  # type: ignore[arg-type]


def test_model_without_parameters() -> None:
    norm = torch.nn.BatchNorm2d(3, affine=False, device="meta")
    assert TorchSession(norm, SEGMENT).device.type == "meta"


def test_compile_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    signature = Signature(task="segment", channels=3, classes=(ClassInfo(name="a", color=(0, 0, 0)),))
    with pytest.raises(DependencyError, match=r"needs a C\+\+ compiler on CPUs"):
        TorchSession(torch.nn.Conv2d(3, 1, 1), signature, compile=True)
    require_compiler("cuda")  # there it is Triton's affair


def batches(count: int, read: list[int]) -> Iterator[NDArray[np.uint8]]:
    for index in range(count):
        read.append(index)
        yield np.full((1 + index % 3, 4, 5, 3), index, np.uint8)


def double(images_BHWC: Tensor) -> Tensor:
    return images_BHWC.float() * 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_order_of_answers(device: str, count: int) -> None:
    answers = list(pipelined(batches(count, []), double, torch.device(device)))
    assert len(answers) == count
    for index, answer in enumerate(answers):
        np.testing.assert_array_equal(answer, np.full((1 + index % 3, 4, 5, 3), 2 * index, np.float32))


@pytest.mark.parametrize("device", DEVICES)
def test_batches_in_flight(device: str) -> None:
    read: list[int] = []
    answers = pipelined(batches(20, read), double, torch.device(device))
    for done in range(1, 6):
        next(answers)
        assert len(read) == done + BUFFERS - 1


def test_session_map() -> None:
    session = TorchSession(create_model("hybrid-xs"), SEGMENT)
    pictures = [images(1, 32, 32 + width, 3) for width in range(3)]
    for one, other in zip(session.map(pictures), map(session, pictures), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(DataError, match="shape"):
        list(session.map([pictures[0], pictures[0][0]]))
