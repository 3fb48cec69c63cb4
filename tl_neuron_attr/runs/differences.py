"""Two runs side by side: in what their plans differ, and prompt by prompt what was found."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.parts import differences
from tl_neuron_attr.runs.saved import Run, as_frame, load_run
from tl_neuron_attr.runs.shard import read_prompts

_KEY = ["prompt_id", "kind", "layer", "head", "index", "source_pos"]
_ASKED = ["prompt_id", "from_end", "target_text", "against"]
_ZEROED = ["prompt_id", "role", "set", "kind", "count"]


@dataclass(frozen=True, kw_only=True)
class RunDifference:
    """What differs between two runs."""

    plans: pd.DataFrame = field(repr=False)
    """``name, first, second``: settings, model, prompts, versions that are not the same."""
    prompts: pd.DataFrame = field(repr=False)
    """``prompt_id, knowledge_type, kind, neurons, common, overlap, score_difference``: of the
    prompts in both, neurons listed by either and by both, the share of the latter, and the largest
    absolute difference of a score (nats) among those."""
    answers: pd.DataFrame = field(repr=False)
    """``prompt_id, knowledge_type, same_target, log_prob_difference``: second less first, nats."""
    methods: pd.DataFrame = field(repr=False)
    """As ``prompts``, with ``method``, of the methods in both; empty where there are none."""
    interventions: pd.DataFrame = field(repr=False)
    """``prompt_id, knowledge_type, role, set, kind, count, change, change_second, difference``:
    what zeroing does to log p (nats) in each run, and second less first; empty where not both were
    asked."""
    only_first: int
    """Prompts answered in the first run alone."""
    only_second: int
    unlike: int = 0
    """Prompts of one ``prompt_id`` that were answered in both and are not the same: another text,
    position, target or ``against``. They are in no table."""


def diff_runs(
    first: str | os.PathLike[str] | Run, second: str | os.PathLike[str] | Run
) -> RunDifference:
    """In what two runs differ: prompts are matched by ``prompt_id``; whole shards of each count.

    Compared are those of the same text (or tokens, where one has no text), position read at, target
    and ``against``.

    Raises:
        InputError: If one is no run, or no prompt was answered in both, or of none the same.

    Cost: reads both, a knowledge type at a time, and the prompts of both.
    """
    one, other = (each if isinstance(each, Run) else load_run(each) for each in (first, second))
    answers, only_first, only_second, unlike = _answers(one, other)
    plans = [
        (name, _cell(value), _cell(theirs))
        for name, value, theirs in differences(one.parts.identity, other.parts.identity)
    ]
    # a prompt may be of another type in the other run
    alike: dict[tuple[str, str], list[str]] = {}
    columns = ["knowledge_type", "knowledge_type_second", "prompt_id"]
    for ours, theirs, prompt in answers[columns].itertuples(index=False):
        alike.setdefault((str(ours), str(theirs)), []).append(str(prompt))
    neurons = [
        _overlap(one, other, "neurons", types, some, also=[])
        for types, some in alike.items()
        if _both_have(one, other, "neurons")
    ]
    methods = [
        _overlap(one, other, "methods", types, some, also=["method"])
        for types, some in alike.items()
        if _both_have(one, other, "methods")
    ]
    columns = ["knowledge_type", "prompt_id", "kind", "neurons", "common"]
    columns += ["score_difference", "overlap"]
    return RunDifference(
        plans=pd.DataFrame(plans, columns=["name", "first", "second"]),
        prompts=_stacked(neurons, columns),
        answers=answers.drop(columns="knowledge_type_second"),
        methods=_stacked(methods, [*columns[:2], "method", *columns[2:]]),
        interventions=_effects(one, other, list(answers["prompt_id"])),
        only_first=only_first,
        only_second=only_second,
        unlike=unlike,
    )


def _both_have(one: Run, other: Run, table: str) -> bool:
    return table in one.settings.what and table in other.settings.what


def _stacked(tables: Sequence[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def _answers(one: Run, other: Run) -> tuple[pd.DataFrame, int, int, int]:
    """Of the prompts that are the same, and how many are in the first, in the second, other."""
    columns = ["prompt_id", "knowledge_type", "target_text", "log_prob"]
    found = one.table("answers", columns=columns)
    theirs = other.table("answers", columns=columns)
    both = found.merge(theirs, on="prompt_id", suffixes=("", "_second"))
    if both.empty:
        raise InputError(
            f"the runs in {str(one.directory)!r} and {str(other.directory)!r} have no prompt in "
            "common that was answered in both; prompts are matched by prompt_id, and those that "
            "failed are in the table errors"
        )
    same = both.loc[both["prompt_id"].isin(_same_prompts(one, other))]
    if same.empty:
        raise InputError(
            f"no prompt of the run in {str(one.directory)!r} is the one that has its prompt_id in "
            f"{str(other.directory)!r}: text, position or target are others; compare runs of the "
            "same prompts"
        )
    counts = (len(found) - len(both), len(theirs) - len(both), len(both) - len(same))
    answers = pd.DataFrame(
        {
            "prompt_id": same["prompt_id"],
            "knowledge_type": same["knowledge_type"],
            "knowledge_type_second": same["knowledge_type_second"],
            "same_target": same["target_text"] == same["target_text_second"],
            "log_prob_difference": same["log_prob_second"] - same["log_prob"],
        }
    )
    return answers.reset_index(drop=True), *counts


def _same_prompts(one: Run, other: Run) -> list[str]:
    """The ids of the prompts that both ask for alike.

    By the text where both have one: tokens may differ by a BOS, or be those of another tokenizer.
    """
    tables = [_what_is_asked(run) for run in (one, other)]
    both = tables[0].merge(tables[1], on=_ASKED, suffixes=("", "_second"))
    texts = both["text"].notna() & both["text_second"].notna()
    alike = (both["text"] == both["text_second"]).where(
        texts, both["tokens"] == both["tokens_second"]
    )
    return both.loc[alike.fillna(value=False), "prompt_id"].tolist()


def _what_is_asked(run: Run) -> pd.DataFrame:
    found = read_prompts(run.parts)
    words = found["tokens"].cast(pa.list_(pa.string()))
    names = ["prompt_id", "text", "n_tokens", "read_pos", "target_text", "against"]
    table = as_frame(found.select(names))
    table = table.assign(
        tokens=pc.call_function("binary_join", [words, pa.scalar(" ")]).to_pandas(),
        from_end=table["n_tokens"] - table["read_pos"],
        target_text=table["target_text"].fillna(""),
        against=table["against"].fillna(-1),
    )
    return pd.DataFrame(table[[*_ASKED, "text", "tokens"]])


def _overlap(
    one: Run,
    other: Run,
    table: str,
    types: tuple[str, str],
    common: Sequence[str],
    *,
    also: list[str],
) -> pd.DataFrame:
    """One row a prompt and kind, and whatever ``also`` tells lists of one prompt apart."""
    key = [*_KEY, *also]
    tables = [_listed(run, table, key, name) for run, name in zip((one, other), types, strict=True)]
    tables = [pd.DataFrame(found[found["prompt_id"].isin(common)]) for found in tables]
    for name in also:  # of lists that only one run has, there is nothing to compare
        shared = [*set(tables[0][name]) & set(tables[1][name])]
        tables = [pd.DataFrame(found[found[name].isin(shared)]) for found in tables]
    joined = tables[0].merge(tables[1], on=key, how="outer", suffixes=("", "_second"))
    both = joined["score"].notna() & joined["score_second"].notna()
    apart = (joined["score"] - joined["score_second"]).abs().where(both)
    joined = joined.assign(common=both.astype("int64"), neurons=1, score_difference=apart)
    by = ["prompt_id", *also, "kind"]
    rows = joined.groupby(by, sort=False, as_index=False).agg(
        {"neurons": "sum", "common": "sum", "score_difference": "max"}
    )
    rows = rows.assign(overlap=rows["common"] / rows["neurons"])
    rows.insert(0, "knowledge_type", types[0])
    return rows


def _listed(run: Run, table: str, key: list[str], knowledge_type: str) -> pd.DataFrame:
    found = run.table(table, columns=[*key, "score"], knowledge_type=knowledge_type)
    # places that are empty match each other
    return found.assign(**{name: found[name].fillna(-1) for name in ("head", "source_pos")})


def _effects(one: Run, other: Run, prompts: Sequence[str]) -> pd.DataFrame:
    """One row a prompt and set of neurons."""
    columns = ["prompt_id", "knowledge_type", *_ZEROED[1:], "change", "change_second", "difference"]
    if not _both_have(one, other, "interventions"):
        return pd.DataFrame(columns=columns)
    tables = []
    for run in (one, other):
        read = [*_ZEROED, "knowledge_type", "log_prob_before", "log_prob"]
        found = run.table("interventions", columns=read)
        found = found.loc[found["prompt_id"].isin(prompts)]
        tables.append(found.assign(change=found["log_prob"] - found["log_prob_before"]))
    second = tables[1][[*_ZEROED, "change"]]
    joined = tables[0].merge(second, on=_ZEROED, suffixes=("", "_second"))
    joined = joined.assign(difference=joined["change_second"] - joined["change"])
    return pd.DataFrame(joined[columns])


def _cell(value: Any) -> str:
    return "" if value is None else str(value)
