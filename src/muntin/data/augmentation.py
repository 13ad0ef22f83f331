"""Random changes to training crops: single values, and presets of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from muntin.section import Section

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, lt=1)]
Zoom = Annotated[float, Field(ge=0.1, le=10)]
Preset = Literal["none", "light", "standard", "strong"]
"""Fields that join several pictures in a crop, and their task: a preset's value has no effect in the other one."""


class Augmentation(Section):
    """Random changes to training crops: values that replace those of the preset `data.augment`; the defaults below are those of `light`.

    Flips, zoom, rotation and mosaic change image and mask; brightness, contrast, saturation and hue the image only. `restore` changes the
    clean picture before it is degraded, without zoom and rotation; its pairs (`targets`) are only flipped.
    """

    flip_horizontal: Probability = Field(default=0.5, description="probability of a left-right flip, 0-1")
    flip_vertical: Probability = Field(default=0.0, description="probability of an upside-down flip, 0-1; 0.5 suits pictures from above")
    scale: tuple[Zoom, Zoom] = Field(
        default=(0.8, 1.25),
        description="range of the zoom, 0.1-10: 2 doubles the size of objects, [1, 1] is no zoom; `classify` never zooms out",
    )
    rotation: float = Field(
        default=0.0,
        ge=0,
        le=180,
        description="largest rotation to either side, degrees; masks by nearest neighbour; 180 suits pictures from above",
    )
    brightness: Strength = Field(default=0.1, description="largest relative change of brightness, 0-1: 0.1 multiplies by 0.9 to 1.1")
    contrast: Strength = Field(default=0.1, description="largest relative change of contrast, 0-1; pictures of 1 or 3 channels only")
    saturation: Strength = Field(default=0.1, description="largest relative change of saturation, 0-1; pictures of 3 channels only")
    hue: float = Field(
        default=0.0, ge=0, le=0.5, description="largest shift of the hue, in turns of the colour circle; pictures of 3 channels only"
    )
    mosaic: Probability = Field(default=0.0, description="share of crops that four crops meet in; segment only")
    mixup: Probability = Field(default=0.0, description="share of crops that are blended with another one, labels too; classify only")
    cutmix: Probability = Field(
        default=0.0, description="share of crops with a rectangle of another one, labels by area; classify only; mixup + cutmix at most 1"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {list(self.scale)}: the smaller zoom comes first: swap them")
        if self.mixup + self.cutmix > 1:
            raise ValueError(f"mixup {self.mixup:g} and cutmix {self.cutmix:g} add up to more than 1: they are shares of the crops")
        return self

    def changes(self, preset: Preset) -> dict[str, Any]:
        """The values that are not those of a preset."""
        return {name: value for name, value in self.model_dump().items() if value != getattr(PRESETS[preset], name)}


PRESETS: dict[Preset, Augmentation] = {
    "none": Augmentation(flip_horizontal=0, scale=(1, 1), brightness=0, contrast=0, saturation=0),
    "light": Augmentation(),
    "standard": Augmentation(scale=(0.7, 1.4), rotation=10, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
    "strong": Augmentation(
        scale=(0.5, 2), rotation=30, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.05, mosaic=0.3, mixup=0.2, cutmix=0.2
    ),
}
NO_AUGMENTATION = PRESETS["none"]


def fill_in(values: Any) -> Any:
    """Fill the `augmentation` of a `data` section that is being read with the values of its preset, `augment`."""
    given = values.get("augmentation", {}) if isinstance(values, dict) else None
    if not isinstance(given, dict | Augmentation) or values.get("augment", "light") not in get_args(Preset):
        return values  # pydantic says what is wrong
    own = given if isinstance(given, dict) else {name: getattr(given, name) for name in given.model_fields_set}
    return {**values, "augmentation": {**PRESETS[values.get("augment", "light")].model_dump(), **own}}
