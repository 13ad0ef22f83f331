"""Start a real Triton without docker on a model repository that `muntin triton` wrote, with this environment's Python and packages.

    python benchmarks/start_triton.py REPOSITORY [--http-port 8000] [--grpc-port 8001] [--package .venv/triton] [--explicit]
    python benchmarks/start_triton.py --install

The server (2.51, Linux on x86-64, glibc 2.35 or newer) and its Python back end are files of the PyPI package `nvidia-pytriton`, which is
installed into the folder --package where it is not there yet (--install: that, and no more): 55 MB. It listens on 127.0.0.1 only, since
this version has known holes. Ctrl-C ends it. --explicit: clients may load and unload models, and none is loaded at the start.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

REQUIREMENT = "nvidia-pytriton==0.7.0"
HOST = "127.0.0.1"
_STUB = Path("python_backend_stubs", f"{sys.version_info.major}.{sys.version_info.minor}", "triton_python_backend_stub")


class TritonLaunch(NamedTuple):
    """A command line, and variables beside this process's."""

    command: list[str]
    variables: dict[str, str]


def _home(package: Path) -> Path:
    return package / "pytriton" / "tritonserver"


def is_installed(package: Path) -> bool:
    """Return whether the server and the back end for this Python are in a folder."""
    return (_home(package) / "backends" / "python" / _STUB.name).is_file()


def install(package: Path) -> None:
    """Install the server into a folder, unless it is there. Raises CalledProcessError, with pip's output on standard error, and SystemExit
    for a Python that it has no back end for."""
    if is_installed(package):
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade"]
    subprocess.run([*pip, "--target", str(package), REQUIREMENT], check=True)  # noqa: S603 - our own command
    if not (_home(package) / _STUB).is_file():
        sys.exit(f"{REQUIREMENT} has no back end for Python {_STUB.parent.name}: take one of 3.8 to 3.13")
    (_home(package) / "backends" / "python" / _STUB.name).hardlink_to(_home(package) / _STUB)


def triton_launch(package: Path, repository: Path, *, http_port: int, grpc_port: int | None = None, explicit: bool = False) -> TritonLaunch:
    """Return how to start an installed server."""
    home = _home(package.resolve())
    options = {"model-repository": repository, "backend-directory": home / "backends", "http-address": HOST, "http-port": http_port}
    options |= {"allow-metrics": "false"} | ({"model-control-mode": "explicit"} if explicit else {})
    options |= {"allow-grpc": "false"} if grpc_port is None else {"grpc-address": HOST, "grpc-port": grpc_port}
    libraries = [str(package.resolve() / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    variables = {
        "VIRTUAL_ENV": sys.prefix,  # the back end's stub takes its packages from the first Python of the path
        "PATH": os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", "")]),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
    }
    command = [str(home / "bin" / "tritonserver"), *(f"--{name}={value}" for name, value in options.items())]
    return TritonLaunch(command=command, variables=variables)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("repository", type=Path, nargs="?")
    parser.add_argument("--install", action="store_true", help="install the server, and start none")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--package", type=Path, default=Path(sys.prefix) / "triton", help="folder of the server, filled where it is empty")
    parser.add_argument("--explicit", action="store_true", help="clients load and unload models")
    given = parser.parse_args()
    if not given.install and (given.repository is None or not given.repository.is_dir()):
        parser.error("give a folder that `muntin triton ARTIFACT REPOSITORY` wrote, or --install")
    try:
        install(given.package)
    except subprocess.CalledProcessError:
        sys.exit(f"{REQUIREMENT} cannot be installed; pip's reason is above")
    if not given.install:
        ports = {"http_port": given.http_port, "grpc_port": given.grpc_port}
        launch = triton_launch(given.package, given.repository, **ports, explicit=given.explicit)
        os.execve(launch.command[0], launch.command, os.environ | launch.variables)  # noqa: S606 - our own command


if __name__ == "__main__":
    main()
