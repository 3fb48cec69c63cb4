"""The page of ``prompts``: which prompts there are, and which of them a model knows."""

import pandas as pd

from tl_neuron_attr.markup import Shown
from tl_neuron_attr.report.asked import Facts, how_to_read, origin, warned
from tl_neuron_attr.report.page import Section, page

HOW = (
    "A prompt is kept if its answer is one token, is among the model's most probable next tokens, "
    "and is more probable than every other answer of its knowledge type. The filter is that of Yu "
    "& Ananiadou (2024).",
    "Every accepted answer counts as right: the target is the one that the model finds most "
    "probable, and none of them competes with it.",
    "The columns of the counts are stages: of the prompts asked those with an answer of one token, "
    "of these those with it among the top, of these those kept.",
)
_COUNTS = {
    "knowledge_type": "type",
    "relations": "relations",
    "facts": "facts",
    "answers": "answers",
    "prompts": "prompts",
    "asked": "asked",
    "one_token": "answer is one token",
    "in_top": "of these among the top",
    "kept": "of these kept",
}
_PROMPT = {"text": "prompt", "answer": "answer", "knowledge_type": "type"}


def prompts_page(facts: Facts) -> str:
    """The whole page; ``facts`` are what ``prompts`` writes beside its prompts."""
    of_model = f", asked of {facts['model']}" if "model" in facts else ""
    return page(
        f"Prompts of {facts['source']}{of_model}",
        [_finding(facts)],
        [
            *warned(facts["warnings"]),
            Section(
                title="How many there are",
                text=[f"Asked for: {facts['source']}."],
                items=[
                    Shown(
                        caption="By knowledge type",
                        table=pd.DataFrame(facts["types"]),
                        columns=_COUNTS,
                    )
                ],
            ),
            _kept(facts),
            *_dropped(facts),
            *([how_to_read(*HOW)] if "model" in facts else []),
            origin(facts["made_with"], facts.get("again")),
        ],
    )


def _finding(facts: Facts) -> str:
    whole = next(row for row in facts["types"] if row["knowledge_type"] == "all")
    if "model" not in facts:
        return f"{whole['prompts']:,} prompts about {whole['facts']:,} facts; no model was asked."
    return (
        f"{facts['model']} knows {whole['kept']:,} of {whole['asked']:,} prompts "
        f"({whole['kept'] / whole['asked']:.0%}): the answer is one token, among the "
        f"{facts['top']} most probable, and above every other answer of its type."
    )


def _kept(facts: Facts) -> Section:
    if "model" not in facts:
        return Section(
            title="The prompts",
            items=[
                Shown(
                    caption="Every prompt, as it was written to the file",
                    table=pd.DataFrame(facts["kept"]),
                    columns=_PROMPT,
                )
            ],
        )
    return Section(
        title="Prompts it knows",
        items=[
            Shown(
                caption="Every prompt that was kept, and written to the file",
                table=pd.DataFrame(facts["kept"]),
                columns={**_PROMPT, "prob": "probability", "rank": "rank among all tokens"},
            )
        ],
    )


def _dropped(facts: Facts) -> list[Section]:
    if not facts.get("dropped"):
        return []
    return [
        Section(
            title="Prompts that fell out",
            items=[
                Shown(
                    caption="Every prompt that was not kept, and why",
                    table=pd.DataFrame(facts["dropped"]),
                    columns={**_PROMPT, "reason": "reason", "detail": "in one sentence"},
                )
            ],
        )
    ]
