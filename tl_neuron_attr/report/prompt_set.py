"""The report of many prompts: an index, and a page for each prompt that is opened on demand."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tl_neuron_attr import views
from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.markup import Shown, escaped, table
from tl_neuron_attr.prompts import Target
from tl_neuron_attr.report.attribution import drawn, report_html
from tl_neuron_attr.report.cards import best_cards, label_of
from tl_neuron_attr.report.page import contents, document, figure, paragraphs, plotly_js
from tl_neuron_attr.report.payload import shown
from tl_neuron_attr.report.saved import Cards, read_saved
from tl_neuron_attr.tables import Saved, records, write_tables

PLOTLY = "plotly.min.js"
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; frame-src 'self'; base-uri 'none'; form-action 'none'"
)
"""What a page of a set may load: what is in it, and files beside it."""

CARDS_OF_EACH = 2
"""Of how many of the best neurons of a kind a prompt of a set has a whole card."""

FREQUENT = 200
"""So many neurons are in the table of those that are among the best of most prompts."""

TOP = 30
"""Among how many best of a kind a neuron must be to be counted for a prompt."""


@dataclass
class _Seen:
    """What the index tells of the prompts, gathered one by one; the prompts themselves are not."""

    prompts: list[dict[str, Any]] = field(default_factory=list)
    layers: pd.DataFrame | None = None
    """The layers' scores, summed over prompts."""
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """In how many prompts a neuron is among the best, by kind and name."""
    scores: dict[tuple[str, str], float] = field(default_factory=dict)
    """The sum of its scores there."""
    models: dict[str, None] = field(default_factory=dict)


def report_set(
    results: Iterable[Attribution | str | Path],
    directory: str | Path,
    *,
    cards: int = CARDS_OF_EACH,
) -> Path:
    """``index.html``, a page a prompt under ``prompts/``, and plotly.js once; where the index is.

    The index lists the prompts, sorts and searches them, and opens a prompt's page when it is
    asked for; it works from disk. ``results`` may be a generator: each is written as it comes and
    let go, so that memory does not grow with the prompts but by a line each.

    Args:
        results: Results, or directories that results were saved to (their own cards are shown).
        directory: Where to write. Pages of an earlier set with more prompts are removed.
        cards: Of how many of the best neurons of a kind a page has whole cards.

    Raises:
        InputError: If there are no results, they are of models with different numbers of layers,
            or something cannot be read or written.
        OutputError: If writing fails on the way. The index is written last: an old one stays.
    """
    place = check_writable(directory)
    pages = check_writable(place / "prompts")
    seen = _Seen()
    for number, each in enumerate(results, start=1):
        saved, text = _page(each, cards)
        _check_alike(seen, saved)
        name = f"{number:05}.html"
        write_tables(pages, {}, {name: text})
        _gather(seen, saved, f"prompts/{name}")
    if not seen.prompts:
        raise InputError("there are no results to report on")
    write_tables(place, {}, {PLOTLY: plotly_js(), "index.html": _index(seen)})
    for page in sorted(pages.glob("[0-9][0-9][0-9][0-9][0-9].html"))[len(seen.prompts) :]:
        page.unlink()
    return place / "index.html"


def _page(each: Attribution | str | Path, cards: int) -> tuple[Saved, str]:
    """What is saved of a prompt, and its page, which takes plotly.js from beside the index."""
    if isinstance(each, Attribution):
        saved = each.saved()
        found: Cards = best_cards(each, saved, cards)
        return saved, report_html(saved, found, plotly=f"../{PLOTLY}", policy=POLICY)
    saved, found = read_saved(each)
    return saved, drawn(each, saved, found, plotly=f"../{PLOTLY}", policy=POLICY)


def _check_alike(seen: _Seen, saved: Saved) -> None:
    layers = saved.tables["layers"]
    if seen.layers is not None and len(seen.layers) != len(layers):
        raise InputError(
            f"prompt {saved.facts['prompt_id']!r} is of a model with {len(layers) // 2} layers, "
            f"those before it of one with {len(seen.layers) // 2}; an index is of one model"
        )


def _gather(seen: _Seen, saved: Saved, page: str) -> None:
    facts, layers = saved.facts, saved.tables["layers"]
    before = 0.0 if seen.layers is None else seen.layers["score"]
    seen.layers = layers.assign(score=layers["score"] + before)
    seen.models[facts["model"]["name"]] = None
    seen.prompts.append(_line(saved, page))
    neurons = saved.tables["neurons"]
    best = neurons.loc[(neurons["role"] == "value") & (neurons["rank"] <= TOP)]
    largest: dict[tuple[str, str], float] = {}
    for row in records(best):  # best first: a dimension of a head counts where it brings most
        name = label_of({**row, "source_pos": None})
        largest.setdefault((row["kind"], name), row["score"])
    seen.counts.update(largest.keys())
    for key, score in largest.items():
        seen.scores[key] = seen.scores.get(key, 0.0) + score


def _line(saved: Saved, page: str) -> dict[str, Any]:
    """What the index says of a prompt."""
    facts, layers = saved.facts, saved.tables["layers"]
    target, predicted = facts["target"], facts["predictions"][0]
    best = records(layers.nlargest(1, "score"))[0]
    values = saved.tables["neurons"]
    values = values.loc[values["role"] == "value"]
    tops = {kind: records(rows.head(1)) for kind, rows in values.groupby("kind")}
    prompt = facts["prompt"] if facts["prompt"] is not None else "".join(facts["token_texts"])
    return {
        "page": page,
        "prompt_id": facts["prompt_id"],
        "prompt": prompt if len(prompt) <= 120 else "…" + prompt[-119:],
        "target": [Target.of_facts(target).words],
        "log_prob": target["log_prob"],
        "prob": math.exp(target["log_prob"]) if Target.of_facts(target).has_prob else None,
        "predicted": [shown(predicted["token"])],
        "layer": f"{'attention' if best['kind'] == 'attn' else 'FFN'} {best['layer']}",
        "layer_score": best["score"],
        **{
            f"{kind}_neuron": label_of(rows[0]) if rows else None
            for kind, rows in {"ffn": [], "attn": [], **tops}.items()
        },
        "warnings": len(facts["warnings"]),
    }


# --- the index --------------------------------------------------------------------------------


def _index(seen: _Seen) -> str:
    assert seen.layers is not None
    count = len(seen.prompts)
    means = seen.layers.assign(score=seen.layers["score"] / count)
    says = f"{count:,} prompt{'s' * (count > 1)}, {', '.join(seen.models)}"
    sections = [
        ("prompts", "Prompts", _prompts(seen)),
        (
            "layers",
            "Layers",
            paragraphs(["What each layer's attention and FFN add to the answer, on average."])
            + figure(
                views.layer_bars(means, title=f"Rise from each layer, mean of {count:,} prompts"),
                "f-layers",
            ),
        ),
        ("neurons", "Neurons of many prompts", _frequent(seen)),
    ]
    body = "\n".join(
        f'<section id="{place}"><h2>{escaped(title)}</h2>{inside}</section>'
        for place, title, inside in sections
    )
    return document(
        f"Which neurons gave the answers? {says}",
        f"<h1>Which neurons gave the answers?</h1>\n{paragraphs([says + '.'])}"
        f"{contents([(place, title) for place, title, _ in sections])}{body}",
        styles=["report.css"],
        scripts=["tables.js", "figures.js", "prompt_set.js"],
        plotly=PLOTLY,
        policy=POLICY,
    )


def _prompts(seen: _Seen) -> str:
    lines = pd.DataFrame(seen.prompts)
    shown_table = table(
        Shown(
            caption="Choose a prompt to open its report below; scores in nats",
            table=lines,
            columns={
                "prompt": "prompt",
                "target": "target",
                "prob": "p",
                "log_prob": "log p",
                "predicted": "predicted",
                "layer": "top layer",
                "layer_score": "its rise",
                "ffn_neuron": "top FFN neuron",
                "attn_neuron": "top attention neuron",
                "warnings": "warnings",
                "prompt_id": "id",
            },
        )
    )
    pages = "|".join(lines["page"])
    return (
        f'<div id="prompts-table" data-pages="{escaped(pages)}">{shown_table}</div>'
        '<p id="opened" class="soft" aria-live="polite"></p><div id="frame"></div>'
    )


def _frequent(seen: _Seen) -> str:
    rows = [
        {
            "neuron": name,
            "kind": "attention" if kind == "attn" else "FFN",
            "prompts": prompts,
            "share": prompts / len(seen.prompts),
            "mean": seen.scores[kind, name] / prompts,
        }
        for (kind, name), prompts in seen.counts.items()
    ]
    rows.sort(key=lambda row: (-row["prompts"], -row["mean"], row["neuron"]))
    says = (
        f"Neurons that are among the {TOP} best value neurons of their kind in the most prompts; "
        "an attention neuron counts once a prompt, at the source position where it brings most."
    )
    if len(rows) > FREQUENT:
        says += f" The first {FREQUENT} of {len(rows):,}."
    columns: Mapping[str, str] = {
        "neuron": "neuron",
        "kind": "kind",
        "prompts": "prompts",
        "share": "share of prompts",
        "mean": "mean score there, nats",
    }
    frequent = pd.DataFrame(rows[:FREQUENT], columns=list(columns))
    return paragraphs([says]) + table(
        Shown(caption="Neurons by how many prompts they serve", table=frequent, columns=columns)
    )
