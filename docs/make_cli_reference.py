"""Write docs/cli.md: every command of `muntin` with its arguments and options, read from the signatures that typer parses.

python docs/make_cli_reference.py > docs/cli.md
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from muntin.cli import app

HEAD = """# Commands and options

Every command of `muntin`. `muntin COMMAND --help` prints the same. Exit codes: 0 done, 1 wrong input or a failed check, 2 usage.

This page is written by `python docs/make_cli_reference.py > docs/cli.md`.
"""
TYPES = {int: "whole number", float: "number", str: "text", Path: "path", bool: ""}


def cli_reference() -> str:
    """Return the page, in Markdown: one section a command, in the order of `muntin --help`."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    functions = {command.name: command.callback for command in app.registered_commands if command.callback is not None}
    return "\n".join([HEAD, *(_section(name, command.params, functions[name]) for name, command in commands.items())])


def _section(name: str, parameters: list[Any], function: Callable[..., Any]) -> str:
    """Return a command's usage, its description and a table of its arguments and options."""
    rows = list(_rows(parameters, function))
    arguments = "".join(f" {label}" for label, *_ in rows if not label.startswith("`"))
    lines = [f"## muntin {name}", "", f"    muntin {name}{arguments} [OPTIONS]", "", inspect.cleandoc(function.__doc__ or ""), ""]
    lines += ["| name | value | default | |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _rows(parameters: list[Any], function: Callable[..., Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield each parameter's label, its values, its default and its help."""
    hints = get_type_hints(function, include_extras=True)
    for parameter in parameters:
        if parameter.name not in hints:  # --help
            continue
        kind, info = _declared(hints[parameter.name])
        if isinstance(info, ArgumentInfo):
            label = parameter.name.upper() + ("..." if parameter.nargs != 1 else "")
        else:
            label = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
        unset = parameter.default is None or parameter.default is False
        default = "required" if parameter.required else "" if unset else f"`{parameter.default}`"
        yield label, _value(kind, info), default, (info.help or "").replace("\\[", "[")  # which rich wants escaped


def _declared(hint: Any) -> tuple[type, ArgumentInfo | OptionInfo]:
    """Return the type of one value of a parameter, and its declaration."""
    info: ArgumentInfo | OptionInfo | None = None
    while args := [arg for arg in get_args(hint) if arg is not NoneType]:  # Annotated, `| None`, list
        info = next((arg for arg in args if isinstance(arg, ArgumentInfo | OptionInfo)), info)
        hint = args[0]
    assert info is not None
    return get_origin(hint) or hint, info


def _value(kind: type, info: ArgumentInfo | OptionInfo) -> str:
    text = TYPES[kind]
    if info.min is not None:
        text += f" from {info.min}"
    return text if info.max is None else f"{text} to {info.max}"


if __name__ == "__main__":
    sys.stdout.write(cli_reference())
