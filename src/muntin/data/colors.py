"""Colours that can be told apart, for classes that were given none."""

from __future__ import annotations

import colorsys

RGB = tuple[int, int, int]

# Okabe and Ito's set for colour-blind readers, in an order that keeps neighbours far apart in lightness too.
_FIRST: tuple[RGB, ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (86, 180, 233),
    (120, 120, 120),
)
_GOLDEN = 0.618033988749895  # steps of the golden ratio fill the circle of hues evenly for any count


def distinct_colors(count: int) -> tuple[RGB, ...]:
    """`count` different colours: eight that colour-blind readers can tell apart, then hues by the golden ratio at changing lightness."""
    colors = list(_FIRST[:count])
    step = 0
    while len(colors) < count:
        value, saturation = ((0.95, 0.55), (0.55, 0.85), (0.75, 0.75))[step % 3]
        red, green, blue = colorsys.hsv_to_rgb(0.07 + step * _GOLDEN, saturation, value)
        color = (round(red * 255), round(green * 255), round(blue * 255))
        if color not in colors:
            colors.append(color)
        step += 1
    return tuple(colors)
