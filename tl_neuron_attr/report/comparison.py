"""The page of ``compare``: what raised an answer in one run and not in another."""

import pandas as pd

from tl_neuron_attr.markup import Shown
from tl_neuron_attr.report.asked import (
    POSITIONS,
    SIGNS,
    Facts,
    asked,
    how_to_read,
    model,
    named,
    origin,
    proof,
    quantity,
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
from tl_neuron_attr.views import compared_head_heatmap, compared_layer_bars, compared_neuron_scatter

HOW = (
    "Here is the run that was asked about, there the other one. A score is by how much a layer, "
    "head or neuron raises the target's log p in its own run, in nats. The difference is here less "
    "there: above 0 it raises the answer more here.",
    "Both runs are read out with the norm frozen at the scale of this run, so that a difference is "
    "one of what was written and not of the norm. That is why log p there has two values: at this "
    "run's norm scale, and as that run has it itself.",
    "Where a head was zeroed, its own score there is 0 and the difference is its score here; what "
    "is worth reading are the others: what they lost is what reached them through the head.",
    "A coefficient of about 0 in one run and not in the other is of a neuron that is switched off "
    "there. Two coefficients that are alike with different scores are of a neuron that writes the "
    "same into another context.",
    SIGNS,
    POSITIONS,
)
_COLUMNS = {
    "difference": "difference, nats",
    "score": "here, nats",
    "other_score": "there, nats",
    "coefficient": "coefficient here",
    "other_coefficient": "coefficient there",
    "raises": "raises",
    "lowers": "lowers",
}


def comparison_page(saved: Saved) -> str:
    """The whole page. Tables: ``layers, heads, neurons``, and ``lowest`` if asked for."""
    tables, facts = saved.tables, saved.facts
    layers, heads, neurons = (tables[name] for name in ("layers", "heads", "neurons"))
    of = quantity(facts["target"])
    return page(
        f"What raises {named(facts['target'])} here, and not there",
        _findings(layers, heads, neurons, facts),
        [
            *warned(facts["warnings"]),
            asked(facts, _other(facts)),
            Section(
                title="Layers",
                items=[
                    compared_layer_bars(layers, title=f"Rise in {of} from each layer, nats"),
                    Shown(
                        caption="Each layer in both runs",
                        table=layers.assign(kind=called(layers["kind"], KINDS)),
                        columns={
                            "layer": "layer",
                            "kind": "part",
                            "difference": "difference, nats",
                            "score": "here, nats",
                            "other_score": "there, nats",
                        },
                    ),
                ],
            ),
            _heads(heads),
            _neurons(neurons, tables.get("lowest")),
            proof(facts["certificates"]),
            how_to_read(*HOW),
            origin(facts, facts.get("again")),
        ],
    )


def _other(facts: Facts) -> list[str]:
    """What the run is compared with."""
    other = facts["other"]
    said = [f"Compared with {other['what']}."]
    if other["tokens"] != facts["tokens"]:
        said.append(f"Its tokens: {tokens(other['token_texts'])}.")
    if other["model"] != facts["model"]:
        said.append(f"There {model({**facts, 'model': other['model']})}")
    said.append(
        f"There {quantity(facts['target'])} is {signed(other['own_log_prob'])} nats as that run "
        f"has it itself, and {signed(other['log_prob'])} with the norm at the scale it has here."
    )
    return said


def _findings(
    layers: pd.DataFrame, heads: pd.DataFrame, neurons: pd.DataFrame, facts: Facts
) -> list[str]:
    here, other = facts["target"]["log_prob"], facts["other"]
    change = here - other["own_log_prob"]
    found = [
        f"{quantity(facts['target'])} is {signed(here)} nats here and "
        f"{signed(other['own_log_prob'])} there ({other['what']}): {signed(change)} nats between "
        "them."
    ]
    top = layers.loc[layers["difference"].abs().idxmax()]
    head = heads.loc[[heads["difference"].abs().idxmax()]]
    found.append(
        f"The layer that differs most is {KINDS[top['kind']]} of layer {top['layer']} "
        f"({signed(top['difference'])} nats), the head {head_labels(head)[0]} "
        f"({signed(head['difference'].iloc[0])}){_best(neurons)}."
    )
    return found


def _best(neurons: pd.DataFrame) -> str:
    """The first neuron of each kind."""
    first = neurons.loc[(neurons["rank"] == 1) & (neurons["difference"] > 0)]
    return "".join(
        f", the {KINDS[kind]} neuron {label} ({signed(difference)})"
        for kind, label, difference in zip(
            first["kind"], neuron_labels(first), first["difference"], strict=True
        )
    )


def _heads(heads: pd.DataFrame) -> Section:
    ordered = heads.sort_values("difference", ascending=False, kind="stable")
    return Section(
        title="Heads",
        items=[
            compared_head_heatmap(
                heads, title="Difference of each head's rise, here less there, nats"
            ),
            head_list(
                "Every head, the largest difference first",
                ordered,
                {
                    "difference": "difference, nats",
                    "score": "here, nats",
                    "other_score": "there, nats",
                },
            ),
        ],
    )


def _neurons(neurons: pd.DataFrame, lowest: pd.DataFrame | None) -> Section:
    lists = {"more": neurons} | ({} if lowest is None else {"less": lowest})
    drawn = pd.concat([*lists.values()], ignore_index=True)
    said = "Listed are the neurons that score most more here than there"
    return Section(
        title="Neurons",
        text=[
            f"{said}; those that score more there are listed with --lowest."
            if lowest is None
            else f"{said}, and those that score most less."
        ],
        items=[
            compared_neuron_scatter(drawn, title="Each listed neuron's score in both runs, nats"),
            *(
                _neuron_list(table.loc[table["kind"] == kind], kind, which)
                for which, table in lists.items()
                for kind in KINDS
                if kind in set(table["kind"])
            ),
        ],
    )


def _neuron_list(rows: pd.DataFrame, kind: str, which: str) -> Shown:
    sources = {"source_token": "reads from", "other_source_token": "there it reads from"}
    return neuron_list(
        f"The {len(rows)} {KINDS[kind]} neurons that score most {which} here",
        rows,
        (sources if kind == "attn" else {}) | _COLUMNS,
    )
