"""Share the pictures of one folder out to the training, validation and test splits.

A hash of a picture's key and the seed alone decides its split, so adding pictures moves none of the others.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from muntin.errors import DataError
from muntin.images.listing import composed
from muntin.tasks.folders import SplitName

_MAX_SEEDS = 1000  # seeds tried
_BALANCE_HASHES = 50_000  # pictures hashed in search of a seed that keeps the shares: about half a second
_MAX_HASHES = 200_000  # pictures hashed in search of a seed with which no split lacks a class: about two seconds


def split_of(key: str, seed: int, shares: Mapping[SplitName, float]) -> SplitName:
    """The split of a picture: the hash of seed and key, a number in [0, 1), falls into the `shares` of test or validation, or into none."""
    digest = hashlib.sha256(os.fsencode(f"{seed}/{composed(key)}")).digest()  # fsencode: a file name may be invalid UTF-8
    position, upper_edge = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for name in ("test", "validation"):
        upper_edge += shares.get(name, 0.0)
        if position < upper_edge:
            return name
    return "train"


def filling_seed(
    keys: Sequence[str], shares: Mapping[SplitName, float], first: int = 0, *, by_class: bool = False, balanced: bool = False
) -> int | None:
    """The first seed from `first` on that leaves no split empty, or None if 1,000 seeds all leave one empty.

    `by_class`: keys are `class/stem`; the result is the seed whose splits lack the fewest classes, among as many as 200,000 hashes allow.
    `balanced`: of these seeds the one whose splits are nearest to their shares, without more than 50,000 hashes.
    """
    all_splits = {"train", *shares}
    class_count = len({key.partition("/")[0] for key in keys})
    hashes = _MAX_HASHES if by_class else _BALANCE_HASHES if balanced else 0
    seeds_compared = min(_MAX_SEEDS, 1 + hashes // max(1, len(keys))) if hashes else 0
    seeds_balanced = min(_MAX_SEEDS, _BALANCE_HASHES // max(1, len(keys))) if balanced else 0
    best_seed, best_score = None, (0, 0, -math.inf)
    for seed in range(first, first + _MAX_SEEDS):
        placed = [(split_of(key, seed, shares), key.partition("/")[0] if by_class else "") for key in keys]
        filled = set(placed)
        if {split for split, _ in filled} != all_splits:
            continue
        sizes = Counter(split for split, _ in placed)
        off = sum(abs(sizes[name] - share * len(keys)) for name, share in shares.items()) if balanced else 0.0
        score = sum(split == "train" for split, _ in filled), len(filled), -off
        if score > best_score:
            best_seed, best_score = seed, score
        whole = not by_class or len(filled) == len(all_splits) * class_count
        if seed - first >= (seeds_balanced if whole else seeds_compared):
            break
    return best_seed


def empty_split_error(split: SplitName, keys: Sequence[str], folder: Path, seed: int, shares: Mapping[SplitName, float]) -> DataError:
    """The error for a split without pictures; it names a seed that fills every split, if there is one."""
    problem = f"the {split} split of the {len(keys)} pictures in {folder} is empty"
    better = filling_seed(keys, shares, seed + 1)
    if better is None:
        return DataError(
            f"{problem}: at least {1 + len(shares)} pictures are needed; add pictures, change its share, or name a folder for it"
        )
    return DataError(f"{problem}: set `seed: {better}` under data, which fills every split, add pictures, or name a folder for it")


def check_disjoint(files: Mapping[SplitName, Sequence[Path]]) -> None:
    """Raise DataError if two splits hold the same file. Links are followed; copies are not recognised."""
    split_by_file: dict[Path, SplitName] = {}
    resolved_folders: dict[Path, Path] = {}
    shared: list[tuple[Path, SplitName, SplitName]] = []
    for split, paths in files.items():
        for path in paths:
            if path.parent not in resolved_folders:
                resolved_folders[path.parent] = path.parent.resolve()
            file = path.resolve() if path.is_symlink() else resolved_folders[path.parent] / path.name
            first_split = split_by_file.setdefault(file, split)
            if first_split != split:
                shared.append((path, first_split, split))
    if shared:
        path, first_split, second_split = shared[0]
        more = f" (and {len(shared) - 1} more are in two splits)" if len(shared) > 1 else ""
        raise DataError(
            f"{path} is in the {first_split} and in the {second_split} split{more}: "
            "give each split pictures of its own, or a share of `images`"
        )
