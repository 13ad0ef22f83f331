"""Products: made once, whole, and not to be changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

import products
from products import check, copy_of, product


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of products of this test's own."""
    monkeypatch.setattr(products, "_home", lambda: tmp_path)
    monkeypatch.setattr(products, "_used", set())
    return tmp_path


@pytest.fixture
def take(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`take(make)`: the product that `make(folder)` makes, as a fixture gets it."""

    def run(make: Callable[[Path], object]) -> Path:
        monkeypatch.setitem(products.MAKERS, "thing", make)
        monkeypatch.setenv("PYTEST_CURRENT_TEST", "a fixture (setup)")
        return product("thing")

    return run


def write_whole(folder: Path) -> None:
    (folder / "file").write_text("whole")


def test_made_once_by_many(home: Path, take: Callable[..., Path]) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.1)
        write_whole(folder)

    with ThreadPool(4) as pool:
        folders = pool.map(take, [make] * 4)
    assert made == [home / "thing"] and set(folders) == {home / "thing"}
    check()


def test_unfinished_product_is_made_again(take: Callable[..., Path]) -> None:
    def killed(folder: Path) -> None:
        (folder / "part").write_text("half")
        raise SystemExit

    with pytest.raises(SystemExit):
        take(killed)
    assert [path.name for path in take(write_whole).iterdir()] == ["file"]


def test_changed_product_fails_and_is_made_again(take: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    made = take(write_whole)
    (copy_of(made, tmp_path_factory.mktemp("copy")) / "file").write_text("other")
    check()
    (made / "file").write_text("other")
    with pytest.raises(AssertionError, match="which all share"):
        check()
    assert (take(write_whole) / "file").read_text() == "whole"


def test_product_in_the_body_of_a_test() -> None:
    with pytest.raises(AssertionError, match="in a fixture"):
        product("trained")
