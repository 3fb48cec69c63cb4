"""What came out: the result of an evaluation, from which every table is made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from tl_neuron_attr.display import box, grid, line, next_calls
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.evaluate.effects import CONTROLS
from tl_neuron_attr.evaluate.statistics import (
    area_weights,
    false_discovery_q,
    means,
    pearson,
    sign_flip_p,
    spearman,
)
from tl_neuron_attr.files import check_writable
from tl_neuron_attr.styled import grid_of
from tl_neuron_attr.tables import write_tables

EFFECT_COLUMNS = (
    "prompt_id",
    "knowledge_type",
    "method",
    "kind",
    "top",
    "metric",
    "before",
    "after",
)
METRICS = ("reciprocal_rank", "prob", "log_prob")
PROMPT_COLUMNS = ("prompt_id", "knowledge_type", "relation", "subject", "answer", "text")
SKIPPED_COLUMNS = ("prompt_id", "method", "reason")
PREDICTED_COLUMNS = (
    "prompt_id",
    "knowledge_type",
    "method",
    "kind",
    "top",
    "predicted",
    "measured",
)
CORRELATION_COLUMNS = ("prompt_id", "knowledge_type", "method", "kind", "spearman")
RANKING_COLUMNS = (
    "prompt_id",
    "knowledge_type",
    "method",
    "kind",
    "rank",
    "layer",
    "head",
    "index",
    "score",
)
CURVE_COLUMNS = ("knowledge_type", "method", "kind", "metric", "top", "mean", "low", "high")

ALL_TYPES = "all"

By = Literal["prompt", "fact"]
"""What intervals and tests draw: each prompt for itself, or all prompts about one fact together."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What became of the answers without each method's best neurons, prompt by prompt.

    Holds tables alone, and neither the model nor any tensor. Intervals hold 95 % of 2,000 bootstrap
    resamples, drawn with ``facts["seed"]``: the same tables give the same numbers. They are over
    prompts; ``by="fact"`` draws all prompts about one subject of one relation together, which says
    how sure one can be of *other facts*, and gives wider intervals where a fact has several
    phrasings.
    """

    effects: pd.DataFrame = field(repr=False)
    """One row a prompt, method, kind, number of neurons and metric, with the metric's value before
    and after. ``log_prob`` is in nats. Controls are the methods ``random`` and ``norm_matched``."""
    prompts: pd.DataFrame = field(repr=False)
    """The prompts measured: what each asks about, and its text."""
    skipped: pd.DataFrame = field(repr=False)
    """Prompts left out, and why; with a ``method`` those left out of that method alone."""
    predicted: pd.DataFrame = field(repr=False)
    """Per prompt, method, kind and number of neurons: ``predicted``, less the sum of the method's
    scores of what was zeroed, beside ``measured``, the change of log p(answer) in nats."""
    correlations: pd.DataFrame = field(repr=False)
    """Per prompt, method and kind: ``spearman``, the rank correlation of the method's scores with
    exact ablation's, over all neurons. Empty unless ``evaluate(..., correlate=True)``."""
    rankings: pd.DataFrame = field(repr=False, default_factory=lambda: ranking_table([]))
    """Which neurons each method chose: its best of each kind, one row a prompt, method, kind and
    neuron, with ``rank`` (from 1), ``layer``, ``head`` (empty for FFN neurons), ``index`` and the
    method's own ``score``. As many as the largest ``top``, and 100 at the most."""
    facts: Mapping[str, Any]
    """Where these numbers come from, ready for JSON: model, prompts, methods, seed, versions."""

    def __repr__(self) -> str:
        left = f", {len(self.skipped)} left out" * bool(len(self.skipped))
        return (
            f"Evaluation of {', '.join(self.facts['methods'])} on {len(self.prompts)} prompts{left}"
        )

    def _repr_html_(self) -> str:
        """For notebooks: plain means, so that nothing is resampled."""
        grid_ = self._grid
        means_ = {"before": grid_.before, "after": grid_.after}
        table = grid_.columns.assign(**{name: np.nanmean(v, 0) for name, v in means_.items()})
        table = table.assign(change=table["after"] - table["before"])
        shown = pd.DataFrame(table[table["metric"] == "log_prob"])
        return box(
            repr(self),
            grid(
                grid_of(
                    shown,
                    "Mean log p(answer), nats, without each method's best neurons",
                    columns=("method", "kind", "top", "before", "after", "change"),
                )
            ),
            line(f"controls: {', '.join(CONTROLS)}; the lower the change, the better the method"),
            next_calls(
                {
                    "evaluation.summary()": "every metric, with intervals",
                    "evaluation.comparisons()": "methods tested in pairs",
                    "views.effect_curves(evaluation.curves())": "the curves",
                }
            ),
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods measured, controls last."""
        return (*self.facts["methods"], *CONTROLS)

    def summary(self, *, by: By = "prompt") -> pd.DataFrame:
        """Means over the prompts of each knowledge type, and of all: one row a condition.

        ``knowledge_type, method, kind, top, metric, prompts, before, after, after_low, after_high,
        change, change_low, change_high``: mean before and after, the interval of the mean after,
        and the mean change with its own. ``reciprocal_rank`` averages to the MRR.
        """
        grid = self._grid
        change = grid.after - grid.before
        parts = [
            self._means(grid.columns, values, name, by)
            for name, values in (("before", grid.before), ("after", grid.after), ("change", change))
        ]
        table = pd.concat([parts[0], *(part.iloc[:, -3:] for part in parts[1:])], axis=1)
        return table.drop(columns=["before_low", "before_high"])

    def curves(self, *, by: By = "prompt") -> pd.DataFrame:
        """The same as curves over the number of neurons, 0 included (the prompt as it is).

        ``knowledge_type, method, kind, metric, top, mean, low, high``.
        """
        grid = self._grid
        first = ~grid.columns.duplicated(["method", "kind", "metric"]).to_numpy()
        start = self._means(
            grid.columns.loc[first].assign(top=0), grid.before[:, first], "mean", by
        )
        table = pd.concat([start, self._means(grid.columns, grid.after, "mean", by)])
        table = table.rename(columns={"mean_low": "low", "mean_high": "high"})[list(CURVE_COLUMNS)]
        orders = {
            "knowledge_type": [name for name, _ in grid.types()],
            "kind": self.facts["kinds"],
            "method": self.methods,
            "metric": METRICS,
        }
        places = [_places(table[name].tolist(), order) for name, order in orders.items()]
        order = np.lexsort([np.array(table["top"].tolist()), *reversed(places)])
        return table.iloc[order].reset_index(drop=True)

    def areas(self, *, log: bool = True, by: By = "prompt") -> pd.DataFrame:
        """Area under each curve, divided by its width: the curve's mean height, in its own unit.

        The trapezoid rule over log(1 + N), as numbers of neurons are mostly spaced by factors, or
        with ``log=False`` over N. Lower is better. ``knowledge_type, method, kind, metric, prompts,
        area, low, high``.
        """
        columns, values = self._areas(log)
        table = self._means(columns, values, "area", by)
        return table.rename(columns={"area_low": "low", "area_high": "high"})

    def comparisons(
        self,
        *,
        to: str | None = None,
        metrics: Sequence[str] = METRICS,
        area: bool = False,
        by: By = "prompt",
    ) -> pd.DataFrame:
        """Which method is better, tested: every pair of methods on the prompts that both have.

        ``kind, top, metric, method, other, prompts, difference, low, high, p, q``: ``difference``
        is the mean of ``after`` by ``method`` less that by ``other``, below 0 where ``method``
        lowers the answer more. ``p`` is of a two-sided sign-flip test of that mean (9,999 flips, so
        no p is below 0.0001); ``q`` is ``p`` after Benjamini-Hochberg over all rows of the table.
        With ``area`` the areas under the curves (over log(1 + N)) are compared, and there is no
        ``top``. ``to`` compares every method with that one alone.

        Raises:
            InputError: If ``to`` is no method of this evaluation, or a metric is unknown.
        """
        if to is not None and to not in self.methods:
            raise InputError(f"to must be one of {', '.join(self.methods)}; got {to!r}")
        for metric in metrics:
            if metric not in METRICS:
                raise InputError(f"a metric is one of {', '.join(METRICS)}; got {metric!r}")
        columns, values = self._areas(True) if area else (self._grid.columns, self._grid.after)
        keys = ["kind", *([] if area else ["top"]), "metric"]
        found = []
        for of_key in _parts(columns.loc[columns["metric"].isin(metrics)], keys):
            place = dict(zip(of_key["method"], of_key.index, strict=True))
            key = of_key.iloc[0][keys].tolist()
            found += [(*key, *pair, *(place[name] for name in pair)) for pair in _pairs(place, to)]
        table = pd.DataFrame(found, columns=[*keys, "method", "other", "first", "second"])
        differences = values[:, table["first"]] - values[:, table["second"]]
        kept = ~np.isnan(differences).all(0)
        table, differences = table.loc[kept].reset_index(drop=True), differences[:, kept]
        groups = self._groups(by, np.arange(len(self.prompts)))
        mean = means(differences, groups, self._seed)
        p = sign_flip_p(differences, groups, self._seed)
        table = table.drop(columns=["first", "second"]).assign(
            prompts=(~np.isnan(differences)).sum(0),
            difference=mean.mean,
            low=mean.low,
            high=mean.high,
            p=p,
            q=false_discovery_q(p),
        )
        return _joined([table], strings=("kind", "metric", "method", "other"))

    def calibration(self) -> pd.DataFrame:
        """Predicted beside measured, over the prompts: a row a method, kind and number of neurons.

        ``method, kind, top, unit, prompts, predicted, measured, correlation, rank_correlation,
        slope``: means, Pearson's and Spearman's correlation over prompts, and the least-squares
        slope of measured on predicted (1 where the sum of the scores is what zeroing does).
        ``unit`` is ``nats`` where scores are changes of log p(answer); elsewhere sums of scores
        predict no nats, and means and slope are in the method's own unit.
        """
        rows = []
        for of_key in _parts(self.predicted, ["method", "kind", "top"]):
            method, kind, top = of_key.iloc[0][["method", "kind", "top"]]
            x, y = (of_key[name].to_numpy(dtype=float) for name in ("predicted", "measured"))
            spread = ((x - x.mean()) ** 2).sum()
            slope = ((x - x.mean()) * (y - y.mean())).sum() / spread if spread > 0 else np.nan
            unit = "nats" if method in self.facts["in_nats"] else "score"
            numbers = (len(x), x.mean(), y.mean(), pearson(x, y), spearman(x, y), slope)
            rows.append((method, kind, top, unit, *numbers))
        names = ["method", "kind", "top", "unit", "prompts", "predicted", "measured"]
        names += ["correlation", "rank_correlation", "slope"]
        return _joined([pd.DataFrame(rows, columns=names)], strings=("method", "kind", "unit"))

    def rank_correlation(self, *, by: By = "prompt") -> pd.DataFrame:
        """Spearman's rank correlation with exact ablation: its mean over prompts, with interval.

        ``knowledge_type, method, kind, prompts, spearman, low, high``. Prompts where a method's
        scores are all the same have none, and are not counted.

        Raises:
            InputError: If correlations were not asked for.
        """
        if self.correlations.empty:
            raise InputError(
                "there are no rank correlations; ask for them with evaluate(..., correlate=True)"
            )
        grid = _Grid.of(self.correlations, self.prompts, ["method", "kind"], ["spearman"])
        table = self._means(grid.columns, grid.values["spearman"], "spearman", by)
        return table.rename(columns={"spearman_low": "low", "spearman_high": "high"})

    def save(
        self, directory: str | Path, *, report: bool = False, again: str | None = None
    ) -> None:
        """Write every table (Parquet; ``summary`` also as CSV) and ``evaluation.json``; with
        ``report`` also ``report.html``, to look at in a browser.

        ``again`` is the command that makes it again, for ``evaluation.json``. All files appear
        together at the end, or none; a report of an earlier run is removed. The same evaluation
        gives the same bytes.

        Raises:
            InputError: If the directory cannot be written to.
            OutputError: If writing fails on the way; nothing has changed then.
        """
        path = check_writable(directory)
        summary = self.summary()
        tables = {
            "effects": self.effects,
            "summary": summary,
            "curves": self.curves(),
            "areas": self.areas(),
            "comparisons": self.comparisons(),
            "predicted": self.predicted,
            "rankings": self.rankings,
            "calibration": self.calibration(),
            "prompts": self.prompts,
            "skipped": self.skipped,
        }
        if not self.correlations.empty:
            tables["correlations"] = self.correlations
        facts = {**self.facts, **({} if again is None else {"again": again})}
        texts = {"summary.csv": summary.to_csv(index=False)}
        if report:
            from tl_neuron_attr.report.evaluation import evaluation_page

            texts["report.html"] = evaluation_page(replace(self, facts=facts))
        texts["evaluation.json"] = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        stale = [] if "correlations" in tables else ["correlations"]
        write_tables(path, tables, texts, stale, [] if report else ["report.html"])

    # --- what tables are made from ------------------------------------------------------------

    @property
    def _seed(self) -> int:
        return int(self.facts["seed"])

    @cached_property
    def _grid(self) -> "_Grid":
        keys = ["method", "kind", "top", "metric"]
        return _Grid.of(self.effects, self.prompts, keys, ["before", "after"])

    def _means(
        self, columns: pd.DataFrame, values: Float[np.ndarray, "row column"], name: str, by: By
    ) -> pd.DataFrame:
        """Means with intervals, as columns ``name``, ``name_low``, ``name_high``, by type."""
        tables = []
        for knowledge_type, rows in self._grid.types():
            found = means(values[rows], self._groups(by, rows), self._seed)
            ends = dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
            table = columns.assign(prompts=(~np.isnan(values[rows])).sum(0), **ends)
            table.insert(0, "knowledge_type", knowledge_type)
            tables.append(table[table["prompts"] > 0])
        return _joined(tables, strings=("knowledge_type",))

    def _groups(self, by: By, rows: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
        """What is drawn as one, numbered from 0 among these rows."""
        if by not in ("prompt", "fact"):
            raise InputError(f"by must be 'prompt' or 'fact', got {by!r}")
        if by == "prompt":
            return np.arange(len(rows))
        names = self.prompts[["knowledge_type", "relation", "subject"]].astype(str)
        facts, _ = pd.MultiIndex.from_frame(pd.DataFrame(names)).factorize()
        return np.unique(facts[rows], return_inverse=True)[1]

    def _areas(self, log: bool) -> tuple[pd.DataFrame, Float[np.ndarray, "row column"]]:
        """The area under each prompt's own curve; NaN where a point is missing."""
        grid = self._grid
        columns, values = [], []
        names = ["method", "kind", "metric"]
        for of_key in _parts(grid.columns, names):
            ordered = of_key.sort_values("top", kind="stable")
            weights = area_weights(np.array([0, *ordered["top"]]), log=log)
            points = ordered.index.to_numpy()
            curve = np.hstack([grid.before[:, points[:1]], grid.after[:, points]])
            columns.append(of_key.iloc[0][names].tolist())
            values.append(curve @ weights)
        return pd.DataFrame(columns, columns=names).astype("string"), np.stack(values, axis=1)


def load_evaluation(directory: str | Path) -> Evaluation:
    """The evaluation that ``save`` wrote there.

    Raises:
        InputError: If it is not whole.
    """
    path = Path(directory)
    try:
        facts = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))
        names = ("effects", "prompts", "skipped", "predicted")
        tables = {name: _read(path / f"{name}.parquet") for name in names}
        # of the first nothing is saved where it was not asked for, of the second by old versions
        some = {
            "correlations": pd.DataFrame(columns=list(CORRELATION_COLUMNS)),
            "rankings": ranking_table([]),
        }
        for name in some:
            if (path / f"{name}.parquet").exists():
                some[name] = _read(path / f"{name}.parquet")
        if not isinstance(facts, dict):
            raise ValueError("evaluation.json holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"there is no whole evaluation in {str(directory)!r} ({error}); make one with "
            "evaluate(...).save(directory)"
        ) from error
    return Evaluation(**tables, **some, facts=facts)


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except OSError:
        raise
    except Exception as error:  # what pyarrow and pandas raise for a damaged file is of many kinds
        raise ValueError(f"{path.name} is damaged: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The best neurons of one kind, by one method, of one prompt: best first."""

    prompt_id: str
    knowledge_type: str
    method: str
    kind: str
    layer: Int[np.ndarray, " rank"]
    head: Int[np.ndarray, " rank"] | None
    index: Int[np.ndarray, " rank"]
    score: Float[np.ndarray, " rank"]


def ranking_table(found: Sequence[Chosen]) -> pd.DataFrame:
    """One row a neuron."""
    counts = [len(each.index) for each in found]
    words = {
        name: pd.array([getattr(each, name) for each in found], dtype="string").repeat(counts)
        for name in ("prompt_id", "knowledge_type", "method", "kind")
    }
    heads = [np.full(len(each.index), np.nan) if each.head is None else each.head for each in found]
    columns = {
        **words,
        "rank": _joined_arrays([np.arange(1, count + 1) for count in counts], "int64"),
        "layer": _joined_arrays([each.layer for each in found], "int64"),
        "head": pd.array(_joined_arrays(heads, "float64"), dtype="Int64"),
        "index": _joined_arrays([each.index for each in found], "int64"),
        "score": _joined_arrays([each.score for each in found], "float64"),
    }
    return pd.DataFrame(columns, columns=list(RANKING_COLUMNS))


def _joined_arrays(parts: Sequence[np.ndarray], dtype: str) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """A long table as arrays: a row a prompt, a column whatever ``keys`` tell apart."""

    columns: pd.DataFrame
    values: Mapping[str, Float[np.ndarray, "row column"]]
    """NaN where a prompt lacks the column."""
    knowledge_types: tuple[str, ...]

    @classmethod
    def of(
        cls,
        table: pd.DataFrame,
        prompts: pd.DataFrame,
        keys: list[str],
        values: Sequence[str],
    ) -> "_Grid":
        row = pd.Index(prompts["prompt_id"]).get_indexer(pd.Index(table["prompt_id"]))
        of_rows = pd.DataFrame(table, columns=keys)
        columns = pd.DataFrame(of_rows.drop_duplicates().reset_index(drop=True))
        each = pd.MultiIndex.from_frame(columns)
        column = each.get_indexer(pd.MultiIndex.from_frame(of_rows))
        arrays = {}
        for name in values:
            array = np.full((len(prompts), len(columns)), np.nan)
            array[row, column] = table[name].to_numpy(dtype=float)
            arrays[name] = array
        return cls(
            columns=columns,
            values=arrays,
            knowledge_types=tuple(prompts["knowledge_type"].tolist()),
        )

    @property
    def before(self) -> Float[np.ndarray, "row column"]:
        return self.values["before"]

    @property
    def after(self) -> Float[np.ndarray, "row column"]:
        return self.values["after"]

    def types(self) -> list[tuple[str, Int[np.ndarray, " row"]]]:
        """The rows of all prompts, and of each knowledge type in the order they come."""
        of_row = np.array(self.knowledge_types)
        each = [(name, (of_row == name).nonzero()[0]) for name in dict.fromkeys(of_row.tolist())]
        return [(ALL_TYPES, np.arange(len(of_row))), *each]


def _pairs(methods: Mapping[str, int], to: str | None) -> list[tuple[str, str]]:
    if to is None:
        return list(combinations(methods, 2))
    return [(name, to) for name in methods if name != to and to in methods]


def _parts(table: pd.DataFrame, keys: Sequence[str]) -> list[pd.DataFrame]:
    """The rows that agree in ``keys``, in the order in which they come."""
    return [part for _, part in table.groupby(list(keys), sort=False)]


def _places(values: Sequence[str], order: Sequence[str]) -> Int[np.ndarray, " row"]:
    place = {name: number for number, name in enumerate(order)}
    return np.array([place[value] for value in values])


def _joined(tables: Sequence[pd.DataFrame], *, strings: Sequence[str]) -> pd.DataFrame:
    whole = pd.concat(tables, ignore_index=True)
    return whole.astype({name: "string" for name in strings})
