"""What the page says: which tables and figures come in which order, and the words around them."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from tl_neuron_attr.across import BEST_LAYERS
from tl_neuron_attr.markup import Shown
from tl_neuron_attr.paper.figures import (
    drop_matrix,
    layer_sum_bars,
    method_bars,
    query_depth_lines,
    segment_lines,
    share_lines,
    shared_bars,
)
from tl_neuron_attr.paper.settings import METHOD_TOP, TOP, TOP_VALUES
from tl_neuron_attr.paper.tables import ALL
from tl_neuron_attr.report.page import Section, page
from tl_neuron_attr.views import head_heatmap, layer_bars, type_layer_heatmap
from tl_neuron_attr.views.methods import layers_of_methods

NOT_COMPARABLE = (
    "The sentences behind the published numbers were never released: 1,350 for GPT2-large and "
    "3,141 for Llama-7B, drawn from TriviaQA. Nothing here is a rerun of them. Numbers marked by "
    "colour are published ones, of other sentences and (unless this is GPT2-large or Llama-7B) of "
    "another model: they show what the same table looked like there, not what it should be here.",
    "Of the published table of methods only the rows 'original' and 'a' are well attested; the "
    "others come from one secondary source, and its column of log-probabilities is not known. "
    "Which model the published random controls belong to, where the paper draws the line between "
    "shallow and deep layers, and which kinds of neurons its shared value neurons count, is not "
    "known either; what is done here is said beside each table.",
    "Zeroed is zeroed at all positions. An attention neuron that is zeroed is a row of W_O: what a "
    "dimension of a head carries from all source positions.",
)


def figures_of(
    tables: Mapping[str, pd.DataFrame], facts: Mapping[str, Any]
) -> dict[str, go.Figure]:
    """Every figure, by name, each drawn from one of the tables."""
    queries, top = tables["query_layers"], facts["sizes"]["top"]["ffn"]
    of_example = f"of {facts['example']!r}"
    found = {
        "methods": method_bars(
            tables["methods"], "Probability left without the top 10 FFN neurons"
        ),
        "value_layers": type_layer_heatmap(
            tables["value_layers"], title=f"Mean rise in log p; the {BEST_LAYERS} best of each type"
        ),
        "query_layers_of_ffn": type_layer_heatmap(
            queries.loc[queries["of"] == "ffn"], title="Query layers of FFN value neurons"
        ),
        "query_layers_of_attn": type_layer_heatmap(
            queries.loc[queries["of"] == "attn"], title="Query layers of attention value neurons"
        ),
        "layer_sums": layer_sum_bars(tables["layer_sums"], "Attention against FFN by type"),
        "chosen_layers": layers_of_methods(
            tables["chosen_layers"],
            ["log_prob_increase", "prob_increase"],
            "Layers of the neurons that methods a and c choose",
        ),
        "segment": segment_lines(tables["segment"], "From the input to the final hidden state"),
        "shares": share_lines(tables["shares"], "Share of the total that the top neurons hold"),
        "heads": drop_matrix(tables["heads"], "Probability lost without each type's top heads"),
        "example_layers": layer_bars(
            tables["example_layers"], title=f"Rise in log p from each layer, {of_example}"
        ),
        "example_heads": head_heatmap(
            tables["example_all_heads"], title=f"Rise in log p from each head, {of_example}"
        ),
    }
    for size in sorted({TOP, top}):
        found[f"shared_neurons_top_{size}"] = shared_bars(
            tables["shared_neurons"], size, f"Neurons shared by more than half, of the top {size}"
        )
        depth = tables["query_depth"]
        found[f"query_depth_top_{size}"] = query_depth_lines(
            depth.loc[depth["top"] == size],
            f"Query neurons that are value neurons too, or not, of the top {size}",
        )
    return found


def paper_page(
    tables: Mapping[str, pd.DataFrame],
    figures: Mapping[str, go.Figure],
    facts: Mapping[str, Any],
) -> str:
    """The HTML file."""
    size = facts["sizes"]
    lead = [
        f"{facts['model']} ({facts['architecture']}): {facts['layers']} layers, "
        f"{facts['layers'] * facts['heads']} heads, {facts['ffn_neurons']:,} FFN neurons, "
        f"{facts['attn_neurons']:,} attention neurons (head and dimension). "
        f"{facts['summary']}; {facts['prompts']} used. Convention {facts['convention']}, "
        f"seed {facts['settings']['seed']}.",
        "The tables and figures of Yu & Ananiadou, Neuron-Level Knowledge Attribution in Large "
        "Language Models (EMNLP 2024, arXiv 2312.12141), made anew for this model. Each is also a "
        "file beside this page: tables/*.parquet and *.csv, figures/*.json (plotly).",
    ]
    sections = [
        Section(title="What can be compared, and what cannot", text=NOT_COMPARABLE),
        _prompts(tables, facts),
        _methods(tables, figures),
        _drops(tables, facts),
        _heads(tables, figures, facts),
        Section(
            title="Value layers",
            text=[
                "The rise in log p(answer) from each attention and FFN layer, added alone to what "
                f"it read: means over the prompts of a type. Numbers mark the {BEST_LAYERS} layers "
                "with the highest mean, of both kinds together.",
            ],
            items=[figures["value_layers"]],
        ),
        Section(
            title="Query layers",
            text=[
                f"What set off the {TOP_VALUES} best value neurons of each prompt: their scores, "
                "handed down to earlier layers by share of the pre-activation.",
            ],
            items=[figures["query_layers_of_ffn"], figures["query_layers_of_attn"]],
        ),
        _sums(tables, figures),
        Section(
            title="Layers of the chosen neurons",
            text=[
                f"The top {METHOD_TOP} FFN neurons by log-probability increase (a) and by "
                "probability increase (c), the neurons that the table of methods zeroes.",
            ],
            items=[figures["chosen_layers"]],
        ),
        Section(
            title="From the input to the final hidden state",
            text=[
                "log p and p of the answer at points of the straight line from what enters the "
                "first block to the final hidden state, the final norm frozen at the scale of the "
                "run: means over prompts.",
            ],
            items=[figures["segment"]],
        ),
        Section(
            title="Share of the total held by the top neurons",
            text=[
                "Of the sum of all positive scores: means over "
                f"{facts['settings']['sample']} prompts of each type, drawn by the seed. The total "
                "is not computed but bounded; the band lies between proven ends.",
            ],
            items=[figures["shares"]],
        ),
        _shared(figures, size["top"]["ffn"]),
        _depth(figures, size["top"]["ffn"]),
        *_example(tables, figures, facts),
    ]
    return page(f"The paper's tables and figures: {facts['model']}", lead, sections)


def _prompts(tables: Mapping[str, pd.DataFrame], facts: Mapping[str, Any]) -> Section:
    return Section(
        title="Prompts",
        text=[
            "The paper's filter: the answer is one token, among the model's ten likeliest, and "
            "above every other answer of its type. Why each of the others fell out is in "
            "tables/dropped.csv.",
            *(f"Warning: {message}" for message in facts["warnings"]),
        ],
        items=[
            Shown(
                caption="Prompts by knowledge type",
                table=tables["prompts"],
                columns={
                    "knowledge_type": "knowledge type",
                    "asked": "asked",
                    "one_token": "answer is one token",
                    "in_top": "in the top 10",
                    "kept": "above all others",
                },
            )
        ],
    )


def _methods(tables: Mapping[str, pd.DataFrame], figures: Mapping[str, go.Figure]) -> Section:
    table = tables["methods"].assign(
        method=tables["methods"]["method"].str.replace("_", " "),
        letter=tables["methods"]["letter"].fillna(""),
        interval=[
            f"{low:.2f} to {high:.2f}"
            for low, high in zip(
                tables["methods"]["prob_low"], tables["methods"]["prob_high"], strict=True
            )
        ],
    )
    by_type = table.pivot(index="method", columns="knowledge_type", values="prob")
    types = [*dict.fromkeys(table["knowledge_type"])]
    by_type = by_type.reindex(index=[*dict.fromkeys(table["method"])], columns=types).reset_index()
    return Section(
        title="Eight methods: the answer without their top 10 FFN neurons",
        text=[
            "Of each prompt the ten FFN neurons that a method ranks highest are zeroed; lower is "
            "better. Two controls zero as many other neurons of the layers that method a chose: at "
            "random, and matched to the norm of what the chosen ones add.",
            "Intervals are of "
            f"{table.loc[table['knowledge_type'] == ALL, 'facts'].iloc[0]:,} facts drawn with "
            "replacement, each with all of its prompts: the wordings of one fact are not "
            "independent. Those in the figure are of the ratio, the mean after and the mean "
            "before taken over the same draw.",
        ],
        items=[
            Shown(
                caption="All prompts: means, with the 95 % bootstrap interval of p over facts",
                table=table.loc[table["knowledge_type"] == ALL],
                columns={
                    "letter": "",
                    "method": "method",
                    "mrr": "MRR",
                    "prob": "p, %",
                    "interval": "interval of p",
                    "log_prob": "log p, nats",
                    "gpt2_large_mrr": "*GPT2-large MRR",
                    "gpt2_large_prob": "*GPT2-large p, %",
                    "llama_7b_mrr": "*Llama-7B MRR",
                    "llama_7b_prob": "*Llama-7B p, %",
                    "well_attested": "*well attested",
                },
            ),
            figures["methods"],
            Shown(
                caption="Probability by knowledge type, in per cent",
                table=by_type,
                columns={"method": "method", **{name: name for name in types}},
            ),
        ],
    )


def _drops(tables: Mapping[str, pd.DataFrame], facts: Mapping[str, Any]) -> Section:
    names = {
        "value_neurons": "value neurons",
        "shallow_query_neurons": "shallow query neurons",
    }
    drops = tables["drops"]
    table = drops.replace({"test": names}).assign(
        zeroed=_counts(drops, "attn", "ffn"), random=_counts(drops, "random_attn", "random_ffn")
    )
    return Section(
        title="Many neurons at once",
        text=[
            "How far MRR and probability fall, in per cent of what they were, when value neurons "
            "of attention and FFN, or the query FFN neurons of shallow layers, are zeroed; and "
            "random neurons of the same layers: as many, or, where more than half of a layer was "
            "chosen, all others of it, which are fewer (the table says how many). The paper zeroes "
            "200 attention and 100 FFN value neurons, and 1,000 query neurons, of models with "
            "184,320 (GPT2-large) and 352,256 FFN neurons. 'In proportion' zeroes the same share "
            "of this model as of GPT2-large.",
            f"Shallow are the first {facts['sizes']['shallow_layers']} of {facts['layers']} "
            "layers: the first half, a choice of this project. Fewer query neurons than asked for "
            "are zeroed where fewer score above 0.",
        ],
        items=[
            Shown(
                caption=(
                    "Drops in per cent; numbers of neurons (attention + FFN) are means over prompts"
                ),
                table=table,
                columns={
                    "test": "zeroed",
                    "scale": "how many",
                    "zeroed": "neurons",
                    "mrr_drop": "MRR",
                    "prob_drop": "p",
                    "random": "random: neurons",
                    "random_mrr_drop": "random: MRR",
                    "random_prob_drop": "random: p",
                    "gpt2_large_mrr_drop": "*GPT2-large MRR",
                    "gpt2_large_prob_drop": "*GPT2-large p",
                    "llama_7b_mrr_drop": "*Llama-7B MRR",
                    "llama_7b_prob_drop": "*Llama-7B p",
                    "published_random_mrr_drop": "*random MRR",
                    "published_random_prob_drop": "*random p",
                },
            )
        ],
    )


def _counts(table: pd.DataFrame, attn: str, ffn: str) -> list[str]:
    """Numbers of neurons of both kinds as one cell: ``200 + 100``."""

    def short(count: float) -> str:
        return f"{count:,.1f}".removesuffix(".0")

    return [f"{short(a)} + {short(f)}" for a, f in zip(table[attn], table[ffn], strict=True)]


def _heads(
    tables: Mapping[str, pd.DataFrame], figures: Mapping[str, go.Figure], facts: Mapping[str, Any]
) -> Section:
    names = {
        "heads_own_type": "top heads of the type itself",
        "heads_other_types": "top heads of another type, none in common",
        "heads_other_types_in_common": "top heads of another type, some in common",
        "random": "random heads",
    }
    count = facts["sizes"]["heads"]
    pairs = tables["heads_summary"].set_index("test")["pairs"]
    apart, common = (pairs[f"heads_other_types{ending}"] for ending in ("", "_in_common"))
    return Section(
        title="Top heads of each type",
        text=[
            "The 1 % of all heads with the highest mean score over a type's prompts, zeroed in all "
            f"prompts. Of {facts['layers'] * facts['heads']} heads that is {count} (at least 1).",
            "Heads zeroed: "
            + "; ".join(
                f"{name}: {', '.join(here['head'])}"
                for name, here in tables["heads_zeroed"].groupby("heads_of", sort=False)
            )
            + ".",
            f"Of {apart + common} pairs of different types, {common} have zeroed heads in common: "
            "there the heads of the other type are, in part or all, the type's own. They are left "
            "out of 'another type, none in common', and stand apart.",
        ],
        items=[
            Shown(
                caption="Drops in per cent, means over pairs (whose heads, which type's prompts)",
                table=tables["heads_summary"].replace({"test": names}),
                columns={
                    "test": "zeroed",
                    "heads": "heads",
                    "pairs": "pairs",
                    "mrr_drop": "MRR",
                    "prob_drop": "p",
                    "gpt2_large_mrr_drop": "*GPT2-large MRR",
                    "gpt2_large_prob_drop": "*GPT2-large p",
                },
            ),
            figures["heads"],
        ],
    )


def _sums(tables: Mapping[str, pd.DataFrame], figures: Mapping[str, go.Figure]) -> Section:
    return Section(
        title="Attention against FFN",
        text=["The sum of a prompt's layer scores, attention and FFN apart: means by type, nats."],
        items=[
            Shown(
                caption="Sums of layer scores, nats",
                table=tables["layer_sums"],
                columns={
                    "knowledge_type": "knowledge type",
                    "attn": "attention",
                    "ffn": "FFN",
                    "llama_7b_attn": "*Llama-7B attention",
                    "llama_7b_ffn": "*Llama-7B FFN",
                },
            ),
            figures["layer_sums"],
        ],
    )


def _shared(figures: Mapping[str, go.Figure], top: int) -> Section:
    return Section(
        title="Neurons that sentences of a type share",
        text=[
            "Neurons that are among the best of more than half of a type's prompts, and raise the "
            "answer there, in per cent of how many the best are. The published numbers are for the "
            f"top {TOP} of large models: of a small one {TOP} is a large part, so that many are "
            f"shared by chance; hence also the top {top}, the same share as of GPT2-large.",
        ],
        items=[figures[f"shared_neurons_top_{size}"] for size in sorted({TOP, top}, reverse=True)],
    )


def _depth(figures: Mapping[str, go.Figure], top: int) -> Section:
    return Section(
        title="Query neurons by depth",
        text=[
            f"Of a prompt's top {TOP} query FFN neurons, those that are among its top {TOP} FFN "
            "value neurons, and those that are not. Only neurons that score above 0 count, so that "
            "a prompt of a small model may have fewer. A line at 1 would be the same number in "
            "every layer. Published are counts of one prompt each, read off the notebooks' plots.",
        ],
        items=[figures[f"query_depth_top_{size}"] for size in sorted({TOP, top}, reverse=True)],
    )


_LIST = {
    "place": "place",
    "label": "here",
    "score": "score, nats",
    "coefficient": "coefficient",
    "source_token": "source",
    "raises": "raises",
    "lowers": "lowers",
    "gpt2_large_label": "*GPT2-large",
    "gpt2_large_score": "*score",
    "llama_7b_label": "*Llama-7B",
    "llama_7b_score": "*score",
}


def _example(
    tables: Mapping[str, pd.DataFrame], figures: Mapping[str, go.Figure], facts: Mapping[str, Any]
) -> Sequence[Section]:
    lists = {
        "example_heads": "Heads of the highest score",
        "example_ffn_neurons": "FFN value neurons",
        "example_attn_neurons": "Attention value neurons: layer, head, dimension, source position",
        "example_query_neurons": "Query FFN neurons of the best attention value neurons",
    }
    shown = [
        Shown(caption=caption, table=tables[name], columns=_LIST) for name, caption in lists.items()
    ]
    predictions = Shown(
        caption="What the model predicts",
        table=tables["example_predictions"].assign(
            token=[[token] for token in tables["example_predictions"]["token"]],
            prob=100 * tables["example_predictions"]["prob"],
        ),
        columns={"token": "token", "prob": "p, %", "log_prob": "log p, nats"},
    )
    positions = Shown(
        caption="Source positions of the best head",
        table=tables["example_positions"].assign(
            token=[[token] for token in tables["example_positions"]["token"]]
        ),
        columns={
            "layer": "layer",
            "head": "head",
            "source_pos": "position",
            "token": "token",
            "attention": "attention",
            "score": "score, nats",
        },
    )
    queries = tables["example_query_layers"]
    wide = queries.assign(
        layer=[
            f"{kind}" if pd.isna(layer) else f"{kind} {layer}"
            for layer, kind in zip(queries["layer"], queries["kind"], strict=True)
        ]
    ).pivot(index="layer", columns="of", values="score")
    wide["best"] = wide.max(axis=1)
    wide = wide.sort_values("best", ascending=False, kind="stable").head(BEST_LAYERS).reset_index()
    query_layers = Shown(
        caption="Query layers, the ten highest: score of what they feed, nats",
        table=wide,
        columns={"layer": "layer", "ffn": "of FFN value neurons", "attn": "of attention neurons"},
    )
    through = Shown(
        caption="A shallow query neuron as later heads carry it on, the most readable first",
        table=tables["example_through_heads"],
        columns={
            "neuron": "neuron",
            "layer": "layer",
            "head": "head",
            "readability": "readability",
            "raises": "raises",
            "lowers": "lowers",
        },
    )
    return [
        Section(
            title="A worked example",
            text=[
                f"One prompt, {facts['example']!r}, from layers to neurons and what set them off. "
                "Published ids and scores are those of GPT2-large and Llama-7B on 'Tim Duncan "
                "plays the sport of': the same list, of another model and another prompt.",
            ],
            items=[
                predictions,
                figures["example_layers"],
                figures["example_heads"],
                shown[0],
                positions,
                shown[1],
                shown[2],
                query_layers,
                shown[3],
                through,
            ],
        )
    ]
