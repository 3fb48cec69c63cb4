"""What stands around a page's findings: what was asked, what proves them, where they come from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tl_neuron_attr.markup import Shown
from tl_neuron_attr.prompts import Target, visible
from tl_neuron_attr.report.page import Section

Facts = Mapping[str, Any]
"""A ``run.json``, or the like: plain values, fresh or read back."""

CONVENTIONS = {
    "exact": (
        "exact: the final norm is frozen at the scale of the full run, with every bias, so that "
        "log p of the final residual is the model's own."
    ),
    "published": (
        "published: as the notebooks of Yu & Ananiadou (2024) read residuals out, for numbers that "
        "compare with theirs: the final norm frozen, LayerNorm without its bias, no output bias."
    ),
    "recomputed": (
        "recomputed: the final norm's scale is taken anew from every residual that is read out. "
        "Scores have no bounds then, so that every neuron is scored."
    ),
}

POSITIONS = (
    "A label names a neuron: L4.N12 is FFN neuron 12 of layer 4; L4.H1.D7@2 is dimension 7 of head "
    "1 of layer 4, as it reads from position 2. Layers, heads, neurons and positions count from 0."
)

SIGNS = (
    "The tokens that a neuron raises and lowers are those whose logits its contribution moves most "
    "in this run, with the sign its coefficient has here. Spaces are shown as ·, newlines as ⏎."
)


def asked(facts: Facts, more: Sequence[str] = ()) -> Section:
    """Prompt, target, model and convention of one attributed prompt, and what else was asked."""
    text = facts["prompt"]
    prompt = ["The prompt was given as token ids."] if text is None else [f"Prompt: {text}"]
    return Section(
        title="What was asked",
        text=[
            *prompt,
            f"Tokens, each after its position: {tokens(facts['token_texts'])}. The answer is read "
            f"at position {facts['read_pos']}.",
            answer(facts["target"]),
            model(facts),
            f"Convention {CONVENTIONS[facts['convention']]}",
            *more,
        ],
    )


def tokens(texts: Sequence[str]) -> str:
    """The tokens of a prompt, each after its position."""
    return "  ".join(f"{pos}:{visible(text)}" for pos, text in enumerate(texts))


def answer(target: Facts) -> str:
    """What is explained, and how probable it is."""
    asked = Target.of_facts(target)
    words, before = f"Target: {asked.words_and_ids}", target["embedding_log_prob"]
    if asked.distribution is not None:
        return (
            f"{words}: {asked.quantity} is {signed(target['log_prob'])} nats; before the first "
            f"layer {signed(before)}. Wherever this page says log p, that is meant."
        )
    if asked.against is None:
        return (
            f"{words}, log p = {signed(target['log_prob'])} nats, a probability of "
            f"{math.exp(target['log_prob']):.3g}; before the first layer log p = {signed(before)}."
        )
    return (
        f"{words}: the difference of their log p is {signed(target['log_prob'])} nats; before the "
        f"first layer {signed(before)}. Wherever this page says log p, that difference is meant."
    )


def named(target: Facts) -> str:
    """What is explained, for a title."""
    return Target.of_facts(target).in_tables.strip()


def quantity(target: Facts) -> str:
    """What scores are a rise of, in a few words."""
    asked = Target.of_facts(target)
    if asked.distribution is not None:
        return asked.quantity
    if asked.against is None:
        return f"log p of {asked.words}"
    return f"log p({visible(asked.text)}) − log p({visible(asked.against.text)})"


def model(facts: Facts) -> str:
    """Which model, and in which numbers."""
    of = facts.get("model")
    if of is None:  # a graph or a card that was saved without the facts of its attribution
        return f"Model: {facts['model_name']}."
    return (
        f"Model: {of['name']} ({of['architecture']}, {of['class']}), {of['dtype']} weights, "
        f"{of['processing']}; scores in {facts['score_dtype']}."
    )


def warned(messages: Sequence[str]) -> list[Section]:
    """What a reader must know first, if there is anything."""
    if not messages:
        return []
    return [Section(title=f"Warnings ({len(messages)})", text=list(messages))]


def proof(certificates: Mapping[str, Facts]) -> Section:
    """Why the neurons listed are the best there are, list by list."""
    rows = [
        {
            "list": _listed(name),
            "total": each["total"],
            "evaluated": each["evaluated"],
            "kth_score": each["kth_score"],
            "next_bound": math.nan if each["next_bound"] is None else each["next_bound"],
            "why": _why(each),
        }
        for name, each in certificates.items()
    ]
    return Section(
        title="Certificates: that no neuron is missing",
        text=[
            "A list of the best neurons is complete if no neuron outside it can score above its "
            "last one. Bounds prove that without scoring every neuron."
        ],
        items=[
            Shown(
                caption="Of each list how it was proven; scores and bounds in nats",
                table=pd.DataFrame(rows),
                columns={
                    "list": "list",
                    "total": "neurons there are",
                    "evaluated": "scored exactly",
                    "kth_score": "score of the last one listed",
                    "next_bound": "bound of the best one not scored",
                    "why": "why it is complete",
                },
            )
        ],
    )


def _listed(name: str) -> str:
    kind = "FFN neurons" if name.endswith("ffn") else "attention neurons"
    return f"{kind}, lowest first" if name.startswith("lowest") else kind


def _why(certificate: Facts) -> str:
    if not certificate["applies"]:
        return "no bound holds under this convention: every neuron was scored"
    if certificate["linear"]:
        return "scores of a contrast are linear: one product gave every one of them"
    if certificate["next_bound"] is None:
        return "every neuron that is not off was scored"
    low = certificate["lowest"]
    holds = (
        certificate["next_bound"] >= certificate["kth_score"]
        if low
        else certificate["next_bound"] <= certificate["kth_score"]
    )
    if not holds:
        return "NOT PROVEN: a neuron that was not scored might belong into the list"
    return f"no neuron that was not scored can score {'below' if low else 'above'} the last one"


def origin(facts: Facts, again: str | None = None) -> Section:
    """Where the numbers come from, and how to have them again."""
    rows = [("weights, SHA-256", facts["model"]["sha256"])] if "model" in facts else []
    rows += [(name, version) for name, version in facts.get("versions", {}).items()]
    text = [] if again is None else [f"To make it again: {again}"]
    if not rows:
        text.append("Saved without versions and the hash of the weights.")
    return Section(
        title="Where this comes from",
        text=text,
        items=[
            Shown(
                caption="Versions and weights",
                table=pd.DataFrame(rows, columns=["what", "value"]),
                columns={"what": "what", "value": "which"},
            )
        ]
        * bool(rows),
    )


def how_to_read(*paragraphs: str) -> Section:
    """The page's words, explained."""
    return Section(title="How to read this", text=paragraphs)


# --- words ------------------------------------------------------------------------------------


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, minus being a real one."""
    return f"{value:+.{digits}f}".replace("-", "−")


def joined(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
