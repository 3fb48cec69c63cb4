"""START HERE: a model + prompts -> every table and figure of the paper, in a directory.

known   = known_prompts(model, prompts)        the paper's filter            (knowledge/)
parts   = start_run(directory, identity)       what is done so far           (../parts.py)
for each batch of prompts of one type that is not there yet:
    collect(attribute_all(...), ...)           what each sentence shows      (collect.py)
    zero_neurons(...)                          what happens without          (zeroing.py)
zero_heads(...)                                and without a type's heads    (zeroing.py)
tables  = methods_table(...), ...              means, published beside       (tables.py)
figures = figures_of(tables)                   drawn from them               (figures.py)
page    = paper_page(...)                      all of it, one HTML file      (contents.py)
"""

import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import torch

from tl_neuron_attr.across import layers_by_type
from tl_neuron_attr.attribute import attribute, attribute_all
from tl_neuron_attr.attribution import progress_bar, version_of
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host, open_host, weights_hash
from tl_neuron_attr.index import ProjectionIndex, projection_index
from tl_neuron_attr.knowledge import AskedPrompt, KnowledgePrompt, known_prompts, load_prompts
from tl_neuron_attr.knowledge.known import drawn_evenly
from tl_neuron_attr.methods import Case
from tl_neuron_attr.neurons import Head
from tl_neuron_attr.paper.collect import collect, collect_shares, queries_of
from tl_neuron_attr.paper.contents import figures_of, paper_page
from tl_neuron_attr.paper.example import example_prompt, worked_example
from tl_neuron_attr.paper.settings import TOP, Settings, sizes
from tl_neuron_attr.paper.tables import (
    chosen_layers,
    drops_table,
    heads_summary,
    heads_table,
    layer_sums,
    methods_table,
    query_depth,
    segment_table,
    share_curve,
    shared_neurons,
)
from tl_neuron_attr.paper.zeroing import zero_heads, zero_neurons
from tl_neuron_attr.parts import Parts, check_run, fingerprint, start_run
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import Prompt
from tl_neuron_attr.readout import Convention
from tl_neuron_attr.tables import write_tables

FORMAT = 1
"""Of the parts: a directory of another format is another run."""

RANDOM_HEADS = "random"

_WHAT = "run of the paper's tables"
"""What the directory holds, for errors."""

_VERSIONED = ("tl_neuron_attr", "transformer_lens", "transformers", "torch")


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What ``write_paper`` wrote."""

    directory: Path
    tables: Mapping[str, pd.DataFrame] = field(repr=False)
    """By name; each is ``tables/<name>.parquet`` and ``.csv``."""
    figures: tuple[str, ...]
    """Each is ``figures/<name>.json``, as plotly reads it."""

    @property
    def page(self) -> Path:
        """The HTML file with all of them."""
        return self.directory / "index.html"


def write_paper(
    model: Any,
    directory: str | Path,
    *,
    prompts: str | Path | Sequence[KnowledgePrompt] = "paper",
    name: str | None = None,
    settings: Settings | None = None,
    convention: Convention = "exact",
    prepend_bos: bool | None = None,
    example: str | None = None,
    announce: Callable[[str], object] | None = None,
    progress: bool = False,
) -> Paper:
    """Every table and figure of the paper for one model, published numbers beside.

    Of a run that was interrupted, what is whole is kept, and a call with the same model, prompts
    and settings goes on from there; the files then are the same, byte for byte, as without.

    Args:
        model: A ``TransformerBridge`` or a ``HookedTransformer``; it is left as it was.
        directory: New, empty, or of a run of this very kind.
        prompts: What ``load_prompts`` takes, or prompts; those whose answer the model knows are
            used.
        name: What the model is called on the page.
        settings: Seed, batch size and how many prompts.
        convention: ``exact`` or ``published``.
        prepend_bos: Whether texts get a BOS token; by default what TransformerLens does.
        example: The prompt of the worked example; by default the notebooks', or, of the bundled
            model, one that it knows.
        announce: Called with lines for people: what is wrong with the prompts, how many remain,
            and how long it will take.
        progress: Show progress bars.

    Raises:
        InputError: If the directory holds anything else; if no prompt remains; for anything wrong
            with the request. Before the first attribution.
        OutputError: If writing fails; what was written before stays.
        UnsupportedModelError, IdentityError, NonFiniteError: As in ``attribute``.

    Cost: for each prompt one attribution, the eight methods' scores (the rank of the answer reads
    every FFN neuron out), two forward passes, and one more of about 25 rows.
    Disk: about 20 kB a prompt.
    """
    settings = settings or Settings()
    say = announce or (lambda line: None)
    if convention not in ("exact", "published"):
        raise InputError(f"convention must be 'exact' or 'published' here, got {convention!r}")
    host = open_host(model)
    called = name or host.model_name
    sentence = example_prompt(called, example)
    asked, noticed = _loaded(prompts)
    identity = _identity(host, called, asked, settings, convention, prepend_bos, sentence)
    check_run(directory, identity, _WHAT)
    known = known_prompts(host, asked, prepend_bos=prepend_bos, progress=progress)
    kept = drawn_evenly(known.kept, settings.limit, settings.seed)
    noticed = (*noticed, *known.warnings)
    for message in noticed:
        say(f"Warning: {message}")
    say(known.summary() + (f"; {len(kept)} of them drawn" if len(kept) < len(known.kept) else ""))
    run = _Run(
        host=host,
        settings=settings,
        convention=convention,
        parts=start_run(directory, identity, {}, what=_WHAT, folder="parts"),
        batches=tuple(_batches(kept, settings.batch_size)),
        sampled=_sampled(kept, settings),
    )
    with torch.no_grad(), full_precision():
        _attribute_missing(run, say, progress)
        heads = _zero_missing_heads(run, progress)
        result = attribute(
            model, Prompt(text=sentence, prepend_bos=prepend_bos), top=TOP, convention=convention
        )
        tables = {
            "prompts": known.counts(),
            "dropped": known.reasons(),
            **_tables(run, heads),
            **worked_example(result),
        }
    facts = _facts(run, called, known.summary(), sentence)
    return _write(run, tables, {**facts, "warnings": noticed})


def _loaded(
    prompts: str | Path | Sequence[KnowledgePrompt],
) -> tuple[tuple[KnowledgePrompt, ...], tuple[str, ...]]:
    """The prompts, and what was noticed about the file they are from (warned of as ever, too)."""
    if not isinstance(prompts, (str, Path)):
        return tuple(prompts), ()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        asked = load_prompts(prompts)
    for each in caught:
        warnings.warn(each.message, each.category, stacklevel=3)
    about = [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
    return asked, tuple(dict.fromkeys(about))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts of one knowledge type that are run, and kept, together."""

    name: str
    """Of its part: the type's number and its own."""
    knowledge_type: str
    prompts: tuple[AskedPrompt, ...]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the stages share."""

    host: Host
    settings: Settings
    convention: Convention
    parts: Parts
    batches: tuple[Batch, ...]
    sampled: frozenset[str]
    """Ids of the prompts for which the total of all neurons is bounded."""

    @property
    def knowledge_types(self) -> list[str]:
        """In the order they came in."""
        return [*dict.fromkeys(batch.knowledge_type for batch in self.batches)]

    @property
    def facts(self) -> dict[str, tuple[str, ...]]:
        """What each prompt is about, as the bootstrap draws it."""
        asked = [each.prompt for batch in self.batches for each in batch.prompts]
        return {
            each.prompt_id: (each.fact.knowledge_type, each.fact.relation, each.fact.subject)
            for each in asked
        }


def _attribute_missing(run: _Run, say: Callable[[str], object], progress: bool) -> None:
    """Every batch that is not there yet."""
    todo = [batch for batch in run.batches if run.parts.state(batch.name) != "whole"]
    count = sum(len(batch.prompts) for batch in todo)
    done = sum(len(batch.prompts) for batch in run.batches) - count
    if done:
        say(f"{done} prompts are done already" + (f"; going on with {count}" if count else ""))
    index_directory = run.parts.directory / "index"
    if todo:
        index = projection_index(run.host, index_directory, progress=progress)
        _attribute_each(run, todo, index, say, progress)
    # of use until here alone, and large; what it led to is in the parts
    shutil.rmtree(index_directory, ignore_errors=True)


def _attribute_each(
    run: _Run,
    todo: Sequence[Batch],
    index: ProjectionIndex,
    say: Callable[[str], object],
    progress: bool,
) -> None:
    """These batches, and an estimate of how long they take from the first."""
    count = sum(len(batch.prompts) for batch in todo)
    with progress_bar(count, "prompt", progress) as bar:
        for number, batch in enumerate(todo):
            started = time.perf_counter()
            run.parts.write(batch.name, _as_arrow(_found(run, batch, index)))
            bar.update(len(batch.prompts))
            if number == 0 and len(todo) > 1:
                say(_estimate(run, batch, time.perf_counter() - started, count))


def _found(run: _Run, batch: Batch, index: ProjectionIndex) -> dict[str, pd.DataFrame]:
    """One part: everything about the prompts of one batch."""
    asked = [each.as_prompt() for each in batch.prompts]
    results = attribute_all(
        run.host.model,
        asked,
        top=TOP,
        convention=run.convention,
        batch_size=run.settings.batch_size,
    )
    queries = queries_of(results)
    kind = batch.knowledge_type
    effects, chosen = zero_neurons(
        [Case(result=result) for result in results],
        [of_attn for _, of_attn in queries],
        kind,
        run.settings.seed,
    )
    some = [result for result in results if result.captured.prompt.prompt_id in run.sampled]
    return {
        **collect(results, queries, kind),
        "effects": effects,
        "chosen": chosen,
        "shares": collect_shares(some, index, kind),
    }


def _estimate(run: _Run, batch: Batch, seconds: float, count: int) -> str:
    """How long all will take, as measured on one batch: its own time, and that of heads."""
    started = time.perf_counter()
    names = [*run.knowledge_types, RANDOM_HEADS]
    prompts = [each.tokenized for each in batch.prompts]
    zero_heads(run.host, prompts, dict.fromkeys(names, [Head(0, 0)]), batch.knowledge_type)
    of_heads = time.perf_counter() - started
    here = len(batch.prompts)
    left = (seconds * (count - here) + of_heads * count) / here
    return (
        f"the first {here} prompts took {seconds:.1f} s, and their heads {of_heads:.1f} s: "
        f"about {_minutes(left)} for the other {count - here}"
    )


def _zero_missing_heads(run: _Run, progress: bool) -> dict[str, tuple[Head, ...]]:
    """Each type's heads of the highest mean score, zeroed in all prompts; which they are."""
    heads = _top_heads(run)
    todo = [batch for batch in run.batches if run.parts.state(_of_heads(batch)) != "whole"]
    with progress_bar(len(todo), "batch without heads", progress) as bar:
        for batch in todo:
            prompts = [each.tokenized for each in batch.prompts]
            found = zero_heads(run.host, prompts, heads, batch.knowledge_type)
            run.parts.write(_of_heads(batch), _as_arrow({"head_effects": found}))
            bar.update(1)
    return heads


def _top_heads(run: _Run) -> dict[str, tuple[Head, ...]]:
    """As many of each type, and of all heads at random."""
    host, count = run.host, sizes(run.host).heads
    table = _read(run.parts, [batch.name for batch in run.batches], "heads")
    totals = pd.DataFrame(
        table.groupby(["knowledge_type", "layer", "head"], sort=False, as_index=False).agg(
            {"score_sum": "sum"}
        )
    )
    chosen = {}
    for kind in run.knowledge_types:
        here = totals.loc[totals["knowledge_type"] == kind]
        best = here.sort_values("score_sum", ascending=False, kind="stable").head(count)
        chosen[kind] = tuple(Head(*place) for place in best[["layer", "head"]].to_numpy().tolist())
    generator = torch.Generator().manual_seed(run.settings.seed)
    order = torch.randperm(host.n_layers * host.n_heads, generator=generator)[:count]
    drawn = tuple(Head(*divmod(number, host.n_heads)) for number in order.tolist())
    return {**chosen, RANDOM_HEADS: drawn}


def _of_heads(batch: Batch) -> str:
    return f"{batch.name}-heads"


def _batches(kept: Sequence[AskedPrompt], size: int) -> Iterator[Batch]:
    """Batches of one type each; in each, prompts of about the same length."""
    of_type: dict[str, list[AskedPrompt]] = {}
    for each in kept:
        of_type.setdefault(each.prompt.fact.knowledge_type, []).append(each)
    for number, (kind, prompts) in enumerate(of_type.items()):
        prompts = sorted(prompts, key=lambda each: len(each.tokenized.tokens))
        for place in range(0, len(prompts), size):
            yield Batch(
                name=f"{number:02}-{place // size:04}",
                knowledge_type=kind,
                prompts=tuple(prompts[place : place + size]),
            )


def _sampled(kept: Sequence[AskedPrompt], settings: Settings) -> frozenset[str]:
    """Ids of the prompts for which the total of all neurons is bounded."""
    types = {each.prompt.fact.knowledge_type for each in kept}
    drawn = drawn_evenly(kept, settings.sample * len(types), settings.seed)
    return frozenset(each.prompt.prompt_id for each in drawn)


def _identity(
    host: Host,
    called: str,
    asked: Sequence[KnowledgePrompt],
    settings: Settings,
    convention: Convention,
    prepend_bos: bool | None,
    sentence: str,
) -> dict[str, Any]:
    """What has to be the same for a directory to be this run's."""
    return {
        "format": FORMAT,
        "model": called,
        "weights_sha256": weights_hash(host),
        "dtype": str(host.dtype).removeprefix("torch."),
        "processing": host.processing,
        "prompts": len(asked),
        "prompts_sha256": fingerprint(
            (each.prompt_id, each.text, each.fact.accepted, each.fact.knowledge_type)
            for each in asked
        ),
        "convention": convention,
        "prepend_bos": prepend_bos,
        "example": sentence,
        "settings": asdict(settings),
        "versions": {name: version_of(name) for name in _VERSIONED},
    }


def _as_arrow(tables: Mapping[str, pd.DataFrame]) -> dict[str, pa.Table]:
    return {
        name: pa.Table.from_pandas(table, preserve_index=False) for name, table in tables.items()
    }


def _read(parts: Parts, names: Sequence[str], table: str) -> pd.DataFrame:
    """One table of these parts, put together in their order."""
    found = [each.to_pandas() for each in parts.read(names, table)]
    return pd.concat(found, ignore_index=True)


def _tables(run: _Run, heads: Mapping[str, tuple[Head, ...]]) -> dict[str, pd.DataFrame]:
    """Every table that is made of the parts."""
    names = [batch.name for batch in run.batches]
    of_heads = [_of_heads(batch) for batch in run.batches]
    parts = run.parts
    prompts: dict[str, int] = {}
    for batch in run.batches:
        known = prompts.get(batch.knowledge_type, 0)
        prompts[batch.knowledge_type] = known + len(batch.prompts)
    effects = _read(parts, names, "effects")
    layers = _read(parts, names, "layers")
    drops = heads_table(_read(parts, of_heads, "head_effects"))
    return {
        "methods": methods_table(effects, run.facts, run.settings.seed),
        "drops": drops_table(effects),
        "heads": drops,
        "heads_summary": heads_summary(drops, heads),
        "heads_zeroed": pd.DataFrame(
            [(name, str(head)) for name, each in heads.items() for head in each],
            columns=["heads_of", "head"],
        ),
        "value_layers": layers_by_type(layers),
        "query_layers": layers_by_type(_read(parts, names, "query_layers"), by=["of"]),
        "layer_sums": layer_sums(layers),
        "chosen_layers": chosen_layers(
            _read(parts, names, "chosen"), sum(prompts.values()), run.host.n_layers
        ),
        "segment": segment_table(_read(parts, names, "segment")),
        "shares": share_curve(_read(parts, names, "shares")),
        "shared_neurons": shared_neurons(_read(parts, names, "neurons"), prompts),
        "query_depth": query_depth(_read(parts, names, "query_split")),
    }


def _facts(run: _Run, called: str, summary: str, sentence: str) -> dict[str, Any]:
    """What the page says of the run."""
    host = run.host
    return {
        "model": called,
        "architecture": host.architecture,
        "layers": host.n_layers,
        "heads": host.n_heads,
        "ffn_neurons": host.n_layers * host.d_mlp,
        "attn_neurons": host.n_layers * host.n_heads * host.d_head,
        "parallel": host.parallel,
        "summary": summary,
        "prompts": sum(len(batch.prompts) for batch in run.batches),
        "example": sentence,
        "convention": run.convention,
        "settings": asdict(run.settings),
        "sizes": asdict(sizes(host)),
    }


def _write(run: _Run, tables: dict[str, pd.DataFrame], facts: dict[str, Any]) -> Paper:
    directory = run.parts.directory
    figures = figures_of(tables, facts)
    texts = {f"{name}.csv": _csv(table) for name, table in tables.items()}
    write_tables(directory / "tables", tables, texts)
    drawn = {f"{name}.json": (figure.to_json() or "") + "\n" for name, figure in figures.items()}
    write_tables(directory / "figures", {}, drawn)
    write_tables(directory, {}, {"index.html": paper_page(tables, figures, facts)})
    return Paper(directory=directory, tables=tables, figures=tuple(figures))


def _csv(table: pd.DataFrame) -> str:
    """Lists of tokens as JSON: they may hold any character."""
    plain = table.copy()
    for name in plain.columns:
        cells = plain[name].tolist()
        if any(isinstance(cell, list) for cell in cells):
            plain[name] = [json.dumps(cell, ensure_ascii=False) for cell in cells]
    return plain.to_csv(index=False, lineterminator="\n")


def _minutes(seconds: float) -> str:
    return f"{math.ceil(seconds)} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"
