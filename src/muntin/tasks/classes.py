"""The classes of a recipe, and the mapping from the values in masks to class numbers."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import Field, TypeAdapter, ValidationError

from muntin.artifact import Artifact, open_artifact
from muntin.artifact.answers import ANSWERS, Task
from muntin.artifact.classes import Channel8, ClassInfo, renamed
from muntin.artifact.store import rewrite_artifact
from muntin.errors import DataError
from muntin.images import IGNORED
from muntin.images.listing import composed
from muntin.images.opening import PictureFile, UInt8
from muntin.section import Section
from muntin.text import list_some

RGB = tuple[Channel8, Channel8, Channel8]
Classes = Iterable["str | ClassInfo | ClassSpec | Mapping[str, Any]"] | Mapping[str, Sequence[int] | None]
"""Classes as users give them: see `specs_of`."""
MaskValue = Annotated[int, Field(ge=0, le=65535)] | RGB
_FORMS = "give names, or entries with name and color, [red, green, blue] from 0 to 255"
UNKNOWN_VALUE = "add a class, set `ignore`, or correct the mask"

# Okabe and Ito's palette for colour-blind readers, ordered so that neighbours differ in lightness, too.
_OKABE_ITO: tuple[RGB, ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (86, 180, 233),
    (120, 120, 120),
)
_GOLDEN_RATIO = 0.618033988749895  # steps of this size spread hues evenly over the circle for any count
_HUES = 1024  # steps, after which few hues are left that no class has
_ODD = 0x9E3779  # multiples of an odd number modulo 2 ** 24 are all different


class ClassSpec(Section):
    """A class: its name, its colour in pictures and charts, and its value in the masks."""

    name: Annotated[str, Field(min_length=1, description="unique among the classes; for `classify` the folder's name")]
    color: RGB | None = Field(default=None, description="red, green, blue, 0-255 each; by default a colour that no other class has")
    value: MaskValue | None = Field(default=None, description="mask value, or [red, green, blue]; by default the class's index from 0")


def class_infos(classes: Sequence[ClassSpec], task: Task) -> tuple[ClassInfo, ...]:
    """Names and colours of the classes, missing colours filled in.

    Raises DataError: fewer than two classes, more than the task allows, or a name twice.
    """
    if not 2 <= len(classes) <= ANSWERS[task].most_classes:
        raise DataError(f"{len(classes)} classes: from 2 to {ANSWERS[task].most_classes} are possible, name them under `classes`")
    repeated = [name for name, count in Counter(composed(entry.name) for entry in classes).items() if count > 1]
    if repeated:
        raise DataError(f"the class name {repeated[0]!r} is used twice: give each class its own name")
    used = {entry.color for entry in classes}
    unused = iter([color for color in distinct_colors(2 * len(classes)) if color not in used])
    return tuple(ClassInfo(name=entry.name, color=entry.color if entry.color is not None else next(unused)) for entry in classes)


def specs_of(classes: object) -> list[ClassSpec]:
    """Read classes as `muntin.export` and files have them: a list of names, or of entries with name and color; or a mapping from names to
    colours.

    Raises DataError for another form.
    """
    if isinstance(classes, str | bytes) or not isinstance(classes, Iterable):
        raise DataError(f"classes: {_FORMS}, not a {type(classes).__name__}")
    entries = [{"name": name, "color": color} for name, color in classes.items()] if isinstance(classes, Mapping) else list(classes)
    plain = [
        {"name": entry} if isinstance(entry, str) else entry.model_dump() if isinstance(entry, ClassInfo | ClassSpec) else entry
        for entry in entries
    ]
    try:
        return TypeAdapter(list[ClassSpec]).validate_python(plain)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        number, *place = first["loc"]
        where = ".".join(str(part) for part in place)
        raise DataError(f"classes, entry {int(number) + 1}{where and f', {where}'}: {first['msg']}; {_FORMS}") from error


def read_specs(file: Path) -> list[ClassSpec]:
    """Read classes from a file: YAML or JSON as `specs_of` takes them, or by another ending a name on each line. Raises DataError."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() in (".yaml", ".yml", ".json"):
            return specs_of(yaml.safe_load(text))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())[:200]
        raise DataError(f"--classes {file}: {reason}; give a file with a name on each line, or a YAML or JSON list") from error
    except DataError as error:
        raise DataError(f"--classes {file}: {error}") from error
    names = [line.strip() for line in text.splitlines()]
    while names and not names[-1]:
        names.pop()
    if empty := [number for number, name in enumerate(names, 1) if not name]:
        raise DataError(f"--classes {file}: line {empty[0]} is empty: write the name of a class on each line")
    return [ClassSpec(name=name) for name in names]


def renamed_by(file: Path, classes: Sequence[ClassInfo]) -> tuple[ClassInfo, ...]:
    """Return the classes with the names of a file, and with its colours where it has some. Raises DataError, also for mask values."""
    specs = read_specs(file)
    if any(spec.value is not None for spec in specs):
        raise DataError(f"--classes {file}: value: masks are read by the recipe: leave it out")
    try:
        return renamed(classes, [(spec.name, spec.color) for spec in specs])
    except DataError as error:
        raise DataError(f"--classes {file}: {error}") from error


def relabel_artifact(artifact: Artifact, classes: Sequence[ClassInfo]) -> Artifact:
    """Give the classes of an artefact other names and colours. Its manifest alone changes, and with it the artefact's digest."""
    signature = artifact.manifest.signature.model_copy(update={"classes": tuple(classes)})
    rewrite_artifact(artifact, {}, signature=signature)
    return open_artifact(artifact.path)


class MaskMapping:
    """Maps the values in masks, integers or colours, to class numbers 0..K-1, and the value `ignore` to 255.

    `advice`: what to do about a value of no class, which it may name as {value}.
    Raises DataError: a value twice, or integers mixed with colours.
    """

    def __init__(self, classes: Sequence[ClassSpec], ignore: int | RGB | None, advice: str = UNKNOWN_VALUE) -> None:
        self._advice = advice
        values = [index if entry.value is None else entry.value for index, entry in enumerate(classes)]
        self.colors = not isinstance(values[0], int)
        if any(isinstance(value, int) == self.colors for value in values):
            raise DataError("the classes' values mix integers and colours: give every class an integer, or every class [red, green, blue]")
        repeated = [value for value, count in Counter(values).items() if count > 1]
        if repeated:
            raise DataError(f"two classes have the value {as_yaml(repeated[0])}: every class needs its own")
        table = {_code(value): index for index, value in enumerate(values)}
        if ignore is not None and isinstance(ignore, int) != self.colors:  # an integer `ignore` has no meaning in colour masks
            if _code(ignore) in table:
                name = classes[table[_code(ignore)]].name
                raise DataError(f"the value {as_yaml(ignore)} is both class {name!r} and `ignore`: set `ignore: null` or another value")
            table[_code(ignore)] = IGNORED
        self._codes = np.array(sorted(table), dtype=np.int64)
        self._labels = np.array([table[code] for code in sorted(table)], dtype=np.uint8)
        ignored = "none" if IGNORED not in table.values() else as_yaml(ignore)
        self._allowed = f"{list_some([as_yaml(value) for value in values], 12)}; `ignore` is {ignored}"

    def __call__(self, mask: npt.NDArray[Any], path: PictureFile, *, nodata: float | None = None) -> UInt8:
        """Labels (H, W) of a mask (H, W) or (H, W, 3) as `read_mask` gives it; the value `nodata` is ignored if it is no class.

        Raises DataError naming `path` for a value of no class.
        """
        if mask.ndim == 3 and not self.colors:
            if not (mask == mask[:, :, :1]).all():
                raise DataError(f"{path} is a colour picture and the classes have integer values: give each class `value: [r, g, b]`")
            mask = mask[:, :, 0]
        codes = color_codes(mask) if self.colors else mask
        labels, known = self._look_up(codes)
        if nodata is not None and not self.colors and (empty := ~known & (codes == nodata)).any():
            labels[empty], known[empty] = IGNORED, True
        if not known.all():
            unknown = [as_yaml(code_color(code) if self.colors else code) for code in np.unique(codes[~known]).tolist()]
            advice = self._advice.format(value=unknown[0].strip("[]").replace(" ", ""))
            raise DataError(f"{path} holds the mask values {list_some(unknown)}, allowed are {self._allowed}: {advice}")
        return labels

    def _look_up(self, codes: npt.NDArray[Any]) -> tuple[UInt8, npt.NDArray[np.bool_]]:
        """Labels, and for each code True if it is known."""
        if codes.dtype == np.uint8:  # a table is ten times faster than the search, and most masks are uint8
            small = self._codes < 256
            table, known = np.zeros(256, dtype=np.uint8), np.zeros(256, dtype=np.bool_)
            table[self._codes[small]], known[self._codes[small]] = self._labels[small], True
            return table[codes], known[codes]
        indices = np.minimum(np.searchsorted(self._codes, codes), self._codes.size - 1)
        return self._labels[indices], self._codes[indices] == codes


def distinct_colors(count: int) -> tuple[RGB, ...]:
    """Return `count` different colours: eight that colour-blind readers can distinguish, then hues in steps of the golden ratio.

    After `_HUES` steps they are spread over all colours.
    """
    colors = dict.fromkeys(_OKABE_ITO[:count])
    step = 0
    while len(colors) < count:
        value, saturation = ((0.95, 0.55), (0.55, 0.85), (0.75, 0.75))[step % 3]
        red, green, blue = colorsys.hsv_to_rgb(0.07 + step * _GOLDEN_RATIO, saturation, value)
        color = (round(red * 255), round(green * 255), round(blue * 255))
        colors[color if step < _HUES else code_color(step * _ODD % (1 << 24))] = None
        step += 1
    return tuple(colors)


def color_codes(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Colours (H, W, 3) as one number each, (H, W): red · 65536 + green · 256 + blue."""
    wide = mask.astype(np.int32)
    return wide[:, :, 0] << 16 | wide[:, :, 1] << 8 | wide[:, :, 2]


def code_color(code: int) -> RGB:
    """The colour of a number from `color_codes`."""
    return code >> 16, code >> 8 & 255, code & 255


def _code(value: int | RGB) -> int:
    return value if isinstance(value, int) else value[0] << 16 | value[1] << 8 | value[2]


def as_yaml(value: object) -> str:
    """A number or colour as YAML."""
    return str(list(value)) if isinstance(value, tuple) else str(value)
