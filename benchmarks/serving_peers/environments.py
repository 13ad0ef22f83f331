"""A virtual environment for each peer, made with pip: their dependencies exclude each other. Triton runs muntin's own environment."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import start_triton
from kept import write_whole

REPOSITORY = Path(__file__).resolve().parents[2]
PEERS: dict[str, tuple[str, ...]] = {
    "litserve": ("litserve",),
    "ray": ("ray[serve]",),
    "triton": (start_triton.REQUIREMENT,),
}
_VERSIONS = """
import importlib.metadata as m, json, sys
print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))
"""


def make_environment(name: str, folder: Path) -> str | None:
    """Makes `folder/NAME` unless it `is_made`; None, or the reason why it cannot be made. The first time takes a minute or two.

    muntin is installed as it lies here (editable, without extras), with the engine's version of this environment.
    """
    root, ready = folder / name, folder / name / "ready.json"
    if is_made(name, folder):
        return None
    ready.unlink(missing_ok=True)  # of another engine: what comes of a failure now is no environment
    if name == "triton":
        return _install_triton(root, ready)
    pins = [f"{engine}=={importlib.metadata.version(engine)}" for engine in ("openvino", "onnxruntime")]
    pip = [str(root / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(root)],
        [*pip, *PEERS[name], *pins, "--editable", str(REPOSITORY)],
    ]
    for command in commands:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own commands
        if ran.returncode:
            lines = [line for line in (ran.stderr + ran.stdout).splitlines() if line.strip()]
            return f"{' '.join(command[1:6])} ... : {(lines or ['no message'])[-1][:200]}"
    # For the package that this file is in.
    (site_packages(root) / "serving-benchmark.pth").write_text(f"{REPOSITORY / 'benchmarks'}\n", encoding="utf-8")
    main = PEERS[name][0].partition("[")[0].partition("=")[0]
    asked = [str(root / "bin" / "python"), "-c", _VERSIONS, main, "openvino", "numpy"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True)  # noqa: S603
    write_whole(ready, json.loads(told.stdout))
    return None


def _install_triton(root: Path, ready: Path) -> str | None:
    try:
        start_triton.install(root)
    except (subprocess.CalledProcessError, SystemExit) as error:
        return str(error)
    main, _, version = start_triton.REQUIREMENT.partition("==")
    write_whole(ready, {main: version, **{package: importlib.metadata.version(package) for package in ("openvino", "numpy")}})
    return None


def is_made(name: str, folder: Path) -> bool:
    """Return whether an environment is complete, with the engine version that is installed here."""
    ready = folder / name / "ready.json"
    return ready.is_file() and versions(name, folder).get("openvino") == importlib.metadata.version("openvino")


def versions(name: str, folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / name / "ready.json").read_text(encoding="utf-8")))


def site_packages(root: Path) -> Path:
    return next((root / "lib").glob("python3.*")) / "site-packages"
