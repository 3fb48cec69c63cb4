"""What methods agree on, and what zeroing does to answers, over a run's prompts.

Like the rest of a summary: shard by shard, added up in their order in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from tl_neuron_attr.runs.totals import (
    KINDS,
    NEURON_FIELDS,
    NOTHING,
    Totals,
    codes,
    neuron_keys,
    numbers,
    of_all_types,
    packed,
    read,
    totals,
    unpacked,
)

_KINDS = tuple(KINDS)

_BY = ["knowledge_type", "role", "set", "kind", "count"]
_MEANS = [
    "zeroed",
    "log_prob_before",
    "log_prob",
    "change",
    "prob_before",
    "prob",
    "mrr_before",
    "mrr",
]
_PROBS = ["prob_before", "prob"]


@dataclass(kw_only=True)
class MethodTotals:
    """What each method lists, and what each two of them list alike, of the shards so far."""

    methods: Sequence[str]
    neurons: dict[str, Totals] = field(init=False)
    overlaps: dict[tuple[str, str], Totals] = field(init=False)
    """By type and kind: in how many prompts either lists any, and the sum of overlaps."""

    def __post_init__(self) -> None:
        self.neurons = dict.fromkeys(self.methods, NOTHING)
        self.overlaps = dict.fromkeys(combinations(self.methods, 2), NOTHING)

    def add(self, path: Path, types: dict[str, int]) -> None:
        """Another shard."""
        table = read(path, (*NEURON_FIELDS, "method"))
        of_method = codes(table, "method", {name: n for n, name in enumerate(self.methods)})
        keys, rows = neuron_keys(table, types), numbers(table, "row")
        score = numbers(table, "score")
        lists = _Lists.of(keys, rows)
        listed = {}
        for number, name in enumerate(self.methods):
            here = of_method == number
            self.neurons[name] += totals(keys[here], rows[here], score[here])
            listed[name] = np.sort(lists.neuron[here])
        for pair in self.overlaps:
            self.overlaps[pair] += lists.overlaps(*(listed[name] for name in pair))


@dataclass(frozen=True, kw_only=True)
class _Lists:
    """The lists of a shard: of each prompt and kind one for each method."""

    neuron: np.ndarray
    """Of each row a number, the same where prompt, kind and neuron are."""
    per_list: int
    """Divided by this it is that of prompt and kind."""
    keys: np.ndarray
    """What each number of prompt and kind is about: type and kind, packed."""

    @classmethod
    def of(cls, keys: np.ndarray, rows: np.ndarray) -> "_Lists":
        """From rows that say what they are about, and of which prompt."""
        fields = unpacked(keys)
        neurons, place = np.unique(keys, return_inverse=True)
        prompts = rows.astype(np.int64) - (int(rows.min()) if len(rows) else 0)
        group = prompts * len(KINDS) + fields["kind"]
        of_group = np.zeros(int(group.max()) + 1 if len(group) else 0, dtype=np.int64)
        of_group[group] = packed(type=fields["type"], kind=fields["kind"])
        per_list = max(1, len(neurons))
        return cls(neuron=group * per_list + place, per_list=per_list, keys=of_group)

    def overlaps(self, one: np.ndarray, other: np.ndarray) -> Totals:
        """Of two methods' rows (sorted), added up by type and kind."""
        common = np.intersect1d(one, other, assume_unique=True)
        counts = [
            np.bincount(some // self.per_list, minlength=len(self.keys))
            for some in (one, other, common)
        ]
        either = counts[0] + counts[1] - counts[2]
        there = either.nonzero()[0]
        return totals(self.keys[there], there, counts[2][there] / either[there])


def overlap_table(methods: MethodTotals, types: Sequence[str], all_types: str) -> pd.DataFrame:
    """``knowledge_type, method, other, kind, prompts, overlap``; each two methods once."""
    rows = []
    for (method, other), of_pair in methods.overlaps.items():
        for each, everywhere in ((of_pair, False), (of_all_types(of_pair), True)):
            fields = unpacked(each.keys)
            for code, kind, prompts, score in zip(
                fields["type"].tolist(),
                fields["kind"].tolist(),
                each.prompts,
                each.score,
                strict=True,
            ):
                name = all_types if everywhere else types[code]
                rows.append((name, method, other, _KINDS[kind], int(prompts), score / prompts))
    columns = ["knowledge_type", "method", "other", "kind", "prompts", "overlap"]
    table = pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[:4], "string"))
    return table.sort_values("knowledge_type", kind="stable", ignore_index=True)


@dataclass(kw_only=True)
class Effects:
    """Sums of what zeroing does, of the shards so far."""

    contrasts: np.ndarray
    """Rows of the prompts that ask for a contrast: theirs is no probability."""
    sums: list[pd.DataFrame] = field(default_factory=list)

    def add(self, path: Path) -> None:
        """Another shard."""
        names = ["row", *_BY, "zeroed", "log_prob_before", "rank_before", "log_prob", "rank"]
        table = read(path, names).to_pandas()
        before, after = table["log_prob_before"], table["log_prob"]
        table = table.astype({name: "string" for name in _BY[:-1]}).assign(
            prompts=1,
            tokens=(~table["row"].isin(self.contrasts)).astype("int64"),
            change=after - before,
            prob_before=np.exp(before),
            prob=np.exp(after),
            mrr_before=1 / table["rank_before"],
            mrr=1 / table["rank"],
        )
        counted = ["prompts", "tokens", *_MEANS]
        self.sums.append(table.groupby(_BY, as_index=False, sort=False)[counted].sum())


def effect_table(effects: Effects, all_types: str) -> pd.DataFrame:
    """Means over prompts, by type and over all, in the order in which things were zeroed."""
    columns = [*_BY, "prompts", *_MEANS]
    if not effects.sums:
        return pd.DataFrame(columns=columns)
    each = pd.concat(effects.sums, ignore_index=True)
    both = pd.concat([each, each.assign(knowledge_type=all_types)], ignore_index=True)
    both = both.astype({name: "string" for name in _BY[:-1]})
    counted = ["prompts", "tokens", *_MEANS]
    found = pd.DataFrame(both.groupby(_BY, as_index=False, sort=False)[counted].sum())
    means = pd.DataFrame(found[_MEANS].div(found["prompts"], axis=0))
    means.loc[found["tokens"] < found["prompts"], _PROBS] = np.nan  # contrasts are among them
    table = pd.DataFrame(found.assign(**{name: means[name] for name in _MEANS})[columns])
    return pd.DataFrame(table.sort_values("knowledge_type", kind="stable", ignore_index=True))
