"""Is it so: what the published notebooks printed, held against what this package computes.

For whoever has the weights: the notebooks' prompt is run in the convention ``published`` on the
same model, and everything they printed about it is compared, score by score and place by place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tl_neuron_attr.attribute import attribute
from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host, open_host
from tl_neuron_attr.models import load_model
from tl_neuron_attr.paper.published import MODELS, Example, Scores, published_example

DEFAULT_SOURCES = {"gpt2-large": "gpt2-large", "llama-7b": "huggyllama/llama-7b"}
"""What the two models are called on the hub."""

RELATIVE = 1e-3
"""How far a score may be off, as a part of the largest one printed beside it. The notebooks ran
on a GPU, with other releases of torch and transformers; half a unit of the last printed decimal
is allowed on top."""

CHECK_COLUMNS = (
    "model",
    "what",
    "entries",
    "largest_difference",
    "tolerance",
    "out_of_place",
    "verdict",
    "note",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a notebook printed, beside what is found here."""

    what: str
    entries: int
    """How many scores or tokens were compared."""
    largest_difference: float
    """Among scores, in nats (of attention weights, from 0 to 1); infinite where one is missing."""
    tolerance: float
    out_of_place: int
    """How many of a ranking stand elsewhere, though not for being closer than the tolerance."""

    @property
    def agrees(self) -> bool:
        """Whether nothing differs by more than the tolerance."""
        return self.largest_difference <= self.tolerance and not self.out_of_place


def check_published(
    sources: Mapping[str, Any] | None = None,
    *,
    examples: Mapping[str, Example] | None = None,
    load: Callable[[str], Any] = load_model,
) -> pd.DataFrame:
    """What agrees with the published notebooks, and what differs: one row a thing they printed.

    Columns ``model, what, entries, largest_difference, tolerance, out_of_place, verdict, note``;
    the verdict is ``agrees``, ``differs`` or, where a model's weights are not at hand, ``skipped``
    (with the reason as ``note``).

    Args:
        sources: A name that ``load_model`` knows, a directory or a loaded model, for each of
            ``gpt2-large`` and ``llama-7b``; those left out are looked for on the hub.
        examples: What was printed, by model; by default what ships with the package.
        load: What makes a model of a name.

    Raises:
        InputError: If a source is a directory that does not exist, or a model of another shape.

    Cost: one attribution of eight tokens for each model. In float32, Llama-7B takes 27 GB.
    """
    if examples is None:
        examples = {model: published_example(model) for model in MODELS}
    sources = {**DEFAULT_SOURCES, **(sources or {})}
    rows: list[dict[str, Any]] = []
    for name, example in examples.items():
        source = sources.get(name, name)
        model, problem = _at_hand(source, load)
        if model is None:
            rows.append({"model": name, "verdict": "skipped", "note": problem})
            continue
        rows += [
            {
                "model": name,
                "what": found.what,
                "entries": found.entries,
                "largest_difference": found.largest_difference,
                "tolerance": found.tolerance,
                "out_of_place": found.out_of_place,
                "verdict": "agrees" if found.agrees else "differs",
                "note": "",
            }
            for found in compare_example(model, example)
        ]
        del model  # two of them may not fit into memory
    return pd.DataFrame(rows, columns=list(CHECK_COLUMNS)).astype(
        {"entries": "Int64", "out_of_place": "Int64", "largest_difference": float}
    )


def compare_example(model: Any, example: Example) -> list[Finding]:
    """Each thing a notebook printed about its prompt, beside what is found for it here.

    Raises:
        InputError: If the model is of another shape than the published one.
    """
    _check_shape(open_host(model), example)
    wanted = (example.top_values["ffn"], example.top_values["attn"], len(example.attn_neurons.rows))
    result = attribute(
        model,
        example.prompt,
        target=example.target,
        prepend_bos=example.bos,
        convention="published",
        top=max(*wanted, 2 * len(example.attn_neurons.rows)),
    )
    layers = _by(result.layers(), "layer", "kind")
    return [
        _same("number of tokens", [example.n_tokens], [len(result.captured.prompt.tokens)]),
        _predictions(result, example),
        _scores("layers", example.layers, layers),
        _sums(example, layers),
        _scores("heads", example.heads, _by(result.heads(), "layer", "head")),
        *_of_one_head(result, example),
        _scores("FFN neurons", example.ffn_neurons, _by(result.neurons("ffn"), "layer", "index")),
        _scores(
            "attention neurons",
            example.attn_neurons,
            _by(result.neurons("attn"), "layer", "head", "index", "source_pos"),
        ),
        *_query(result, example),
    ]


def _of_one_head(result: Attribution, example: Example) -> list[Finding]:
    (layer, head, _), _ = example.head_positions.rows[0]
    table = result.positions(layer, head)
    where = ("layer", "head", "source_pos")
    name = f"source positions of L{layer}.H{head}"
    return [
        _scores(name, example.head_positions, _by(table, *where)),
        _scores(f"{name}, attention", example.attention, _by(table, *where, value="attention")),
    ]


def _query(result: Attribution, example: Example) -> list[Finding]:
    found = []
    for kind, name, wanted in (
        ("ffn", "query layers of FFN neurons", example.query_layers_of_ffn),
        ("attn", "query layers of attention neurons", example.query_layers_of_attn),
    ):
        table = result.query_layers(kind, top_values=example.top_values[kind])
        table = table.loc[table["kind"] != "bias"]
        found.append(_scores(name, wanted, _by(table, "layer", "kind")))
    neurons = result.query_neurons(
        2 * len(example.query_neurons.rows), top_values=example.top_values["query_neurons"]
    )
    return [
        *found,
        _scores("query neurons", example.query_neurons, _by(neurons, "layer", "index")),
    ]


def _at_hand(source: Any, load: Callable[[str], Any]) -> tuple[Any, str]:
    """The model, or ``None`` and why it cannot be had."""
    if not isinstance(source, str):
        return source, ""
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise InputError(f"no such directory: {source!r}; give a Hugging Face model directory")
    try:
        return load(source), ""
    except InputError as error:
        if Path(source).expanduser().is_dir():
            raise
        return None, str(error)


def _check_shape(host: Host, example: Example) -> None:
    found = {
        "layers": host.n_layers,
        "heads": host.n_heads,
        "d_head": host.d_head,
        "d_mlp": host.d_mlp,
    }
    if found != example.shape:
        raise InputError(
            f"the published model has {_shape(example.shape)}, this one {_shape(found)}; "
            "give the same model"
        )


def _shape(shape: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in shape.items())


def _predictions(result: Attribution, example: Example) -> Finding:
    found = result.predictions(len(example.predictions))["token"]
    # the Llama notebook prints tokens without the space in front of them
    return _same(
        "predictions",
        [text.strip() for text in example.predictions],
        [str(text).strip() for text in found],
    )


def _same(what: str, wanted: list[Any], found: list[Any]) -> Finding:
    wrong = sum(one != other for one, other in zip(wanted, found, strict=True))
    return Finding(
        what=what,
        entries=len(wanted),
        largest_difference=0.0,
        tolerance=0.0,
        out_of_place=wrong,
    )


def _sums(example: Example, layers: Mapping[tuple[Any, ...], float]) -> Finding:
    """Sums over layers: those printed are of rounded scores."""
    step = 0.5 * 10.0**-example.layers.decimals
    found = {
        kind: sum(score for (_, of), score in layers.items() if of == kind)
        for kind in example.layer_sums
    }
    total = max(map(abs, example.layer_sums.values()))
    return Finding(
        what="sums over layers",
        entries=len(found),
        largest_difference=max(
            abs(found[kind] - printed) for kind, printed in example.layer_sums.items()
        ),
        tolerance=step * example.shape["layers"] + RELATIVE * total,
        out_of_place=0,
    )


def _scores(what: str, wanted: Scores, found: Mapping[tuple[Any, ...], float]) -> Finding:
    """Each printed score beside the one found for the same thing, and their order."""
    largest = max(abs(score) for _, score in wanted.rows)
    tolerance = 0.5 * 10.0**-wanted.decimals + RELATIVE * largest
    infinite = float("inf")
    differences = [abs(found.get(where, infinite) - score) for where, score in wanted.rows]
    out_of_place = 0
    if not wanted.all:
        ranked = sorted(found.items(), key=lambda item: -item[1])
        # near ties may stand either way
        out_of_place = sum(
            where != place and abs(found.get(where, -infinite) - score) > tolerance
            for (where, _), (place, score) in zip(wanted.rows, ranked, strict=False)
        )
    return Finding(
        what=what,
        entries=len(wanted.rows),
        largest_difference=max(differences),
        tolerance=tolerance,
        out_of_place=out_of_place,
    )


def _by(table: pd.DataFrame, *columns: str, value: str = "score") -> dict[tuple[Any, ...], float]:
    """The table's scores, by what they are of."""
    keys = zip(
        *([None if pd.isna(cell) else cell for cell in table[name]] for name in columns),
        strict=True,
    )
    return dict(zip(keys, table[value].tolist(), strict=True))
