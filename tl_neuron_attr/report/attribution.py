"""The report of one prompt: what is saved of an attribution -> one HTML file."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tl_neuron_attr import views
from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.files import check_file
from tl_neuron_attr.markup import Shown, escaped, number, table
from tl_neuron_attr.prompts import Target
from tl_neuron_attr.report.cards import CARDS, best_cards
from tl_neuron_attr.report.page import POLICY, contents, data, document, figure, paragraphs
from tl_neuron_attr.report.payload import lists_of, payload, shown
from tl_neuron_attr.report.saved import Cards, read_saved
from tl_neuron_attr.tables import Saved, records, write_tables

_KINDS = {"ffn": "FFN", "attn": "attention"}
_LISTS = {
    "ffn": (
        "FFN value neurons",
        "The FFN neurons whose contribution, added alone to the residual stream, raises the answer "
        "most. They write where the answer is read.",
        "source",
    ),
    "attn": (
        "Attention value neurons",
        "One dimension of one head, at one source position: what it brings from there to where the "
        "answer is read.",
        "source",
    ),
    "query": (
        "Query neurons",
        "Earlier FFN neurons that set the best attention value neurons off. Their scores are those "
        "of the value neurons, handed down by share of the pre-activation, and stand beside the "
        "position where a neuron does most of it.",
        "fires at",
    ),
    "suppressing-ffn": (
        "FFN neurons that lower the answer most",
        "Proven to be the lowest scores, as the others are the highest.",
        "source",
    ),
    "suppressing-attn": (
        "Attention neurons that lower the answer most",
        "Proven to be the lowest scores, as the others are the highest.",
        "source",
    ),
}
_HOW_TO_READ = (
    "A score is a rise in the answer's log-probability, in nats: what happens to it when this one "
    "part is added, alone, to the residual stream just before it. A rise of 0.69 nats doubles the "
    "probability; negative scores speak against the answer. Scores of neurons do not add up to "
    "that of their layer, because the softmax is not linear.",
    "A neuron's coefficient is how strongly it fires here. Its sign matters: a neuron with a "
    "negative coefficient raises the tokens at the other end of what it says. The lists of tokens "
    "take account of that: they are what the neuron raises and lowers in this run.",
    "Value neurons write the answer into the stream; query neurons, in earlier layers, set value "
    "neurons off. A number before a token is its place in the prompt, from 0; · is a space and ⏎ "
    "a new line.",
    "This is what single parts say on their own. It is not what happens without them: other "
    "neurons may step in. To see that, zero them: tl-neuron-attr evaluate, or mask_curve(result).",
    "Click a token of the prompt to see only what comes from there; a second click shows all "
    "again. Click a neuron, or press Enter on its name, for its card; the arrow keys go to the "
    "next one, and Escape closes it. Headings of tables sort.",
)


def report_files(result: Attribution, saved: Saved, count: int = CARDS) -> dict[str, str]:
    """``cards.json`` and ``report.html`` of a result, by name."""
    text = json.dumps({"cards": best_cards(result, saved, count)}, ensure_ascii=False)
    return {
        "cards.json": text + "\n",
        "report.html": report_html(saved, json.loads(text)["cards"]),
    }


def write_report(files: Mapping[str, str], place: Path) -> Path:
    """Write the report alone, under a name of its own."""
    write_tables(place.parent, {}, {place.name: files["report.html"]})
    return place


def redraw_report(directory: str | Path, path: str | Path | None = None) -> Path:
    """Draw the report again from what is saved, with the same bytes; where it is.

    ``path`` is by default ``report.html`` in the directory itself.

    Raises:
        InputError: If what is saved is damaged or of something else, or the file cannot be made.
        OutputError: If writing fails on the way.
    """
    place = check_file(Path(directory) / "report.html" if path is None else path, "report.html")
    saved, cards = read_saved(directory)
    return write_report({"report.html": drawn(directory, saved, cards)}, place)


def drawn(
    directory: str | Path,
    saved: Saved,
    cards: Cards,
    plotly: bool | str = True,
    policy: str = POLICY,
) -> str:
    """``report_html``; what it cannot make sense of is a file that is not what ``save`` wrote.

    Raises:
        InputError: Saying so.
    """
    try:
        return report_html(saved, cards, plotly, policy)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"what is saved in {str(directory)!r} cannot be drawn ({type(error).__name__}: "
            f"{error}); attribute the prompt again with --out"
        ) from error


def report_html(
    saved: Saved, cards: Cards = (), plotly: bool | str = True, policy: str = POLICY
) -> str:
    """The whole file; ``plotly`` and ``policy`` as in ``page.document``."""
    facts = saved.facts
    sections = [
        ("layers", "Layers", _layers(saved)),
        ("heads", "Heads and source positions", _heads(saved)),
        ("where", "Where the neurons lie", _where(saved)),
        *((name, _LISTS[name][0], _list(saved, name)) for name in lists_of(saved)),
        ("proof", "Are these the best? The certificate", _proof(saved)),
        ("reading", "How to read this", paragraphs(_HOW_TO_READ)),
        ("provenance", "Where these numbers come from", _provenance(facts)),
    ]
    body = "\n".join(
        f'<section id="{name}"><h2>{escaped(title)}</h2>\n{inside}\n</section>'
        for name, title, inside in sections
        if inside
    )
    places = [(name, title) for name, title, inside in sections if inside]
    command = " ".join(map(shlex.quote, ["tl-neuron-attr", "card", "NEURON", *_asked(facts)]))
    if not _has_command(facts):
        command = "neuron_card(result, 'NEURON')"
    found = {**payload(saved, cards), "command": command, "quantity": _quantity(facts)}
    return document(
        f"{Target.of_facts(facts['target']).words} after {_clipped(_prompt(facts))}",
        f"{_header(facts)}\n{contents(places)}\n{body}\n"
        '<dialog id="card" aria-labelledby="card-name"></dialog>\n'
        + data(found, 'data-name="report"'),
        styles=["report.css"],
        scripts=["tables.js", "figures.js", "report.js"],
        plotly=plotly,
        policy=policy,
    )


# --- what was asked ---------------------------------------------------------------------------


def _header(facts: Mapping[str, Any]) -> str:
    target = Target.of_facts(facts["target"])
    aim = _aim(target)
    note = (
        "" if target.distribution is None else " Where a figure says log p(target), that is meant."
    )
    warned = "".join(
        f'<p class="warn"><strong>Warning.</strong> {escaped(message)}</p>'
        for message in facts["warnings"]
    )
    model = facts["model"]
    return (
        f"<h1>Which neurons gave {aim}?</h1>\n"
        f'<p class="soft">{escaped(model["name"])}, {escaped(model["architecture"])}; scores are '
        f"rises in {_quantity(facts)}, in nats, convention {escaped(facts['convention'])}."
        f"{note}</p>\n"
        f'{warned}<div id="strip" class="strip" role="group" aria-label="Tokens of the prompt: '
        f'choose a source position">{_tokens(facts)}</div>\n'
        '<p id="chosen" class="soft" aria-live="polite">Choose a token to see only what comes from '
        f"there.</p>\n{_numbers(facts)}"
    )


def _aim(target: Target) -> str:
    """What is explained, for the heading."""
    if target.distribution is not None:
        return escaped(target.words)
    aim = " or ".join(f"<code>{escaped(shown(each.text))}</code>" for each in target.answers)
    if target.against is not None:
        aim += f" rather than <code>{escaped(shown(target.against.text))}</code>"
    return aim


def _tokens(facts: Mapping[str, Any]) -> str:
    tokens = facts["token_texts"][: facts["read_pos"] + 1]
    return "".join(
        f'<button type="button" aria-pressed="false" data-place="{place}"'
        f"{' class=read' if place == facts['read_pos'] else ''}><small>{place}</small>"
        f"{escaped(shown(token))}</button>"
        for place, token in enumerate(tokens)
    )


def _numbers(facts: Mapping[str, Any]) -> str:
    target = facts["target"]
    asked = Target.of_facts(target)
    if asked.has_prob:
        says = (
            f"log p = {number(target['log_prob'])} nats, p = {number(_prob(target['log_prob']))}; "
            f"before the first layer p = {number(_prob(target['embedding_log_prob']))}"
        )
    else:
        what = "difference of log p" if asked.distribution is None else asked.quantity
        says = (
            f"{what} = {number(target['log_prob'])} nats; before the first layer "
            f"{number(target['embedding_log_prob'])}"
        )
    likeliest = " ".join(
        f'<span class="likely"><code>{escaped(shown(row["token"]))}</code> '
        f"{number(row['prob'])}</span>"
        for row in facts["predictions"]
    )
    return (
        f"<dl><dt>Answer</dt><dd>{escaped(asked.words_and_ids)}: {escaped(says)}</dd>"
        f"<dt>The model predicts</dt><dd>{likeliest}</dd></dl>"
    )


def _prob(log_prob: float) -> float:
    return math.exp(log_prob)


def _quantity(facts: Mapping[str, Any]) -> str:
    return Target.of_facts(facts["target"]).quantity


def _prompt(facts: Mapping[str, Any]) -> str:
    return facts["prompt"] if facts["prompt"] is not None else "".join(facts["token_texts"])


def _clipped(text: str, length: int = 60) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


# --- figures and lists ------------------------------------------------------------------------


def _layers(saved: Saved) -> str:
    parts = [
        paragraphs(["What the attention and the FFN of each layer add to the answer."]),
        figure(views.layer_bars(saved.tables["layers"]), "f-layers"),
    ]
    if "log_probs" in saved.tables:
        target = Target.of_facts(saved.facts["target"])
        quantity = None if target.distribution is None else target.quantity
        found = views.log_prob_heatmap(saved.tables["log_probs"], quantity=quantity)
        parts.append(figure(found, "f-log-probs"))
    return "\n".join(parts)


def _heads(saved: Saved) -> str:
    heads, positions = saved.tables["heads"], saved.tables["positions"]
    best = records(heads)[int(heads["score"].abs().to_numpy().argmax())]
    of_best = positions.loc[
        (positions["layer"] == best["layer"]) & (positions["head"] == best["head"])
    ]
    return "\n".join(
        [
            figure(views.head_heatmap(heads), "f-heads"),
            '<p><label>Head <select id="head"></select></label></p>',
            figure(views.position_bars(of_best), "f-positions"),
            _drawn_table(
                "positions",
                "What each head brings from each source position",
                (
                    *("text:head", "source:source", "number:attention"),
                    f"number:rise in {_quantity(saved.facts)}, nats",
                ),
            ),
        ]
    )


def _where(saved: Saved) -> str:
    neurons = saved.tables["neurons"]
    values = neurons.loc[neurons["role"] == "value"]
    n_layers = len(set(saved.tables["layers"]["layer"]))
    shares = saved.tables.get("shares")
    parts = [
        figure(views.neuron_scatter(values, n_layers=n_layers), "f-neurons"),
        figure(views.cumulative_share(values, shares), "f-shares"),
    ]
    if shares is not None:
        parts.append(table(_shares(shares)))
    return "\n".join(parts)


def _shares(shares: pd.DataFrame) -> Shown:
    named = shares.assign(kind=[_KINDS[kind] for kind in shares["kind"]])
    return Shown(
        caption="Of all that raises the answer, how much the best neurons hold: proven ends",
        table=named,
        columns={
            "kind": "neurons",
            "top": "the best",
            "rise_lower": "all that raises, nats: at least",
            "rise_upper": "at most",
            "share_lower": "share of the best: at least",
            "share_upper": "share: at most",
        },
    )


def _list(saved: Saved, name: str) -> str:
    title, says, place = _LISTS[name]
    columns = (
        *("number:rank", "neuron:neuron", f"source:{place}", "number:coefficient"),
        *("number:score, nats", "tokens:raises", "tokens:lowers"),
    )
    if name.endswith("ffn"):  # they write where the answer is read, all of them
        columns = (*columns[:2], "-", *columns[3:])
    return paragraphs([says]) + _drawn_table(name, title, columns)


def _drawn_table(name: str, caption: str, columns: Sequence[str]) -> str:
    """The frame of a table whose rows ``report.js`` draws, as many as are looked at."""
    heads = "".join(
        f'<th scope="col"{" class=num" if column.startswith("number:") else ""}>'
        f"{escaped(column.partition(':')[2])}</th>"
        for column in columns
        if column != "-"
    )
    return (
        f'<div class="wide" tabindex="0"><table data-drawn="{name}" '
        f'data-columns="{escaped("|".join(columns))}"><caption>{escaped(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody></tbody></table></div>"
    )


# --- how sure, and where from -----------------------------------------------------------------


def _proof(saved: Saved) -> str:
    return "\n".join(
        paragraphs([_certificate(name, each)]) for name, each in saved.facts["certificates"].items()
    )


def _certificate(name: str, found: Mapping[str, Any]) -> str:
    kind = _KINDS[name.removeprefix("suppressing_")]
    lowest = found["lowest"]
    which = f"{kind} neurons that {'lower' if lowest else 'raise'} the answer most"
    start = f"The {which}, of {found['total']:,}: "
    if not found["applies"]:
        return start + "every neuron was scored, because no such bound holds here."
    if found["linear"]:
        return start + "every neuron was scored exactly; a contrast is linear, which is cheap."
    end = f"the last one listed scores {number(found['kth_score'])} nats"
    if found["next_bound"] is None:
        return start + (
            f"{found['evaluated']:,} were scored exactly, all that fire at all; {end}, and the "
            "others score 0."
        )
    return start + (
        f"{found['evaluated']:,} were scored exactly. {end[0].upper()}{end[1:]}; no other neuron "
        f"can score {'below' if lowest else 'above'} {number(found['next_bound'])} nats, as a "
        f"bound from the gradient proves (rounding allowed for: {number(found['slack'])} nats). "
        "So none that belongs here is missing."
    )


def _provenance(facts: Mapping[str, Any]) -> str:
    model = facts["model"]
    rows = {
        "model": f"{model['name']} ({model['architecture']}, {model['class']}, "
        f"{model['processing']} weights)",
        "weights": f"SHA-256 {model['sha256']}",
        "numbers": f"weights {model['dtype']}, scores {facts['score_dtype']}",
        "convention": facts["convention"],
        "an FFN neuron is": facts["neuron_basis"]["ffn"],
        "an attention neuron is": facts["neuron_basis"]["attn"],
        "versions": ", ".join(f"{name} {each}" for name, each in facts["versions"].items()),
        "prompt": f"{facts['prompt_id']}: {_prompt(facts)}",
        "time": f"{facts['seconds']} s",
    }
    listed = "".join(
        f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in rows.items()
    )
    if not _has_command(facts):
        return (
            f"<dl>{listed}</dl>\n<p>Made in Python, of a distribution that no command line "
            "takes: attribute(model, prompt, target=Distribution(probs)).</p>"
        )
    return (
        f"<dl>{listed}</dl>\n<p>Made again by (add --index DIR for neurons that lower the answer, "
        f'and for shares):</p>\n<pre tabindex="0"><code>{escaped(command_of(facts))}</code></pre>\n'
        "<p>The tables that this page was drawn from are beside it as Parquet files, where it was "
        "made by <code>attribute --out</code>; <code>tl-neuron-attr report DIR</code> draws it "
        "again from them.</p>"
    )


def _has_command(facts: Mapping[str, Any]) -> bool:
    """Whether a command line can ask for it: not about a distribution that was given."""
    wanted = Target.of_facts(facts["target"]).distribution
    return wanted is None or wanted.is_own


def command_of(facts: Mapping[str, Any]) -> str:
    """The command line that gives these numbers again."""
    words = ["tl-neuron-attr", "attribute", *_asked(facts), "--out", "OUT"]
    return " ".join(map(shlex.quote, words))


def _asked(facts: Mapping[str, Any]) -> list[str]:
    """The arguments that ask about this prompt and target, whatever the command."""
    texts, target = facts["token_texts"], Target.of_facts(facts["target"])
    text = facts["prompt"]
    if text is not None and text.startswith("-"):
        text = None  # it would be taken for an option
    if text is not None and "".join(texts[1:]) == text:
        words = [text, "--bos"]
    elif text is not None and "".join(texts) == text:
        words = [text, "--no-bos"]
    else:
        words = ["--tokens", ",".join(map(str, facts["tokens"]))]
    words += ["--model", facts["model"]["name"]]
    if target.distribution is not None:
        words += ["--distribution"]
    else:
        for each in target.answers:
            words += ["--target-id", str(each.id)]
    if target.against is not None:
        words += ["--against-id", str(target.against.id)]
    if facts["read_pos"] != len(facts["tokens"]) - 1:
        words += ["--position", str(facts["read_pos"])]
    if facts["convention"] != "exact":
        words += ["--convention", facts["convention"]]
    return words
