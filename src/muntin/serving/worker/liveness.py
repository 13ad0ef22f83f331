"""State of the engine of a session, and ways to end and revive it. Only an engine in a process of its own can die alone."""

from __future__ import annotations

from muntin.runtime.session import Session


class Liveness:
    """An engine in this process: it never dies alone, and cannot be ended. Base of others.

    `deaths`: how often the engine has died, or could not be started again. `last_death`: the cause of the last one, in words.
    """

    def __init__(self) -> None:
        self.deaths = 0
        self.last_death = ""

    @property
    def able(self) -> bool:
        """False while an engine that died several times in a row is not started again."""
        return True

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Numbers of the other processes that the engine runs in now."""
        return ()

    def interrupt(self, seconds: float) -> bool:
        """End the engine if a call has taken at least `seconds`: its calls fail, and the next one starts it again. Return True if done."""
        return False

    def revive(self, seconds: float) -> bool:
        """Wait at most `seconds` until an engine that died runs again. Return whether it does; a call says why not."""
        return True


IN_THIS_PROCESS = Liveness()
"""The liveness of every engine that runs in this process."""


def liveness_of(session: Session) -> Liveness:
    return session if isinstance(session, Liveness) else IN_THIS_PROCESS
