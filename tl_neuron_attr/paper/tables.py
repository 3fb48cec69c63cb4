"""The paper's tables, one function each: what was collected -> a table, published numbers beside.

In go tables of all parts put together (``collect.py``, ``zeroing.py``), out come tables for
people: means over prompts, by knowledge type or over all. A prompt counts once, so that over all
types the larger ones weigh more, as in the paper. MRR is from 0 to 1; probabilities, drops and
shares are in per cent; scores and log-probabilities are in nats.

Columns that begin with ``gpt2_large`` or ``llama_7b`` are published numbers. They are of other
models and of other sentences: of the same *form*, never to be expected.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from tl_neuron_attr.evaluate.effects import CONTROLS
from tl_neuron_attr.evaluate.statistics import LEVEL, RESAMPLES, Means, means
from tl_neuron_attr.neurons import Head
from tl_neuron_attr.paper.published import MODELS, published_example, published_numbers
from tl_neuron_attr.paper.settings import TOP
from tl_neuron_attr.paper.zeroing import PAPER_METHODS

ALL = "all"
ORIGINAL = "original"

_MEASURES = ("mrr", "prob", "log_prob")
_PUBLISHED = {model: model.replace("-", "_") for model in MODELS}


def methods_table(
    effects: pd.DataFrame, facts: Mapping[str, tuple[str, ...]], seed: int
) -> pd.DataFrame:
    """MRR, probability and log-probability after zeroing the top-10 FFN neurons by each method.

    One row a knowledge type (and ``all``) and method, ``original`` first and the controls last:
    means over prompts, with the ends of their 95 % bootstrap intervals, and beside ``all`` the
    published values. ``prob_left`` is the mean probability in per cent of that of ``original``.
    ``well_attested`` marks published rows that are sure.

    Args:
        effects: Of ``zero_neurons``, all prompts together.
        facts: What each ``prompt_id`` is about. The bootstrap draws facts, each with all of its
            prompts: two wordings of one fact are not two independent observations.
        seed: Of the bootstrap.
    """
    rows = effects.loc[effects["test"] == "methods"]
    order = [*PAPER_METHODS, *CONTROLS]
    prompts = rows.drop_duplicates("prompt_id")
    # one array: prompts by runs, the run without anything zeroed first
    values = {
        name: np.concatenate(
            [
                _measure(prompts, name, before=True)[:, None],
                np.stack(
                    [_measure(_of_method(rows, method, prompts), name) for method in order], axis=1
                ),
            ],
            axis=1,
        )
        for name in _MEASURES
    }
    types = prompts["knowledge_type"].to_numpy()
    about, _ = pd.factorize(pd.Series([facts[each] for each in prompts["prompt_id"]]))
    tables = []
    for name in [ALL, *dict.fromkeys(types)]:
        here = types == name if name != ALL else np.ones(len(types), dtype=bool)
        groups = np.unique(about[here], return_inverse=True)[1]
        columns: dict[str, Any] = {"knowledge_type": name, "method": [ORIGINAL, *order]}
        for measure, each in values.items():
            columns |= _with_ends(measure, means(each[here], groups, seed))
        left = ratio_of_means(values["prob"][here], groups, seed)
        columns |= _with_ends("prob_left", Means(*(100 * each for each in left)))
        columns |= {"prompts": int(here.sum()), "facts": int(groups.max()) + 1}
        tables.append(pd.DataFrame(columns))
    table = pd.concat(tables, ignore_index=True)
    letters = {method: letter for letter, method in zip("abcdefgh", PAPER_METHODS, strict=True)}
    of_each = [letters.get(method) for method in table["method"]]
    table.insert(1, "letter", pd.array(of_each, dtype="string"))
    return _beside_methods(table)


def ratio_of_means(
    values: Float[np.ndarray, "row column"], groups: Int[np.ndarray, " row"], seed: int
) -> Means:
    """Mean of each column divided by that of the first, with its percentile bootstrap interval.

    Both means are of the same draw of groups: what a prompt has in common before and after cancels.
    A row without a value in a column is left out of both means there.
    """
    present = ~np.isnan(values)
    n_groups = int(groups.max()) + 1
    after, before = np.zeros((2, n_groups, values.shape[1]))
    np.add.at(after, groups, np.where(present, values, 0.0))
    np.add.at(before, groups, np.where(present, values[:, :1], 0.0))
    rng = np.random.default_rng(seed)
    found = np.empty((RESAMPLES, values.shape[1]))
    with np.errstate(invalid="ignore", divide="ignore"):
        for draw in range(RESAMPLES):
            times = np.bincount(rng.integers(0, n_groups, n_groups), minlength=n_groups)
            found[draw] = (times @ after) / (times @ before)
        ratio = after.sum(0) / before.sum(0)
    low, high = np.full((2, values.shape[1]), np.nan)
    some = present.any(0)  # a draw may still have missed all rows of a column that few rows have
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low[some], high[some] = np.nanquantile(found[:, some], ends, axis=0)
    return Means(ratio, low, high)


def _with_ends(name: str, found: Means) -> dict[str, Float[np.ndarray, " column"]]:
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _of_method(rows: pd.DataFrame, method: str, prompts: pd.DataFrame) -> pd.DataFrame:
    """One method's rows, in the order of the prompts; empty cells where it has none."""
    of_method = rows.loc[rows["method"] == method].set_index("prompt_id")
    return of_method.reindex(prompts["prompt_id"])


def _beside_methods(table: pd.DataFrame) -> pd.DataFrame:
    published = {row["method"]: row for row in published_numbers()["methods"]}
    overall = table["knowledge_type"] == ALL
    for model, column in _PUBLISHED.items():
        for place, measure in enumerate(("mrr", "prob")):
            table[f"{column}_{measure}"] = [
                published[method][model][place] if here and method in published else np.nan
                for method, here in zip(table["method"], overall, strict=True)
            ]
    table["well_attested"] = pd.array(
        [
            published[method]["well_attested"] if here and method in published else None
            for method, here in zip(table["method"], overall, strict=True)
        ],
        dtype="boolean",
    )
    return table


def drops_table(effects: pd.DataFrame) -> pd.DataFrame:
    """How far MRR and probability drop without many value, or shallow query, neurons.

    One row a test and scale: how many neurons were zeroed (means over prompts), the drops in per
    cent of the means, the same without random neurons of the same layers, and the published drops.
    Random neurons are as many, or all others of a layer where more than half of it was chosen:
    ``random_ffn`` and ``random_attn`` say how many that were.
    """
    published = {row["what"]: row for row in published_numbers()["drops"]}
    rows = []
    tests = effects.loc[effects["test"] != "methods"]
    cells = tests[["test", "scale"]].drop_duplicates().to_numpy().tolist()
    for test, scale in cells:
        here = tests.loc[(tests["test"] == test) & (tests["scale"] == scale)]
        ours, random = here.loc[here["method"] == test], here.loc[here["method"] == "random"]
        wanted = published[test]
        rows.append(
            {
                "test": test,
                "scale": scale,
                "ffn": ours["ffn"].mean(),
                "attn": ours["attn"].mean(),
                "random_ffn": random["ffn"].mean(),
                "random_attn": random["attn"].mean(),
                "prompts": len(ours),
                **_drops(ours),
                **_drops(random, "random_"),
                **_published_pair(wanted, ("mrr_drop", "prob_drop")),
            }
        )
    return pd.DataFrame(rows)


def _published_pair(wanted: dict[str, Any], names: Iterable[str]) -> dict[str, float]:
    found = {}
    columns = {**_PUBLISHED, "random": "published_random"}
    for key, column in columns.items():
        values = wanted[key] or (np.nan, np.nan)
        found |= {f"{column}_{name}": value for name, value in zip(names, values, strict=True)}
    return found


def heads_table(effects: pd.DataFrame) -> pd.DataFrame:
    """How far MRR and probability of each type drop without the top heads of each.

    One row a type whose heads are zeroed (``heads_of``; ``random``) and a type that is measured.
    """
    rows = []
    for heads_of, name in effects[["heads_of", "knowledge_type"]].drop_duplicates().to_numpy():
        here = effects.loc[(effects["heads_of"] == heads_of) & (effects["knowledge_type"] == name)]
        rows.append(
            {"heads_of": heads_of, "knowledge_type": name, "prompts": len(here), **_drops(here)}
        )
    return pd.DataFrame(rows)


def heads_summary(drops: pd.DataFrame, heads: Mapping[str, Collection[Head]]) -> pd.DataFrame:
    """The same in four lines, means over pairs of a type whose heads are zeroed and one measured.

    ``heads_own_type``: both are the same type. ``heads_other_types``: two types whose zeroed heads
    have none in common. ``heads_other_types_in_common``: two types that share at least one, so that
    the other type's heads are (in part) the type's own. ``random``. ``pairs`` counts them; without
    any the drops are NaN. ``heads`` is how many are zeroed at once.

    Args:
        drops: Of ``heads_table``.
        heads: Which were zeroed, by type; and ``random``.
    """
    published = {row["what"]: row for row in published_numbers()["drops"]}
    random = drops["heads_of"] == "random"
    own = drops["heads_of"] == drops["knowledge_type"]
    pairs = drops[["heads_of", "knowledge_type"]].to_numpy().tolist()
    common = np.array([not set(heads[of]).isdisjoint(heads[name]) for of, name in pairs], bool)
    rows = []
    for what, here in (
        ("heads_own_type", drops[own]),
        ("heads_other_types", drops[~own & ~random & ~common]),
        ("heads_other_types_in_common", drops[~own & ~random & common]),
        ("random", drops[random]),
    ):
        wanted = published.get(what, dict.fromkeys((*MODELS, "random")))
        pair = _published_pair(wanted, ("mrr_drop", "prob_drop"))
        rows.append(
            {
                "test": what,
                "heads": len(heads["random"]),
                "pairs": len(here),
                "mrr_drop": here["mrr_drop"].mean(),
                "prob_drop": here["prob_drop"].mean(),
                **{name: value for name, value in pair.items() if "random" not in name},
            }
        )
    return pd.DataFrame(rows)


def layer_sums(layers: pd.DataFrame) -> pd.DataFrame:
    """Sum of the scores of all attention layers, and of all FFN layers, by knowledge type."""
    every = pd.concat([layers, layers.assign(knowledge_type=ALL)])
    mean = every.pivot_table("score", "knowledge_type", "kind", aggfunc="mean", sort=False)
    # each prompt has every layer once
    n_layers = len(set(layers["layer"]))
    table = pd.DataFrame(
        {
            "knowledge_type": mean.index.tolist(),
            **{kind: n_layers * mean[kind].to_numpy() for kind in ("attn", "ffn")},
        }
    )
    for row in published_numbers()["layer_score_sums"]:
        for kind, value in row["llama-7b"].items():
            here = table["knowledge_type"] == row["knowledge_type"]
            table.loc[here, f"llama_7b_{kind}"] = value
    return table


def chosen_layers(chosen: pd.DataFrame, prompts: int, n_layers: int) -> pd.DataFrame:
    """FFN neurons that each method chose, by layer: how many a prompt."""
    counts: Counter[tuple[str, int]] = Counter()
    columns = (chosen[name].tolist() for name in ("method", "layer", "neurons"))
    for method, layer, count in zip(*columns, strict=True):
        counts[method, layer] += count
    rows = [
        (method, layer, counts[method, layer] / prompts)
        for method in PAPER_METHODS
        for layer in range(n_layers)
    ]
    return pd.DataFrame(rows, columns=["method", "layer", "neurons"])


def segment_table(segment: pd.DataFrame) -> pd.DataFrame:
    """log p and p of the answer from the input to the final hidden state, by type and over all."""
    points = segment.assign(prob=100 * np.exp(segment["log_prob"]))
    together = pd.concat([points.assign(knowledge_type=ALL), points])
    return pd.DataFrame(
        together.groupby(["knowledge_type", "part"], sort=False, as_index=False).agg(
            {"log_prob": "mean", "prob": "mean"}
        )
    )


def share_curve(shares: pd.DataFrame) -> pd.DataFrame:
    """Part of all that raises the answer held by the top neurons: means of proven ends, per cent.

    Numbers of neurons that not all sampled prompts have (long prompts have more attention neurons)
    are left out.
    """
    found = pd.DataFrame(
        shares.groupby(["kind", "top"], as_index=False).agg(
            prompts=("prompt_id", "size"),
            share_lower=("share_lower", "mean"),
            share_upper=("share_upper", "mean"),
        )
    )
    found[["share_lower", "share_upper"]] *= 100
    sampled = len(set(shares["prompt_id"]))
    return found.loc[found["prompts"] == sampled].reset_index(drop=True)


def shared_neurons(neurons: pd.DataFrame, prompts: dict[str, int]) -> pd.DataFrame:
    """Neurons among the top in more than half of a type's prompts, in per cent of the top.

    A neuron counts where it raises the answer: a prompt of a small model may have fewer than 300.

    Attention neurons are those of a head and dimension, whatever their source position. Published
    are one number for value and one for query neurons; which kinds the former counts is not known.
    """
    keys = ["knowledge_type", "role", "kind", "top"]
    counts = pd.DataFrame(
        neurons.groupby(
            [*keys, "layer", "head", "index"], sort=False, dropna=False, as_index=False
        ).agg({"prompts": "sum"})
    )
    sizes = [prompts[name] for name in counts["knowledge_type"]]
    counts["shared"] = 2 * counts["prompts"].to_numpy() > np.array(sizes)
    table = pd.DataFrame(counts.groupby(keys, sort=False, as_index=False).agg({"shared": "sum"}))
    table["percent"] = 100 * table["shared"] / table["top"]
    for row in published_numbers()["shared_percent"]:
        here = (table["role"] == row["role"]) & (table["top"] == TOP)
        for model, column in _PUBLISHED.items():
            table.loc[here, f"{column}_percent"] = row[model]
    return table


def query_depth(split: pd.DataFrame) -> pd.DataFrame:
    """By layer, how many query FFN neurons of a prompt are value neurons too, and how many not.

    ``source`` is ``here`` or a published model, of its one example prompt; ``depth`` is the layer
    from 0 to 1.
    """
    found = pd.DataFrame(
        split.groupby(["top", "layer"], as_index=False).agg(
            {"query_only": "mean", "query_and_value": "mean"}
        )
    )
    found.insert(0, "source", "here")
    tables = [found]
    for model in MODELS:
        counts = published_example(model).neurons_by_layer
        tables.append(
            pd.DataFrame(
                {
                    "source": model,
                    "top": TOP,
                    "layer": range(len(counts["query_only"])),
                    "query_only": counts["query_only"],
                    "query_and_value": counts["query_and_value"],
                }
            )
        )
    table = pd.concat(tables, ignore_index=True)
    deepest = table.groupby("source")["layer"].transform("max")
    table.insert(3, "depth", table["layer"] / deepest.clip(lower=1))
    return table


def _measure(rows: pd.DataFrame, name: str, *, before: bool = False) -> np.ndarray:
    ending = "_before" if before else ""
    if name == "mrr":
        return 1 / rows[f"rank{ending}"].to_numpy(dtype=float)
    log_prob = rows[f"log_prob{ending}"].to_numpy(dtype=float)
    return log_prob if name == "log_prob" else 100 * np.exp(log_prob)


def _drops(rows: pd.DataFrame, prefix: str = "") -> dict[str, float]:
    """By how much, in per cent of what it was, the mean falls."""
    found = {}
    for name in ("mrr", "prob"):
        before = _measure(rows, name, before=True).mean()
        found[f"{prefix}{name}_drop"] = 100 * (1 - _measure(rows, name).mean() / before)
    return found
