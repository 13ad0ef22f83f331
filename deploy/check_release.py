"""Build the sdist and the wheel, and try the wheel in an empty environment for each extra, outside the checkout.

    python deploy/check_release.py [--extras none train ...] [--output dist]

The wheel is built from the sdist. `demo` is always the first: its run makes the artefact that the others verify, predict with and serve.
A step that fails ends the check with its output. Needs the network for pip, about 2 GB of disk at a time and 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("demo", "none", "train", "serve", "raster", "video", "otel", "ray")
SHORT = ("training.steps=40", "model.name=hybrid-xxs", "training.validate_every=40", "data.crop=64")
"""Changes to the demonstration's recipe: the steps are tried, not the result."""
IMPORTS = {"train": "torch, timm, optuna, muntin", "raster": "rasterio", "video": "av", "otel": "opentelemetry.sdk", "ray": "ray.serve"}


class Environment:
    """A new virtual environment with the wheel and one extra, and an empty folder to work in."""

    def __init__(self, folder: Path, wheel: Path, extra: str) -> None:
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        venv.create(folder / "venv", with_pip=True)
        self.bin = folder / "venv" / "bin"
        wanted = str(wheel) if extra == "none" else f"{wheel}[{extra}]"
        self.run("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wanted)
        self.run("python", "-m", "pip", "check")

    def run(self, program: str, *arguments: object) -> str:
        """Run a program of the environment and return its standard output. Raises SystemExit with its output if it fails."""
        words = [str(self.bin / program), *map(str, arguments)]
        variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        done = subprocess.run(words, cwd=self.work, env=variables, capture_output=True, text=True, check=False)  # noqa: S603 - own words
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}\nexit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout


def build(output: Path) -> Path:
    """Build both and return the wheel's path."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(output), str(ROOT)], check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    return max(output.glob("*.whl"), key=lambda path: path.stat().st_mtime).resolve()


def try_demo(environment: Environment, shared: Path) -> None:
    """Run the demonstration with few steps, and keep its artefact and a picture."""
    environment.run("muntin", "demo", *(word for change in SHORT for word in ("--set", change)))
    shutil.copytree(environment.work / "runs/demo/artifact", shared / "artifact")
    draw = "import numpy, sys; from PIL import Image; Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (300, 200, 3), 'uint8'))"
    environment.run("python", "-c", f"{draw}.save(sys.argv[1])", shared / "picture.png")


def try_runtime(environment: Environment, shared: Path) -> None:
    """Use the artefact."""
    environment.run("muntin", "doctor")
    environment.run("muntin", "verify", shared / "artifact")
    environment.run("muntin", "predict", shared / "artifact", shared / "picture.png", "-o", "answers/")
    if not any((environment.work / "answers").iterdir()):
        raise SystemExit("muntin predict wrote nothing")


def try_server(environment: Environment, shared: Path) -> None:
    """Serve the artefact and ask it for a mask."""
    command = [str(environment.bin / "muntin"), "serve", str(shared / "artifact"), "--http-port", "0", "--no-grpc", "--json"]
    log = environment.work / "server.log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=environment.work) as server:  # noqa: S603
        try:
            address = _address(log, server)
            request = urllib.request.Request(f"{address}/predict", data=(shared / "picture.png").read_bytes())  # noqa: S310 - own server
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                if not answer.read().startswith(b"\x89PNG"):
                    raise SystemExit("POST /predict did not return a PNG")
        finally:
            server.terminate()
            server.wait(30)


def _address(log: Path, server: subprocess.Popen[bytes]) -> str:
    """The server's address, from its output, within two minutes."""
    for _ in range(240):
        time.sleep(0.5)
        if server.poll() is not None:
            break
        for word in log.read_text().replace('"', " ").split():
            if word.startswith("http://"):
                return word.rstrip("/,.")
    raise SystemExit(f"muntin serve does not answer:\n{log.read_text()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", nargs="+", choices=EXTRAS, default=EXTRAS)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the sdist and the wheel")
    arguments = parser.parse_args()
    wheel = build(arguments.output)
    seconds = {}
    with tempfile.TemporaryDirectory(prefix="muntin-release-") as name:
        shared = Path(name) / "shared"
        shared.mkdir()
        for extra in sorted({"demo", *arguments.extras}, key=EXTRAS.index):
            started = time.monotonic()
            environment = Environment(Path(name) / extra, wheel, extra)
            if module := IMPORTS.get(extra):
                environment.run("python", "-c", f"import {module}")
            if extra == "demo":
                try_demo(environment, shared)
            try_runtime(environment, shared)
            if extra in ("demo", "serve"):
                try_server(environment, shared)
            seconds[extra] = round(time.monotonic() - started)
            print(f"{extra:<8} {seconds[extra]} s", flush=True)
            shutil.rmtree(Path(name) / extra)
    print(json.dumps({"wheel": wheel.name, "seconds": seconds}))


if __name__ == "__main__":
    main()
