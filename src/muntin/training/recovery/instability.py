"""Losses that leave their range: such a batch is skipped, and after several in a row the run goes back to its last checkpoint.

    loss or gradient not finite, or a spike    -> the weights stay, the step is taken with the next batch
    more than SKIPPED_IN_A_ROW                 -> the newest checkpoint, and batches that the run has not seen
    more than ROLLBACKS                        -> an error

Source: Chowdhery et al., PaLM (2204.02311, section 5.1): a restart from an earlier checkpoint with other batches ends a spike.
"""

from __future__ import annotations

import math
import statistics

from pydantic import BaseModel, ConfigDict

SKIPPED_IN_A_ROW = 5
"""Consecutive batches that are skipped before the run goes back."""
ROLLBACKS = 2
"""Times that a run goes back."""
WINDOW, LEAST = 100, 20
"""Losses that the usual loss is the median of, at most and at least."""
HARMLESS = 0.5
"""Loss of labels or pictures below which none is a spike: chance between two classes has 0.69. A network that knows its few crops by heart
has losses of 1e-7, and may meet one that it does not know."""


class GuardState(BaseModel):
    """State of a guard. `first`: losses of the first steps. `skipped`: batches that were left out, which moves the later ones."""

    model_config = ConfigDict(extra="forbid")

    recent: list[float] = []
    first: list[float] = []
    skipped: int = 0
    in_a_row: int = 0
    rollbacks: int = 0


class LossGuard:
    """Judges losses. `factor`: of the usual loss, from which a loss is a spike (None: only finite or not), if it is above `harmless`."""

    def __init__(self, factor: float | None, state: GuardState | None = None, *, harmless: float = HARMLESS) -> None:
        self.factor, self.harmless = factor, harmless
        self.state = GuardState() if state is None else state.model_copy(deep=True)

    def fault(self, loss: float) -> str:
        """Return the fault of a loss in words; empty if there is none."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        recent, first = self.state.recent, self.state.first
        if self.factor is None or len(recent) < LEAST:
            return ""
        usual, beginning = statistics.median(recent), statistics.median(first)
        # a trained network may meet a crop that it does not know: it is no worse on it than an untrained one
        if loss > max(self.factor * usual, beginning, self.harmless):
            return f"the loss is {loss:.3g}, {loss / usual:.0f} times its median over {len(recent)} steps ({usual:.3g})"
        return ""

    def accept(self, loss: float) -> None:
        """Count the loss of a step that was taken."""
        state = self.state
        state.in_a_row = 0
        state.recent = [*state.recent[-WINDOW + 1 :], loss]
        if len(state.first) < LEAST:
            state.first = [*state.first, loss]

    def skip(self) -> bool:
        """Count a batch that was left out. Returns False if the run should go back."""
        self.state.skipped += 1
        self.state.in_a_row += 1
        return self.state.in_a_row <= SKIPPED_IN_A_ROW

    def go_back(self, earlier: GuardState, steps: int) -> bool:
        """Take the state of a checkpoint `steps` before, without repeating batches. Returns False if the run has gone back often enough."""
        if self.state.rollbacks >= ROLLBACKS:
            return False
        skipped, rollbacks = self.state.skipped + steps, self.state.rollbacks + 1
        self.state = earlier.model_copy(deep=True, update={"skipped": skipped, "rollbacks": rollbacks, "in_a_row": 0})
        return True
