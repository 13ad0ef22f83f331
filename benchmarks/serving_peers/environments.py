"""A virtual environment for each peer, made with pip: their dependencies exclude each other. Triton runs muntin's own environment."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import start_triton
from harness import ROOT, write_whole

PEERS = {"litserve": "litserve", "ray": "ray[serve]", "triton": start_triton.REQUIREMENT}
_VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"


def make_environment(name: str, folder: Path) -> str | None:
    """Make `folder/NAME` unless it is there with this environment's engine: None, or the reason why it cannot be made. The first time takes
    a minute or two. muntin is installed as it is here (editable, without extras)."""
    root, ready = folder / name, folder / name / "ready.json"
    if versions(name, folder):
        return None
    ready.unlink(missing_ok=True)  # of another engine: after a failure there is no environment
    if name == "triton":
        try:
            start_triton.install(root)
        except (subprocess.CalledProcessError, SystemExit) as error:
            return str(error)
        package, _, its_version = start_triton.REQUIREMENT.partition("==")
        write_whole(ready, {package: its_version, **{package: version(package) for package in ("openvino", "numpy")}})
        return None
    python = str(root / "bin" / "python")
    pins = [f"{engine}=={version(engine)}" for engine in ("openvino", "onnxruntime")]
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PEERS[name], *pins, "--editable", str(ROOT)]
    package = PEERS[name].partition("[")[0]
    for command in ([sys.executable, "-m", "venv", "--clear", str(root)], pip, [python, "-c", _VERSIONS, package, "openvino", "numpy"]):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own commands
        if ran.returncode:
            lines = [line for line in (ran.stderr + ran.stdout).splitlines() if line.strip()]
            return f"{' '.join(command[1:6])} ... : {(lines or ['no message'])[-1][:200]}"
    packages = next((root / "lib").glob("python3.*")) / "site-packages"
    (packages / "serving-benchmark.pth").write_text(f"{ROOT / 'benchmarks'}\n", encoding="utf-8")  # for `serving_peers`
    write_whole(ready, json.loads(ran.stdout))
    return None


def versions(name: str, folder: Path) -> dict[str, str]:
    """Versions in a complete environment with this environment's engine; empty without one."""
    ready = folder / name / "ready.json"
    found: dict[str, str] = json.loads(ready.read_text(encoding="utf-8")) if ready.is_file() else {}
    return found if found.get("openvino") == version("openvino") else {}
