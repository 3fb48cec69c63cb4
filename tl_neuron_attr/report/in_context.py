"""The page of ``in-context``: the heads that carry the labels of a few-shot prompt."""

import pandas as pd

from tl_neuron_attr.markup import Shown
from tl_neuron_attr.prompts import visible
from tl_neuron_attr.report.asked import (
    SIGNS,
    Facts,
    asked,
    how_to_read,
    joined,
    named,
    origin,
    quantity,
    signed,
    warned,
)
from tl_neuron_attr.report.listed import called, head_labels, head_list, placed
from tl_neuron_attr.report.page import Section, page
from tl_neuron_attr.tables import Saved, records
from tl_neuron_attr.views import head_heatmap

HOW = (
    "A few-shot prompt shows examples with two labels and ends where the next one belongs. A head "
    "that learns in context attends from there to the labels before, and brings them over. Three "
    "things tell such a head: its rise in the target's log p, what zeroing it does, and that what "
    "it brings from the places of a label speaks for that label.",
    "Label 1 − 2 is the rise in log p(label 1) − log p(label 2), in nats: above 0 for the first, "
    "below 0 for the second. A head that carries labels has it above 0 from the places of label 1 "
    "and below 0 from those of label 2.",
    "M is log p(label 1) − log p(label 2) of what a head brings from one place, read out alone, as "
    "in Yu & Ananiadou (arXiv 2402.02872). The biases of the read-out add the same constant to it "
    "everywhere; label 1 − 2 is M without that.",
    "What a head reads is the residual stream before its layer, a sum of the embedding and of what "
    "earlier attention and earlier FFNs wrote. The share of each part is along that sum, once of "
    "what the head's norm gives it and once of the values it makes of it; shares add up to 1, and "
    "one that is below 0 points against the sum.",
    SIGNS,
)
_PARTS = {"embed": "embedding", "attn": "earlier attention", "ffn": "earlier FFNs", "bias": "bias"}


def in_context_page(saved: Saved) -> str:
    """The whole page. Tables: ``heads, label_positions, inputs``."""
    tables, facts = saved.tables, saved.facts
    heads, found = tables["heads"], facts["in_context"]
    return page(
        f"Heads that carry labels to {named(facts['target'])}",
        _findings(heads, facts),
        [
            *warned(facts["warnings"]),
            asked(facts, [_labels(found)]),
            _heads(heads, facts),
            _places(tables["label_positions"], facts),
            _inputs(tables["inputs"], facts),
            how_to_read(*HOW),
            origin(facts, facts.get("again")),
        ],
    )


def _labels(found: Facts) -> str:
    each = [
        f"label {number} is {visible(label['text'])}, at "
        f"{joined([str(pos) for pos in label['positions']])}"
        for number, label in enumerate(found["labels"], start=1)
    ]
    return f"In the examples {'; '.join(each)}."


def _findings(heads: pd.DataFrame, facts: Facts) -> list[str]:
    labels, best = head_labels(heads), heads.iloc[0]
    zeroed = records(heads.head(1))[0]["zeroed"]
    found = [
        f"Of the heads, {labels[0]} raises {quantity(facts['target'])} most, by "
        f"{signed(best['score'])} nats"
        + ("." if zeroed is None else f"; zeroed, it changes by {signed(zeroed)}.")
    ]
    both = zip(labels, heads["contrast_1"].tolist(), heads["contrast_2"].tolist(), strict=True)
    carry = [label for label, first, second in both if first > 0.01 and second < -0.01]
    found.append(
        f"From the places of each label {joined(carry)} "
        f"{'brings' if len(carry) == 1 else 'bring'} what speaks for that label (by more than 0.01 "
        "nats)."
        if carry
        else "None of the heads listed brings from the places of each label what speaks for that "
        "label by more than 0.01 nats: nothing here says that labels are carried in context."
    )
    return found


def _heads(heads: pd.DataFrame, facts: Facts) -> Section:
    first, second = (visible(label["text"]) for label in facts["in_context"]["labels"])
    scanned = bool(heads["zeroed"].notna().any())
    return Section(
        title="Heads",
        items=[
            head_heatmap(
                heads, title=f"The {len(heads)} heads that raise {quantity(facts['target'])} most"
            ),
            head_list(
                f"By their own rise; label 1 is {first}, label 2 is {second}",
                heads,
                {
                    "score": "rise, nats",
                    **({"zeroed": "change when zeroed, nats"} if scanned else {}),
                    "contrast": "label 1 − 2, nats",
                    "contrast_1": "of it from label 1",
                    "contrast_2": "of it from label 2",
                    "attention_1": "attention to label 1",
                    "attention_2": "attention to label 2",
                },
            ),
        ],
    )


def _places(places: pd.DataFrame, facts: Facts) -> Section:
    texts = facts["token_texts"]
    return Section(
        title="What they bring from each place of a label",
        text=[
            f"The constant in every M is {signed(facts['in_context']['constant'])} nats: it comes "
            "from the biases of the read-out and says nothing of the heads."
        ],
        items=[
            head_list(
                "Each head at each place of a label",
                places.assign(at=placed(places["source_pos"], texts)),
                {
                    "at": "position",
                    "attention": "attention",
                    "log_prob_difference": "M, nats",
                    "contrast": "label 1 − 2, nats",
                },
            )
        ],
    )


def _inputs(inputs: pd.DataFrame, facts: Facts) -> Section:
    read_pos = facts["read_pos"]
    at = [
        f"{place} ({'query' if pos == read_pos else 'key and value'})"
        for place, pos in zip(
            placed(inputs["position"], facts["token_texts"]), inputs["position"], strict=True
        )
    ]
    return Section(
        title=f"What {facts['in_context']['head']} reads",
        items=[
            Shown(
                caption="Where what the head reads comes from: its query at the position that is "
                "read, keys and values at the labels",
                table=inputs.assign(at=at, part=called(inputs["part"], _PARTS)),
                columns={
                    "at": "position",
                    "part": "part",
                    "norm": "norm",
                    "share": "share of what is read",
                    "value_share": "share of the value",
                    "raises": "raises",
                    "lowers": "lowers",
                },
            )
        ],
    )
