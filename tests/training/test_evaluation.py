from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from muntin.artifact import ClassInfo, Signature
from muntin.data.source import HeldSamples
from muntin.errors import DataError
from muntin.images import IGNORED
from muntin.tasks.classify.learning import PictureScores
from muntin.tasks.samples import Sample
from muntin.tasks.scores import PictureAnswers
from muntin.tasks.segment.scores import MaskScores, areas
from muntin.training.evaluation import collapse, evaluate, poor_classes, predictions, tile_of, worse_than_input

NAMES = ("sea", "land", "ice", "rock")


class Painted:
    """A session whose labels are the picture's first channel."""

    def __init__(self, classes: int, task: str = "segment") -> None:
        self.signature = Signature(task=task, channels=1, classes=tuple(ClassInfo(name=n, color=(0, 0, 0)) for n in NAMES[:classes]))
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]:
        self.shapes.append(images_BHWC.shape)
        K = len(self.signature.classes)
        labels_BHW = images_BHWC[:, :, :, 0]
        if self.signature.task == "classify":
            return np.eye(K, dtype=np.float32)[labels_BHW[:, 0, 0]]
        return np.ascontiguousarray(np.eye(K, dtype=np.float32)[labels_BHW].transpose(0, 3, 1, 2))


def sample(guess_HW: NDArray[np.uint8], truth: NDArray[np.uint8] | int) -> Sample:
    return Sample(name="a", image=guess_HW[:, :, None], target=truth)


def evaluated(pairs: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]], classes: int, tile: int = 64) -> MaskScores:
    scores = evaluate(Painted(classes), HeldSamples([sample(guess, truth) for guess, truth in pairs]), tile=tile)
    assert isinstance(scores, MaskScores)
    return scores


def areas_of(
    pairs: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]], classes: int, tile: int = 64, block: int | None = None
) -> NDArray[np.int64]:
    return areas(Painted(classes), HeldSamples([sample(guess, truth) for guess, truth in pairs]), tile=tile, block=block)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 4), pictures=st.integers(1, 3), tile=st.sampled_from([3, 64]))
def test_scores_against_a_plain_count(seed: int, classes: int, pictures: int, tile: int) -> None:
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(pictures):
        size = tuple(generator.integers(1, 8, 2))
        truth = generator.integers(0, classes, size).astype(np.uint8)
        truth[generator.random(size) < 0.3] = IGNORED
        pairs.append((generator.integers(0, classes, size).astype(np.uint8), truth))
    guess = np.concatenate([g.ravel() for g, _ in pairs])
    truth = np.concatenate([t.ravel() for _, t in pairs])
    guess, truth = guess[truth != IGNORED], truth[truth != IGNORED]
    if not truth.size:
        for score in (evaluated, areas_of):
            with pytest.raises(DataError):
                score(pairs, classes, tile)
        return
    sums = areas_of(pairs, classes, tile).sum(0)
    assert (areas_of(pairs, classes, tile, block=2).sum(0) == sums).all()
    held = np.isin(range(classes), truth)
    assert sums.tolist() == [[((guess == k) & (truth == k)).sum(), held[k] * ((guess == k) | (truth == k)).sum()] for k in range(classes)]
    result = evaluated(pairs, classes, tile)
    assert (result.samples, result.counted) == (pictures, truth.size)
    assert result.accuracy == pytest.approx((guess == truth).mean())
    present = []
    for k, name in enumerate(NAMES[:classes]):
        both, either = ((guess == k) & (truth == k)).sum(), ((guess == k) | (truth == k)).sum()
        assert result.iou[name] == (pytest.approx(both / either) if either else None)
        assert result.recall[name] == (pytest.approx(both / (truth == k).sum()) if (truth == k).any() else None)
        present += [both / either] if either else []
    assert result.miou == pytest.approx(np.mean(present))
    assert result.score == result.miou


def test_class_in_neither_truth_nor_prediction() -> None:
    truth = np.array([[0, 0, 1, 1]], np.uint8)
    result = evaluated([(truth, truth)], 3)
    assert result.iou == {"sea": 1.0, "land": 1.0, "ice": None}
    assert result.miou == 1
    wrong = evaluated([(np.array([[0, 0, 1, 2]], np.uint8), truth)], 3)
    assert wrong.iou == {"sea": 1.0, "land": 0.5, "ice": 0.0}  # predicted where it is not: that counts
    assert wrong.recall["ice"] is None
    assert result.notes == ()
    assert wrong.notes == (
        "the truth holds no ice, and some pixels were predicted as it: its IoU of 0 counts in the mean",
    )  # fmt: skip


def test_class_without_images() -> None:
    result = PictureScores(task="classify", samples=1, counted=1, accuracy=1.0, iou={}, recall={"sea": 1.0, "land": None, "ice": None})
    assert result.notes == ("no image is of land, ice: the accuracy does not cover it",)


def test_interval_of_an_accuracy() -> None:
    result = PictureScores(task="classify", samples=10, counted=10, accuracy=0.8, iou={}, recall={})
    assert result.interval == pytest.approx((0.490, 0.943), abs=0.001)  # Wilson's, from a table
    all_right = replace(result, accuracy=1.0).interval
    assert all_right is not None and all_right[0] < 1 == pytest.approx(all_right[1])
    masks = MaskScores(task="segment", samples=10, counted=10, accuracy=0.8, iou={}, recall={})
    assert masks.interval is None


def test_ignored_pixels() -> None:
    truth = np.array([[0, 1, IGNORED, IGNORED]], np.uint8)
    results = [evaluated([(np.array([[0, 1, a, b]], np.uint8), truth)], 3) for a, b in [(0, 1), (2, 2)]]
    assert results[0] == results[1]
    assert results[0].counted == 2


@pytest.mark.parametrize("pairs", [[], [(np.zeros((2, 2), np.uint8), np.full((2, 2), IGNORED, np.uint8))]])
def test_nothing_to_count(pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> None:
    with pytest.raises(DataError, match="nothing to score") as error:
        evaluated(pairs, 3)
    assert "\n" not in str(error.value)


def test_classify_counts() -> None:
    samples = HeldSamples([sample(np.full((3, 4), guess, np.uint8), truth) for guess, truth in [(0, 0), (1, 1), (1, 0), (1, 1)]])
    result = evaluate(Painted(3, "classify"), samples, tile=8)
    assert (result.task, result.counted, result.accuracy, result.score) == ("classify", 4, 0.75, 0.75)
    assert result.recall == {"sea": 0.5, "land": 1.0, "ice": None}


@pytest.mark.parametrize("task", ["segment", "classify"])
def test_score_by_class(task: str) -> None:
    pairs = [(np.full((3, 4), guess, np.uint8), truth) for guess, truth in [(0, 0), (1, 1), (1, 0), (1, 1)]]
    samples = [sample(guess, truth if task == "classify" else np.full((3, 4), truth, np.uint8)) for guess, truth in pairs]
    result = evaluate(Painted(3, task), HeldSamples(samples), tile=8)
    assert result.iou == {"sea": 0.5, "land": pytest.approx(2 / 3), "ice": None}
    assert result.recall == {"sea": 0.5, "land": 1.0, "ice": None}
    assert result.by_class == (result.iou if task == "segment" else result.recall)


def test_tiles_and_progress() -> None:
    session, notes = Painted(2), []
    truth = np.zeros((20, 30), np.uint8)
    samples = HeldSamples([sample(truth, truth)] * 2)
    labels: PictureAnswers = []
    evaluate(session, samples, tile=tile_of(8), progress=lambda done, total: notes.append((done, total)), answers=labels)
    assert {shape[1:3] for shape in session.shapes} == {(16, 16)}
    assert [entry.shape for entry in labels] == [(20, 30)] * 2 == [entry.shape for _, entry in predictions(session, samples, tile=16)]
    assert notes == [(1, 2), (2, 2)]


def test_classes_hardly_ever_found() -> None:
    last = {"step": 80, "score": 0.5, "by_class": {"sea": 0.9, "ice": 0.03, "none": None, "road": 0.1}}
    (note,) = poor_classes([{"step": 4, "by_class": {"sea": 0.0}}, last])
    assert note.startswith("hardly ever found in the validation split: ice (less than 10% of it)")
    assert poor_classes([]) == poor_classes([last | {"step": 40}]) == ()


def test_restored_pictures_worse_than_their_input() -> None:
    (note,) = worse_than_input({"psnr": 30.0, "input_psnr": 31.5})
    assert note.startswith("the restored pictures are 1.50 dB worse than the input")
    assert worse_than_input({"psnr": 32.0, "input_psnr": 31.5}) == worse_than_input({"score": 0.5}) == worse_than_input(None) == ()


# ---- a collapse of the score ----


def curves(losses: Sequence[float], scores: Sequence[float]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """A training curve with a point every ten steps, and scores at even distances along it."""
    every = 10 * len(losses) // len(scores)
    training = [{"step": 10 * (index + 1), "loss": loss} for index, loss in enumerate(losses)]
    return training, [{"step": every * (index + 1), "score": score} for index, score in enumerate(scores)]


def test_collapse_by_a_high_learning_rate() -> None:
    losses = [2.4, 1.5, 0.9, 0.7, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5, *[11.0] * 10]
    training, validation = curves(losses, [0.5, 0.63, 0.3, 0.23])
    assert collapse(training, validation) == (
        100, "the validation score fell from 0.630 at step 100 to 0.230 at step 200, and the training loss rose from 0.5 to 11"
    )  # fmt: skip
    assert collapse(training, validation[:2]) is None
    training += [{"step": 200 + 10 * index, "loss": 1.0} for index in range(1, 6)]
    assert collapse(training, [*validation, {"step": 250, "score": 0.5}]) is None  # it has recovered
    assert collapse([], validation) is None and collapse(training, []) is None


def test_collapse_from_the_start() -> None:
    """A learning rate that is too high at once, in a score that weights averaged over time keep."""
    training, validation = curves([2.0, 2.9, 4.2, 4.9, 11, 8, 6, 4, 3.5, 2.5], [0.77, 0.76])
    assert collapse(training, validation[:1]) == (50, "the training loss rose from 2 at the start to 5 at step 50")
    assert collapse(training, validation) == (50, "the training loss rose from 2 at the start to 4.8 at step 100")


def test_no_collapse_of_a_run_that_learns_by_heart() -> None:
    assert collapse(*curves([2 * 0.7**index for index in range(40)], [0.6, 0.5, 0.35, 0.3])) is None
    assert collapse(*curves([0.01] * 20 + [0.03] * 20, [1.0, 1.0, 1.0, 0.5])) is None  # it began with weights that fit


@pytest.mark.parametrize("learns", [True, False])
def test_no_collapse_of_noisy_curves(learns: bool) -> None:
    """The accuracy of three pictures, and a loss that jumps by 15 % from point to point."""
    generator = np.random.default_rng(0)
    drops = 0
    for _ in range(300):
        steps = np.arange(40)
        losses = (0.3 + 2 * np.exp(-steps / 8) if learns else np.full(40, 1.1)) * generator.lognormal(0, 0.15, 40)
        scores = generator.binomial(3, 0.8 if learns else 0.5, 8) / 3
        for count in range(1, 9):
            training, validation = curves(losses.tolist(), scores.tolist())
            drops += scores[count - 1] <= 2 / 3 * scores[:count].max()
            assert collapse(training, validation[:count]) is None
    assert drops > 300  # the scores alone would have alarmed


def test_confusion_and_most_frequent_mistakes() -> None:
    guess, truth = (np.array([row], np.uint8) for row in ([0, 0, 1, 2, 2, 2], [0, 1, 1, 1, 1, IGNORED]))
    result = evaluated([(guess, truth)], 3)
    assert result.confusion == ((1, 0, 0), (1, 1, 2), (0, 0, 0))
    assert result.mistakes == (("land", "ice", 2), ("land", "sea", 1))
