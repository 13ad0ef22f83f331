"""Exceptions for a user's mistake or a failed check.

Each message names the wrong value, the allowed ones and the remedy on one line, which the CLI prints before it exits with 1.
"""

from __future__ import annotations

from typing import TypeVar

Raised = TypeVar("Raised", bound=BaseException)


class MuntinError(Exception):
    """Base of all errors that a user can act on; the text is one line."""


class DataError(MuntinError):
    """An image, a mask or a folder of them is unreadable, inconsistent or empty."""


class RecipeError(MuntinError):
    """A recipe or an option holds an unknown key or a value outside its range."""


class CheckpointError(MuntinError):
    """A checkpoint is missing, corrupted or of another model."""


class ArtifactError(MuntinError):
    """An artefact is missing, altered, incomplete or of a format this version does not read."""


class ExportError(MuntinError):
    """A model cannot be turned into an artefact."""


class VerificationError(MuntinError):
    """An artefact does not compute what was recorded when it was made."""


class DriftError(MuntinError):
    """Pictures are not like those that a model was trained on."""


class DependencyError(MuntinError):
    """A package of an extra, a compiler or a device is missing."""


def install(extra: str) -> str:
    """Return the command that installs an extra of muntin, from the checkout of the installation if there is one (PEP 610)."""
    import json  # not at the top: every command imports this module, and few need these
    import shlex
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        record = json.loads(distribution("muntin").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        record = {}
    url = urlsplit(record.get("url", ""))
    if url.scheme != "file" or "dir_info" not in record:
        return f"pip install 'muntin[{extra}]'"
    editable = "-e " if record["dir_info"].get("editable") else ""
    return f"pip install {editable}{shlex.quote(f'{url2pathname(url.path)}[{extra}]')}"


def memory_advice(error: BaseException) -> str:
    """Return advice for an out-of-memory error, with the error's own text."""
    reason = f" ({' '.join(str(error).split())[:200]})" if str(error) else ""
    return (
        f"not enough memory{reason}: choose a smaller --tile, --size or --batch where the command has it, a smaller training.batch_size or "
        "data.crop to train, or a machine with more"
    )


def bare(error: Raised) -> Raised:
    """Return the error without traceback, cause and context, whose frames keep megabytes of arguments alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
