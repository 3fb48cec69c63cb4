"""What a result shows at the end of a notebook's cell: its tables -> a strip of tokens, a box.

From tables and facts alone: nothing here reaches for a model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tl_neuron_attr.display import (
    Grid,
    box,
    escaped,
    facts,
    grid,
    layer_bars,
    next_calls,
    number,
    signed,
    token,
    warned,
)
from tl_neuron_attr.prompts import Target, TokenizedPrompt
from tl_neuron_attr.strip import TokenStrip, token_strip
from tl_neuron_attr.styled import grid_of
from tl_neuron_attr.tables import records


@dataclass(frozen=True, kw_only=True)
class Glance:
    """What there is to show of an attribution."""

    prompt: TokenizedPrompt
    model: str
    """Its name and what kind it is."""
    target: Target
    log_prob: float
    embedding_log_prob: float
    convention: str
    predictions: pd.DataFrame
    layers: pd.DataFrame
    neurons: Mapping[str, pd.DataFrame]
    """The best few of each kind, by what they are called."""
    attn_neurons: pd.DataFrame
    """All ranked attention neurons: where they read from."""
    certificates: Mapping[str, str]
    """Of each kind, in words."""
    warnings: Sequence[str]


def attribution_box(shown: Glance) -> str:
    """The box of an attribution."""
    rises = records(shown.layers)
    attn, ffn = ([row["score"] for row in rises if row["kind"] == kind] for kind in ("attn", "ffn"))
    predicted = "  ".join(
        f"{token(row['token'])} {number(row['prob'])}" for row in records(shown.predictions)
    )
    proofs = {f"{name} neurons": escaped(text) for name, text in shown.certificates.items()}
    grids = "".join(
        grid(grid_of(table, f"{name} value neurons, the best {len(table)}", columns=_NEURON))
        for name, table in shown.neurons.items()
    )
    return box(
        "Attribution: which neurons gave the answer",
        facts(
            {
                "target": target_words(shown.target, shown.log_prob, shown.embedding_log_prob),
                "predicts": predicted,
                "model": escaped(f"{shown.model}; read out {shown.convention}"),
            }
        ),
        _ranked_strip(shown).html(),
        layer_bars(attn, ffn, f"rise in {shown.target.quantity}, nats"),
        grids,
        facts(proofs),
        warned(shown.warnings),
        next_calls(
            {
                "result.neurons(tokens=5)": "all ranked neurons",
                "result.token_strip()": "what every head brings from each token",
                "result.query_neurons(tokens=5)": "what set them off",
                "neuron_card(result, 'L…')": "one neuron",
                "result.report('result.html')": "a page of all of it",
            }
        ),
    )


def target_words(target: Target, log_prob: float, embedding_log_prob: float | None = None) -> str:
    """A target and how probable it is, as HTML."""
    aim = " or ".join(f"{token(each.text)} (id {each.id})" for each in target.answers)
    if target.distribution is not None:
        return f"{escaped(target.words)}, {target.quantity} = {number(log_prob)} nats"
    if target.against is None:
        before = (
            ""
            if embedding_log_prob is None
            else f"; before the first layer p = {number(math.exp(embedding_log_prob))}"
        )
        return f"{aim}, p = {number(math.exp(log_prob))}, log p = {number(log_prob)} nats{before}"
    return (
        f"{aim} against {token(target.against.text)} "
        f"(id {target.against.id}), difference of log p = {signed(log_prob)} nats"
    )


def source_strip(
    prompt: TokenizedPrompt,
    positions: pd.DataFrame,
    neurons: pd.DataFrame,
    of: str,
    *,
    attention: bool,
    top: int,
) -> TokenStrip:
    """What heads bring from each token, as a strip.

    ``positions`` has the heads in question at every source, ``neurons`` the attention neurons to
    list; ``of`` says in words whose they are.
    """
    brought = _by_source(positions)
    several = any(len(rows) > 1 for rows in brought.values())
    if attention:
        quantity = f"{'mean attention' if several else 'attention'} of {of}, from 0 to 1"
    else:
        quantity = f"{'sum of the rises' if several else 'rise'} through {of}, nats"
    values = []
    for rows in brought.values():
        total = sum(row["attention" if attention else "score"] for row in rows)
        values.append(total / len(rows) if attention else total)
    listed = _by_source(neurons)
    grids: dict[int, tuple[Grid, ...]] = {}
    for place, rows in brought.items():
        best = sorted(rows, key=lambda row: -row["score"])[:top]
        found = [
            grid_of(pd.DataFrame(best), "Heads that bring most from here", columns=_HEAD, top=top)
        ]
        if place in listed:
            some = pd.DataFrame(listed[place])
            found.append(
                grid_of(some, "The best attention neurons here", columns=_AT_SOURCE, top=top)
            )
        grids[place] = tuple(found)
    return token_strip(prompt.token_texts, prompt.read_pos, values, quantity=quantity, facts=grids)


_NEURON = ("source_token", "score", "coefficient", "raises", "lowers")
_AT_SOURCE = ("score", "coefficient", "raises")
_HEAD = ("score", "attention")


def _by_source(table: pd.DataFrame) -> dict[int, list[dict[str, Any]]]:
    """Rows by their source position, in order."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in records(table):
        found.setdefault(row["source_pos"], []).append(row)
    return dict(sorted(found.items()))


def _ranked_strip(shown: Glance) -> TokenStrip:
    """The prompt, with what the ranked attention neurons bring from each token."""
    ranked = _by_source(shown.attn_neurons)
    count = len(shown.attn_neurons)
    values: list[float] = []
    grids: dict[int, tuple[Grid, ...]] = {}
    for place in range(shown.prompt.read_pos + 1):
        here = ranked.get(place, [])
        values.append(sum((row["score"] for row in here), 0.0))
        words = f"{len(here):,} of the {count:,} ranked attention neurons read here"
        some = pd.DataFrame(here, columns=shown.attn_neurons.columns)
        grids[place] = (grid_of(some, words, columns=("score", "coefficient"), top=3),)
    return token_strip(
        shown.prompt.token_texts,
        shown.prompt.read_pos,
        values,
        quantity=f"sum of the scores of the {count:,} best attention neurons, nats",
        facts=grids,
    )
