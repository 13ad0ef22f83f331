from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.data.source import SPLITS
from muntin.data.splits import check_disjoint, empty_split_error, filling_seed, split_of
from muntin.errors import DataError
from muntin.tasks.folders import SplitName

SHARES: dict[SplitName, float] = {"validation": 0.1, "test": 0.3}


@given(key=st.text(min_size=1), seed=st.integers(0, 99), validation=st.floats(0.01, 0.49), test=st.floats(0.01, 0.49))
def test_split_of_any_key(key: str, seed: int, validation: float, test: float) -> None:
    split = split_of(key, seed, {"validation": validation, "test": test})
    assert split in SPLITS
    assert split_of(key, seed, {"validation": validation, "test": test}) == split


def test_split_of_many_keys_by_share() -> None:
    splits = [split_of(f"{number}", 0, SHARES) for number in range(4000)]
    assert abs(splits.count("validation") / 4000 - 0.1) < 0.02
    assert abs(splits.count("test") / 4000 - 0.3) < 0.03
    assert splits != [split_of(f"{number}", 1, SHARES) for number in range(4000)]


def test_split_of_a_decomposed_accent() -> None:
    for number in range(40):
        assert split_of(f"caf\u00e9/{number}", 0, SHARES) == split_of(f"cafe\u0301/{number}", 0, SHARES)


def test_filling_seed_for_few_keys() -> None:
    keys = ["a", "b", "c"]
    seed = filling_seed(keys, SHARES)
    assert seed is not None
    assert {split_of(key, seed, SHARES) for key in keys} == set(SPLITS)
    assert all(len({split_of(key, earlier, SHARES) for key in keys}) < 3 for earlier in range(seed))
    assert filling_seed(keys[:2], SHARES) is None


def test_filling_seed_by_class() -> None:
    keys = [f"{name}/{number}" for name in "abc" for number in range(4)]
    seed = filling_seed(keys, {"validation": 0.15, "test": 0.15}, by_class=True)
    assert seed is not None
    assert len({(split_of(key, seed, {"validation": 0.15, "test": 0.15}), key[0]) for key in keys}) == 9


def test_first_of_equal_seeds() -> None:
    """Of seeds that lack the same classes: one class has a single picture, so that none can have all of them."""
    keys = ["a/0", *(f"b/{number}" for number in range(4))]
    seed = filling_seed(keys, SHARES, by_class=True)
    assert seed is not None

    def shown(seed: int) -> tuple[int, int]:
        placed = {(split_of(key, seed, SHARES), key[0]) for key in keys}
        return sum(split == "train" for split, _ in placed), len(placed)

    assert shown(seed) == (2, 4)
    assert all(shown(earlier) != (2, 4) for earlier in range(seed))


def test_empty_split_error_names_a_seed() -> None:
    keys = [f"p{number}" for number in range(4)]
    seed = filling_seed(keys, SHARES, 6)
    assert f"the test split of the 4 pictures in photos is empty: set `seed: {seed}` under data" in str(
        empty_split_error("test", keys, Path("photos"), 5, SHARES)
    )
    assert "at least 3 pictures are needed" in str(empty_split_error("test", keys[:2], Path("photos"), 5, SHARES))


def test_disjoint_splits_with_shared_files(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            (tmp_path / folder / f"{number}.png").touch()
    first, second = (sorted((tmp_path / folder).iterdir()) for folder in ("a", "b"))
    check_disjoint({"train": first, "validation": second})
    with pytest.raises(DataError, match=r"b/0\.png is in the validation and in the test split \(and 2 more are in two splits\): give"):
        check_disjoint({"train": first, "validation": second, "test": second})
    (tmp_path / "linked").symlink_to(tmp_path / "a", target_is_directory=True)
    with pytest.raises(DataError, match=r"linked/0\.png is in the train and in the validation split"):
        check_disjoint({"train": first, "validation": sorted((tmp_path / "linked").iterdir())})
    second[0].unlink()
    second[0].symlink_to(first[2])
    with pytest.raises(DataError, match=r"b/0\.png is in the train and in the validation split: give"):
        check_disjoint({"train": first, "validation": second})


def test_balanced_seed() -> None:
    shares: dict[SplitName, float] = {"validation": 0.15, "test": 0.15}
    for count in (15, 60):
        keys = [f"p{number}" for number in range(count)]
        seed = filling_seed(keys, shares, balanced=True)
        assert seed is not None
        sizes = Counter(split_of(key, seed, shares) for key in keys)
        assert abs(sizes["test"] - 0.15 * count) <= 1 and abs(sizes["validation"] - 0.15 * count) <= 1
    classes = [f"{name}/{number}" for name, number in (*(("a", n) for n in range(40)), *(("b", n) for n in range(4)))]
    seed = filling_seed(classes, shares, by_class=True, balanced=True)
    assert seed is not None
    placed = [(split_of(key, seed, shares), key[0]) for key in classes]
    assert len(set(placed)) == 6 and 4 <= sum(split == "test" for split, _ in placed) <= 9
