"""The page of ``answer``: what gave a whole answer, token by token and together."""

import math

import pandas as pd

from tl_neuron_attr.markup import Shown
from tl_neuron_attr.prompts import shown_tokens, visible
from tl_neuron_attr.report.asked import (
    CONVENTIONS,
    POSITIONS,
    SIGNS,
    Facts,
    how_to_read,
    model,
    origin,
    proof,
    signed,
    tokens,
    warned,
)
from tl_neuron_attr.report.listed import (
    KINDS,
    called,
    head_labels,
    head_list,
    neuron_labels,
    neuron_list,
)
from tl_neuron_attr.report.page import Section, page
from tl_neuron_attr.tables import Saved
from tl_neuron_attr.views import layer_bars
from tl_neuron_attr.views.heads import head_grid

RISE = "rise in log p(answer), nats"

HOW = (
    "The probability of an answer is the product of its tokens', each given the prompt and the "
    "tokens before it. So its log p is the sum of theirs, and a score here is the sum of what a "
    "layer, head or neuron raises each token's log p by, where that token is read.",
    "A part may do much for one token and speak against another: the columns beside the sum say "
    "so. A neuron's coefficient is shown for the token for which it does most.",
    "An attention neuron reads from one position. Positions of the answer are seen by later tokens "
    "only: for earlier ones such a neuron does nothing.",
    SIGNS,
    POSITIONS,
)


def answer_page(saved: Saved) -> str:
    """The whole page. Tables: ``answer_tokens, layers, heads, neurons, neurons_by_token``."""
    tables, facts = saved.tables, saved.facts
    of_tokens, neurons = tables["answer_tokens"], tables["neurons"]
    texts = [visible(text) for text in of_tokens["token"]]
    names = [f"{number}:{text}" for number, text in enumerate(texts)]
    each = dict(zip(names, names, strict=True))
    layers = _beside(tables["layers"], ["layer", "kind"], names)
    heads = _beside(tables["heads"], ["layer", "head"], names)
    return page(
        f"What gave the answer {''.join(of_tokens['token']).strip()}",
        _findings(layers, heads, neurons, facts),
        [
            *warned(facts["warnings"]),
            _asked(facts),
            Section(
                title="The answer, token by token",
                items=[
                    Shown(
                        caption="Each token where it comes next; log p in nats",
                        table=of_tokens.assign(token=texts),
                        columns={
                            "number": "#",
                            "token": "token",
                            "position": "read at position",
                            "log_prob": "log p",
                            "prob": "p",
                            "embedding_log_prob": "log p before the first layer",
                        },
                    )
                ],
            ),
            Section(
                title="Layers",
                items=[
                    layer_bars(layers, title="What each layer adds to log p(answer)").update_yaxes(
                        title_text=RISE
                    ),
                    Shown(
                        caption="Each layer: for the answer, and for each of its tokens, nats",
                        table=layers.assign(kind=called(layers["kind"], KINDS)),
                        columns={"layer": "layer", "kind": "part", "score": "sum", **each},
                    ),
                ],
            ),
            Section(
                title="Heads",
                items=[
                    head_grid(heads, "score", RISE, None, "What each head adds to log p(answer)"),
                    head_list(
                        "Every head, the largest sum first; nats",
                        heads.sort_values("score", ascending=False, kind="stable"),
                        {"score": "sum", **each},
                    ),
                ],
            ),
            _neurons(neurons, tables["neurons_by_token"], names),
            proof(facts["certificates"]),
            how_to_read(*HOW),
            origin(facts, facts.get("again")),
        ],
    )


def _beside(table: pd.DataFrame, keys: list[str], names: list[str]) -> pd.DataFrame:
    """One row a layer's part or head: ``score``, the sum, and beside it each token's."""
    each = [table.loc[table["number"] == number] for number in range(len(names))]
    scores = {name: part["score"].to_numpy() for name, part in zip(names, each, strict=True)}
    found = pd.DataFrame(each[0][keys]).reset_index(drop=True)
    return found.assign(score=sum(scores.values()), **scores)


def _asked(facts: Facts) -> Section:
    texts, read = facts["token_texts"], facts["read_pos"]
    text = facts["answer"]
    answer = [each["text"] for each in facts["answer_tokens"]]
    return Section(
        title="What was asked",
        text=[
            f"Prompt, each token after its position: {tokens(texts[: read + 1])}.",
            "The answer was given as token ids." if text is None else f"Answer: {visible(text)}",
            f"Its tokens: {shown_tokens(answer)}. The first is read at position {read}.",
            f"log p of the whole answer is {signed(facts['log_prob'])} nats, a probability of "
            f"{math.exp(facts['log_prob']):.3g}; before the first layer log p = "
            f"{signed(facts['embedding_log_prob'])}.",
            model(facts),
            f"Convention {CONVENTIONS[facts['convention']]}",
        ],
    )


def _findings(
    layers: pd.DataFrame, heads: pd.DataFrame, neurons: pd.DataFrame, facts: Facts
) -> list[str]:
    answer = facts["answer_tokens"]
    least = min(answer, key=lambda each: each["log_prob"])
    top = layers.loc[layers["score"].idxmax()]
    head = heads.loc[[heads["score"].idxmax()]]
    first = neurons.loc[neurons["rank"] == 1]
    best = "".join(
        f", the {KINDS[kind]} neuron {label} ({signed(score)})"
        for kind, label, score in zip(
            first["kind"], neuron_labels(first), first["score"], strict=True
        )
    )
    return [
        f"The answer's {len(answer)} tokens have a log p of {signed(facts['log_prob'])} nats "
        f"together; the least likely of them is {visible(least['text'])} "
        f"({signed(least['log_prob'])}).",
        f"Most comes through {KINDS[top['kind']]} of layer {top['layer']} "
        f"({signed(top['score'])} nats), the head {head_labels(head)[0]} "
        f"({signed(head['score'].iloc[0])}){best}.",
    ]


def _neurons(neurons: pd.DataFrame, by_token: pd.DataFrame, names: list[str]) -> Section:
    lists = []
    for kind in KINDS:
        rows = neurons.loc[neurons["kind"] == kind].reset_index(drop=True)
        each = by_token.loc[by_token["kind"] == kind].sort_values(["number", "rank"])
        scores = each["score"].to_numpy().reshape(len(names), len(rows))
        rows = rows.assign(
            at=[names[number] for number in rows["most_at"]],
            **dict(zip(names, scores, strict=True)),
        )
        columns = {
            "score": "sum",
            **dict(zip(names, names, strict=True)),
            "at": "does most for",
            "coefficient": "coefficient there",
            "raises": "raises",
            "lowers": "lowers",
        }
        caption = f"The {len(rows)} {KINDS[kind]} neurons that did most for the whole answer; nats"
        source = {"source_token": "reads from"} if kind == "attn" else {}
        lists.append(neuron_list(caption, rows, source | columns))
    return Section(title="Neurons", items=lists)
