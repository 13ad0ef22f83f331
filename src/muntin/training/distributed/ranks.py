"""The processes that train one model together, and what they have to agree on."""

from __future__ import annotations

from torch import Tensor


class Ranks:
    """A run of one process. `count`: processes; `index`: this one's number, from 0. See `ProcessGroup` for several."""

    count = 1
    index = 0

    @property
    def first(self) -> bool:
        """True for the process that writes what is shared."""
        return self.index == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors of one shape."""
        return tensor

    def any(self, flag: bool) -> bool:
        """True if it is True in any process."""
        return flag


ALONE = Ranks()
