"""Reports on the disk: all files or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import muntin.reporting
from muntin.errors import MuntinError
from muntin.reporting import write_report
from muntin.reporting.files import write_files


def without_pictures(report: dict[str, Any]) -> dict[str, Any]:
    return {**report, "pictures": None}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_report_round_trip(report: dict[str, Any], run_directory: Path) -> None:
    page = write_report(run_directory, report)
    assert page == run_directory / "report.html"
    assert json.loads((run_directory / "report.json").read_text(encoding="utf-8")) == report
    assert not [file for file in contents(run_directory) if file.startswith(".")]


def test_report_is_reproducible(report: dict[str, Any], run_directory: Path) -> None:
    write_report(run_directory, report)
    first = contents(run_directory)
    write_report(run_directory, report)
    assert contents(run_directory) == first


def test_refused_report_keeps_earlier_files(report: dict[str, Any], run_directory: Path) -> None:
    write_report(run_directory, report)
    before = contents(run_directory)
    report["steps"][0]["miou"] = float("nan")
    with pytest.raises(MuntinError, match="finite"):
        write_report(run_directory, report)
    report["steps"][0]["miou"] = 0.5
    report["pictures"]["overlay"] = "none.png"
    with pytest.raises(MuntinError, match=r"none\.png"):
        write_report(run_directory, report)
    assert contents(run_directory) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_full_disk_keeps_earlier_files(report: dict[str, Any], tmp_path: Path) -> None:
    small = {**without_pictures(report), "title": "before"}
    write_report(tmp_path, small)
    before = contents(tmp_path)
    source = tmp_path.with_name(f"{tmp_path.name}-next.json")
    source.write_text(json.dumps({**small, "title": "after"}), encoding="utf-8")
    # Files may not grow past a size that report.json fits and report.html does not.
    limit = len(before["report.json"]) + 1000
    assert limit < len(before["report.html"])
    code = (
        "import json, resource, sys\n"
        "from pathlib import Path\n"
        "from muntin.errors import MuntinError\n"
        "from muntin.reporting import write_report\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)\n"
        "try:\n"
        "    write_report(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))\n"
        "except MuntinError as error:\n"
        "    sys.exit(f'refused: {error}')\n"
    )
    package = str(Path(muntin.reporting.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(source), str(limit)],
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("refused: cannot write the report into ")
    assert done.stderr.count("\n") == 1
    assert contents(tmp_path) == before


def test_file_name_outside_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_files(
        tmp_path / "new" / "folder", {"a.txt": f"été, {name}", "a.json": json.dumps({"path": name}, ensure_ascii=False)}, what="text"
    )
    assert (tmp_path / "new" / "folder" / "a.txt").read_text(encoding="utf-8") == "été, caf\\udce9"
    assert json.loads((tmp_path / "new" / "folder" / "a.json").read_text(encoding="utf-8")) == {"path": name}


def test_report_folder_is_a_file(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(MuntinError, match="cannot write the report into") as caught:
        write_report(tmp_path / "run", without_pictures(report))
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {"run": b"mine"}


def test_report_file_is_a_folder(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(MuntinError, match="cannot write the report into"):
        write_report(tmp_path, without_pictures(report))
    assert not [file for file in contents(tmp_path) if file.startswith(".")]


def test_import_without_torch_and_matplotlib() -> None:
    code = "import sys, muntin.reporting; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    package = str(Path(muntin.reporting.__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": package}, check=False).returncode == 0
