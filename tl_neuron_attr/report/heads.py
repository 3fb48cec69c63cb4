"""The page of ``heads``: what becomes of an answer when each head in turn is zeroed."""

import pandas as pd

from tl_neuron_attr.report.asked import (
    asked,
    how_to_read,
    named,
    origin,
    quantity,
    signed,
    warned,
)
from tl_neuron_attr.report.listed import head_labels, head_list
from tl_neuron_attr.report.page import Section, page
from tl_neuron_attr.tables import Saved
from tl_neuron_attr.views import head_heatmap, head_scan_heatmap

HOW = (
    "Each head is zeroed alone, at all positions, and the prompt is run again: the change says how "
    "much the answer rests on that head, through all that reads it later. Below 0 the head helped; "
    "above 0 it held the answer back.",
    "A head's own rise is something else: what its output at the read position adds to the "
    "residual stream, read out there and then, with nothing zeroed. A head that works through "
    "later layers (by what they read of it, there or at earlier positions) has a small rise of "
    "its own and a large change. Where the change is smaller than the rise, other heads stand in "
    "for it.",
    "Changes do not add up over heads: two heads that do the same each look dispensable alone.",
)


def heads_page(saved: Saved) -> str:
    """The whole page. Tables: ``heads`` with ``layer, head, change, score``."""
    tables, facts = saved.tables, saved.facts
    heads = tables["heads"]
    ordered = heads.sort_values("change", kind="stable").reset_index(drop=True)
    of = quantity(facts["target"])
    return page(
        f"Heads without which the answer changes: {named(facts['target'])}",
        [_finding(ordered, of)],
        [
            *warned(facts["warnings"]),
            asked(facts),
            Section(
                title="Each head zeroed alone",
                items=[
                    head_scan_heatmap(heads, title=f"Change of {of} without each head, nats"),
                    head_list(
                        f"Every head, those that helped most first; {of}, in nats",
                        ordered,
                        {"change": "change when zeroed, nats", "score": "its own rise, nats"},
                    ),
                ],
            ),
            Section(
                title="What the heads add themselves",
                text=["For comparison: nothing is zeroed here."],
                items=[head_heatmap(heads, title=f"Each head's own rise in {of}, nats")],
            ),
            how_to_read(*HOW),
            origin(facts, facts.get("again")),
        ],
    )


def _finding(ordered: pd.DataFrame, of: str) -> str:
    changes, labels = ordered["change"].tolist(), head_labels(ordered)
    helped = sum(change < -0.01 for change in changes)
    held = sum(change > 0.01 for change in changes)
    first = (
        f"Without {labels[0]} alone {of} changes most to the worse, by {signed(changes[0])} nats"
        if changes[0] < 0
        else f"No head helped: none lowers {of} when it alone is zeroed"
    )
    return (
        f"{first}. Of {len(changes)} heads {helped} help by more than 0.01 nats and {held} hold "
        "the answer back by more than that."
    )
