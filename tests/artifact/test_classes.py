from __future__ import annotations

from pathlib import Path

import pytest

from muntin.artifact.classes import RENAMED, ClassInfo, present_classes, renamed, write_renamed
from muntin.errors import CheckpointError, DataError

TRAINED = (ClassInfo(name="sea", color=(0, 0, 200)), ClassInfo(name="land", color=(0, 160, 0)))


def test_renamed_classes_keep_their_colors() -> None:
    new = renamed(TRAINED, [("See", None), ("Land", (1, 2, 3))])
    assert new == (ClassInfo(name="See", color=(0, 0, 200)), ClassInfo(name="Land", color=(1, 2, 3)))


@pytest.mark.parametrize(
    ("classes", "names", "message"),
    [
        (TRAINED, ["a"], r"1 classes are named, and the model has 2 \(sea, land\): name as many, in their order"),
        (TRAINED, ["a", "a"], "the class name 'a' is used twice"),
        ((), ["a"], "restores images and has no classes"),
    ],
)
def test_wrong_names(classes: tuple[ClassInfo, ...], names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        renamed(classes, [(name, None) for name in names])


def test_present_classes_of_a_run_and_its_parts(tmp_path: Path) -> None:
    """The names of a run hold for its updates and stages, and a part's own ones come first."""
    run, new = tmp_path / "run", renamed(TRAINED, [("See", None), ("Land", None)])
    step, update = run / "checkpoints" / "step-1", run / "updates" / "1" / "checkpoints" / "step-9"
    for folder in (step, update):
        folder.mkdir(parents=True)
    assert present_classes(step, TRAINED) == TRAINED
    write_renamed(run, TRAINED, new)
    assert present_classes(step, TRAINED) == new
    grown = (*TRAINED, ClassInfo(name="ice", color=(9, 9, 9)))
    assert present_classes(update, grown) == (*new, grown[2])
    write_renamed(run / "updates" / "1", grown, TRAINED + new[:1])
    assert present_classes(update, grown) == TRAINED + new[:1]
    with pytest.raises(CheckpointError, match="renames other classes than the run was trained on: remove it"):
        present_classes(step, TRAINED[::-1])
    (run / RENAMED).write_text("{")
    with pytest.raises(CheckpointError, match=f"{RENAMED}: damaged"):
        present_classes(step, TRAINED)
