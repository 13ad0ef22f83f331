from __future__ import annotations

from pathlib import Path

from muntin.training.config import TrainingConfig
from muntin.training.progress.advice import after_collapse, lower_rate, where_best


def test_where_the_best_weights_are(tmp_path: Path) -> None:
    for step in (20, 40):
        (tmp_path / f"step-{step:08d}").mkdir()
    newest = tmp_path / "step-00000040"
    assert where_best(20, newest, kept=True) == "the result has the weights of step 20, of the best score"
    assert where_best(20, newest, kept=False) == f"{tmp_path}/step-00000020 has the best score"
    assert where_best(10, newest, kept=False) == "the checkpoint of step 10 is not kept"


def test_advice_names_the_rate() -> None:
    config = TrainingConfig(learning_rate=0.08, final_learning_rate=0.04, gate_budget=0.5)
    assert "(now 0.08) is probably too high or training.gate_budget (0.5) too low" in after_collapse("it fell", config, result="")
    assert lower_rate(config, of_candidate=False, resumable=True).endswith(
        "by --resume --set training.learning_rate=0.02 --set training.final_learning_rate=0.02"
    )
    assert "another --output" in lower_rate(config, of_candidate=True, resumable=True)
