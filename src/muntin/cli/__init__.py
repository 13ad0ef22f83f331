"""The command line: parse, call, print. A command imports its room when it runs, which keeps `--help` quick."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from muntin.cli.bench import bench_command
from muntin.cli.compare import compare_command
from muntin.cli.compress import compress_command, quantize_command
from muntin.cli.console import accept_any_name, out, say
from muntin.cli.export import export_command, relabel_command
from muntin.cli.machine import doctor_command
from muntin.cli.models import init_command, models_command
from muntin.cli.predict import predict_command
from muntin.cli.profile import profile_command
from muntin.cli.report import demo_command, report_command
from muntin.cli.search import search_command
from muntin.cli.serve import serve_command, triton_command
from muntin.cli.train import evaluate_command, fit_command
from muntin.cli.updating.drift import drift_command
from muntin.cli.updating.update import update_command
from muntin.cli.verify import verify_command
from muntin.errors import MuntinError, install, memory_advice

SYNONYMS = {
    "train": "fit", "val": "evaluate", "eval": "evaluate", "test": "evaluate", "validate": "evaluate", "benchmark": "bench",
    "quantise": "quantize", "infer": "predict", "inference": "predict", "detect": "predict", "convert": "export",
}  # fmt: skip
"""Commands of other programs, and the command here that does the same."""


class _Commands(TyperGroup):
    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        """Resolve a command. A name of `SYNONYMS` is a usage error that gives the right one; typer suggests similar names for others."""
        if (name := SYNONYMS.get(args[0])) is not None:
            ctx.fail(f"there is no command '{args[0]}': did you mean `muntin {name}`?")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        out.print(f"muntin {version('muntin')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Make vision models small and fast, and measure the deployed artefact."""


_EXTRAS = {
    "train": ("torch", "torchvision", "onnxscript", "timm", "torchmetrics", "tensorboard", "optuna"),
    "serve": ("granian", "starlette", "orjson", "grpc", "google", "prometheus_client"),
}
"""Packages that a command may lack, by the extra that installs them."""
CTRL_C = 130
"""Exit code that typer gives a KeyboardInterrupt."""

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo_command,
    "init": init_command,
    "doctor": doctor_command,
    "fit": fit_command,
    "evaluate": evaluate_command,
    "compress": compress_command,
    "quantize": quantize_command,
    "search": search_command,
    "export": export_command,
    "relabel": relabel_command,
    "verify": verify_command,
    "compare": compare_command,
    "bench": bench_command,
    "profile": profile_command,
    "predict": predict_command,
    "serve": serve_command,
    "triton": triton_command,
    "drift": drift_command,
    "update": update_command,
    "report": report_command,
    "models": models_command,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 wrong input or a failed check (one line on stderr), 2 usage."""
    accept_any_name()
    try:
        app()
    except MuntinError as error:
        say(f"muntin: {error}")
        sys.exit(1)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        extra = next((extra for extra, packages in _EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        say(f"muntin: this command needs the package {package}: {install(extra)}")
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        from muntin.runtime.host.memory import no_memory  # slow to import

        if not no_memory(error):
            raise
        say(f"muntin: {memory_advice(error)}")
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        say(f"muntin: {where}{error.strerror or error}; check the path, its permissions and the free space")
        sys.exit(1)
    except SystemExit as error:
        if error.code == CTRL_C:
            say("muntin: interrupted")
            sys.exit(1)
        raise
