"""The page of ``evaluate``: what became of the answers without each method's best neurons."""

from typing import Any

import pandas as pd

from tl_neuron_attr.evaluate.evaluation import ALL_TYPES, Evaluation
from tl_neuron_attr.markup import Shown
from tl_neuron_attr.report.asked import CONVENTIONS, how_to_read, joined, model, origin, warned
from tl_neuron_attr.report.listed import called
from tl_neuron_attr.report.page import Section, page
from tl_neuron_attr.tables import records
from tl_neuron_attr.views import effect_bars, effect_curves, effect_heatmap, predicted_scatter

HOW = (
    "Each method ranks a prompt's neurons. Its best ones are zeroed, the prompt is run again, and "
    "the answer is looked at: a method that finds the neurons the answer rests on leaves less of "
    "it. Lower is better.",
    "Controls say what zeroing so many neurons does anyway: random ones of the same layers as the "
    "first method's, and others whose contributions have a similar norm. A method that is no lower "
    "than these has not found anything.",
    "Probability and log probability are of the answer; the reciprocal rank is 1 where it is the "
    "model's first choice, 1/2 where the second. Means are over prompts. Log probability weighs "
    "the prompts where little is left, probability those where much is.",
    "Intervals are of 95 %, drawn over prompts. They are of each mean alone; whether two methods "
    "differ is tested on the same prompts: q is the share of false discoveries to expect among all "
    "rows of the table that are at least as sure.",
    "The predicted change is less the sum of the scores of what was zeroed. It is what zeroing "
    "does only if neurons act one by one and nothing stands in for them; how far off it is says "
    "how much they do not. Scores of methods without a unit predict no nats.",
)
METRICS = {"prob": "probability", "log_prob": "log p, nats", "reciprocal_rank": "reciprocal rank"}
_NEURONS = {"ffn": "FFN neurons", "attn": "attention neurons", "both": "neurons of each kind"}
_COUNTS = {
    "knowledge_type": "type",
    "asked": "asked",
    "one_token": "answer is one token",
    "in_top": "of these among the top",
    "kept": "of these kept",
}


def evaluation_page(found: Evaluation) -> str:
    """The whole page; of the same evaluation read back, the same bytes."""
    facts, summary = found.facts, found.summary()
    return page(
        f"Which methods find the neurons behind {facts['prompts']['measured']:,} answers",
        _findings(found, summary),
        [
            *warned([*facts["warnings"], *facts["model_warnings"], *_unused(found)]),
            _asked(found),
            *(_effects(found, summary, kind) for kind in facts["kinds"]),
            _tests(found),
            *_predicted(found),
            *_correlations(found),
            *_left_out(found),
            how_to_read(*HOW),
            origin(facts, facts.get("again")),
        ],
    )


def _findings(found: Evaluation, summary: pd.DataFrame) -> list[str]:
    """The lowest mean probability of each kind, beside its controls."""
    top, said = found.facts["tops"][-1], []
    for kind in found.facts["kinds"]:
        rows = summary.loc[
            (summary["knowledge_type"] == ALL_TYPES)
            & (summary["metric"] == "prob")
            & (summary["kind"] == kind)
            & (summary["top"] == top)
        ]
        controls = rows.loc[rows["method"].isin(found.facts["controls"]["names"])]
        methods = rows.loc[~rows["method"].isin(found.facts["controls"]["names"])]
        if methods.empty:
            continue
        best = methods.loc[methods["after"].idxmin()]
        beside = joined(
            [f"{row['after']:.3f} ({row['method']})" for row in records(controls)] or ["unknown"]
        )
        said.append(
            f"Without the top {top} {_NEURONS[kind]} of {best['method']}, the lowest of "
            f"{len(methods)} methods, the answer's mean probability is {best['after']:.3f} "
            f"[{best['after_low']:.3f}, {best['after_high']:.3f}]; it is {best['before']:.3f} with "
            f"nothing zeroed, and without as many neurons drawn as controls {beside}."
        )
    return said


def _unused(found: Evaluation) -> list[str]:
    measured = found.facts["prompts"]["measured"]
    return [
        f"{name} could not be used on {count:,} of {measured:,} prompts."
        for name, count in found.facts["without"].items()
    ]


def _asked(found: Evaluation) -> Section:
    facts = found.facts
    asked, tops = facts["prompts"], facts["tops"]
    numbers = f"{tops[0]}" if len(tops) == 1 else f"{joined(list(map(str, tops)))}"
    kinds = joined([_NEURONS[kind] for kind in facts["kinds"]])
    return Section(
        title="What was asked",
        text=[
            f"Methods: {joined(list(facts['methods']))}. Zeroed are the best {numbers} {kinds} of "
            f"each. Controls ({joined(facts['controls']['names'])}) are drawn beside "
            f"{facts['controls']['beside']}, with seed {facts['seed']}.",
            f"Prompts: {asked['measured']:,} measured of {asked['kept']:,} kept and "
            f"{asked['dropped']:,} left out.",
            model(facts),
            f"Convention {CONVENTIONS[facts['convention']]}",
        ],
        items=[
            Shown(
                caption="Prompts by knowledge type, from those asked to those kept",
                table=pd.DataFrame(asked["counts"]),
                columns=_COUNTS,
            )
        ],
    )


def _effects(found: Evaluation, summary: pd.DataFrame, kind: str) -> Section:
    tops = found.facts["tops"]
    rows = summary.loc[summary["kind"] == kind]
    several = len(set(rows["knowledge_type"])) > 2
    items: list[Any] = []
    if len(tops) > 1:
        curves = found.curves()
        items += [
            effect_curves(
                curves, metric, kind=kind, title=f"{_capital(METRICS[metric])}, by number of zeroed"
            )
            for metric in ("prob", "log_prob")
        ]
    items.append(
        effect_bars(
            rows, "prob", top=tops[-1], title=f"Mean probability of the answer, top {tops[-1]}"
        )
    )
    if several:
        items.append(
            effect_heatmap(
                rows.loc[rows["knowledge_type"] != ALL_TYPES],
                "prob",
                top=tops[-1],
                title=f"Mean probability by knowledge type, top {tops[-1]}",
            )
        )
    items.append(
        Shown(
            caption="Means over prompts with 95 % intervals, before and after",
            table=rows.assign(metric=called(rows["metric"], METRICS)),
            columns={
                "method": "method",
                "knowledge_type": "prompts of type",
                "metric": "what",
                "top": "zeroed",
                "prompts": "prompts",
                "before": "before",
                "after": "after",
                "after_low": "from",
                "after_high": "to",
                "change": "change",
                "change_low": "from",
                "change_high": "to",
            },
        )
    )
    if len(tops) > 1:
        items.append(_areas(found, kind))
    return Section(title=f"Without the best {_NEURONS[kind]}", items=items)


def _areas(found: Evaluation, kind: str) -> Shown:
    areas = found.areas()
    rows = areas.loc[areas["kind"] == kind]
    return Shown(
        caption="Mean height of each curve over log(1 + N); lower is better",
        table=rows.assign(metric=called(rows["metric"], METRICS)),
        columns={
            "method": "method",
            "knowledge_type": "prompts of type",
            "metric": "what",
            "prompts": "prompts",
            "area": "mean height",
            "low": "from",
            "high": "to",
        },
    )


def _tests(found: Evaluation) -> Section:
    table = found.comparisons()
    return Section(
        title="Which methods differ",
        text=[
            "Every pair of methods on the prompts that both could be used on. Below 0 the first "
            "one leaves less of the answer."
        ],
        items=[
            Shown(
                caption="Difference of means after zeroing, with 95 % intervals and a paired test",
                table=table.assign(metric=called(table["metric"], METRICS)),
                columns={
                    "kind": "neurons",
                    "top": "zeroed",
                    "metric": "what",
                    "method": "method",
                    "other": "less this one",
                    "prompts": "prompts",
                    "difference": "difference",
                    "low": "from",
                    "high": "to",
                    "p": "p",
                    "q": "q",
                },
            )
        ],
    )


def _predicted(found: Evaluation) -> list[Section]:
    calibration = found.calibration()
    if calibration.empty:
        return []
    facts = found.facts
    in_nats = found.predicted.loc[found.predicted["method"].isin(facts["in_nats"])]
    top = facts["tops"][-1]
    drawn = [
        predicted_scatter(
            in_nats,
            top=top,
            kind=kind,
            title=f"Change of log p without the top {top} {_NEURONS[kind]}, prompt by prompt",
        )
        for kind in facts["kinds"]
        if len(in_nats.loc[(in_nats["kind"] == kind) & (in_nats["top"] == top)])
    ]
    return [
        Section(
            title="Predicted and measured",
            items=[
                *drawn,
                Shown(
                    caption="Over prompts: mean predicted and measured change of log p",
                    table=calibration,
                    columns={
                        "method": "method",
                        "kind": "neurons",
                        "top": "zeroed",
                        "unit": "unit of the prediction",
                        "prompts": "prompts",
                        "predicted": "predicted",
                        "measured": "measured, nats",
                        "correlation": "correlation",
                        "rank_correlation": "of ranks",
                        "slope": "slope",
                    },
                ),
            ],
        )
    ]


def _correlations(found: Evaluation) -> list[Section]:
    if found.correlations.empty:
        return []
    return [
        Section(
            title="Rank correlation with exact ablation",
            items=[
                Shown(
                    caption="Spearman's, over all neurons: mean over prompts, 95 % interval",
                    table=found.rank_correlation(),
                    columns={
                        "method": "method",
                        "kind": "neurons",
                        "knowledge_type": "prompts of type",
                        "prompts": "prompts",
                        "spearman": "rank correlation",
                        "low": "from",
                        "high": "to",
                    },
                )
            ],
        )
    ]


def _left_out(found: Evaluation) -> list[Section]:
    """What was not measured: prompts, and methods on prompts; counted, and the first of each."""
    if found.skipped.empty:
        return []
    rows = records(found.skipped)
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        why = row["reason"] if row["method"] else row["reason"].partition(":")[0]
        groups.setdefault((row["method"] or "every method", why), []).append(row["prompt_id"])
    table = pd.DataFrame(
        [(method, why, len(ids), ids[0]) for (method, why), ids in groups.items()],
        columns=["method", "reason", "prompts", "first"],
    )
    return [
        Section(
            title="What was left out",
            text=["Each prompt and its reason stand in skipped.parquet."],
            items=[
                Shown(
                    caption="Prompts that were not measured, by reason",
                    table=table,
                    columns={
                        "method": "not measured by",
                        "reason": "because",
                        "prompts": "prompts",
                        "first": "the first of them",
                    },
                )
            ],
        )
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
