"""Which page a directory has: what a command or ``save`` left there -> its page, drawn anew."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.evaluate import load_evaluation
from tl_neuron_attr.files import check_file
from tl_neuron_attr.report.answer import answer_page
from tl_neuron_attr.report.asked import Facts
from tl_neuron_attr.report.card import card_page
from tl_neuron_attr.report.comparison import comparison_page
from tl_neuron_attr.report.evaluation import evaluation_page
from tl_neuron_attr.report.graph import graph_page
from tl_neuron_attr.report.heads import heads_page
from tl_neuron_attr.report.in_context import in_context_page
from tl_neuron_attr.report.prompts import prompts_page
from tl_neuron_attr.report.query import query_page
from tl_neuron_attr.tables import Saved, write_tables

Page = Callable[[Saved], str]

OF_RUNS: Mapping[str, tuple[tuple[str, ...], Page]] = {
    "query": (("query_layers", "query_heads", "query_neurons", "query_values"), query_page),
    "compare": (("layers", "heads", "neurons"), comparison_page),
    "heads": (("heads",), heads_page),
    "answer": (
        ("answer_tokens", "layers", "heads", "neurons", "neurons_by_token"),
        answer_page,
    ),
    "in-context": (("heads", "label_positions", "inputs"), in_context_page),
}
"""Of each command that writes ``run.json``: the tables it writes, and their page."""

SOMETIMES = ("lowest",)
"""Tables that are there only if they were asked for."""


def check_one_command(place: Path) -> None:
    """Stop where several commands wrote into one directory: which of them is to be drawn?

    Raises:
        InputError: Naming the files that tell.
    """
    found = [name for name in ("run.json", *_OF_THEIR_OWN) if (place / name).is_file()]
    if len(found) > 1:
        raise InputError(
            f"{str(place)!r} holds what several commands wrote ({', '.join(found)}); give each a "
            "directory of its own"
        )


def has_page(place: Path) -> bool:
    """Whether a command or ``save`` other than that of an attribution wrote there."""
    if place.suffix == ".jsonl":
        return place.with_suffix(".run.json").is_file()
    try:
        return _json(place / "run.json").get("command") in OF_RUNS
    except (OSError, ValueError, AttributeError):
        return any((place / name).is_file() for name in _OF_THEIR_OWN)


def page_of(place: Path) -> str:
    """The page of a directory of tables, drawn from its files: the same bytes.

    Of the prompts in a ``.jsonl`` file it is drawn from what stands beside it.

    Raises:
        InputError: If a file is missing, damaged or of something else.
    """
    try:
        if place.suffix == ".jsonl":
            return prompts_page(_json(place.with_suffix(".run.json")))
        if (place / "run.json").is_file():
            facts = _json(place / "run.json")
            names, drawn = OF_RUNS[facts["command"]]
            present = [name for name in SOMETIMES if (place / f"{name}.parquet").is_file()]
            return drawn(_saved(place, (*names, *present), facts))
        name = next(name for name in _OF_THEIR_OWN if (place / name).is_file())
        return _OF_THEIR_OWN[name](place)
    except InputError:
        raise
    except Exception as error:  # what pyarrow raises for a damaged file is of many kinds
        raise InputError(
            f"cannot draw the report of {str(place)!r} ({type(error).__name__}: {error}); have the "
            "command that wrote it write it again"
        ) from error


def draw_again(place: Path, path: Path | None = None) -> Path:
    """Write the page anew, by default where the command put it, and say where it is.

    Raises:
        InputError: As ``page_of``, or if the file cannot be made.
        OutputError: If writing fails on the way; what was there before is untouched then.
    """
    beside = place.with_suffix(".report.html") if place.suffix == ".jsonl" else None
    page = check_file(path or beside or place / "report.html", "report.html")
    write_tables(page.parent, {}, {page.name: page_of(place)})
    return page


def _of_graph(place: Path) -> str:
    facts = _json(place / "graph.json")["graph"]
    return graph_page(_saved(place, ("nodes", "edges"), facts))


_OF_THEIR_OWN: Mapping[str, Callable[[Path], str]] = {
    "evaluation.json": lambda place: evaluation_page(load_evaluation(place)),
    "card.json": lambda place: card_page(_json(place / "card.json")),
    "graph.json": _of_graph,
}
"""What there is of a page in directories without ``run.json``, by the file that tells."""


def _saved(place: Path, names: tuple[str, ...], facts: Facts) -> Saved:
    tables = {name: pd.read_parquet(place / f"{name}.parquet") for name in names}
    return Saved(tables=tables, facts=facts)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
