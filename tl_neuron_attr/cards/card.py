"""The card itself: a value, and how it reads as text and as JSON."""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tl_neuron_attr.display import box, decimals, escaped, facts, grid, line, signed, token
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron, Head
from tl_neuron_attr.prompts import Target, shown_tokens, visible
from tl_neuron_attr.styled import grid_of
from tl_neuron_attr.tables import records, write_tables
from tl_neuron_attr.topk import Kind

END_COLUMNS = ("end", "id", "token", "logit", "raised")
INPUT_COLUMNS = ("input", "value", "subkey_norm", "gained_norm")
SOURCE_COLUMNS = ("source_pos", "token", "attention", "v", "coefficient", "score")
QUERY_LAYER_COLUMNS = ("layer", "kind", "share", "score")
QUERY_NEURON_COLUMNS = (
    "kind",
    "layer",
    "head",
    "index",
    "source_pos",
    "position",
    "coefficient",
    "share",
    "score",
    "raises",
    "lowers",
)
DOWNSTREAM_COLUMNS = (
    "kind",
    "layer",
    "head",
    "index",
    "source_pos",
    "input",
    "product",
    "effect",
    "pre_activation",
    "share",
    "coefficient",
)
CARRIED_COLUMNS = (
    "layer",
    "head",
    "readability",
    "attention",
    "norm",
    "raises",
    "raised_by",
    "lowers",
    "lowered_by",
)
PROMPT_COLUMNS = (
    "prompt_id",
    "prompt",
    "target",
    "source_pos",
    "source_token",
    "coefficient",
    "score",
)

_SOURCES_SHOWN = 8


@dataclass(frozen=True, kw_only=True, repr=False)
class NeuronCard:
    """Everything about one neuron in one run: numbers and tables, no model.

    Printed, or as the last line of a notebook's cell, it is a card of plain text; ``to_dict``
    gives plain values. Tables hold the ``top`` rows that were asked for.
    """

    neuron: FFNNeuron | AttnNeuron
    model_name: str
    prompt_id: str
    tokens: tuple[str, ...]
    """The prompt."""
    position: int
    """Where the neuron writes; the tables are about this position."""
    read_pos: int
    """Where the answer is read. Only there does the neuron have a score."""
    target: Target
    log_prob: float
    """log p(target), or of a contrast the difference."""
    convention: str
    coefficient: float
    score: float | None
    """Rise in log p(target), in nats; ``None`` where ``position`` is not the read position."""
    rank: int | None
    """Place among the best neurons of its kind, from 1; ``None`` if it is not among them."""
    ranked: int
    """How many of its kind were ranked."""
    total: int
    """How many of its kind there are."""
    subvalue_norm: float
    contribution_norm: float
    """Norm of coefficient times subvalue."""
    inputs: pd.DataFrame
    """Its pre-activations: ``pre``, or ``gate`` and ``up``; ``v`` of an attention neuron. Columns
    ``input``, ``value`` (missing for a position-free neuron: see ``sources``), ``subkey_norm``
    (bare) and ``gained_norm`` (the subkey times the norm's gain, its mean out under LayerNorm)."""
    sources: pd.DataFrame
    """Of an attention neuron: ``source_pos, token, attention, v, coefficient, score``, one row a
    source position; coefficients add up to the position-free neuron's. Empty for FFN neurons."""
    ends: pd.DataFrame
    """``end`` (top or bottom), ``id, token, logit`` (per unit of coefficient), and whether the
    token is ``raised`` by the neuron in this run; the strongest of each end first."""
    readability: float
    """How far the stronger end of the subvalue stands out (``TokenEnds.readability``)."""
    query_layers: pd.DataFrame
    """What set it off, in the result's convention: ``layer, kind, share, score``; ``kind`` embed,
    attn, ffn or bias. ``score`` is the share of the neuron's own."""
    query_neurons: pd.DataFrame
    """The neurons with the largest shares, FFN and attention, and where they fire: ``kind, layer,
    head, index, source_pos, position, coefficient, share, score, raises, lowers``."""
    downstream: pd.DataFrame
    """What it sets off, the largest effect first: ``kind, layer, head, index, source_pos, input``,
    ``product`` (subvalue . key), ``effect``, ``pre_activation`` (in this run), ``share`` (effect /
    pre_activation), and an FFN neuron's ``coefficient``, which tells whether it is on. Heads that
    share their values have one row, under the first of them."""
    heads: pd.DataFrame
    """The contribution through later heads, the most readable first, or through the one chosen:
    ``layer, head, readability``, ``attention`` (which the read position pays to this position),
    ``norm`` (of what is carried), and the tokens it ``raises`` and ``lowers``, with their logits.
    With a coefficient of 0, per unit of it."""
    prompts: pd.DataFrame
    """Of the prompts given, those where its score is largest: ``prompt_id, prompt, target,
    source_pos, source_token, coefficient, score``. An attention neuron is taken at its best source
    position in each; a position-free one as it is, beside the position that brings most."""
    notes: tuple[str, ...]
    """What is missing here, and why."""

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return _html(self)

    def text(self, width: int = 100) -> str:
        """The card as plain text, no line longer than ``width`` (at least 60)."""
        return "\n".join(line.rstrip() for line in _text(self, max(60, width)))

    def to_dict(self) -> dict[str, Any]:
        """The card as plain values: tables are lists of rows, empty cells ``None``."""
        values: dict[str, Any] = {"neuron": str(self.neuron), "kind": kind_of(self.neuron)}
        for name, value in vars(self).items():
            if isinstance(value, pd.DataFrame):
                values[name] = records(value)
            elif isinstance(value, Target):
                values[name] = value.facts()
            elif name != "neuron":
                values[name] = list(value) if isinstance(value, tuple) else value
        return values

    def save(
        self,
        directory: str | Path,
        *,
        made_with: Mapping[str, Any] | None = None,
        report: bool = False,
    ) -> None:
        """Write ``card.json``, ``card.txt`` and the tables that have rows (Parquet), or nothing;
        with ``report`` also ``report.html``, to look at in a browser.

        ``made_with`` are the facts of the attribution (its ``facts()``), to be kept in
        ``card.json``: versions, the weights' hash. A report of an earlier run is removed.

        Raises:
            InputError: If the directory cannot be written to.
            OutputError: If writing fails on the way; nothing has changed then.
        """
        path = check_writable(directory)
        tables = {name: each for name, each in vars(self).items() if isinstance(each, pd.DataFrame)}
        filled = {name: table for name, table in tables.items() if len(table)}
        found = {**self.to_dict(), **({} if made_with is None else {"made_with": dict(made_with)})}
        pages = {}
        if report:
            from tl_neuron_attr.report.card import card_page

            pages["report.html"] = card_page(found)
        facts = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
        texts = {**pages, "card.txt": f"{self}\n", "card.json": facts + "\n"}
        empty = [name for name in tables if name not in filled]
        write_tables(path, filled, texts, empty, [] if report else ["report.html"])


def kind_of(neuron: FFNNeuron | AttnNeuron) -> Kind:
    return "ffn" if isinstance(neuron, FFNNeuron) else "attn"


# --- in a notebook ----------------------------------------------------------------------------

_TABLES = (
    ("sources", "Where it comes from", "coefficient"),
    ("query_layers", "What set it off: layers", "share"),
    ("query_neurons", "What set it off: neurons", "share"),
    ("downstream", "What it sets off", "effect"),
    ("heads", "Through later heads", ""),
    ("prompts", "Prompts where its score is largest", ""),
)
"""Tables of a card, what they are of, and the column whose largest values are shown."""


def _html(card: NeuronCard) -> str:
    what = "FFN neuron" if kind_of(card.neuron) == "ffn" else "attention neuron"
    target = card.target
    aim = " or ".join(token(each.text) for each in target.answers)
    if target.against is not None:
        aim += f" against {token(target.against.text)}"
    aim = aim if target.distribution is None else escaped(target.words)
    numbers = [f"coefficient {signed(card.coefficient)}"]
    if card.score is not None:
        ranked = card.rank is not None
        place = f"rank {card.rank:,}" if ranked else f"not among the best {card.ranked:,}"
        numbers += [f"score {signed(card.score)} nats", f"{place} of {card.total:,}"]
    told = {
        "prompt": escaped(shown_tokens(card.tokens[: card.read_pos + 1])),
        "writes at": f"{card.position}: {token(card.tokens[card.position])}",
        "target": f"{aim}, {_what(target)} {signed(card.log_prob)} nats",
        "in this run": escaped("; ".join(numbers)),
    }
    for end in ("top", "bottom"):
        rows = [row for row in records(card.ends) if row["end"] == end]
        moved = "raised" if rows and rows[0]["raised"] else "lowered"
        moved = "" if card.coefficient == 0 else moved
        told[f"{end} {moved}".strip()] = " ".join(
            f"{token(row['token'])} {signed(row['logit'])}" for row in rows
        )
    grids = []
    for name, caption, by in _TABLES:
        table = getattr(card, name)
        if len(table) and by:
            table = table.loc[table[by].abs().sort_values(ascending=False, kind="stable").index]
        if len(table):
            grids.append(grid(grid_of(table, caption, top=_SOURCES_SHOWN, tokens=3)))
    return box(
        f"{card.neuron}, {what} of {card.model_name}",
        facts(told),
        line("top and bottom: logits per unit of coefficient"),
        *grids,
        *map(line, card.notes),
    )


# --- as text ----------------------------------------------------------------------------------


def _text(card: NeuronCard, width: int) -> Iterator[str]:
    yield from _heading(card, width)
    sign = card.coefficient
    meaning = "0: nothing is raised" if sign == 0 else "positive" if sign > 0 else "negative"
    yield ""
    yield from textwrap.wrap(
        f"What it says (logits per unit; {card.readability:.1f} sd)   the coefficient is {meaning}",
        width,
    )
    for end in ("top", "bottom"):
        rows = [row for row in records(card.ends) if row["end"] == end]
        moved = "" if sign == 0 else "raised " if rows and rows[0]["raised"] else "lowered"
        shown = [f"{visible(row['token'])} {decimals(row['logit'], 2)}" for row in rows]
        start = f"  {end:6}  {moved}  "
        yield start + _first_of(shown, width - len(start))
    if len(card.sources):
        yield from _section("Where it comes from", _source_grid(card, width))
    if len(card.query_layers):
        yield from _section(
            "What set it off (share of its pre-activation)", _set_off_lines(card, width)
        )
    if len(card.downstream):
        yield from _section(
            "What it sets off (effect on the pre-activation)", _downstream_grid(card, width)
        )
    if len(card.heads):
        yield from _section(
            "Through later heads (sd: how far an end stands out)", _ov_grid(card, width)
        )
    if len(card.prompts):
        yield from _section("Prompts where its score is largest", _prompt_grid(card, width))
    for note in card.notes:
        yield ""
        yield from textwrap.wrap(f"Note: {note}", width)


def _heading(card: NeuronCard, width: int) -> Iterator[str]:
    what = "FFN neuron" if kind_of(card.neuron) == "ffn" else "attention neuron"
    at = f"{card.position}:{visible(card.tokens[card.position])}"
    yield _clipped(f"{card.neuron}   {what} of {card.model_name}, where it writes at {at}", width)
    yield _clipped(f"prompt    {shown_tokens(card.tokens[: card.read_pos + 1])}", width)
    signs = card.target.distribution is None
    said = f"{_what(card.target)} {decimals(card.log_prob, sign=signs)} nats"
    yield _clipped(f"target    {card.target.words}   {said}", width)
    yield ""
    facts = [f"coefficient {card.coefficient:+.4g}"]
    if card.score is not None:
        place = (
            f"not among the best {card.ranked:,}" if card.rank is None else f"rank {card.rank:,}"
        )
        facts += [f"score {decimals(card.score, 4)} nats", f"{place} of {card.total:,}"]
    yield _clipped("   ".join(facts), width)
    norms = (
        f"norms     subvalue {card.subvalue_norm:.3g}   contribution {card.contribution_norm:.3g}"
    )
    yield _clipped(norms, width)
    for row in records(card.inputs):
        value = "" if row["value"] is None else f" {row['value']:+.4g}"
        yield from textwrap.wrap(
            f"input     {row['input']}{value}   subkey's norm {row['subkey_norm']:.3g}, "
            f"with the norm's gain {row['gained_norm']:.3g}",
            width,
            subsequent_indent=" " * 10,
        )


def _what(target: Target) -> str:
    """What is known of a target, in a few words."""
    if target.distribution is not None:
        return target.quantity
    return "log p" if target.against is None else "difference of log p"


def _section(title: str, lines: Iterator[str]) -> Iterator[str]:
    yield ""
    yield title
    yield from lines


def _source_grid(card: NeuronCard, width: int) -> Iterator[str]:
    rows = sorted(records(card.sources), key=lambda row: -abs(row["coefficient"]))[:_SOURCES_SHOWN]
    yield from _grid(
        (">attention", ">v", ">coef.", ">score", "source"),
        [
            (
                decimals(row["attention"], sign=False),
                decimals(row["v"]),
                decimals(row["coefficient"], 4),
                _signed(row["score"]),
                f"{row['source_pos']}:{visible(row['token'])}",
            )
            for row in rows
        ],
        width,
    )


def _set_off_lines(card: NeuronCard, width: int) -> Iterator[str]:
    layers = [
        f"{row['kind']}{'' if row['layer'] is None else row['layer']} {decimals(row['share'], 2)}"
        for row in sorted(records(card.query_layers), key=lambda row: -abs(row["share"]))
        if row["share"]
    ]
    yield "  " + _first_of(layers, width - 2)
    yield from _grid(
        ("neuron", ">at", ">share", ">score", ">coef.", "raises", "lowers"),
        [
            (
                _label(row),
                str(row["position"]),
                decimals(row["share"]),
                _signed(row["score"]),
                decimals(row["coefficient"], 2),
                _tokens(row["raises"]),
                _tokens(row["lowers"]),
            )
            for row in records(card.query_neurons)
        ],
        width,
        flexible=2,
    )


def _downstream_grid(card: NeuronCard, width: int) -> Iterator[str]:
    yield from _grid(
        ("neuron", "input", ">effect", ">per unit", ">pre-act.", ">share", ">coef."),
        [
            (
                _label(row),
                row["input"],
                decimals(row["effect"]),
                decimals(row["product"]),
                decimals(row["pre_activation"]),
                _signed(row["share"], 2),
                _signed(row["coefficient"], 2),
            )
            for row in records(card.downstream)
        ],
        width,
    )


def _ov_grid(card: NeuronCard, width: int) -> Iterator[str]:
    yield from _grid(
        ("head", ">sd", ">attention", "raises", "lowers"),
        [
            (
                str(Head(row["layer"], row["head"])),
                f"{row['readability']:.1f}",
                decimals(row["attention"], sign=False),
                _tokens(row["raises"]),
                _tokens(row["lowers"]),
            )
            for row in records(card.heads)
        ],
        width,
        flexible=2,
    )


def _prompt_grid(card: NeuronCard, width: int) -> Iterator[str]:
    yield from _grid(
        (">score", ">coef.", "target", "source", "prompt"),
        [
            (
                decimals(row["score"], 4),
                decimals(row["coefficient"]),
                visible(row["target"]),
                ""
                if row["source_pos"] is None
                else f"{row['source_pos']}:{visible(row['source_token'])}",
                _sentence(row["prompt"]),
            )
            for row in records(card.prompts)
        ],
        width,
        flexible=1,
    )


def _grid(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, flexible: int = 0
) -> Iterator[str]:
    """Rows in columns, indented by two; the last ``flexible`` columns share what is left of a line.

    Columns whose header begins with ``>`` are set flush right; empty ones are left out.
    """
    kept = [place for place in range(len(header)) if any(row[place] for row in rows)]
    names = [header[place].lstrip(">") for place in kept]
    right = [header[place].startswith(">") for place in kept]
    cells = [names, *([row[place] for place in kept] for row in rows)]
    sizes = [max(len(row[place]) for row in cells) for place in range(len(kept))]
    if flexible and kept:
        left = width - sum(sizes[:-flexible]) - 2 * len(sizes)
        sizes[-flexible:] = [max(6, left // flexible)] * flexible
    for row in cells:
        shown = [
            text.rjust(size) if flush else _clipped(text, size).ljust(size)
            for text, size, flush in zip(row, sizes, right, strict=True)
        ]
        yield _clipped("  " + "  ".join(shown).rstrip(), width)


def _label(row: dict[str, Any]) -> str:
    if row["kind"] == "ffn":
        return str(FFNNeuron(row["layer"], row["index"]))
    return str(AttnNeuron(row["layer"], row["head"], row["index"], row["source_pos"]))


def _tokens(texts: Sequence[str]) -> str:
    return " ".join(map(visible, texts))


def _sentence(text: str) -> str:
    """With its spaces as they are, and no other character that cannot be seen."""
    return " ".join(map(visible, text.split(" ")))


def _signed(value: float | None, digits: int = 4) -> str:
    return "" if value is None else decimals(value, digits)


def _first_of(items: Sequence[str], width: int) -> str:
    """As many of them as a line holds, whole."""
    line = "  ".join(items)
    while len(line) > width and len(items) > 1:
        items = items[:-1]
        line = "  ".join([*items, "…"])
    return _clipped(line, width)


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
