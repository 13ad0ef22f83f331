"""What muntin raises for a user's mistake or a failed check.

Every message says what came, what is allowed and what to do, on one line: the CLI prints it as it stands and exits 1.
"""

from __future__ import annotations

from typing import TypeVar

Raised = TypeVar("Raised", bound=BaseException)


class MuntinError(Exception):
    """Base of every error that is the user's to act on; its text is one line."""


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


class DependencyError(MuntinError):
    """Something that must be installed is not: a package of an extra, a compiler, a device."""


def install(extra: str) -> str:
    """The command that installs an extra of muntin's: from the checkout that it was installed from, where it was (PEP 610's record)."""
    import json  # here, with what follows: every command imports this module, and hardly any needs them
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


def bare(error: Raised) -> Raised:
    """An error without where it was raised, and why: the frames that it was raised through hold what they were given, megabytes of it, for
    as long as anybody keeps the error. Where one of them keeps it, that is until cycles are collected."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
