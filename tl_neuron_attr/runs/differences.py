"""Two runs side by side: in what their plans differ, and prompt by prompt what was found."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from tl_neuron_attr.errors import InputError
from tl_neuron_attr.parts import differences
from tl_neuron_attr.runs.saved import Run, load_run

_KEY = ["prompt_id", "kind", "layer", "head", "index", "source_pos"]


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
    only_first: int
    """Prompts answered in the first run alone."""
    only_second: int


def diff_runs(
    first: str | os.PathLike[str] | Run, second: str | os.PathLike[str] | Run
) -> RunDifference:
    """In what two runs differ: prompts are matched by ``prompt_id``; whole shards of each count.

    Raises:
        InputError: If one is no run, or they have no prompt in common.

    Cost: reads both, a knowledge type at a time.
    """
    one, other = (each if isinstance(each, Run) else load_run(each) for each in (first, second))
    answers, only_first, only_second = _answers(one, other)
    plans = [
        (name, _cell(value), _cell(theirs))
        for name, value, theirs in differences(one.parts.identity, other.parts.identity)
    ]
    types = [str(name) for name in answers["knowledge_type"].unique()]
    tables = [
        _overlap(one, other, name, answers["prompt_id"].tolist())
        for name in types
        if "neurons" in one.settings.what and "neurons" in other.settings.what
    ]
    columns = ["knowledge_type", "prompt_id", "kind", "neurons", "common"]
    columns += ["score_difference", "overlap"]
    return RunDifference(
        plans=pd.DataFrame(plans, columns=["name", "first", "second"]),
        prompts=pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns),
        answers=answers,
        only_first=only_first,
        only_second=only_second,
    )


def _answers(one: Run, other: Run) -> tuple[pd.DataFrame, int, int]:
    columns = ["prompt_id", "knowledge_type", "target_text", "log_prob"]
    found = one.table("answers", columns=columns)
    theirs = other.table("answers", columns=columns).drop(columns="knowledge_type")
    both = found.merge(theirs, on="prompt_id", suffixes=("", "_second"))
    if both.empty:
        raise InputError(
            f"the runs in {str(one.directory)!r} and {str(other.directory)!r} have no prompt in "
            "common; prompts are matched by prompt_id"
        )
    answers = pd.DataFrame(
        {
            "prompt_id": both["prompt_id"],
            "knowledge_type": both["knowledge_type"],
            "same_target": both["target_text"] == both["target_text_second"],
            "log_prob_difference": both["log_prob_second"] - both["log_prob"],
        }
    )
    return answers, len(found) - len(both), len(theirs) - len(both)


def _overlap(one: Run, other: Run, knowledge_type: str, common: Sequence[str]) -> pd.DataFrame:
    """One row a prompt and kind."""
    tables = [table[table["prompt_id"].isin(common)] for table in _both(one, other, knowledge_type)]
    joined = tables[0].merge(tables[1], on=_KEY, how="outer", suffixes=("", "_second"))
    both = joined["score"].notna() & joined["score_second"].notna()
    apart = (joined["score"] - joined["score_second"]).abs().where(both)
    joined = joined.assign(common=both.astype("int64"), neurons=1, score_difference=apart)
    rows = joined.groupby(["prompt_id", "kind"], sort=False, as_index=False).agg(
        {"neurons": "sum", "common": "sum", "score_difference": "max"}
    )
    rows = rows.assign(overlap=rows["common"] / rows["neurons"])
    rows.insert(0, "knowledge_type", knowledge_type)
    return rows


def _both(one: Run, other: Run, knowledge_type: str) -> Iterator[pd.DataFrame]:
    for run in (one, other):
        table = run.table("neurons", columns=[*_KEY, "score"], knowledge_type=knowledge_type)
        # places that are empty match each other
        yield table.assign(**{name: table[name].fillna(-1) for name in ("head", "source_pos")})


def _cell(value: Any) -> str:
    return "" if value is None else str(value)
