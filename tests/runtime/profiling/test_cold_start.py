"""Loading is measured in a process of its own, with the errors of opening."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from muntin.errors import ArtifactError, DataError, MuntinError
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.cold_start import ArtifactCandidate, Candidate, measure_loading

OPTIONS = SessionOptions(threads=1, shapes=((1, 16, 16), (2, 8, 8)))


@dataclass(frozen=True, kw_only=True)
class Ending(Candidate):
    """Opening that fails, by the path."""

    @property
    def signature(self) -> Any:
        raise NotImplementedError

    def example(self) -> Any:
        raise NotImplementedError

    def prepare(self) -> None:
        os.write(1, b"a library's own words\n")

    def open(self, options: SessionOptions) -> Any:
        if self.path == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.path == "memory":
            raise MemoryError
        if self.path == "mistake":
            raise ArtifactError("one line")
        raise RuntimeError("first\nlast")


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)  # as a user's own module
    monkeypatch.setattr(Ending, "__module__", "test_cold_start")


def test_second_time_comes_from_the_cache(convolutions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUNTIN_CACHE", str(tmp_path))
    candidate = ArtifactCandidate(path=str(convolutions.path))
    first, second = (measure_loading(candidate, OPTIONS) for _ in range(2))
    assert (first.cached, second.cached) == (False, True)
    assert measure_loading(candidate, replace(OPTIONS, shapes=((1, 16, 16), (1, 24, 24)))).cached is False  # half of it is new
    assert first.load_s > 0
    assert measure_loading(ArtifactCandidate(path=str(convolutions.path), engine="onnxruntime"), OPTIONS).cached is None


@pytest.mark.parametrize("cache", [f"{__file__}", "~no such user/cache"])
def test_no_cache(convolutions: Any, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    monkeypatch.setenv("MUNTIN_CACHE", cache)
    cached = [measure_loading(ArtifactCandidate(path=str(convolutions.path)), OPTIONS).cached for _ in range(2)]
    assert cached == [False, False]


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [({"engine": "abacus"}, DataError, "openvino"), ({"path": "nowhere"}, ArtifactError, "nowhere")],
)
def test_errors_of_opening(convolutions: Any, fields: dict[str, str], kind: type[MuntinError], message: str) -> None:
    with pytest.raises(kind, match=message):
        measure_loading(ArtifactCandidate(**({"path": str(convolutions.path)} | fields)), OPTIONS)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "killed",
            DataError,
            "killed: opening it for images of 1x16x16, 2x8x8 was ended by signal 9, as when memory runs out: choose a smaller",
        ),
        ("memory", DataError, "memory: no memory to open it for images of 1x16x16, 2x8x8: choose a smaller size or batch"),
        ("mistake", ArtifactError, "one line"),
        ("broken", DataError, "broken cannot be opened in a process of its own: last"),
    ],
)
def test_process_without_an_answer_is_one_line(importable: None, name: str, kind: type[MuntinError], message: str) -> None:
    with pytest.raises(kind) as caught:
        measure_loading(Ending(path=name), OPTIONS)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_script_without_a_guard(convolutions: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""
import json
from muntin.runtime.profiling.cold_start import ArtifactCandidate, measure_loading
from muntin.runtime.options import SessionOptions
found = measure_loading(ArtifactCandidate(path={str(convolutions.path)!r}), SessionOptions(threads=1, shapes=((1, 8, 8),)))
print(json.dumps(found.load_s > 0))
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr, json.loads(done.stdout)) == (0, "", True)
