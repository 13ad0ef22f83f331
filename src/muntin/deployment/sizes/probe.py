"""The sizes that a model takes, found by calling it, widest first.

    every size -> multiples of 1, 2, 4, ... 64 from the smallest side that works -> the example's size alone

A model that takes sizes may still have no graph for them, or an engine may fail at the smallest. So an export that fails for a reason of
sizes is tried again with fewer: multiples from half of the example's sides, then larger multiples, then the example's size.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from muntin.artifact import Signature, Sizes
from muntin.artifact.sizes import golden_sizes
from muntin.deployment.capture.model_contract import Pairs, SizeError, pairs_at
from muntin.deployment.sizes.requested import Size

LARGEST = 1 << 20
"""Maximum number of pixels of an example that is compared whole."""
OTHER_SIZES = ((192, 64), (64, 160), (256, 256))
"""Rows and columns of images unlike the golden pairs: sides that strides divide, taller than wide, square, large."""
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of pixels that are tried as the divisor of all sides."""
LEAST = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Smallest sides that are tried, pixels."""


class Probe:
    """Calls a model with images of sizes, and keeps its answers. `example`: raw pixels (B, C, H, W), from which the images are cut."""

    def __init__(self, model: nn.Module, example: Tensor, signature: Signature) -> None:
        self._model, self._example, self._signature = model, example, signature
        self._answers: dict[Size, Pairs | SizeError] = {}

    def pairs(self, sizes: Iterable[Size]) -> Pairs:
        """Return images of the sizes and the model's answers. Raises `SizeError` for a size that the model does not take."""
        return [pair for size in sizes for pair in self._answer(size)]

    def forget(self) -> None:
        """Drop all answers: scores of many classes are large."""
        self._answers.clear()

    def _answer(self, size: Size) -> Pairs:
        if size not in self._answers:
            try:
                self._answers[size] = self._call(size)
            except SizeError as error:
                self._answers[size] = error
        answer = self._answers[size]
        if isinstance(answer, SizeError):
            raise answer
        return answer

    def _call(self, size: Size) -> Pairs:
        pairs = pairs_at(self._model, self._example, [size])
        (_, scores), expected = pairs[0], self._signature.scores_shape(1, *size)
        if scores.shape != expected:
            raise SizeError(
                f"the model answers {scores.shape} to 1 x {size[0]} x {size[1]} pixels, where {expected} is due: interpolate the answer to "
                "the image's sides"
            )
        return pairs

    def widest(self) -> tuple[Sizes, str]:
        """Return the widest sizes that the model takes, and the reason why it does not take more; empty for every size."""
        reason = self.refusal(Sizes())
        if not reason:
            return Sizes(), ""
        return next(self._multiples(MULTIPLES), Sizes.only(*self._size)), reason

    def narrower(self, sizes: Sizes) -> Sizes:
        """Return fewer sizes that the model takes, after an export that failed."""
        multiple, half = max(sizes.height.multiple, sizes.width.multiple), min(self._size) // 2
        from_half = Sizes.both(min=max(1, half), multiple=multiple)
        if sizes != Sizes() and sizes.cover(from_half) and from_half != sizes and not self.refusal(from_half):
            return from_half
        larger = [other for other in reversed(MULTIPLES) if other > multiple]
        return next(self._multiples(larger), Sizes.only(*self._size))

    def refusal(self, sizes: Sizes) -> str:
        """Return why the model does not take some of the sizes; empty where it takes those that are probed."""
        golden, others = self.sizes_to_compare(sizes)
        try:
            self.pairs((*golden, *others))
        except SizeError as error:
            return str(error)
        return ""

    def sizes_to_compare(self, sizes: Sizes) -> tuple[tuple[Size, ...], tuple[Size, ...]]:
        """Return the sizes of the golden pairs, and further ones, unlike them, at which a model is compared."""
        H, W = self._size
        others = [sizes.at_least(*size) for size in OTHER_SIZES]
        others += [(H, W)] if H * W <= LARGEST else []
        if not sizes.every:
            others += [sizes.at_least(1, 1), sizes.at_least(1, sizes.width.smallest + 1)]
        return golden_sizes(H, W, sizes), tuple(dict.fromkeys(others))

    @property
    def _size(self) -> Size:
        height, width = self._example.shape[2:]
        return height, width

    def _multiples(self, multiples: Iterable[int]) -> Iterator[Sizes]:
        """Yield, for each multiple that divides the example's sides, the sizes that the model takes from the smallest side that works."""
        H, W = self._size
        for multiple in multiples:
            if H % multiple or W % multiple or not self._takes(H + multiple, W + multiple):
                continue
            sides = sorted({-(-side // multiple) * multiple for side in (*LEAST, min(H, W))})
            candidates = (Sizes.both(min=side, multiple=multiple) for side in sides if side <= min(H, W))
            yield from (sizes for sizes in candidates if not self.refusal(sizes))

    def _takes(self, height: int, width: int) -> bool:
        try:
            self.pairs([(height, width)])
        except SizeError:
            return False
        return True
