"""Consent to the user's own factories, `package.module:factory`, which a recipe may name as its model.

Such a name is code that is imported and called. One in a recipe that the user gives is the user's own; one in the recipe of a checkpoint
may be a stranger's, and is refused until the user consents. Consent is to a name, for this process.
"""

from __future__ import annotations

from muntin.errors import CheckpointError
from muntin.models.create import FOREIGN

_trusted: set[str] = set()


def is_code(name: str) -> bool:
    """Return True if a model's name is a factory of the user's."""
    kind, colon, _ = name.partition(":")
    return bool(colon) and kind not in FOREIGN


def trust_model(name: str) -> None:
    """Allow `check_trusted` of a model's name from now on."""
    if is_code(name):
        _trusted.add(name)


def trusted_models() -> tuple[str, ...]:
    """Return the factories that this process may call, for another process that works for it."""
    return tuple(sorted(_trusted))


def check_trusted(name: str) -> None:
    """Raise `CheckpointError` for a factory that the user has not consented to."""
    if is_code(name) and name not in _trusted:
        raise CheckpointError(
            f"the checkpoint's recipe names code as its model, {name}, which would be imported and called: if you trust it, repeat the "
            "command with --trust-code (in Python read_checkpoint(path, trust_code=True), for a teacher teacher.trust_code=true)"
        )
