from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat

import pytest
import torch

from muntin.errors import DependencyError, MuntinError
from muntin.training.config import TrainingConfig
from muntin.training.distributed.ranks import ALONE, Ranks
from muntin.training.precision import (
    MAX_SECONDS,
    TrainingPrecision,
    choose_by_speed,
    cpu_computes_bf16,
    prepare_hardware,
    resolve_precision,
)


def product_dtype(precision: TrainingPrecision) -> torch.dtype:
    with precision.autocast():
        return torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)).dtype


def test_fp32() -> None:
    precision = resolve_precision("fp32", "cpu")
    assert (precision.name, precision.dtype) == ("fp32", None)
    assert product_dtype(precision) == torch.float32


UNDECIDED = TrainingPrecision(name="fp32", device="cpu", dtype=None, reason="test", undecided=True)
LONG = TrainingConfig(steps=2000)


class Machine:
    """Steps on a clock of their own: `fp32` seconds a row, and a gain of BF16 for each step in it after two slow ones."""

    def __init__(self, gains: Iterable[float], fp32: float = 0.01) -> None:
        self.gains, self.fp32, self.now = chain([0.5, 0.5], gains), fp32, 0.0
        self.rows: list[int] = []

    def step(self, precision: TrainingPrecision, rows: int) -> None:
        self.rows.append(rows)
        self.now += self.fp32 * rows / (next(self.gains) if precision.name == "bf16" else 1)

    def choose(self, config: TrainingConfig = LONG, ranks: Ranks = ALONE) -> TrainingPrecision:
        return choose_by_speed(UNDECIDED, config, self.step, rows=8, least=8, ranks=ranks, clock=lambda: self.now)


@pytest.mark.parametrize(
    ("gains", "name"),
    [
        ((1.9, 2.0, 2.1, 2.0, 2.0), "bf16"),
        ((2.0, 2.0, 0.4, 2.0, 2.0), "bf16"),
        ((2.0, 2.0, 0.4, 2.0, 1.1), "fp32"),
        ((0.57, 0.8, 0.57, 0.63, 1.2), "fp32"),  # matrix products on a busy machine, of which the last one alone chose BF16
        ((1.1, 1.1, 1.1, 1.1, 1.1), "fp32"),
        ((0.5, 3.0, 0.5, 3.0, 3.0), "fp32"),
    ],
)
def test_choice_by_speed(gains: tuple[float, ...], name: str) -> None:
    precision = Machine(gains).choose()
    assert (precision.name, precision.dtype) == (name, torch.bfloat16 if name == "bf16" else None)
    assert not precision.undecided and precision.gains == pytest.approx(sorted(gains))
    words = f"BF16 is {sorted(gains)[2]:.2f} times as fast with this model ({min(gains):.2f} to {max(gains):.2f} in 5 pairs of steps)"
    if name == "fp32" and sorted(gains)[2] > 1:
        words += ", too little: it is taken from 1.2 times on in all pairs but one"
    assert precision.reason == words and precision.notes == (f"precision auto: {name}, since {words}",)
    assert product_dtype(precision) == (precision.dtype or torch.float32)


@pytest.mark.parametrize(
    ("seconds", "config"),
    [
        (1e-6, TrainingConfig(steps=20)),
        (1.0, TrainingConfig(steps=300)),
        (0.1, TrainingConfig(steps=10**6, minutes=0.1)),
    ],
)
def test_short_run(seconds: float, config: TrainingConfig) -> None:
    machine = Machine(repeat(9.0), fp32=seconds)
    precision = machine.choose(config)
    assert (precision.name, precision.undecided, precision.notes) == ("fp32", False, ())
    assert precision.reason == "the run is too short to measure BF16"
    assert machine.now <= 6 * 8 * seconds


@pytest.mark.parametrize(("seconds", "rows"), [(0.001, 64), (0.025, 6), (1.0, 2)])
def test_measured_rows(seconds: float, rows: int) -> None:
    machine = Machine(repeat(1.0), fp32=seconds)
    choose_by_speed(UNDECIDED, TrainingConfig(steps=10_000), machine.step, rows=64, least=2, clock=lambda: machine.now)
    assert machine.rows[:4] == [2] * 4
    assert set(machine.rows[4:]) == {rows}
    assert machine.now <= MAX_SECONDS + 8 * seconds or rows == 2


def test_failing_step() -> None:
    def fail(precision: TrainingPrecision, rows: int) -> None:
        raise MuntinError("memory was short")

    threads = torch.get_num_threads()
    precision = choose_by_speed(UNDECIDED, LONG, fail, rows=8)
    assert (precision.name, precision.undecided, precision.reason) == ("fp32", False, "BF16 was not measured: memory was short")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("own", "first"), [(2.0, 0.0), (0.5, 1.0), (2.0, 1.0)])
def test_choice_of_the_first_process(own: float, first: float) -> None:
    class Second(Ranks):
        def of_first(self, number: float) -> float:
            return first

    precision = Machine(repeat(own)).choose(ranks=Second())
    assert precision.dtype is (torch.bfloat16 if first else None)
    assert precision.name == ("bf16" if first else "fp32")


def test_process_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(Ranks):
        count = 2

        def any(self, flag: bool) -> bool:
            return True

    monkeypatch.setattr("muntin.training.precision.cpu_computes_bf16", lambda: True)
    assert prepare_hardware(TrainingConfig(), begun=None).undecided == (not torch.cuda.is_available())
    if not torch.cuda.is_available():
        precision = prepare_hardware(TrainingConfig(), begun=None, ranks=Two())
        assert (precision.name, precision.undecided) == ("fp32", False)


def test_pytorch_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking() -> bool:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_is_mkldnn_bf16_supported'")  # as of such a build

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lacking)
    assert not cpu_computes_bf16()


@pytest.mark.parametrize("capable", [True, False])
@pytest.mark.parametrize("begun", ["fp32", "bf16", "fp16", None])
def test_auto_on_a_cpu(begun: str | None, capable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.training.precision.cpu_computes_bf16", lambda: capable)
    precision = resolve_precision("auto", "cpu", begun=begun)
    assert precision.name == ("bf16" if begun == "bf16" and capable else "fp32")
    assert precision.undecided == (capable and begun not in ("fp32", "bf16"))
    assert not resolve_precision("fp32", "cpu", begun=begun).undecided


def test_unsupported_types() -> None:
    with pytest.raises(DependencyError, match="write auto, bf16 or fp32") as error:
        resolve_precision("fp16", "cpu")
    assert "\n" not in str(error.value)
    if cpu_computes_bf16():
        assert resolve_precision("bf16", "cpu").dtype == torch.bfloat16
    else:
        with pytest.raises(DependencyError, match="write auto or fp32"):
            resolve_precision("bf16", "cpu")


def test_autocast_block() -> None:
    precision = TrainingPrecision(name="bf16", device="cpu", dtype=torch.bfloat16, reason="test")
    assert product_dtype(precision) == torch.bfloat16
    assert torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "scales"), [(torch.float16, True), (torch.bfloat16, False), (None, False)])
def test_loss_scaler(dtype: torch.dtype | None, scales: bool) -> None:
    scaler = TrainingPrecision(name="x", device="cpu", dtype=dtype, reason="test").scaler()
    assert scaler.is_enabled() == scales
    loss = torch.tensor(2.0)
    assert (float(scaler.scale(loss)) > 2) == scales
