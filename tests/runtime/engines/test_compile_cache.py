"""Cache of compiled models: keys, owner, size limit, damage."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.runtime import load
from muntin.runtime.engines import compile_cache as cache
from muntin.runtime.engines.compile_cache import CompiledModels, cache_folder, compiled_folder, make_room
from muntin.runtime.engines.openvino.compiled import CompiledForm
from muntin.runtime.inputs import image_dims


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUNTIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MUNTIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "muntin"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "muntin"


def form(images: Any) -> CompiledForm:
    return CompiledForm(image_dims(images.shape))


def test_second_session_reads_the_cache(convolutions: Any, images_of: Callable[..., Any], own_cache: Path) -> None:
    images = images_of(3)
    first = load(convolutions.path, precision="f32")
    scores = first(images)
    blobs = [file for file in own_cache.rglob("*") if file.is_file()]
    assert blobs
    second = load(convolutions.path, precision="f32")
    np.testing.assert_array_equal(second(images), scores)
    assert not first._compiled[form(images)].kept  # type: ignore[attr-defined]
    assert second._compiled[form(images)].kept  # type: ignore[attr-defined]
    computed = [{layer.name: layer.precision for layer in session.layers() if layer.compute} for session in (first, second)]
    assert computed[0] == computed[1]
    assert set(own_cache.rglob("*")) >= set(blobs)


def test_folders_of_artefacts_versions_and_cpus(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [
        compiled_folder("openvino", "1", "a" * 64),
        compiled_folder("openvino", "2", "a" * 64),
        compiled_folder("openvino", "1", "b" * 64),
    ]
    monkeypatch.setattr(cache, "cpu_identity", lambda: "another CPU")
    folders.append(compiled_folder("openvino", "1", "a" * 64))
    assert len(set(folders)) == 4
    assert all(folder is not None and folder.is_dir() for folder in folders)
    folder = compiled_folder("openvino", "../../1/2", "a" * 64)
    assert folder is not None
    assert folder.parent == own_cache / "compiled"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and modes of POSIX")
def test_folder_writable_by_others(own_cache: Path, convolutions: Any) -> None:
    folder = compiled_folder("openvino", "1", "a" * 64)
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert compiled_folder("openvino", "1", "a" * 64) is None
    (own_cache / "compiled").chmod(0o777)
    assert compiled_folder("openvino", "1", "b" * 64) is None
    assert load(convolutions.path) is not None  # opened without a cache


def test_cache_that_cannot_be_created(own_cache: Path, convolutions: Any, images_of: Callable[..., Any]) -> None:
    own_cache.write_text("a file where the folder should be")
    assert compiled_folder("openvino", "1", "a" * 64) is None
    assert load(convolutions.path)(images_of(3)).shape[1] == 5


def test_eviction_order(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LIMIT", 300)
    models = [CompiledModels("openvino", str(index), "a" * 64) for index in range(3)]
    for index, model in enumerate(models[:2]):
        model.write("key", bytes(100))
        folder = compiled_folder("openvino", str(index), "a" * 64)
        assert folder is not None
        os.utime(folder, (1000 + index, 1000 + index))
    assert models[0].read("key") is not None  # used again
    models[2].write("key", bytes(100))
    assert [model.read("key") for model in models] == [bytes(100), None, bytes(100)]


def test_files_of_one_folder_are_bounded(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = CompiledModels("openvino", "1", "a" * 64)
    folder = compiled_folder("openvino", "1", "a" * 64)
    assert folder is not None
    for age, key in enumerate(("first", "second", "third")):
        models.write(key, bytes(100))
        for file in folder.iterdir():
            os.utime(file, (1000 - age, 1000 - age))  # the last written is the oldest
    assert models.read("first") is not None  # used again
    monkeypatch.setattr(cache, "LIMIT", 300)
    models.write("fourth", bytes(100))
    assert sum(file.stat().st_size for file in own_cache.rglob("*") if file.is_file()) <= 300
    assert [key for key in ("first", "second", "third", "fourth") if models.read(key) is not None] == ["first", "fourth"]
    monkeypatch.setattr(cache, "LIMIT", 50)
    models.write("fifth", bytes(100))
    assert len(list(folder.iterdir())) == 1
    assert models.read("fifth") is not None  # what was just written stays, however large


def test_make_room_keeps_the_folder_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for age in range(4):
        folder = compiled_folder("tensorrt", str(age), "a" * 64)
        assert folder is not None
        (folder / "engine").write_bytes(bytes(100))
        os.utime(folder, (1000 + age, 1000 + age))
        folders.append(folder)
    used = folders[0]  # the oldest
    (foreign := used.parent / "my-project").mkdir()
    (foreign / "thesis").write_bytes(bytes(1000))
    for limit, left in ((400, [0, 1, 2, 3]), (250, [0, 3]), (50, [0])):
        monkeypatch.setattr(cache, "LIMIT", limit)
        make_room(used)
        assert [age for age, folder in enumerate(folders) if folder.exists()] == left
    assert (used / "engine").read_bytes() == bytes(100)
    assert (foreign / "thesis").exists()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:100] + b"x" + data[101:], lambda data: b"", lambda data: data[1:]]
)
def test_damaged_files(convolutions: Any, images_of: Callable[..., Any], own_cache: Path, damage: Callable[[bytes], bytes]) -> None:
    images = images_of(3)
    scores = load(convolutions.path, precision="f32")(images)
    (file,) = (file for file in own_cache.rglob("*") if file.is_file())
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    session = load(convolutions.path, precision="f32")
    np.testing.assert_array_equal(session(images), scores)
    assert not session._compiled[form(images)].kept  # type: ignore[attr-defined]
    assert len(file.read_bytes()) == len(whole)  # kept anew


def test_cached_model_that_the_engine_refuses(convolutions: Any, images_of: Callable[..., Any], own_cache: Path) -> None:
    images = images_of(3)
    scores = load(convolutions.path, precision="f32")(images)
    (file,) = (file for file in own_cache.rglob("*") if file.is_file())
    nonsense = b"not a compiled model"
    file.write_bytes(hashlib.sha256(nonsense).digest() + nonsense)
    np.testing.assert_array_equal(load(convolutions.path, precision="f32")(images), scores)


def test_other_options_are_other_models(convolutions: Any, images_of: Callable[..., Any], own_cache: Path) -> None:
    for options in ({"threads": 1}, {"threads": 2}, {"threads": 2, "streams": 2}):
        session = load(convolutions.path, precision="f32", **options)
        session(images_of(3))
        assert not session._compiled[form(images_of(3))].kept  # type: ignore[attr-defined]
    assert len([file for file in own_cache.rglob("*") if file.is_file()]) == 3


def test_load_without_cache(convolutions: Any, images_of: Callable[..., Any], own_cache: Path) -> None:
    load(convolutions.path, cache=False)(images_of(3))
    assert not own_cache.exists()
