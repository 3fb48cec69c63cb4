"""The page of ``card``: everything about one neuron."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tl_neuron_attr.cards.card import (
    CARRIED_COLUMNS,
    DOWNSTREAM_COLUMNS,
    END_COLUMNS,
    INPUT_COLUMNS,
    PROMPT_COLUMNS,
    QUERY_LAYER_COLUMNS,
    QUERY_NEURON_COLUMNS,
    SOURCE_COLUMNS,
)
from tl_neuron_attr.markup import Shown
from tl_neuron_attr.prompts import Target, visible
from tl_neuron_attr.report.asked import (
    CONVENTIONS,
    POSITIONS,
    Facts,
    how_to_read,
    origin,
    quantity,
    signed,
    tokens,
    warned,
)
from tl_neuron_attr.report.listed import KINDS, head_list, neuron_list, placed
from tl_neuron_attr.report.page import Section, page
from tl_neuron_attr.views import layer_bars

TABLES = {
    "inputs": INPUT_COLUMNS,
    "sources": SOURCE_COLUMNS,
    "ends": END_COLUMNS,
    "query_layers": QUERY_LAYER_COLUMNS,
    "query_neurons": QUERY_NEURON_COLUMNS,
    "downstream": DOWNSTREAM_COLUMNS,
    "heads": CARRIED_COLUMNS,
    "prompts": PROMPT_COLUMNS,
}
"""The tables of a card, and the columns of one that has no rows and so no file."""

HOW = (
    "An FFN neuron is one hidden unit: it reads the residual stream with a fixed direction (its "
    "key), and where that sets it off it writes another fixed direction (its subvalue) as often as "
    "its coefficient says. An attention neuron is one dimension of a head, at one source position; "
    "its coefficient is attention times value.",
    "What it says is its subvalue as the output layer reads it: logits per unit of coefficient. "
    "With a positive coefficient the top is raised and the bottom lowered, with a negative one the "
    "other way round; which it is in this run stands beside each token. Readability is how far the "
    "stronger end stands out of all tokens, in standard deviations. Logits that are spread "
    "like a Gaussian give about sqrt(2 log V): 4 in a vocabulary of 2,000 tokens, 4.6 of 50,000.",
    "What set it off are the parts of its pre-activation, as shares of it: they add up to 1, and "
    "one below 0 held it back. What it sets off is its effect on the pre-activations of later "
    "neurons at the same position; a share near ±1 means that the later neuron rests on this one. "
    "A later neuron whose own coefficient is 0 is off all the same.",
    "Through later heads: what a head carries of this neuron to the position where the answer is "
    "read, and what that says there.",
    POSITIONS,
)


def card_page(facts: Facts) -> str:
    """The whole page, of ``card.json``: the card's tables are lists of rows there."""
    tables = {name: _table(facts[name], columns) for name, columns in TABLES.items()}
    made = facts.get("made_with", {})
    return page(
        f"Neuron {facts['neuron']} of {facts['model_name']}",
        _findings(tables, facts),
        [
            *warned([*made.get("warnings", ()), *facts["notes"]]),
            _asked(facts),
            _itself(tables["inputs"], facts),
            _says(tables["ends"], facts),
            *_sources(tables["sources"], facts),
            *_set_off(tables["query_layers"], tables["query_neurons"], facts),
            *_sets_off(tables["downstream"]),
            *_carried(tables["heads"]),
            *_prompts(tables["prompts"]),
            how_to_read(*HOW),
            origin(made, made.get("again")),
        ],
    )


def _table(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Rows of ``card.json`` as a table, whole numbers as such where cells are empty."""
    table = pd.DataFrame(rows, columns=[*columns])
    return table.astype(
        {name: "Int64" for name in ("layer", "head", "source_pos") if name in table}
    )


def _findings(tables: Mapping[str, pd.DataFrame], facts: Facts) -> list[str]:
    at = _at(facts, facts["position"])
    found = [f"At {at} its coefficient is {signed(facts['coefficient'], 4)}."]
    if facts["score"] is not None:
        place = (
            f"number {facts['rank']:,} of {facts['total']:,} {KINDS[facts['kind']]} neurons"
            if facts["rank"] is not None
            else f"not among the {facts['ranked']:,} best of {facts['total']:,} "
            f"{KINDS[facts['kind']]} neurons"
        )
        found[0] += (
            f" There it moves {quantity(facts['target'])} by {signed(facts['score'], 4)} nats: "
            f"{place}."
        )
    ends = tables["ends"]
    raised = [visible(text) for text in ends.loc[ends["raised"], "token"].head(5)]
    lowered = [visible(text) for text in ends.loc[~ends["raised"].astype(bool), "token"].head(5)]
    if raised or lowered:
        found.append(f"It raises {' '.join(raised)}, and lowers {' '.join(lowered)}.")
    parts = tables["query_layers"]
    if len(parts):
        first = parts.loc[parts["share"].abs().idxmax()]
        found[-1] += (
            f" The largest part of what set it off is {_part(first)}: {first['share']:.0%} of its "
            "pre-activation."
        )
    return found


def _asked(facts: Facts) -> Section:
    target: dict[str, Any] = facts["target"]
    return Section(
        title="What was asked",
        text=[
            f"Tokens, each after its position: {tokens(facts['tokens'])}.",
            f"The neuron is looked at where it writes, at {_at(facts, facts['position'])}; the "
            f"answer is read at {_at(facts, facts['read_pos'])}.",
            f"Target: {Target.of_facts(target).words_and_ids}; {quantity(target)} is "
            f"{signed(facts['log_prob'])} nats.",
            f"Convention {CONVENTIONS[facts['convention']]}",
        ],
    )


def _itself(inputs: pd.DataFrame, facts: Facts) -> Section:
    return Section(
        title="The neuron itself",
        text=[
            f"Norm of its subvalue {facts['subvalue_norm']:.3g}, of its contribution (coefficient "
            f"times subvalue) {facts['contribution_norm']:.3g}."
        ],
        items=[
            Shown(
                caption="Its pre-activation, and the keys it is read with",
                table=inputs,
                columns={
                    "input": "input",
                    "value": "value in this run",
                    "subkey_norm": "norm of the key",
                    "gained_norm": "norm of the key with the norm's gain",
                },
            )
        ],
    )


def _says(ends: pd.DataFrame, facts: Facts) -> Section:
    sign = "positive" if facts["coefficient"] > 0 else "negative"
    here = f"the coefficient is {sign}" if facts["coefficient"] else "the neuron is off"
    return Section(
        title="What it says",
        text=[f"Readability {facts['readability']:.1f} standard deviations; here {here}."],
        items=[
            Shown(
                caption="The tokens at both ends of its subvalue",
                table=ends.assign(
                    token=[visible(text) for text in ends["token"]],
                    here=["raised" if raised else "lowered" for raised in ends["raised"]],
                ),
                columns={
                    "end": "end",
                    "token": "token",
                    "id": "token id",
                    "logit": "logits per unit of coefficient",
                    "here": "in this run",
                },
            )
        ],
    )


def _sources(sources: pd.DataFrame, facts: Facts) -> list[Section]:
    if sources.empty:
        return []
    table = sources.assign(at=placed(sources["source_pos"], facts["tokens"]))
    return [
        Section(
            title="Where it reads from",
            items=[
                Shown(
                    caption="Each source position; coefficients are attention times v",
                    table=table,
                    columns={
                        "at": "position",
                        "attention": "attention",
                        "v": "v",
                        "coefficient": "coefficient",
                        "score": "rise, nats",
                    },
                )
            ],
        )
    ]


def _set_off(layers: pd.DataFrame, neurons: pd.DataFrame, facts: Facts) -> list[Section]:
    if layers.empty and neurons.empty:
        return []
    inner = layers.loc[layers["kind"].isin(["attn", "ffn"])]
    scored = len(inner) > 0 and not inner["score"].isna().any()
    drawn = [layer_bars(inner, title="What set it off, nats of its score, by layer")] * scored
    return [
        Section(
            title="What set it off",
            items=[
                *drawn,
                Shown(
                    caption="By layer: shares of its pre-activation add up to 1",
                    table=layers.assign(part=[_part(row) for _, row in layers.iterrows()]),
                    columns={
                        "part": "part",
                        "share": "share of the pre-activation",
                        "score": "of its score, nats",
                    },
                ),
                neuron_list(
                    "The neurons with the largest shares",
                    neurons.assign(at=placed(neurons["position"], facts["tokens"])),
                    {
                        "at": "where it fires",
                        "share": "share",
                        "score": "of its score, nats",
                        "coefficient": "coefficient",
                        "raises": "raises",
                        "lowers": "lowers",
                    },
                ),
            ],
        )
    ]


def _sets_off(downstream: pd.DataFrame) -> list[Section]:
    if downstream.empty:
        return []
    return [
        Section(
            title="What it sets off",
            items=[
                neuron_list(
                    "Later neurons at this position, the largest effect first",
                    downstream,
                    {
                        "input": "input",
                        "effect": "effect on the input",
                        "product": "per unit of coefficient",
                        "pre_activation": "the input in this run",
                        "share": "effect as a share of it",
                        "coefficient": "coefficient",
                    },
                )
            ],
        )
    ]


def _carried(heads: pd.DataFrame) -> list[Section]:
    if heads.empty:
        return []
    return [
        Section(
            title="Through later heads",
            items=[
                head_list(
                    "What later heads carry of it, the most readable first",
                    heads,
                    {
                        "readability": "readability, sd",
                        "attention": "attention paid here",
                        "norm": "norm of what is carried",
                        "raises": "raises",
                        "lowers": "lowers",
                    },
                )
            ],
        )
    ]


def _prompts(prompts: pd.DataFrame) -> list[Section]:
    if prompts.empty:
        return []
    return [
        Section(
            title="Prompts where its score is largest",
            items=[
                Shown(
                    caption="Of the prompts given, the best first",
                    table=prompts,
                    columns={
                        "prompt": "prompt",
                        "target": "target",
                        "source_token": "reads from",
                        "coefficient": "coefficient",
                        "score": "rise, nats",
                    },
                )
            ],
        )
    ]


def _at(facts: Facts, position: int) -> str:
    return f"position {position} ({visible(facts['tokens'][position])})"


def _part(row: Any) -> str:
    """A layer's attention or FFN, the embedding or the biases."""
    names = {"embed": "embedding", "bias": "biases"}
    return names.get(row["kind"]) or f"{KINDS[row['kind']]} of layer {row['layer']}"
