"""Draw pages/images/search.svg: the search for the best three of ten neurons, stopped by bounds.

Made-up numbers, no model: python docs/search.py
"""

from pathlib import Path

NEURONS = (  # (bound, exact score), in order of the bound
    (0.92, 0.85),
    (0.74, 0.40),
    (0.70, 0.64),
    (0.61, 0.55),
    (0.47, 0.44),
    (0.38, 0.20),
    (0.30, 0.28),
    (0.22, 0.05),
    (0.15, 0.14),
    (0.08, 0.02),
)
WANTED = 3

WIDTH, HEIGHT = 640, 320
LEFT, TOP, BOTTOM = 64, 30, 58
STEP, BAR = 56, 34
INK, SCORE, BOUND, GREY = "#222222", "#004488", "#BB5566", "#777777"


def evaluated():
    """How many neurons are scored: until the bound of the next is below the best so far."""
    for count in range(WANTED, len(NEURONS)):
        if NEURONS[count][0] <= sorted(score for _, score in NEURONS[:count])[-WANTED]:
            return count
    return len(NEURONS)


def height(value):
    return value * (HEIGHT - TOP - BOTTOM)


def rectangle(place, value, style):
    x, y = LEFT + place * STEP, HEIGHT - BOTTOM - height(value)
    return (
        f'<rect x="{x}" y="{y:.1f}" width="{BAR}" height="{height(value):.1f}" '
        f'data-value="{value}" {style}/>'
    )


def words(x, y, said, colour=INK, anchor="middle"):
    return f'<text x="{x}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{said}</text>'


def figure():
    """The whole SVG."""
    scored = evaluated()
    listed = sorted(range(scored), key=lambda place: -NEURONS[place][1])[:WANTED]
    bar = NEURONS[listed[-1]][1]
    floor, level = HEIGHT - BOTTOM, HEIGHT - BOTTOM - height(bar)
    end = LEFT + len(NEURONS) * STEP - STEP + BAR
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14">',
        "<title>Neurons in order of their bounds; those left out cannot reach the bar</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for place, (bound, score) in enumerate(NEURONS):
        parts.append(rectangle(place, bound, f'fill="none" stroke="{BOUND}" stroke-width="2"'))
        if place < scored:
            faded = "" if place in listed else ' fill-opacity="0.35"'
            parts.append(rectangle(place, score, f'fill="{SCORE}"{faded}'))
    gap = LEFT + scored * STEP - (STEP - BAR) / 2
    parts += [
        f'<line x1="{LEFT - 10}" x2="{end}" y1="{floor}" y2="{floor}" stroke="{GREY}"/>',
        f'<line x1="{LEFT - 10}" x2="{end}" y1="{level:.1f}" y2="{level:.1f}" stroke="{INK}" '
        'stroke-dasharray="6 4"/>',
        words(end, level - 8, "the bar: the third best score", INK, "end"),
        f'<line x1="{gap}" x2="{gap}" y1="{level + 6:.1f}" y2="{floor + 40}" stroke="{GREY}" '
        'stroke-dasharray="2 4"/>',
        words(LEFT + 2 * STEP - 11, floor + 22, "scored: bound and exact score", SCORE),
        words((gap + end) / 2, floor + 22, "not scored: no bound reaches the bar", BOUND),
        words(LEFT + 2 * STEP - 11, floor + 42, "dark: the three listed", GREY),
        f'<text transform="rotate(-90 22 {HEIGHT / 2})" x="22" y="{HEIGHT / 2}" fill="{INK}" '
        'text-anchor="middle">nats</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "pages" / "images" / "search.svg").write_text(figure())
