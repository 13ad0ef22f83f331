"""The command line in this process and in others, and a run and an artefact for it to work on."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from brief_ceilings import brief
from muntin.artifact import ClassInfo, GoldenTolerance, Signature, write_artifact
from muntin.cli import main
from muntin.runtime.profiling.cold_start import Loading
from products import copy_of, product

BUSY_NOTE = "note      other processes use "
"""Begins a note that depends on what else the machine does."""


@pytest.fixture(scope="session", autouse=True)
def brief_ceilings() -> None:
    """A profile measures the machine's ceilings for seconds, each time the same ones."""
    brief()


@dataclass(frozen=True)
class Answer:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    def document(self) -> Any:
        """The one JSON document of a command that succeeded: all of its standard output, and nothing on standard error."""
        assert (self.code, self.err) == (0, "")
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    def mistake(self, code: int = 1) -> str:
        """The one line of a command that failed."""
        assert self.code == code
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("muntin: ")
        assert "Traceback" not in self.err
        return self.err.removeprefix("muntin: ").rstrip("\n")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`call("verify", path)`: the entry point, in this process. An exception that it does not answer fails the test."""

    def call(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["muntin", *map(str, words)])
        capsys.readouterr()
        try:
            main()
            code: Any = 0
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return Answer(code or 0, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def call_process() -> Callable[..., Answer]:
    """`call_process("verify", path, before="python statements")`: a process of its own; costs seconds where torch is loaded."""

    def call(
        *words: object, before: str = "", env: dict[str, str] | None = None, cwd: Path | None = None, errors: str = "strict"
    ) -> Answer:
        code = f"{before}\nfrom muntin import progress\nfrom muntin.cli import main\nprogress.FIRST_S = 3600\nmain()"
        command = [sys.executable, "-c", code, *map(str, words)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors=errors, env=env, cwd=cwd, timeout=120, check=False)
        lines = [line for line in done.stderr.splitlines(keepends=True) if not line.startswith(BUSY_NOTE)]
        return Answer(done.returncode, done.stdout, "".join(lines))

    return call


@dataclass(frozen=True)
class Exported:
    """A data set, a run on it, the run's artefact, and one in floats. Not to be changed: copy first."""

    root: Path
    recipe: Path
    run: Path
    artifact: Path
    floats: Path
    image: Path
    mask: Path


@pytest.fixture(scope="session")
def exported() -> Exported:
    """Of a user's own model of three convolutions: our own takes PyTorch ten times as long to trace."""
    folder = product("trained")
    data, run = folder / "data", folder / "run"
    image, mask = (data / "test" / kind / "test-0.png" for kind in ("images", "masks"))
    return Exported(data, data / "recipe.yaml", run, run / "artifact", folder / "float", image, mask)


@pytest.fixture
def run(exported: Exported, tmp_path: Path) -> Path:
    """A copy of the run, with its artefact."""
    return copy_of(exported.run, tmp_path)


@pytest.fixture
def loading_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading is measured in this process: the import of PyTorch in another one takes seconds."""

    def measure(candidate: Any, options: Any) -> Any:
        started = time.perf_counter()
        session = candidate.open(options)
        return Loading(load_s=time.perf_counter() - started, held_mib=None, peak_mib=2.0, cached=getattr(session, "from_cache", None))

    for module in ("muntin.runtime.profiling.bench", "muntin.deployment.artifact_comparison"):
        monkeypatch.setattr(f"{module}.measure_loading", measure)


@pytest.fixture
def fixed_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are exported for one size, where nothing else is requested: a graph of free sizes takes several times as long to make."""
    monkeypatch.setattr("muntin.deployment.checkpoint_export.usual_sizes", lambda task: "fixed")


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    """All files under a folder, hidden ones too, with what they hold: to see that nothing was changed or left behind."""
    return lambda root: {str(path.relative_to(root)): path.read_bytes() if path.is_file() else b"/" for path in sorted(root.rglob("*"))}


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """`with full_disk(100):` no file of this process can grow beyond so many bytes: writing fails as on a full disk."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture(scope="session")
def write_small() -> Callable[..., Path]:
    """`write_small(path, task="classify", golden=1.0, nan=True)`: an artefact of one product a pixel, made without torch.

    The scores of class k are the mean of channels 0..k over 255; "restore" has as many channels as names, the others three. `golden` is
    added to the recorded scores; `nan` to the real ones. `scale`: each score stands in a square of so many pixels a side.
    """

    def write(
        path: Path,
        *,
        task: str = "segment",
        names: tuple[str, ...] = ("a", "b"),
        golden: float = 0.0,
        nan: bool = False,
        side: int | None = None,
        scale: int = 1,
    ) -> Path:
        channels = len(names) if task == "restore" else 3
        weights = np.stack([np.where(np.arange(channels) <= k, 1 / (255 * (k + 1)), 0) for k in range(len(names))]).astype(np.float32)
        shift = np.full((1, len(names), 1, 1), np.nan if nan else 0, np.float32)
        nodes = [
            helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["planes", "weights"], ["products"], name="product"),
            helper.make_node("Add", ["products", "shift"], ["map" if task == "classify" or scale > 1 else "scores"]),
        ]
        values = {"weights": weights[:, :, None, None], "shift": shift}
        if task == "classify":
            nodes.append(helper.make_node("ReduceMean", ["map", "axes"], ["scores"], keepdims=0))
            values["axes"] = np.array([2, 3])
        elif scale > 1:
            rounding = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            nodes.append(helper.make_node("Resize", ["map", "", "sides"], ["scores"], mode="nearest", **rounding))
            values["sides"] = np.array([1, 1, scale, scale], np.float32)
        shape = ["B", len(names), *(("H", "W") if scale == 1 else (None, None))][: 2 if task == "classify" else 4]
        graph = helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", channels])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(value, name) for name, value in values.items()],
        )
        images = np.random.default_rng(0).integers(0, 256, (1, 5, 6, channels)).astype(np.uint8)
        classes = tuple(ClassInfo(name=name, color=(9 * k, 0, 0)) for k, name in enumerate(names))
        scores = np.einsum("bhwc,kc->bkhw", images.astype(np.float32), weights)
        scores = scores.mean((2, 3)) if task == "classify" else scores.repeat(scale, 2).repeat(scale, 3)
        scores = np.ascontiguousarray(scores) + np.float32(golden)
        write_artifact(
            path,
            model=helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
            signature=Signature(task=task, channels=channels, classes=() if task == "restore" else classes, side=side, scale=scale),
            golden=[(images, scores)],
            golden_tolerance={"openvino": {"f32": GoldenTolerance(max_error=0.01, label_agreement=0.9)}},
        )
        return path

    return write
