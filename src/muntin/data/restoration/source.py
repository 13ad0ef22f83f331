"""The user's own photographs for `restore`, read from folders: clean ones that are degraded here, or degraded and clean ones in pairs.

Pictures in subfolders count, too. A pair has one stem (`a.jpg` and `a.png`), and lies in subfolders of the same names. A clean picture has
`scale` times the sides of its input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from muntin.data.classes import MaskMapping, list_some
from muntin.data.folders import FolderPair, FolderSource, folders_apart
from muntin.data.items import Failure, Item, ItemSamples, ItemSource
from muntin.data.restoration.degradation import MAX_SCALE, Degradation, generator_of
from muntin.data.source import SPLITS, Sample, SampleCache, SplitName
from muntin.errors import DataError
from muntin.images import image_size, read_image
from muntin.images.listing import composed, pictures_below
from muntin.text import count


class RestoreSource(FolderSource):
    """A `Source` of photographs for `restore`. The constructor lists the folders and reads no picture.

    `degrade` makes the inputs from the pictures in `base.images`; without it these are the inputs, and `base.targets` holds the clean
    pictures, whose sides are `scale` times as long. Other arguments and errors as of `FolderSource`.
    """

    def __init__(
        self,
        *,
        base: FolderPair,
        validation: FolderPair | float,
        test: FolderPair | float,
        degrade: Degradation | None = None,
        scale: int = 1,
        channels: int = 3,
        seed: int = 0,
        skip: Sequence[Path] = (),
        root: Path | None = None,
        cache_bytes: int = 1 << 30,
    ) -> None:
        ItemSource.__init__(self, "restore", channels=channels, skip=skip, root=root)
        self.classes = ()
        self.degrade, self.scale = degrade, scale if degrade is None else degrade.scale
        self._apart = folders_apart(base, [pair for pair in (validation, test) if isinstance(pair, FolderPair)])
        for name, other in (("validation", validation), ("test", test)):
            if isinstance(other, FolderPair) and (other.targets is None) != (base.targets is None):
                raise DataError(f"`{name}` must name targets exactly where the training images have targets")
        self._finish(self._split_items(base, {"validation": validation, "test": test}, seed), None, cache_bytes)

    def _finish(self, items: Mapping[SplitName, Sequence[Item]], mapping: MaskMapping | None, cache_bytes: int) -> None:
        self._note_skipped()
        cache = SampleCache(cache_bytes)
        self._splits = {name: RestoreSamples(name, items[name], self.channels, cache, self.degrade, self.scale) for name in SPLITS}

    def _items(self, pair: FolderPair, split: SplitName = "train") -> list[Item]:
        images = self._pictures_below(pair.images, required=True, apart=self._apart - {pair.images.resolve()})
        if pair.targets is None:
            return [Item(key=f"{place}{path.stem}", image=path) for (place, _), path in images.items() if not self._is_skipped(path)]
        targets = self._pictures_below(pair.targets, required=True)
        unused = [f"{name[0]}{path.name}" for name, path in targets.items() if name not in images]
        items = []
        for name, path in images.items():
            if self._is_skipped(path) or (name in targets and self._is_skipped(targets[name])):
                continue
            if name in targets:
                items.append(Item(key=f"{name[0]}{path.stem}", image=path, mask=targets[name]))
            else:
                advice = f"add {pair.targets / name[0] / path.stem}.png or remove the image"
                self._failures[path] = Failure(f"{path} has no clean picture: {advice}", "no clean picture")
        if unused:
            self._notes.append(f"{pair.targets}: {count(len(unused), 'picture')} without an image, not used: {list_some(unused, 3)}")
        return items


class RestoreSamples(ItemSamples):
    """The pictures of a split, decoded and degraded on access: a picture of 10 megapixels takes about half a second, then it is cached."""

    def __init__(
        self, split: SplitName, items: Sequence[Item], channels: int, cache: SampleCache, degrade: Degradation | None, scale: int
    ) -> None:
        super().__init__(split, items, channels, None, cache)
        self._degrade, self._scale = degrade, scale

    def load(self, index: int) -> Sample:
        item = self.items[index]
        return self._cache.get((self._split, index), lambda: self._read(item))

    def sizes(self) -> Sequence[tuple[int, int]]:
        if self._sizes is None:
            sizes = [image_size(item.image) for item in self.items]
            scale = 1 if self._degrade is None else self._scale
            self._sizes = [(max(1, height // scale), max(1, width // scale)) for height, width in sizes]
        return self._sizes

    def _read(self, item: Item) -> Sample:
        """Raises DataError: a damaged file, a picture smaller than `scale` pixels, sizes of a pair that do not fit."""
        image_HWC, scale = read_image(item.image, self._channels), self._scale
        height, width = image_HWC.shape[:2]
        if self._degrade is not None:
            if min(height, width) < scale:
                raise DataError(f"{item.image} is {width}×{height}, too small to be reduced by {scale}: remove it")
            clean_HWC = image_HWC[: height - height % scale, : width - width % scale]
            image_HWC = self._degrade(clean_HWC, generator_of(item.key))
            return Sample(name=item.key, image=image_HWC, target=clean_HWC, degradation=self._degrade)
        assert item.mask is not None
        clean_HWC = read_image(item.mask, self._channels)
        if clean_HWC.shape[:2] != (scale * height, scale * width):
            raise DataError(
                f"{item.image} is {width}×{height} and its clean picture {item.mask} {clean_HWC.shape[1]}×{clean_HWC.shape[0]}: it must be "
                f"{scale * width}×{scale * height} (data.scale {scale})"
            )
        return Sample(name=item.key, image=image_HWC, target=clean_HWC)


def scale_of_pairs(pair: FolderPair) -> int:
    """The scale of the first pair of pictures, from the headers of their files; 1 where there is no pair. Raises DataError for another."""
    assert pair.targets is not None
    images, targets = ({composed(name): path for path, name in pictures_below(folder).items()} for folder in (pair.images, pair.targets))
    stem = next((stem for stem in images if stem in targets), None)
    if stem is None:
        return 1
    (height, width), (clean_height, clean_width) = image_size(images[stem]), image_size(targets[stem])
    scale = clean_height // max(1, height)
    if not 1 <= scale <= MAX_SCALE or (clean_height, clean_width) != (scale * height, scale * width):
        raise DataError(
            f"{images[stem]} is {width}×{height} and its clean picture {targets[stem]} {clean_width}×{clean_height}: the sides of a clean "
            f"picture are 1 to {MAX_SCALE} times the image's, the same for both"
        )
    return scale
