"""A strip of a prompt's tokens, to click: what each brings, and the facts of the one chosen.

A small widget without a script: radio buttons and a style sheet do it, so that it works in any
notebook and in what is made of one, by keyboard as well. Two strips on a page do not meet, even
where they are equal: each stands in a form of its own.
"""

import math
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tl_neuron_attr.display import Grid, box, escaped, grid, line, number, signed, tinted
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.prompts import integer, visible

_SHOWN = 400
_START = 8


@dataclass(frozen=True, kw_only=True)
class TokenStrip:
    """Tokens of a prompt with a value each, and facts about those that can be chosen.

    As the last line of a notebook's cell it is a strip to click; printed, a few lines of text. In
    HTML a prompt of more than 400 tokens has its middle left out, but for the tokens with the
    largest values.

    Raises:
        InputError: If there are no tokens, a position is none of theirs, or a value is not finite.
    """

    tokens: tuple[str, ...]
    read_pos: int
    """Where the answer is read."""
    values: tuple[float | None, ...] = ()
    """By position; those after the last have none."""
    quantity: str = "score, nats"
    """What the values are, and their unit."""
    facts: Mapping[int, tuple[Grid, ...]] = field(default_factory=dict)
    """What is shown of a position once it is chosen."""
    chosen: int | None = None
    """The position chosen at first; ``None`` for none."""

    def __post_init__(self) -> None:
        count = len(self.tokens)
        if not count:
            raise InputError("a strip needs tokens; there are none")
        if len(self.values) > count:
            raise InputError(f"there are {len(self.values)} values for {count} tokens")
        if any(value is not None and not math.isfinite(value) for value in self.values):
            raise InputError("values must be finite numbers, or None where there is none")
        places = [self.read_pos, *self.facts, *([] if self.chosen is None else [self.chosen])]
        for place in places:
            if not 0 <= place < count:
                raise InputError(f"position {place} is out of range: there are {count} tokens")

    @property
    def largest(self) -> float:
        """The end of the scale: the largest absolute value."""
        return max((abs(value) for value in self.values if value is not None), default=0.0)

    def value(self, position: int) -> float | None:
        """The value there, if any."""
        return self.values[position] if position < len(self.values) else None

    def __str__(self) -> str:
        def each(position: int) -> str:
            value = self.value(position)
            shown = "" if value is None else f" ({signed(value)})"
            mark = ">" if position == self.read_pos else ""
            return f"{mark}{position}:{visible(self.tokens[position])}{shown}"

        # what belongs together is wrapped as one word
        words = "  ".join(each(position).replace(" ", "\0") for position in range(len(self.tokens)))
        lines = textwrap.wrap(words, 100, break_on_hyphens=False, break_long_words=False)
        ending = f"read at {self.read_pos}" + (f"; {self.quantity}" if self.values else "")
        return "\n".join([*(each.replace("\0", " ") for each in lines), ending])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return box("", self.html())

    def html(self) -> str:
        """The strip and its legend, to stand in a ``display.box``."""
        parts = []
        before = -1
        for position in _kept(self):
            if position != before + 1:
                parts.append(f'<span class="gap">… {position - before - 1:,} tokens …</span>')
            parts.append(self._token(position))
            before = position
        if before != len(self.tokens) - 1:
            parts.append(f'<span class="gap">… {len(self.tokens) - 1 - before:,} tokens</span>')
        # a form of its own keeps its radio buttons apart from any others; "dialog": never sent
        return (
            f'<form class="strip" method="dialog" dir="{_direction(self.tokens)}" '
            f'role="radiogroup" aria-label="Tokens of the prompt">{"".join(parts)}</form>'
            f"{self._legend()}"
        )

    def _token(self, position: int) -> str:
        value = self.value(position)
        shown = "" if value is None else f" {signed(value)}"
        colour = "transparent" if value is None else tinted(value, self.largest)
        read = position == self.read_pos
        words = f"position {position}" + ("" if value is None else f", {signed(value)}")
        words += ", the answer is read here" if read else ""
        name = f"{words}: {visible(self.tokens[position])}"
        checked = " checked" if position == self.chosen else ""
        inside = (
            f"<bdi>{escaped(visible(self.tokens[position]))}</bdi>"
            f'<small dir="ltr">{position}{shown}</small>'
        )
        css = (
            f'class="tok{" read" if read else ""}" title="{escaped(words)}" '
            f'style="background:{colour}"'
        )
        grids = self.facts.get(position)
        if grids is None:
            return f"<span {css}>{inside}</span>"
        about = "".join(map(grid, grids)) or line("nothing is known of this position")
        return (
            f'<label {css}><input type="radio" name="token" value="{position}"{checked} '
            f'aria-label="{escaped(name)}">{inside}</label>'
            f'<div class="at" dir="ltr" hidden><b>{position}: '
            f"<bdi>{escaped(visible(self.tokens[position]))}</bdi></b>"
            f'<div class="grids">{about}</div></div>'
        )

    def _legend(self) -> str:
        told = "Underlined: where the answer is read."
        if self.facts:
            told += " Choose a token, or move with the arrow keys, to see what comes from it."
        if not self.values:
            return line(told)
        end = self.largest
        falls = any(value is not None and value < 0 for value in self.values)
        ends = f"{tinted(-1.0, 1.0)}," * falls + f"transparent,{tinted(1.0, 1.0)}"
        start = number(-end) if falls else "0"
        return (
            f'<div class="soft" dir="ltr">{escaped(self.quantity)}: {start}'
            f'<span class="scale" style="background:linear-gradient(90deg,{ends})"></span>'
            f"{signed(end)}. {told}</div>"
        )


def token_strip(
    tokens: Sequence[str],
    read_pos: int = -1,
    values: Sequence[float | None] | None = None,
    *,
    quantity: str = "score, nats",
    facts: Mapping[int, Sequence[Grid]] | None = None,
    chosen: int | None = None,
) -> TokenStrip:
    """The strip of these tokens.

    Args:
        tokens: As the tokenizer splits the prompt.
        read_pos: Where the answer is read; from the end if negative.
        values: A number a token, such as a score or an attention weight, shown by colour on a scale
            centred on 0 and as a number. Fewer than there are tokens: the last have none.
        quantity: What the values are, with their unit.
        facts: By position, what is shown once it is chosen. Other tokens cannot be chosen.
        chosen: The position chosen at first: by default that with facts and the largest value.

    Raises:
        InputError: As ``TokenStrip``.
    """
    read_pos = integer(read_pos, "read_pos")
    numbers = (
        () if values is None else tuple(None if value is None else float(value) for value in values)
    )
    known = {} if facts is None else {place: tuple(each) for place, each in facts.items()}
    strip = TokenStrip(
        tokens=tuple(tokens),
        read_pos=read_pos + len(tokens) if read_pos < 0 else read_pos,
        values=numbers,
        quantity=quantity,
        facts=known,
        chosen=chosen,
    )
    if chosen is not None or not known:
        return strip
    best = max(known, key=lambda place: (abs(strip.value(place) or 0.0), -place))
    return replace(strip, chosen=best)


def _kept(strip: TokenStrip) -> list[int]:
    """Which positions are drawn: of a long prompt its two ends and the largest values."""
    count = len(strip.tokens)
    if count <= _SHOWN:
        return list(range(count))
    ends = {*range(_START), *range(count - _SHOWN // 2, count), strip.read_pos}
    by_size = sorted(range(count), key=lambda place: -abs(strip.value(place) or 0.0))
    largest = [place for place in by_size if place not in ends][: _SHOWN - len(ends)]
    return sorted({*ends, *largest, *([] if strip.chosen is None else [strip.chosen])})


def _direction(tokens: Sequence[str]) -> str:
    """Which way the tokens follow each other: as most of their letters are read."""
    kinds = [unicodedata.bidirectional(char) for text in tokens for char in text]
    right = sum(kind in ("R", "AL") for kind in kinds)
    return "rtl" if right > sum(kind == "L" for kind in kinds) else "ltr"
