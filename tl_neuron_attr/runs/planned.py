"""A deterministic plan: prompts -> shards -> batches; the same inputs, the same shards.

A shard is ``shard_size`` prompts in a row, in the order they came. In it, prompts of about the same
length are run together, the longest first, as many as ``plan`` says fit into the budget.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from typing import Any

import pyarrow as pa

from tl_neuron_attr.attribution import version_of
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host, neuron_basis, weights_hash
from tl_neuron_attr.parts import plain
from tl_neuron_attr.plan import peaks_of
from tl_neuron_attr.prompts import TokenizedPrompt
from tl_neuron_attr.runs.asked import Asked
from tl_neuron_attr.runs.measured import check_measurable, why_not
from tl_neuron_attr.runs.schema import FORMAT, PROMPTS, with_metadata
from tl_neuron_attr.runs.settings import LARGEST_BATCH, RunSettings
from tl_neuron_attr.runs.totals import check_types
from tl_neuron_attr.targets import tokenize

_VERSIONED = ("tl_neuron_attr", "transformer_lens", "transformers", "torch", "pyarrow")


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will do, before anything is run."""

    identity: dict[str, Any]
    """What has to be the same for two plans to be one: model, prompts, settings, versions."""
    about: dict[str, Any]
    """What a reader wants to know besides."""
    prompts: pa.Table = field(repr=False)
    """Every prompt with its tokens, shard and batch, or why it cannot be run."""


def plan_run(host: Host, asked: Iterable[Asked], settings: RunSettings) -> RunPlan:
    """Each prompt tokenised, checked, and put into its batch; the same for the same inputs.

    Raises:
        InputError: If there are no prompts, or two have one id; if they are of thousands of types;
            if the model cannot be measured as asked.

    Cost: tokenises every prompt, and one pass over the weights for their hash.
    """
    check_measurable(host, settings)
    size_for = batch_sizes(host, settings)
    digest = hashlib.sha256()
    taken: set[int] = set()
    types: set[str] = set()
    tables = []
    count = 0
    for shard, some in enumerate(_in_shards(asked, settings.shard_size)):
        rows = [_row(host, each, settings) for each in some]
        _check_ids(rows, taken)
        types.update(row["knowledge_type"] for row in rows)
        check_types(len(types))
        _assign_batches(rows, size_for)
        for place, row in enumerate(rows):
            row |= {"row": count + place, "shard": shard}
        count += len(rows)
        _add_to(digest, rows)
        tables.append(pa.Table.from_pylist(rows, schema=PROMPTS))
    if not tables:
        raise InputError("there are no prompts; give at least one")
    identity = plain(
        {
            "format": FORMAT,
            "model": model_facts(host),
            "neuron_basis": neuron_basis(host),
            "prompts": {"count": count, "sha256": digest.hexdigest()},
            "shards": len(tables),
            "settings": settings.plain(),
            "versions": versions(),
        }
    )
    prompts = with_metadata(pa.concat_tables(tables), "prompts", identity)
    return RunPlan(identity=identity, about={"model": host.model_name}, prompts=prompts)


def model_facts(host: Host) -> dict[str, str | int]:
    """What of the model decides the bytes of a run, and which expert a neuron of it is in.

    Cost: one pass over the weights, for their hash.
    """
    return {
        "sha256": weights_hash(host),
        "architecture": host.architecture,
        "class": host.class_name,
        "processing": host.processing,
        "dtype": str(host.dtype).removeprefix("torch."),
        "device": host.device.type,
        **({"n_experts": host.n_experts, "d_expert": host.d_expert} if host.n_experts else {}),
    }


def versions() -> dict[str, str]:
    """Of the libraries that a run's bytes depend on, as they are here."""
    return {name: version_of(name) for name in _VERSIONED}


def batch_sizes(host: Host, settings: RunSettings) -> Callable[[int], int]:
    """How many prompts of a length go into a batch: as asked, or what the budget allows.

    By ``plan``, from the model's shapes alone, so that every machine divides in the same way. One
    prompt goes in whatever it takes.
    """
    peak = peaks_of(host, top=settings.top, convention=settings.convention, budget=settings.budget)

    @cache
    def size_for(n_tokens: int) -> int:
        if settings.batch_size is not None:
            return settings.batch_size
        low, high = 1, LARGEST_BATCH
        while low < high:
            tried = (low + high + 1) // 2
            if peak(n_tokens, tried) <= settings.budget:
                low = tried
            else:
                high = tried - 1
        return low

    return size_for


def prompts_hash(prompts: pa.Table) -> str:
    """Of the prompts as a plan holds them: what its identity has to say of them."""
    digest = hashlib.sha256()
    for batch in prompts.to_batches(max_chunksize=4096):
        _add_to(digest, batch.to_pylist())
    return digest.hexdigest()


def _in_shards(asked: Iterable[Asked], size: int) -> Iterator[list[Asked]]:
    rest = iter(asked)
    while some := list(islice(rest, size)):
        yield some


def _row(host: Host, asked: Asked, settings: RunSettings) -> dict[str, Any]:
    """One row of ``prompts.parquet``, without its place."""
    row: dict[str, Any] = {
        "prompt_id": asked.prompt_id,
        "knowledge_type": asked.knowledge_type,
        "text": asked.text,
        "batch": None,
        "error": asked.error,
    }
    if asked.prompt is None:
        return row
    try:
        found = tokenize(host, _with_bos(asked, settings.prepend_bos))
    except InputError as error:
        return row | {"error": str(error)}
    return row | _tokens(found) | {"error": why_not(settings, found.target)}


def _with_bos(asked: Asked, prepend_bos: bool | None) -> Any:
    prompt = asked.prompt
    assert prompt is not None
    if prepend_bos is None or prompt.tokens is not None or prompt.prepend_bos is not None:
        return prompt
    return replace(prompt, prepend_bos=prepend_bos)


def _tokens(found: TokenizedPrompt) -> dict[str, Any]:
    target = found.target
    # answers and distributions are refused: no one token stands for them
    if target is not None and not target.is_token and target.against is None:
        target = None
    against = None if target is None else target.against
    return {
        "tokens": list(found.tokens),
        "n_tokens": len(found.tokens),
        "read_pos": found.read_pos,
        "target": None if target is None else target.id,
        "target_text": None if target is None else target.text,
        "against": None if against is None else against.id,
    }


def _check_ids(rows: Sequence[dict[str, Any]], taken: set[int]) -> None:
    for row in rows:
        # eight bytes of a digest: the ids of ten million prompts fit into memory
        short = int.from_bytes(hashlib.sha256(row["prompt_id"].encode()).digest()[:8], "big")
        if short in taken:
            raise InputError(
                f"the prompt_id {row['prompt_id']!r} occurs twice; ids must be unique, for tables "
                "name prompts by them"
            )
        taken.add(short)


def _assign_batches(rows: Sequence[dict[str, Any]], size_for: Callable[[int], int]) -> None:
    """The longest first; each batch as large as its first, longest prompt allows."""
    runnable = [row for row in rows if row["error"] is None]
    left = sorted(runnable, key=lambda row: -row["n_tokens"])  # stable: else in their order
    number = 0
    while left:
        size = size_for(left[0]["n_tokens"])
        for row in left[:size]:
            row["batch"] = number
        left = left[size:]
        number += 1


def _add_to(digest: Any, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        listed = [row.get(name) for name in PROMPTS.names]
        digest.update(json.dumps(listed, ensure_ascii=False).encode() + b"\n")
