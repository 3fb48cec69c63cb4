"""Draw pages/images/tangent.svg: log p along one neuron's contribution, and its tangent.

A vocabulary of four tokens and made-up numbers, no model: python docs/tangent.py
"""

import math
from pathlib import Path

BEFORE = (1.0, 0.6, 0.2, -0.5)
"""Logits of the base; the target is the first token."""
ADDED = (2.2, -0.6, 0.9, 0.0)
"""What the neuron's contribution adds to them."""

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 50
X_RANGE, Y_RANGE = (-0.4, 1.6), (-1.7, 1.0)
INK, CURVE, TANGENT, GREY = "#222222", "#004488", "#BB5566", "#777777"


def log_prob(share):
    """log p(target) after adding this share of the contribution."""
    logits = [before + share * added for before, added in zip(BEFORE, ADDED, strict=True)]
    return logits[0] - math.log(sum(map(math.exp, logits)))


def slope():
    """Derivative of ``log_prob`` at 0: delta_w - E_p[delta]."""
    weights = [math.exp(before) for before in BEFORE]
    mean = sum(w * added for w, added in zip(weights, ADDED, strict=True)) / sum(weights)
    return ADDED[0] - mean


def place(share, value):
    """Pixels of a point."""
    x = LEFT + (share - X_RANGE[0]) / (X_RANGE[1] - X_RANGE[0]) * (WIDTH - LEFT - RIGHT)
    y = TOP + (Y_RANGE[1] - value) / (Y_RANGE[1] - Y_RANGE[0]) * (HEIGHT - TOP - BOTTOM)
    return f"{x:.1f},{y:.1f}"


def line(points, colour, *, width=2.5, dash=""):
    coordinates = " ".join(place(*point) for point in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<polyline points="{coordinates}" fill="none" stroke="{colour}" '
        f'stroke-width="{width}"{dashed}/>'
    )


def text(share, value, words, colour=INK, *, dx=0, dy=0, anchor="start"):
    x, y = map(float, place(share, value).split(","))
    return (
        f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" fill="{colour}" text-anchor="{anchor}">'
        f"{words}</text>"
    )


def dot(share, value, colour):
    x, y = place(share, value).split(",")
    return f'<circle cx="{x}" cy="{y}" r="5" fill="{colour}"/>'


def figure():
    """The whole SVG."""
    start, exact, bound = log_prob(0), log_prob(1), log_prob(0) + slope()
    steps = [X_RANGE[0] + i * 0.02 for i in range(101)]
    ends = (X_RANGE[0], (Y_RANGE[1] - start) / slope())
    floor = Y_RANGE[0]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14">',
        "<title>log p(target) along a contribution is concave; its tangent lies above it</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        line([(X_RANGE[0], floor), (X_RANGE[1], floor)], GREY, width=1),
        line([(X_RANGE[0], floor), (X_RANGE[0], Y_RANGE[1])], GREY, width=1),
        line([(X_RANGE[0], start), (1.43, start)], GREY, width=1, dash="2 4"),
        line([(0, floor), (0, start)], GREY, width=1, dash="2 4"),
        line([(1, floor), (1, bound)], GREY, width=1, dash="2 4"),
        line([(end, start + end * slope()) for end in ends], TANGENT, dash="8 5"),
        line([(step, log_prob(step)) for step in steps], CURVE),
        line([(1.08, start), (1.08, exact)], CURVE, width=1.5),
        line([(1.4, start), (1.4, bound)], TANGENT, width=1.5),
        dot(0, start, INK),
        dot(1, exact, CURVE),
        dot(1, bound, TANGENT),
        text(1.09, (start + exact) / 2, "exact score", CURVE, dx=2, dy=5),
        text(1.41, (start + bound) / 2, "bound", TANGENT, dx=3, dy=5),
        text(0.4, -0.72, "log p(target | base + t u)", CURVE),
        text(0.62, 0.28, "tangent at t = 0", TANGENT, dx=-12, anchor="end"),
        text(0, floor, "t = 0: the base", dy=20, anchor="middle"),
        text(1, floor, "t = 1: the whole contribution u", dy=20, anchor="middle"),
        f'<text x="18" y="{HEIGHT // 2}" fill="{INK}" text-anchor="middle" '
        f'transform="rotate(-90 18 {HEIGHT // 2})">nats</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    target = Path(__file__).parent / "pages" / "images" / "tangent.svg"
    target.write_text(figure(), encoding="utf-8")
