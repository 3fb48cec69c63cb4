"""What ``report.js`` draws tables and cards from: saved tables -> plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from tl_neuron_attr.prompts import visible
from tl_neuron_attr.report.cards import card_tables, ends_of, label_of
from tl_neuron_attr.report.saved import Cards
from tl_neuron_attr.tables import Saved, records

MOST_CELLS = 60_000
"""So many heads times source positions are in a report: of longer prompts those of the best heads,
for a page of megabytes is slow to open."""

_LONGEST = 60


@dataclass
class Words:
    """Every token text once, as it is shown; rows hold their numbers."""

    texts: dict[str, int] = field(default_factory=dict)
    numbered: dict[str, int] = field(default_factory=dict)
    """By token as it is."""

    def number(self, token: str) -> int:
        if token not in self.numbered:
            self.numbered[token] = self.texts.setdefault(shown(token), len(self.texts))
        return self.numbered[token]

    def numbers(self, tokens: Sequence[Any]) -> list[int]:
        return [self.number(token) for token in tokens]


def shown(token: str) -> str:
    """A token as it is read: nothing unseen in it, and not without end."""
    text = visible(token) or "(empty)"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def short(value: Any) -> Any:
    """A number with seven digits, which is what a float32 has."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def payload(saved: Saved, cards: Cards) -> dict[str, Any]:
    """Everything that tables and cards show."""
    words = Words()
    read = saved.facts["read_pos"] + 1
    found = {
        "tokens": [shown(token) for token in saved.facts["token_texts"][:read]],
        "lists": {name: _rows(rows, words) for name, rows in lists_of(saved).items()},
        "positions": _positions(saved),
        "cards": {f"{card['role']} {card['neuron']}": _card(card, words) for card in cards},
    }
    return {**found, "words": list(words.texts)}


def lists_of(saved: Saved) -> dict[str, pd.DataFrame]:
    """The lists of neurons that have rows, by the name of their place on the page."""
    neurons = saved.tables["neurons"]
    found = {
        "ffn": neurons.loc[(neurons["role"] == "value") & (neurons["kind"] == "ffn")],
        "attn": neurons.loc[(neurons["role"] == "value") & (neurons["kind"] == "attn")],
        "query": neurons.loc[neurons["role"] == "query"],
    }
    lowest = saved.tables.get("suppressing")
    if lowest is not None:
        found["suppressing-ffn"] = lowest.loc[lowest["kind"] == "ffn"]
        found["suppressing-attn"] = lowest.loc[lowest["kind"] == "attn"]
    return {name: rows for name, rows in found.items() if len(rows)}


def _rows(neurons: pd.DataFrame, words: Words) -> list[list[Any]]:
    """``rank, neuron, source (or where it fires), coefficient, score, raises, lowers``."""
    return [
        [
            row["rank"],
            label_of(row),
            row["position"] if row.get("position") is not None else row["source_pos"],
            short(row["coefficient"]),
            short(row["score"]),
            words.numbers([*row["raises"]]),  # an array, where it was read from a file
            words.numbers([*row["lowers"]]),
        ]
        for row in records(neurons)
    ]


def _positions(saved: Saved) -> dict[str, Any]:
    """By head, best first: its score and attention at each source position."""
    positions = saved.tables["positions"]
    read = saved.facts["read_pos"] + 1
    heads = records(saved.tables["heads"])
    scores = positions["score"].to_numpy(dtype=float).reshape(-1, read)
    attention = positions["attention"].to_numpy(dtype=float).reshape(-1, read)
    order = np.argsort([-abs(head["score"]) for head in heads], kind="stable")
    kept = order[: max(1, MOST_CELLS // read)].tolist()
    return {
        "heads": [[heads[place]["layer"], heads[place]["head"]] for place in kept],
        "scores": [[_digits(each) for each in scores[place].tolist()] for place in kept],
        "attention": [[_digits(each) for each in attention[place].tolist()] for place in kept],
        "total": [_digits(each) for each in scores.sum(axis=0).tolist()],
        "left_out": len(heads) - len(kept),
    }


def _digits(value: float) -> float:
    """Five digits: thousands of these are only looked at."""
    return float(f"{value:.5g}")


def _card(card: Mapping[str, Any], words: Words) -> dict[str, Any]:
    return {
        "position": card["position"],
        "coefficient": short(card["coefficient"]),
        "score": short(card["score"]),
        "rank": card["rank"],
        "ranked": card["ranked"],
        "total": card["total"],
        "readability": short(card["readability"]),
        "inputs": [[row["input"], short(row["value"])] for row in card["inputs"]],
        "raises": _ends(card, words, raised=True),
        "lowers": _ends(card, words, raised=False),
        "tables": [
            {**each, "rows": [_cells(each["columns"], row, words) for row in each["rows"]]}
            for each in card_tables(card)
        ],
        "notes": list(card["notes"]),
    }


def _ends(card: Mapping[str, Any], words: Words, raised: bool) -> list[list[Any]]:
    return [[words.number(row["token"]), short(row["logit"])] for row in ends_of(card, raised)]


def _cells(columns: Sequence[str], row: Sequence[Any], words: Words) -> list[Any]:
    return [
        words.numbers(value) if column.startswith("tokens:") else short(value)
        for column, value in zip(columns, row, strict=True)
    ]
