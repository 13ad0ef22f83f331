"""Runs and artifacts that many tests read, each made once for all processes and all runs of the same code.

A session or module fixture takes a product; a test that changes it copies it:

    from products import copy_of, product

    @pytest.fixture(scope="session")
    def trained() -> Path:
        return product("trained") / "run"

    def test_export(trained: Path, tmp_path: Path) -> None:
        run = copy_of(trained, tmp_path)

| product | its folder |
| --- | --- |
| `trained` | `data` with `recipe.yaml`, `run` (150 steps) with its INT8 `artifact`, and the `float` artifact |
| `compressed` | `run` of `trained` and its `compressed` of two trials (2 steps each) |
| `updated` | `run` of `trained` with an accepted update, and the `new` images of it |
| `image` | INT8 `artifact` of `make_image_model`, for all sizes |
| `tensors` | INT8 `artifact` of `make_encoder`, with named tensors |

Their models are in `product_model.py`, and their data are those of `scenes.py`. A copied run still reads its data from the product.
The products lie in `muntin-products-USER` of the system's temporary folder, by the hash of `src/` and of what they are made with; a folder
that no test has used for a day is removed. They are made where they stay, since runs hold the paths of their data: a listing that is
written last says that a product is complete. A changed product fails the tests (`check`) and is made anew by the next run.
"""

from __future__ import annotations

import functools
import getpass
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

import muntin

SOURCES = ("products.py", "product_model.py", "scenes.py")
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy")
INSTRUCTIONS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Environment variables that change the integers and the rounding of a product."""
UNUSED_S = 24 * 3600.0
"""Seconds after which a folder of products is removed by a run that makes another one."""
MODEL = "product_model:make"
SEARCH = ("compression.trials=2", "compression.steps=2", "compression.max_drop=1", "compression.confidence=0.5")
"""Settings of `compressed`, as the options `--trials 2 --steps 2 --max-drop 1 --confidence 0.5`."""
UPDATE = ("update.share=0.1", "update.accept.max_slowdown=50")
"""Settings of `updated`; other programs may run meanwhile."""

_used: set[str] = set()


def product(name: str) -> Path:
    """Return the folder of a product, and make it if it is not there. For session and module fixtures: a test may patch what makes it."""
    assert not os.environ.get("PYTEST_CURRENT_TEST", "").endswith("(call)"), "take products in a fixture of a session or a module"
    folder = _home() / name
    listing = folder.with_suffix(".json")
    with FileLock(folder.with_suffix(".lock")):
        if not listing.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            with _as_in_a_new_process():
                MAKERS[name](folder)
            draft = folder.with_suffix(".draft")
            draft.write_text(json.dumps(_files(folder)))
            draft.replace(listing)
    os.utime(_home())
    if name in ("trained", "compressed", "updated"):
        from muntin.models.trusted_code import trust_model

        trust_model(MODEL)  # as after a fit of this process
    _used.add(name)
    return folder


def copy_of(path: Path, folder: Path) -> Path:
    """Copy a run or an artifact into a test's folder, and return its path there."""
    return Path(shutil.copytree(path, folder / path.name))


def check() -> None:
    """Raise AssertionError if a product that this process used was changed; the next run makes it anew."""
    for name in sorted(_used):
        folder = _home() / name
        listing = folder.with_suffix(".json")
        if not listing.exists():
            continue
        made, found = json.loads(listing.read_text()), _files(folder)
        if made != found:
            listing.unlink()
            changed = sorted(path for path in made.keys() | found.keys() if made.get(path) != found.get(path))
            raise AssertionError(f"a test changed {folder}, which all share (use copy_of): {', '.join(changed)}")


def _files(folder: Path) -> dict[str, list[int]]:
    """Return size and time of each file."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


@functools.cache
def _home() -> Path:
    """Return the folder of this code's products. Folders of other code that nothing uses any more are removed."""
    source, tests = Path(muntin.__file__).parent, Path(__file__).parent
    digest = hashlib.sha256()
    files = (path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    for path in (*sorted(files), *(tests / name for name in SOURCES)):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode() + path.read_bytes())
    facts = [sys.version, str(tests), *(version(name) for name in PACKAGES), *(os.environ.get(name, "") for name in INSTRUCTIONS)]
    digest.update(json.dumps(facts).encode())
    root = Path(tempfile.gettempdir()) / f"muntin-products-{getpass.getuser()}"
    root.mkdir(mode=0o700, exist_ok=True)
    assert root.stat().st_uid == os.getuid(), f"{root} belongs to another user"
    home = root / digest.hexdigest()[:16]
    if not home.exists():
        for other in root.iterdir():
            with suppress(OSError):  # another process removes it
                if time.time() - other.stat().st_mtime > UNUSED_S:
                    shutil.rmtree(other)
        home.mkdir(exist_ok=True)
    return home


@contextmanager
def _as_in_a_new_process() -> Iterator[None]:
    """One thread, and a random state that is put back."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def _trained(folder: Path) -> None:
    from muntin.deployment.checkpoint_export import export_checkpoint
    from muntin.training import fit, read_checkpoint
    from scenes import write_tiny

    training = {"steps": 150, "batch_size": 8, "learning_rate": 0.01, "validate_every": 150, "checkpoint_every": 75, "precision": "fp32"}
    tiny = write_tiny(folder / "data", model={"name": MODEL, "options": {}}, training=training)
    fit(tiny.recipe, directory=folder / "run", progress=False)
    checkpoint = read_checkpoint(folder / "run")
    export_checkpoint(checkpoint, folder / "run" / "artifact")
    export_checkpoint(checkpoint, folder / "float", integer=False)


def _compressed(folder: Path) -> None:
    from dataclasses import replace

    from muntin.budgeting.run_budget import compress_run
    from muntin.training import read_checkpoint
    from muntin.training.recipe import override_recipe

    run = copy_of(product("trained") / "run", folder)
    checkpoint = read_checkpoint(run)
    recipe = override_recipe(checkpoint.recipe, SEARCH)
    compress_run(replace(checkpoint, state=checkpoint.state.model_copy(update={"recipe": recipe})), progress=False)


def _updated(folder: Path) -> None:
    from muntin.updating.update import update_run
    from scenes import write_scenes

    run = copy_of(product("trained") / "run", folder)
    write_scenes(folder / "new", "new", 16, 900)
    assert update_run(run, folder / "new", overrides=UPDATE, threads=1).accepted


def _image(folder: Path) -> None:
    from product_model import make_image_model, smooth_pixels

    model, example = make_image_model(), smooth_pixels(2)
    muntin.export(model, example, folder / "artifact", calibration=[example], sizes="any", progress=False)


def _tensors(folder: Path) -> None:
    from product_model import make_encoder, tokens

    axes = {"ids": ("batch", "tokens"), "mask": ("batch", "tokens")}
    calibration = [tokens(8, 12, seed) for seed in range(4)]
    muntin.export(make_encoder(), tokens(3, 12), folder / "artifact", calibration=calibration, axes=axes, progress=False)


MAKERS: dict[str, Callable[[Path], None]] = {
    "trained": _trained,
    "compressed": _compressed,
    "updated": _updated,
    "image": _image,
    "tensors": _tensors,
}
