"""Artefacts on disk: what is written comes back, whole or not at all, and no altered byte passes."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from muntin.artifact import Artifact, check_target, file_lock, open_artifact, store
from muntin.artifact import atomic_directory as directory
from muntin.artifact.manifest import parse_manifest, render_manifest
from muntin.artifact.store import FILES, MANIFEST, with_optional_file
from muntin.errors import ArtifactError

Write = Callable[..., Artifact]


def initializers(data: bytes) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load_model_from_string(data).graph.initializer}


def test_every_weight_comes_back(write: Write, model: onnx.ModelProto, tmp_path: Path) -> None:
    write(tmp_path / "a")
    data = open_artifact(tmp_path / "a").model_bytes()
    onnx.checker.check_model(onnx.load_model_from_string(data), full_check=True)
    restored, original = initializers(data), initializers(model.SerializeToString())
    assert restored.keys() == original.keys()
    for name, value in original.items():
        expected = value.astype(np.float16).astype(np.float32) if name == "narrow" else value
        assert restored[name].dtype == value.dtype
        np.testing.assert_array_equal(restored[name], expected, err_msg=name)


def test_stored_weights(write: Write, tmp_path: Path) -> None:
    artifact = write(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "weights.safetensors")
    assert {name: (str(value.dtype), value.nbytes) for name, value in stored.items()} == {
        "wide": ("uint8", 60),
        "narrow": ("float16", 160),
        "positions": ("int64", 792),
        "unsigned": ("uint8", 22),
    }
    assert artifact.manifest.tensors["wide"].model_dump() == {"bits": 4, "shape": (40, 3, 1, 1), "packing": "int"}
    structure = onnx.load_model_from_string((tmp_path / "a" / "model.onnx").read_bytes()).graph
    kept = {item.name: len(item.raw_data) for item in structure.initializer}
    assert kept == {"wide": 0, "narrow": 0, "positions": 0, "unsigned": 0, "wide_scale": 160, "wide_zero": 40, "bias": 8}


def test_stripped_metadata(write: Write, model: onnx.ModelProto, tmp_path: Path) -> None:
    before = model.SerializeToString(deterministic=True)
    assert b"/home/someone" in before
    write(tmp_path / "a")
    assert b"/home/someone" not in (tmp_path / "a" / "model.onnx").read_bytes()
    graph = onnx.load_model_from_string((tmp_path / "a" / "model.onnx").read_bytes()).graph
    assert [node.name for node in graph.node] == [node.name for node in model.graph.node]
    assert model.SerializeToString(deterministic=True) == before  # the model itself is unchanged


def test_short_repr(write: Write, tmp_path: Path) -> None:
    shown = repr(write(tmp_path / "a"))
    assert shown == f"Artifact('{tmp_path / 'a'}', segment, 0 of 1 layers in INT8, others in f32, exported 2026-11-24T16:00:00+00:00)"


def test_same_input_same_bytes(write: Write, tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first.digest == second.digest
    assert first.bytes == sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
    for name in (MANIFEST, *FILES):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_golden_pairs_come_back(write: Write, golden: list[tuple[np.ndarray, np.ndarray]], tmp_path: Path) -> None:
    for read, written in zip(write(tmp_path / "a").golden_images(), golden, strict=True):
        np.testing.assert_array_equal(read[0], written[0])
        np.testing.assert_array_equal(read[1], written[1])


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_flipped_bytes(write: Write, tmp_path: Path, name: str) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / name
    original = file.read_bytes()
    for position in np.linspace(0, len(original) - 2, 40).astype(int):
        changed = bytearray(original)
        changed[position] ^= 0x40
        file.write_bytes(changed)
        with pytest.raises(ArtifactError, match=name) as caught:
            open_artifact(tmp_path / "a")
        assert "\n" not in str(caught.value)


def test_alteration_after_opening(write: Write, tmp_path: Path) -> None:
    artifact = write(tmp_path / "a")
    file = tmp_path / "a" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors"):
        artifact.model_bytes()


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_missing_file(write: Write, tmp_path: Path, name: str) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        open_artifact(tmp_path / "a")


def test_extra_file(write: Write, tmp_path: Path) -> None:
    first = write(tmp_path / "a")
    (tmp_path / "a" / "hook.py").write_text("print()")
    with pytest.raises(ArtifactError, match=r"hook\.py"):
        open_artifact(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"hook\.py"):
        write(tmp_path / "a", packing={})
    (tmp_path / "a" / "hook.py").unlink()
    assert open_artifact(tmp_path / "a").digest == first.digest


def test_optional_file(write: Write, tmp_path: Path) -> None:
    artifact = write(tmp_path / "a")
    assert artifact.optional_file("drift.json") is None
    with_optional_file(artifact, "drift.json", b"{}")
    again = open_artifact(tmp_path / "a")
    assert again.optional_file("drift.json") == b"{}" and again.names[-1] == "drift.json" and again.digest != artifact.digest
    assert again.bytes == sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    (tmp_path / "a" / "drift.json").unlink()
    with pytest.raises(ArtifactError, match=r"drift\.json: missing"):
        open_artifact(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"drift\.json: cannot be read"):
        again.optional_file("drift.json")
    (tmp_path / "a" / "drift.json").write_bytes(b"{}")
    write(tmp_path / "a")  # an export replaces it, and the reference of other weights is gone
    assert "drift.json" not in open_artifact(tmp_path / "a").names


def test_unrecorded_optional_file(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / "drift.json").write_bytes(b"{}")
    with pytest.raises(ArtifactError, match=r"drift\.json: not part of the artefact"):
        open_artifact(tmp_path / "a")


def test_no_artefact_at_all(tmp_path: Path) -> None:
    for name, message in (("nowhere", "no such artefact"), (".", MANIFEST), ("x" * 300, "cannot be read")):
        with pytest.raises(ArtifactError, match=message):
            open_artifact(tmp_path / name)


@pytest.mark.parametrize("refused", ["iterdir", "is_file"])
def test_directory_of_another_user(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    path = write(tmp_path / "a").path

    def no(*_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, refused, no)  # whoever runs the tests may be allowed everything
    with pytest.raises(ArtifactError, match=r"cannot be read \(Permission denied\): check the path and its permissions"):
        open_artifact(path)


def test_replaced_artefact(write: Write, tmp_path: Path) -> None:
    first = write(tmp_path / "a")
    second = write(tmp_path / "a", packing={"wide": 8})
    assert open_artifact(tmp_path / "a").digest == second.digest != first.digest
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_missing_parents_and_empty_directory(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "deep" / "er" / "a")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert open_artifact(tmp_path / "deep" / "er" / "a").digest == open_artifact(tmp_path / "empty").digest


def test_directory_that_is_no_artefact(write: Write, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"text")
    with pytest.raises(ArtifactError, match=r"cat\.jpg"):
        write(tmp_path / "photos")
    with pytest.raises(ArtifactError, match="it is a file"):
        write(tmp_path / "file")
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "photos"]


def test_target_without_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"text")
    for place in ("file/a", "file/deep/er/a"):
        with pytest.raises(ArtifactError, match="file is a file: name a directory below a directory"):
            check_target(tmp_path / place)
    check_target(tmp_path / "deep" / "er" / "a")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # permissions do not bind whom the tests may run as
    with pytest.raises(ArtifactError, match="nothing may be written in"):
        check_target(tmp_path / "deep" / "er" / "a")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("packing", "message"),
    [
        ({"wide": 3}, "wide.*do not fit 3 bits"),
        ({"nothing": 4}, "nothing"),
        ({"narrow": 4}, "narrow is float32"),
        ({"wide": "f16"}, "wide is int8"),
        ({"wide": 9}, "2 to 8"),
    ],
)
def test_packing_that_loses_values(write: Write, tmp_path: Path, packing: dict[str, object], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        write(tmp_path / "a", packing=packing)
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_half_precision(write: Write, model: onnx.ModelProto, tmp_path: Path) -> None:
    next(item for item in model.graph.initializer if item.name == "bias").CopyFrom(
        numpy_helper.from_array(np.full((1, 2, 1, 1), 7e4, np.float32), "bias")
    )
    with pytest.raises(ArtifactError, match="65504"):
        write(tmp_path / "a", packing={"bias": "f16"})


def test_too_large_a_model(write: Write, model: onnx.ModelProto, tmp_path: Path) -> None:
    model.graph.initializer.append(TensorProto(name="huge", data_type=TensorProto.FLOAT, dims=[2**14, 2**15]))
    with pytest.raises(ArtifactError, match="2 GiB"):
        write(tmp_path / "a")


def test_external_data_is_refused(write: Write, model: onnx.ModelProto, tmp_path: Path) -> None:
    outside = TensorProto(name="outside", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="../../etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["read"], name="read", value=outside))
    with pytest.raises(ArtifactError, match="external file"):
        write(tmp_path / "a")


def test_folder_of_artefacts(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "run" / "artifact")
    with pytest.raises(ArtifactError, match=f"holds no manifest.json: .*, such as {tmp_path / 'run' / 'artifact'}"):
        open_artifact(tmp_path / "run")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
@pytest.mark.parametrize("name", ["golden.safetensors", "manifest.json"])
def test_pipe_instead_of_a_file(write: Write, tmp_path: Path, name: str) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    os.mkfifo(tmp_path / "a" / name)
    with pytest.raises(ArtifactError, match=r"no regular file|holds no manifest"):
        open_artifact(tmp_path / "a")


def test_huge_manifest(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a")
    size = (tmp_path / "a" / "manifest.json").stat().st_size
    monkeypatch.setattr(store, "LARGEST_MANIFEST", size)
    open_artifact(tmp_path / "a")
    monkeypatch.setattr(store, "LARGEST_MANIFEST", size - 1)
    with pytest.raises(ArtifactError, match=f"{size:,} bytes, more than"):
        open_artifact(tmp_path / "a")
    with pytest.raises(ArtifactError, match="record less"):
        write(tmp_path / "b", measured={"long": "x" * (1 << 22)})
    assert not (tmp_path / "b").exists()


def test_huge_example(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="example"):
        write(tmp_path / "a", example=(1, 60_000, 60_000))


def test_golden_pairs_that_do_not_fit(write: Write, golden: list[tuple[np.ndarray, np.ndarray]], tmp_path: Path) -> None:
    images, scores = golden[0]
    for pairs in ([], [(images.astype(np.float32), scores)], [(images, scores[:, :1])], [(images, scores * np.float32("nan"))]):
        with pytest.raises(ArtifactError, match="golden"):
            write(tmp_path / "a", golden=pairs)


def tampered(path: Path, name: str) -> Artifact:
    """The artefact at `path` after one of its files was changed, with digests that agree: as whoever means to could make it."""
    manifest = parse_manifest((path / MANIFEST).read_bytes(), MANIFEST)
    files = manifest.files | {name: hashlib.sha256((path / name).read_bytes()).hexdigest()}
    (path / MANIFEST).write_bytes(render_manifest(manifest.model_copy(update={"files": files}))[1])
    return open_artifact(path)


def test_useless_golden_pairs(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / "golden.safetensors"
    whole = load_file(file)
    pair = {name: whole[name] for name in ("inputs_0/images", "outputs_0/scores")}
    changes = {
        "no golden pairs": {},
        "outputs nothing": pair | {"inputs_1/images": whole["inputs_1/images"]},
        "it holds more, which is neither": pair | {"more": whole["inputs_1/images"]},
        "no input images": pair | {"outputs_1/scores": whole["outputs_1/scores"]},
        "golden pair 0: .scores. has the shape": pair | {"outputs_0/scores": whole["outputs_0/scores"][:, :1]},
        "golden pair 0: .images. has the shape": pair | {"inputs_0/images": whole["inputs_0/images"][..., :2]},
    }
    for says, tensors in changes.items():
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file)
        with pytest.raises(ArtifactError, match=rf"golden\.safetensors: .*{says}.*export the artefact again"):
            tampered(tmp_path / "a", "golden.safetensors").golden()


def test_initializer_of_an_unknown_type(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "a")
    file = tmp_path / "a" / "model.onnx"
    structure = onnx.load_model_from_string(file.read_bytes())
    next(item for item in structure.graph.initializer if item.name == "wide").data_type = 99
    file.write_bytes(structure.SerializeToString())
    with pytest.raises(ArtifactError, match="wide has the type 99"):
        tampered(tmp_path / "a", "model.onnx").model_bytes()


@pytest.mark.parametrize("value", [np.float32(0.5), float("nan"), {"deep": [float("inf")]}])
def test_measured_values_that_are_not_plain(write: Write, tmp_path: Path, value: object) -> None:
    with pytest.raises(ArtifactError, match="measured"):
        write(tmp_path / "a", measured={"miou": value})
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, signal, sys
import numpy as np, onnx
from onnx import TensorProto, helper, numpy_helper
from muntin.artifact import Signature, write_artifact
from muntin.errors import ArtifactError
node = helper.make_node("Identity", ["images"], ["scores"], name="identity")
info = helper.make_tensor_value_info
graph = helper.make_graph([node], "g", [info("images", TensorProto.UINT8, [1])], [info("scores", TensorProto.UINT8, [1])],
    [numpy_helper.from_array(np.arange(100_000, dtype=np.float32), "large")])
images = np.zeros((1, 2, 2, 3), np.uint8)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))
try:
    write_artifact(sys.argv[1], model=helper.make_model(graph), signature=Signature(task="restore", channels=3),
        golden=[(images, np.zeros((1, 3, 2, 2), np.float32))], golden_tolerance={})
except ArtifactError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.skipif(os.name != "posix", reason="a limit on the size of files needs POSIX")
def test_full_disk(write: Write, tmp_path: Path) -> None:
    old = write(tmp_path / "a")
    for target in ("a", "new"):
        run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / target)], capture_output=True, text=True, check=False)
        assert (run.returncode, run.stderr) == (1, "")
        assert run.stdout.count("\n") == 1
        assert "cannot be written (File too large)" in run.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert open_artifact(tmp_path / "a").digest == old.digest


KILLED = """
import os, signal, sys
from pathlib import Path
from muntin.artifact import atomic_directory as directory
from muntin.artifact import file_lock
def killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "writing":
    directory.sync_directory = killed
else:  # between the two renames
    directory._swap = lambda fresh, target, aside: (target.rename(aside), killed())
directory.replace_directory(Path(sys.argv[1]), {"manifest.json": b"{}", "model.onnx": b""}, marker="manifest.json")
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_remains_of_killed_writes(write: Write, tmp_path: Path) -> None:
    directory.replace_directory(tmp_path / "a", {MANIFEST: b"{}"}, marker=MANIFEST)
    for where in ("writing", "renaming"):
        ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a"), where], check=False).returncode
        assert ended == -signal.SIGKILL
    left = {entry.name for entry in tmp_path.iterdir()}
    assert sorted(name.rpartition(".")[2] for name in left) == ["lock", "old", "partial"]  # each write removes what was left before it
    others = {".a.0123abcd.partial.txt", ".b.0123abcd.old"}  # not of a write, and of another artefact
    for name in others:
        (tmp_path / name).mkdir()
    write(tmp_path / "a")
    open_artifact(tmp_path / "a")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", *others}


def test_remains_beside_a_running_write(write: Write, tmp_path: Path) -> None:
    running = tmp_path / ".a.0123abcd.partial"
    running.mkdir()
    second = threading.Thread(target=lambda: write(tmp_path / "a"))
    with file_lock.exclusive(tmp_path / ".a.lock"):
        second.start()
        second.join(0.3)
        assert second.is_alive() and running.is_dir()
    second.join()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_remains_without_locks(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "fcntl", None)
    old, new = tmp_path / ".a.0123abcd.partial", tmp_path / ".a.4567abcd.partial"
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, 0))
    write(tmp_path / "a")
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", new.name}


KILLED_EXPORT = """
import os, signal
from muntin.artifact.atomic_directory import scratch_directory
with scratch_directory() as folder:
    (folder / "draft").mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_scratch_directories_of_killed_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert subprocess.run([sys.executable, "-c", KILLED_EXPORT], env=os.environ | {"TMPDIR": str(tmp_path)}, check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2  # the folder and its lock
    with directory.scratch_directory() as first, directory.scratch_directory() as second:
        assert {entry for entry in tmp_path.iterdir() if entry.is_dir()} == {first, second}
    assert not list(tmp_path.iterdir())


def test_failed_sync_after_the_rename(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, sync = write(tmp_path / "a"), directory.sync_directory

    def failing(folder: Path) -> None:
        if folder == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        sync(folder)

    monkeypatch.setattr(directory, "sync_directory", failing)
    with pytest.raises(ArtifactError, match="in place, but the disk does not confirm it"):
        write(tmp_path / "a", packing={"wide": 8})
    assert open_artifact(tmp_path / "a").digest != old.digest
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_needs_no_torch() -> None:
    code = "import sys, muntin.artifact, muntin.runtime; sys.exit(any(m in sys.modules for m in ('torch', 'openvino', 'onnxruntime')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_mount_point_as_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("muntin.artifact.atomic_directory.os.path.ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(ArtifactError, match="a file system is mounted there, which cannot be replaced: name a directory in it"):
        directory.refuse_foreign(tmp_path / "out", ["a"], marker="a")
    assert directory.refuse_foreign(tmp_path / "out" / "artifact", ["a"], marker="a") == (tmp_path / "out" / "artifact").resolve()
