"""The roofline as a self-contained SVG: work per byte to the right, work per second upwards, both in powers of ten."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

INK, PALE, GRID, OURS, OTHERS = "#16202b", "#5c6773", "#e4e8ec", "#1f6fb2", "#d9822b"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 640, 72, 200, 78, 58
"""In pixels: the picture, and the space around the plot."""
LINE = 15
"""Between the middles of two labels."""


class Dot(NamedTuple):
    """An operation; others: the best GFLOP/s of somebody else's."""

    name: str
    flop_per_byte: float
    gflops: float
    others: float | None


class Scale:
    """From numbers to pixels."""

    def __init__(self, dots: Sequence[Dot], matmul: float, copy: float):
        rates = [rate for dot in dots for rate in (dot.gflops, dot.others) if rate]
        xs = [dot.flop_per_byte for dot in dots] + [matmul / copy]
        self.x = math.floor(math.log10(min(xs)) - 0.1), math.ceil(math.log10(max(xs)) + 0.1)
        self.y = math.floor(math.log10(min(rates)) - 0.1), math.ceil(math.log10(max(*rates, matmul)) + 0.1)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        (low, high), (bottom, top) = self.x, self.y
        across = (math.log10(x) - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        up = (math.log10(y) - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up


def draw(dots: Sequence[Dot], matmul: float, copy: float, title: str) -> str:
    """The picture. matmul: GFLOP/s of the fastest product. copy: GB/s of the fastest copy."""
    scale = Scale(dots, matmul, copy)
    body = [
        text(LEFT, 28, f"Roofline of {title}", 17, "font-weight='600'"),
        text(LEFT, 48, "dots below the slanted roof wait for memory, dots below the flat one compute; what a cache "
             "holds may pass the slanted one", 12, ink=PALE),
        *_axes(scale), *_roofs(scale, matmul, copy), *_dots(scale, dots), *_legend(),
    ]  # fmt: skip
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{HEIGHT}' "
            f"viewBox='0 0 {WIDTH} {HEIGHT}' font-family='system-ui, Helvetica, Arial, sans-serif'>",
            f"<rect width='{WIDTH}' height='{HEIGHT}' fill='#ffffff'/>",
            *body,
            "</svg>\n",
        ]
    )


def _axes(scale: Scale) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for power in range(scale.x[0], scale.x[1] + 1):
        x, _ = scale.at(10.0**power, 10.0 ** scale.y[0])
        yield line(x, TOP, x, bottom, GRID)
        yield text(x, bottom + 18, f"{10.0**power:g}", 12, "text-anchor='middle'", PALE)
    for power in range(scale.y[0], scale.y[1] + 1):
        _, y = scale.at(10.0 ** scale.x[0], 10.0**power)
        yield line(LEFT, y, right, y, GRID)
        yield text(LEFT - 8, y + 4, f"{10.0**power:g}", 12, "text-anchor='end'", PALE)
    yield text((LEFT + right) / 2, bottom + 42, "FLOP per byte that has to be moved", 13, "text-anchor='middle'")
    middle = (TOP + bottom) / 2
    yield text(20, middle, "GFLOP/s", 13, f"text-anchor='middle' transform='rotate(-90 20 {middle:.1f})'")


def _roofs(scale: Scale, matmul: float, copy: float) -> Iterator[str]:
    low, high = 10.0 ** scale.x[0], 10.0 ** scale.x[1]
    left = max(low, 10.0 ** scale.y[0] / copy)
    ridge = matmul / copy
    start, corner, end = scale.at(left, left * copy), scale.at(ridge, matmul), scale.at(high, matmul)
    yield line(*start, *corner, INK, 2)
    yield line(*corner, *end, INK, 2)
    yield text(end[0] + 8, end[1] + 4, f"best product {matmul:,.0f} GFLOP/s", 12)
    slope = math.degrees(math.atan2(corner[1] - start[1], corner[0] - start[0]))
    x, y = start[0] + 0.3 * (corner[0] - start[0]), start[1] + 0.3 * (corner[1] - start[1])
    turned = f"text-anchor='middle' transform='rotate({slope:.1f} {x:.1f} {y - 8:.1f})'"
    yield text(x, y - 8, f"best copy {copy:,.1f} GB/s", 12, turned)


def _dots(scale: Scale, dots: Sequence[Dot]) -> Iterator[str]:
    """Both dots of an operation on one upright line, and its name beside them where there is room."""
    points = [scale.at(dot.flop_per_byte, rate) for dot in dots for rate in (dot.gflops, dot.others) if rate]
    taken = [(x - 5, x + 5, y) for x, y in points]
    for dot in sorted(dots, key=lambda dot: (-dot.gflops, dot.name)):
        x, y = scale.at(dot.flop_per_byte, dot.gflops)
        hint = f"{dot.name}: {dot.flop_per_byte:.3g} FLOP/byte, ours {dot.gflops:.3g} GFLOP/s"
        if dot.others:
            _, other = scale.at(dot.flop_per_byte, dot.others)
            yield line(x, y, x, other, OTHERS)
            yield circle(x, other, "#ffffff", OTHERS, f"{hint}, others {dot.others:.3g}")
        yield circle(x, y, OURS, OURS, hint)
        label = _room(taken, x, y, 6.3 * len(dot.name))
        if label != y:
            yield line(x, y, x + 10, label, PALE)
        yield text(x + 11, label + 4, dot.name, 11.5)


def _room(taken: list[tuple[float, float, float]], x: float, y: float, width: float) -> float:
    """The nearest height at which no other name is in the way."""
    for step in sorted(range(-40, 41), key=abs):
        place = y + step * LINE / 3
        clear = all(
            abs(place - other) >= LINE - 4 or x + 10 >= right or x + 11 + width <= left for left, right, other in taken
        )
        if clear and TOP < place < HEIGHT - BOTTOM:
            break
    taken.append((x + 11, x + 11 + width, place))
    return place


def _legend() -> Iterator[str]:
    yield circle(LEFT + 6, 64, OURS, OURS, "")
    yield text(LEFT + 16, 68, "ours", 12)
    yield circle(LEFT + 66, 64, "#ffffff", OTHERS, "")
    yield text(LEFT + 76, 68, "the best of torch, compiled torch and the other peers", 12)


def circle(x: float, y: float, fill: str, stroke: str, hint: str) -> str:
    """A dot with a title."""
    about = f"<title>{escape(hint)}</title>" if hint else ""
    return (
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4.5' fill='{fill}' stroke='{stroke}' stroke-width='1.8'>{about}</circle>"
    )


def line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1) -> str:
    """A line."""
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{stroke}' stroke-width='{width}'/>"


def text(x: float, y: float, words: str, size: float, extra: str = "", ink: str = INK) -> str:
    """Words."""
    return f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' fill='{ink}' {extra}>{escape(words)}</text>"
