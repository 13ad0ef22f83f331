"""Distinct colours for classes without a colour of their own."""

from __future__ import annotations

import colorsys

from muntin.artifact.classes import Channel8

RGB = tuple[Channel8, Channel8, Channel8]

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


def distinct_colors(count: int) -> tuple[RGB, ...]:
    """Return `count` different colours: eight that colour-blind readers can distinguish, then hues in steps of the golden ratio."""
    colors = list(_OKABE_ITO[:count])
    step = 0
    while len(colors) < count:
        value, saturation = ((0.95, 0.55), (0.55, 0.85), (0.75, 0.75))[step % 3]
        red, green, blue = colorsys.hsv_to_rgb(0.07 + step * _GOLDEN_RATIO, saturation, value)
        color = (round(red * 255), round(green * 255), round(blue * 255))
        if color not in colors:
            colors.append(color)
        step += 1
    return tuple(colors)
