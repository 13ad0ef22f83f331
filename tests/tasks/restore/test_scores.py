from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from muntin.artifact import Signature
from muntin.data.source import HeldSamples
from muntin.errors import DataError
from muntin.tasks.learning import LEARNING
from muntin.tasks.restore.degradation import Degradation, enlarged, generator_of
from muntin.tasks.restore.scores import BAND, MOST_DB, RestoredScores, psnr, ssim
from muntin.tasks.samples import Sample
from muntin.training.evaluation import collapse, evaluate


class Answering:
    """A session that repeats pixels, plus a constant."""

    def __init__(self, scale: int = 1, *, added: float = 0.0) -> None:
        self.signature = Signature(task="restore", channels=3, classes=(), scale=scale)
        self.added = added

    def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]:
        scale = self.signature.scale
        repeated = images_BHWC.repeat(scale, 1).repeat(scale, 2).transpose(0, 3, 1, 2).astype(np.float32)
        return repeated + self.added


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return enlarged(coarse, 4)[:height, :width]


def noisy(clean: NDArray[np.uint8], sigma: float = 20) -> NDArray[np.uint8]:
    return Degradation(noise=sigma)(clean, generator_of("a"))


def tensor(image_HWC: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image_HWC)).permute(2, 0, 1)[None].float()


def test_scores_against_torchmetrics() -> None:
    clean = picture(BAND + 70, 61)  # two bands
    worse = noisy(clean)
    expected = float(peak_signal_noise_ratio(tensor(worse), tensor(clean), data_range=255.0))
    assert psnr(worse, clean) == pytest.approx(expected, abs=1e-3)
    _, full = structural_similarity_index_measure(tensor(worse), tensor(clean), data_range=255.0, return_full_image=True)
    assert ssim(worse, clean) == pytest.approx(float(full[:, :, 5:-5, 5:-5].mean()), abs=1e-5)
    assert psnr(clean, clean) == MOST_DB
    assert ssim(clean, clean) == pytest.approx(1)
    assert math.isnan(ssim(clean[:10], clean[:10]))


def test_evaluation_of_a_session() -> None:
    cleans = [picture(40, 52, seed) for seed in range(3)]
    samples = HeldSamples([Sample(name="a", image=noisy(clean), target=clean) for clean in cleans])
    same = evaluate(Answering(), samples, tile=16)
    assert isinstance(same, RestoredScores)
    assert same.score == same.psnr == same.input_psnr
    assert same.ssim == same.input_ssim
    assert same.psnr == pytest.approx(np.mean([psnr(noisy(clean), clean) for clean in cleans]))
    assert (same.samples, same.by_class, same.notes) == (3, {}, ())
    worse = evaluate(Answering(added=30), samples, tile=16)
    assert worse.score < same.score
    assert "worse than the input" in worse.notes[0]
    assert LEARNING["restore"].measure(Answering(), samples, tile=16) == pytest.approx([psnr(noisy(clean), clean) for clean in cleans])
    quick = evaluate(Answering(), samples, tile=16, similarity=False)
    assert isinstance(quick, RestoredScores)
    assert quick.ssim is None
    with pytest.raises(DataError, match="no pictures"):
        evaluate(Answering(), HeldSamples([]), tile=16)


def test_input_of_an_enlarging_session() -> None:
    clean = picture(40, 48)
    small = Degradation(scale=2)(clean, generator_of("a"))
    result = evaluate(Answering(2), HeldSamples([Sample(name="a", image=small, target=clean)]), tile=64)
    assert isinstance(result, RestoredScores)
    assert result.input_psnr == pytest.approx(psnr(enlarged(small, 2), clean))
    assert result.psnr == pytest.approx(psnr(small.repeat(2, 0).repeat(2, 1), clean))


def test_collapse_in_decibels() -> None:
    def run(scores: list[float], losses: list[float]) -> tuple[int, str] | None:
        training = [{"step": 100 * index + 100, "loss": loss} for index, loss in enumerate(losses)]
        validation = [{"step": 100 * index + 100, "score": score, "psnr": score} for index, score in enumerate(scores)]
        return collapse(training, validation)

    assert run([28, 30, 29.5], [0.1, 0.05, 0.05]) is None
    assert run([28, 30, 26], [0.1, 0.05, 0.06]) is None  # worse on the validation pictures alone
    assert run([28, 30, 18], [0.1, 0.05, 0.3]) is not None
