"""``tl-neuron-attr run``, ``summary`` and ``diff``: many prompts, and what they have in common."""

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.control import Control
from rich.markup import escape
from rich.segment import ControlType
from rich.table import Table
from tqdm import tqdm

from tl_neuron_attr.cli.options import (
    AsJson,
    Bos,
    ConventionName,
    Device,
    ModelName,
    WeightDtype,
    convention_of,
    errors_in_one_sentence,
    quiet_libraries,
)
from tl_neuron_attr.cli.terminal import WIDTH, print_table
from tl_neuron_attr.neurons import FFNNeuron
from tl_neuron_attr.plan import in_bytes
from tl_neuron_attr.readout import DEFAULT_BUDGET
from tl_neuron_attr.runs import (
    Run,
    Share,
    Stopped,
    diff_runs,
    line_report,
    load_run,
    run_prompts,
    share_of_environment,
    upgrade_run,
)
from tl_neuron_attr.tables import records

_NEURONS_SHOWN = 10
_METHODS_SHOWN = 3

_REST_OF_LINE = Control((ControlType.ERASE_IN_LINE, 0))

_RunDirectory = Annotated[Path, typer.Argument(help="Directory of a run.", show_default=False)]


def run(
    prompts: Annotated[
        str,
        typer.Argument(
            help="A .jsonl, .csv or .parquet file; a knowledge type; all; or paper.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="Directory to write to: new, or of this very run, to go on."),
    ],
    model: ModelName = "tiny-facts",
    what: Annotated[
        str,
        typer.Option(
            help="Tables, of: neurons, query_neurons, layers, heads, methods, interventions."
        ),
    ] = "neurons,layers",
    top: Annotated[int, typer.Option(help="Neurons of each kind listed for a prompt.")] = 300,
    methods: Annotated[
        str,
        typer.Option(help="Whose neurons the table methods lists: names, or letters a to h."),
    ] = "",
    zero: Annotated[
        str | None,
        typer.Option(help="Neurons interventions zeroes together, as 10,30. Default: 10."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random neurons zeroed beside them.")] = 0,
    convention: ConventionName = "exact",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes, each with the model; one on each GPU if there are. Default: 1, and "
            "with --ray as many as the cluster has room for.",
            show_default=False,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster to run on: auto, host:6379, ray://host:10001; or local."
        ),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(
            help="The part to do: 0/4 is the first of four; all. Default: as RANK and WORLD_SIZE, "
            "or a Slurm array, say, else all.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option(help="CPU threads of each worker; another number, other last bits.")
    ] = 1,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Prompts in a batch. Default: what the budget allows, 64 at most."),
    ] = None,
    budget: Annotated[
        int, typer.Option(help="Bytes that a batch may take beyond the model.")
    ] = DEFAULT_BUDGET,
    shard_size: Annotated[
        int, typer.Option(help="Prompts in a shard, the most that a kill can cost.")
    ] = 256,
    max_failures: Annotated[
        int | None, typer.Option(help="Stop once more prompts than this have failed.")
    ] = None,
    bos: Bos = None,
    device: Device = None,
    dtype: WeightDtype = "float32",
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")] = False,
) -> None:
    """Attribute thousands of prompts into Parquet shards; killed, the same command goes on.

    Where RANK and WORLD_SIZE are set, or a Slurm array runs, this process does its share (--share).

    Example: tl-neuron-attr run capital --out capitals
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)

    def say(line: str) -> None:
        if not quiet:
            with tqdm.external_write_mode(sys.stderr):  # above the bar, not through it
                if sys.stderr.isatty():
                    console.control(Control.move_to_column(0), _REST_OF_LINE)  # a ^C, say
                console.print(escape(line))

    with errors_in_one_sentence(), _stopped_in_one_sentence(console), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_as = convention_of(convention)
        part = share_of_environment() if share is None else Share.parse(share)
        if part.of > 1:
            say(_part(part, given=share is not None))
        quiet_libraries()
        found = run_prompts(
            model,
            prompts,
            out,
            what=what,
            top=top,
            convention=read_as,
            prepend_bos=bos,
            budget=budget,
            batch_size=batch_size,
            shard_size=shard_size,
            threads=threads,
            methods=methods,
            zero=zero,
            seed=seed,
            workers=workers,
            ray=ray,
            share=part,
            max_failures=max_failures,
            device=device,
            dtype=dtype,
            progress=_progress(quiet, say),
            announce=say,
        )
        say(_done(found, part))


def summary(
    directory: _RunDirectory,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with its hash first.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What the prompts of a run have in common, finished or not: neurons, layers, methods, zeroing.

    Example: tl-neuron-attr summary capitals
    """
    with errors_in_one_sentence():
        found = load_run(directory, verify=verify)
        whole = found.summary()
        if as_json:
            tables = {name: records(table) for name, table in whole.tables.items()}
            facts = {"shards": len(found.shards), "of": found.n_shards, **whole.facts}
            print(json.dumps({**facts, **tables}, allow_nan=False))
            return
        console = Console(width=min(WIDTH, Console().width), highlight=False)
        settings = found.settings
        console.print(
            f"[bold]{escape(str(found.facts['model_name']))}[/]  {len(found.shards):,} of "
            f"{found.n_shards:,} shards; top {settings.top:,}, {settings.convention}"
        )
        print_table(console, _prompt_table(whole.prompts))
        _show_neurons(console, whole.neurons)
        if len(whole.layers):
            console.print("\n[bold]Layers of the highest mean rise[/], all prompts, nats")
            print_table(console, _layer_table(whole.layers))
        if whole.methods is not None and len(whole.methods):
            console.print("\n[bold]What each method lists[/], all prompts")
            print_table(console, _frequency_table(whole.methods))
        if whole.overlap is not None and len(whole.overlap):
            console.print("\n[bold]What methods list alike[/], mean share of either's, all prompts")
            print_table(console, _agreement_table(whole.overlap))
        if whole.interventions is not None and len(whole.interventions):
            console.print("\n[bold]The answer without them[/]: mean change of log p (nats), p, MRR")
            print_table(console, _effect_table(whole.interventions))


def upgrade(
    directory: _RunDirectory,
    out: Annotated[Path, typer.Option("--out", help="Directory of the copy: new.")],
) -> None:
    """Copy a run of an earlier schema into that of this release, to go on with it.

    Example: tl-neuron-attr upgrade capitals --out capitals-2
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with errors_in_one_sentence():
        found = upgrade_run(directory, out, announce=lambda line: console.print(escape(line)))
        console.print(escape(_done(found, Share())))


def diff(first: _RunDirectory, second: _RunDirectory, as_json: AsJson = False) -> None:
    """In what two runs differ: their plans, and prompt by prompt the neurons they list.

    Example: tl-neuron-attr diff capitals capitals-published
    """
    with errors_in_one_sentence():
        found = diff_runs(first, second)
        if as_json:
            tables = {"plans": found.plans, "prompts": found.prompts, "answers": found.answers}
            tables |= {"methods": found.methods, "interventions": found.interventions}
            counts = {"only_first": found.only_first, "only_second": found.only_second}
            counts["unlike"] = found.unlike
            rows = {name: records(table) for name, table in tables.items()}
            print(json.dumps({**counts, **rows}, allow_nan=False))
            return
        console = Console(width=min(WIDTH, Console().width), highlight=False)
        if found.plans.empty:
            console.print("The plans are the same.")
        else:
            plans = _table(["differs", "first", "second"], left=3)
            for row in records(found.plans):
                plans.add_row(*(escape(row[name][:40]) for name in ("name", "first", "second")))
            print_table(console, plans)
        same = found.answers["same_target"].tolist().count(True)
        console.print(
            f"\n{len(found.answers):,} prompts in both, {same:,} with the same target; "
            f"{found.only_first:,} in the first alone, {found.only_second:,} in the second"
        )
        if found.unlike:
            console.print(
                f"{found.unlike:,} more share an id but not text, position or target, and are "
                "left out"
            )
        if len(found.prompts):
            print_table(console, _overlap_table(found.prompts, ["knowledge_type", "kind"]))
        if len(found.methods):
            console.print("\n[bold]By method[/]")
            print_table(
                console, _overlap_table(found.methods, ["knowledge_type", "method", "kind"])
            )
        if len(found.interventions):
            console.print("\n[bold]What zeroing does to log p[/], means over prompts, nats")
            print_table(console, _change_table(found.interventions))


# --- what is shown ----------------------------------------------------------------------------


def _progress(quiet: bool, say: Any) -> Any:
    if quiet:
        return False
    return True if sys.stderr.isatty() else line_report(say)


def _part(share: Share, given: bool) -> str:
    text = f"share {share.rank} of {share.of} (from 0): one shard in {share.of}"
    return text if given else f"{text}, by the environment; --share all does everything"


def _done(found: Run, share: Share) -> str:
    failed = found.dataset("errors").count_rows()
    rows = found.dataset("answers").count_rows()
    size = sum(path.stat().st_size for path in found.directory.rglob("*") if path.is_file())
    text = (
        f"{len(found.shards):,} of {found.n_shards:,} shards, {rows:,} prompts answered, "
        f"{failed:,} failed; {in_bytes(size)} in {found.directory}"
    )
    if not found.complete and share.of > 1:
        return f"{text}; the other shares are missing yet, and the last one writes the summary"
    return text


@contextmanager
def _stopped_in_one_sentence(console: Console) -> Iterator[None]:
    """A signal becomes one sentence on standard error, and the exit code shells give it."""
    try:
        yield
    except Stopped as stopped:
        console.print(f"[yellow]Stopped[/]{escape(str(stopped).removeprefix('stopped'))}")
        raise typer.Exit(128 + stopped.number) from None
    except KeyboardInterrupt:
        console.print(
            "[yellow]Stopped[/] at once; shards that are whole are kept, and the same command "
            "goes on"
        )
        raise typer.Exit(130) from None


def _prompt_table(prompts: pd.DataFrame) -> Table:
    table = _table(["type", "answered", "failed", "mean log p"])
    for row in records(prompts):
        mean = row["mean_log_prob"]
        table.add_row(
            escape(row["knowledge_type"]),
            f"{row['prompts']:,}",
            f"{row['failed']:,}",
            "-" if mean is None else f"{mean:.3f}",
        )
    return table


def _show_neurons(console: Console, neurons: pd.DataFrame) -> None:
    """Of all prompts, the most frequent of each role and kind."""
    everywhere = neurons.loc[neurons["knowledge_type"] == "all"]
    for (role, kind), rows in everywhere.groupby(["role", "kind"], sort=False):
        names = {"ffn": "FFN neurons", "attn": "attention neurons (all source positions)"}
        console.print(f"\n[bold]Most frequent {role} {names[str(kind)]}[/], all prompts")
        table = _table(["neuron", "prompts", "share", "mean score"])
        for row in records(rows.head(_NEURONS_SHOWN)):
            table.add_row(
                _label(row),
                f"{row['prompts']:,}",
                f"{row['share']:.0%}",
                f"{row['mean_score']:+.4f}",
            )
        print_table(console, table)


def _label(row: dict[str, Any]) -> str:
    if row["kind"] == "ffn":
        return str(FFNNeuron(row["layer"], row["index"]))
    return f"L{row['layer']}.H{row['head']}.D{row['index']}"


def _layer_table(layers: pd.DataFrame) -> Table:
    best = layers.loc[layers["knowledge_type"] == "all"].sort_values(
        "mean_score", ascending=False, kind="stable"
    )
    table = _table(["layer", "mean rise"])
    for row in records(best.head(_NEURONS_SHOWN)):
        table.add_row(f"L{row['layer']} {row['kind']}", f"{row['mean_score']:+.4f}")
    return table


def _agreement_table(overlap: pd.DataFrame) -> Table:
    table = _table(["method", "other", "kind", "prompts", "overlap"], left=3)
    everywhere = overlap.loc[overlap["knowledge_type"] == "all"]
    for row in records(everywhere):
        table.add_row(
            row["method"],
            row["other"],
            row["kind"],
            f"{row['prompts']:,}",
            f"{row['overlap']:.3f}",
        )
    return table


def _frequency_table(methods: pd.DataFrame) -> Table:
    """Of each method the neurons listed for most prompts."""
    table = _table(["method", "kind", "most frequent, of prompts"], left=3)
    everywhere = methods.loc[methods["knowledge_type"] == "all"]
    for (method, kind), rows in everywhere.groupby(["method", "kind"], sort=False):
        best = [f"{_label(row)} {row['share']:.0%}" for row in records(rows.head(_METHODS_SHOWN))]
        table.add_row(escape(str(method)), str(kind), "  ".join(best))
    return table


def _effect_table(effects: pd.DataFrame) -> Table:
    """Each set beside its control, as many random neurons of the same layers."""
    names = ["type", "zeroed", "prompts", "log p", "random", "p", "random", "MRR", "random"]
    table = _table(names, left=2)
    by = ["knowledge_type", "role", "kind", "count"]
    top, random = (effects.loc[effects["set"] == name] for name in ("top", "random"))
    for row in records(top.merge(random, on=by, suffixes=("", "_random"))):
        table.add_row(
            escape(row["knowledge_type"]),
            f"{row['count']:,} {row['role']} {row['kind']}",
            f"{row['prompts']:,}",
            f"{row['change']:+.3f}",
            f"{row['change_random']:+.3f}",
            *(
                "" if row[name] is None else f"{row[name]:{how}}"  # of contrasts there is none
                for name, how in (
                    ("prob", ".1%"),
                    ("prob_random", ".1%"),
                    ("mrr", ".3f"),
                    ("mrr_random", ".3f"),
                )
            ),
        )
    return table


def _change_table(interventions: pd.DataFrame) -> Table:
    """Over prompts, of each set what zeroing it does in each run."""
    table = _table(["zeroed", "prompts", "first", "second", "largest difference"])
    by = ["role", "set", "kind", "count"]
    rows = interventions.assign(apart=interventions["difference"].abs()).groupby(
        by, sort=False, as_index=False
    )
    found = rows.agg(
        prompts=("change", "size"),
        first=("change", "mean"),
        second=("change_second", "mean"),
        largest=("apart", "max"),
    )
    for row in records(pd.DataFrame(found)):
        drawn = "random, beside " if row["set"] == "random" else ""
        table.add_row(
            f"{row['count']:,} {drawn}{row['role']} {row['kind']}",
            f"{row['prompts']:,}",
            f"{row['first']:+.3f}",
            f"{row['second']:+.3f}",
            f"{row['largest']:.2g}",
        )
    return table


def _overlap_table(prompts: pd.DataFrame, by: list[str]) -> Table:
    names = ["type", *by[1:], "prompts", "mean overlap", "lowest", "largest score difference"]
    table = _table(names, left=len(by))
    rows = prompts.groupby(by, sort=False, as_index=False).agg(
        prompts=("overlap", "size"),
        mean=("overlap", "mean"),
        lowest=("overlap", "min"),
        largest=("score_difference", "max"),
    )
    for row in records(pd.DataFrame(rows).sort_values(by, kind="stable")):
        table.add_row(
            *(escape(row[name]) for name in by),
            f"{row['prompts']:,}",
            f"{row['mean']:.3f}",
            f"{row['lowest']:.3f}",
            "-" if row["largest"] is None else f"{row['largest']:.2g}",
        )
    return table


def _table(names: list[str], left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < left else "right")
    return table
