"""One neuron at one position of a run: what it does there, and what set it off."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.capture import capture_sources
from tl_neuron_attr.captured import Capture
from tl_neuron_attr.cards.card import (
    END_COLUMNS,
    INPUT_COLUMNS,
    QUERY_LAYER_COLUMNS,
    QUERY_NEURON_COLUMNS,
    SOURCE_COLUMNS,
)
from tl_neuron_attr.chosen import value_neurons
from tl_neuron_attr.decompose import attn_decomposition, ffn_decomposition, outlet
from tl_neuron_attr.host import Host, Norm
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron
from tl_neuron_attr.projection import project
from tl_neuron_attr.query import query_scores, top_query_neurons
from tl_neuron_attr.reading import subkeys, through_norm
from tl_neuron_attr.tables import (
    query_layer_table,
    query_neuron_table,
    token_columns,
    with_experts,
)
from tl_neuron_attr.topk import Kind, RankedNeurons, exact_scores, subvalues_of


@dataclass(frozen=True, kw_only=True)
class LookedAt:
    """A neuron, where it is looked at, and what it writes there."""

    neuron: FFNNeuron | AttnNeuron
    captured: Capture
    """Read at the position where the neuron writes."""
    each: RankedNeurons
    """The neuron; of an attention neuron at each source position."""
    which: slice
    """Which of them it is: all, if it is position-free."""
    coefficient: Tensor
    score: float
    subvalue: Float[Tensor, " d_model"]

    @property
    def contribution(self) -> Float[Tensor, " d_model"]:
        return self.coefficient * self.subvalue


def looked_at(result: Attribution, at: Capture, neuron: FFNNeuron | AttnNeuron) -> LookedAt:
    host, out, target = result.host, result.out, result.target
    if isinstance(neuron, FFNNeuron):
        (each,) = value_neurons(host, at, out, target, [neuron])
        number = torch.tensor([neuron.index], device=at.v.device)
        subvalue = ffn_decomposition(host, at, neuron.layer).subvalues(number)[0]
        which = slice(None)
        coefficient, score = each.coefficient[0], float(each.score[0])
    else:
        places = range(at.v.shape[1])
        (each,) = value_neurons(
            host, at, out, target, [replace(neuron, source_pos=place) for place in places]
        )
        block = attn_decomposition(host, at, neuron.layer).over_sources()
        number = torch.tensor([neuron.head * host.d_head + neuron.index], device=at.v.device)
        subvalue = block.subvalues(number)[0]
        if neuron.source_pos is None:
            which = slice(None)
            before = out.baseline(block.base[None], target, tangent=False)
            coefficient = block.coefficients_of(number)[0]
            score = float(exact_scores([block], out, before, number)[0])
        else:
            which = slice(neuron.source_pos, neuron.source_pos + 1)
            coefficient = each.coefficient[neuron.source_pos]
            score = float(each.score[neuron.source_pos])
    return LookedAt(
        neuron=neuron,
        captured=at,
        each=each,
        which=which,
        coefficient=coefficient,
        score=score,
        subvalue=subvalue,
    )


def input_table(host: Host, one: LookedAt) -> pd.DataFrame:
    """What its coefficient is computed from: its pre-activations, with their subkeys' norms."""
    layer = one.neuron.layer
    captured, first = one.captured, torch.zeros_like(one.each.index[:1])
    free = isinstance(one.neuron, AttnNeuron) and one.neuron.source_pos is None
    norm = host.attn_norm(layer) if one.each.kind == "attn" else host.ffn_norm(layer)
    rows = []
    for name, subkey, bias in subkeys(host, one.each, first, layer, "exact"):
        subkey = subkey[0].to(captured.v.dtype)
        gained = subkey if norm.gain is None else subkey * norm.gain.to(subkey)
        if norm.kind == "layer_norm":
            gained = gained - gained.mean()
        if one.each.kind == "ffn":
            read = read_by(host, norm, stream(captured, "ffn")[layer])
            value = float(read @ subkey) + (0.0 if bias is None else float(bias[0]))
        else:
            value = None if free else float(_values(one)[one.which])
        rows.append((name, value, float(subkey.norm()), float(gained.norm())))
    return pd.DataFrame(rows, columns=list(INPUT_COLUMNS)).astype({"value": float})


def source_table(one: LookedAt, token_texts: Sequence[str], scored: bool) -> pd.DataFrame:
    neuron = one.neuron
    if isinstance(neuron, FFNNeuron):
        return pd.DataFrame(columns=list(SOURCE_COLUMNS))
    n_pos = len(one.each)
    return pd.DataFrame(
        {
            "source_pos": range(n_pos),
            "token": list(token_texts[:n_pos]),
            "attention": plain(one.captured.pattern[neuron.layer, neuron.head]),
            "v": plain(_values(one)),
            "coefficient": plain(one.each.coefficient),
            "score": plain(one.each.score) if scored else [float("nan")] * n_pos,
        },
        columns=list(SOURCE_COLUMNS),
    )


def _values(one: LookedAt) -> Float[Tensor, " pos"]:
    """Its place of the value vector, at every source position."""
    neuron, captured = one.neuron, one.captured
    assert isinstance(neuron, AttnNeuron)
    group = captured.pattern.shape[1] // captured.v.shape[2]
    return captured.v[neuron.layer, :, neuron.head // group, neuron.index]


def end_table(result: Attribution, one: LookedAt, k: int) -> tuple[pd.DataFrame, float]:
    """Both ends of the bare subvalue's projection, and which of them is raised here."""
    index, out = result.index, result.out
    if index is not None and k <= index.k:
        row = one.neuron.index
        if isinstance(one.neuron, AttnNeuron):
            row += one.neuron.head * result.host.d_head
        layer, row = torch.tensor([one.neuron.layer]), torch.tensor([row])
        scale = 1.0 if out.norm_scale is None else float(out.norm_scale)
        through = outlet(result.host, one.captured, one.each.kind, one.neuron.layer)
        scale *= 1.0 if through.divisor is None else float(through.divisor)
        found = index.tokens(one.each.kind, layer, row, norm_scale=scale, k=k)
    else:
        found = project(out, one.subvalue[None], k)
    sign = float(one.coefficient)
    rows = [
        (end, token, result.host.token_text(token), logit, sign * (1 if end == "top" else -1) > 0)
        for end, ids, logits in (
            ("top", found.top_ids[0], found.top_logits[0]),
            ("bottom", found.bottom_ids[0], found.bottom_logits[0]),
        )
        for token, logit in zip(ids.tolist(), logits.tolist(), strict=True)
    ]
    return pd.DataFrame(rows, columns=list(END_COLUMNS)), float(found.readability[0])


def read_by(host: Host, norm: Norm, x: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """What a sub-layer reads of the residual stream ``x``."""
    read = through_norm(host, norm, x, x)
    return read if norm.bias is None else read + norm.bias.to(x)


def stream(captured: Capture, kind: Kind) -> Float[Tensor, "layer d_model"]:
    """The residual stream that each layer's attention, or FFN, reads."""
    mid = captured.resid_pre if captured.resid_mid is None else captured.resid_mid
    return mid if kind == "ffn" else captured.resid_pre


def plain(values: Tensor) -> list[float]:
    return values.cpu().double().tolist()


# --- what set it off --------------------------------------------------------------------------


def set_off_by(
    result: Attribution, one: LookedAt, score: float | None, top: int, tokens: int
) -> tuple[pd.DataFrame, pd.DataFrame, tuple[str, ...]]:
    """Earlier layers and neurons with their shares of the coefficient, and what had to be left out.

    The shares of a position-free neuron are those at its source positions, each by its part of the
    coefficient.
    """
    host, captured = result.host, one.captured
    values = _some(one.each, one.which)
    columns = [*QUERY_NEURON_COLUMNS, *(["expert"] if host.n_experts else [])]
    weights = values.coefficient / one.coefficient
    if len(values) == 1:
        weights = torch.ones_like(values.score)  # a share says why a neuron is off, too
    elif float(one.coefficient) == 0:
        layers = pd.DataFrame(columns=list(QUERY_LAYER_COLUMNS))
        table = pd.DataFrame(columns=columns)
        return layers, table, ("its source positions cancel: nothing has a share of 0",)
    convention = "published" if result.convention == "published" else "exact"
    positions = [] if values.source_pos is None else values.source_pos.tolist()
    others = [each for each in positions if each != captured.prompt.read_pos]
    sources = capture_sources(host, captured, others) if others else None
    # a score of 1 is handed down as shares
    scores = query_scores(host, captured, [replace(values, score=weights)], sources, convention)
    left_out = int(scores.left_out.sum())
    notes = ()
    if left_out:
        where = "" if len(values) == 1 else f" at {left_out} of {len(values)} source positions"
        notes = (
            f"ill-conditioned: what feeds it{where} nearly cancels, so it has no shares there",
        )
    layers = query_layer_table(scores).rename(columns={"score": "share"})
    found = [top_query_neurons(host, captured, scores, top, kind) for kind in ("ffn", "attn")]
    neurons = [
        with_experts(
            query_neuron_table(each, captured.prompt.prompt_id, position=True),
            host.n_experts,
            host.d_expert,
        )
        .rename(columns={"score": "share"})
        .join(_says(result, captured, each.neurons, tokens))
        for each in found
        if len(each.neurons)
    ]
    table = pd.concat(neurons, ignore_index=True) if neurons else pd.DataFrame({"share": []})
    table = table.sort_values("share", ascending=False, kind="stable").head(top)
    if left_out == len(values):
        layers, table = layers.head(0), table.head(0)
    nats = float("nan") if score is None else score
    layers = layers.assign(score=layers["share"] * nats)
    table = table.assign(score=table["share"] * nats).reset_index(drop=True)
    return layers, table.reindex(columns=columns), notes


def _some(ranked: RankedNeurons, which: slice) -> RankedNeurons:
    names = ("layer", "number", "head", "source_pos", "index", "coefficient", "score")
    columns = {name: getattr(ranked, name) for name in names}
    return replace(ranked, **{name: c[which] for name, c in columns.items() if c is not None})


def _says(
    result: Attribution, captured: Capture, neurons: RankedNeurons, tokens: int
) -> pd.DataFrame:
    """The tokens each neuron's signed contribution raises and lowers."""
    make = ffn_decomposition if neurons.kind == "ffn" else attn_decomposition
    # not the result's: attention neurons are numbered by how many source positions there are
    blocks = [make(result.host, captured, layer) for layer in range(result.host.n_layers)]
    signs = torch.where(neurons.coefficient < 0, -1.0, 1.0)[:, None]
    ends = project(result.out, signs * subvalues_of(blocks, neurons), tokens)
    ids = {*ends.top_ids.flatten().tolist(), *ends.bottom_ids.flatten().tolist()}
    text_of = {token: result.host.token_text(token) for token in ids}
    return token_columns(neurons, ends, result.captured.prompt.token_texts, text_of)
