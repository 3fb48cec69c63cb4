"""What is left: the answer without the top neurons, or with none but them.

A mask curve zeroes only the ``N`` best of a ranking, a keep curve all others of the chosen layers;
both say what the model then makes of the target. A ranking that found what matters falls fast when
masked, and holds when kept.

Source: Yu & Ananiadou (2024), arXiv 2409.14144.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.chosen import value_neurons
from tl_neuron_attr.decompose import AttnDecomposition, Decomposition
from tl_neuron_attr.differences import RankedDifferences
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host
from tl_neuron_attr.interventions import ZeroMask, masked_residuals
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import at_least_zero, integer
from tl_neuron_attr.readout import read_out
from tl_neuron_attr.tables import CURVE_COLUMNS, neurons_of
from tl_neuron_attr.topk import RankedNeurons

DEFAULT_TOPS = (0, 10, 30, 100)

_NOT_RANKED = 2**31 - 1


@full_precision()
def mask_curve(
    results: Attribution | Sequence[Attribution],
    neurons: Any = "ffn",
    tops: Iterable[int] = DEFAULT_TOPS,
    *,
    keep: bool = False,
    layers: Iterable[int] | None = None,
) -> pd.DataFrame:
    """What is left of each prompt's target with only its top neurons zeroed, or all but them.

    One row a prompt and number of neurons: ``prompt_id, kind, keep, top, zeroed`` (how many neurons
    were), ``log_prob`` (log p(target) in nats; of a contrast the difference), ``prob`` (of the
    target), ``target_rank`` (of the target among all tokens, from 1) and ``correct`` (whether it is
    1). It is the model's own prediction, its final norm taken anew in every run.

    Args:
        results: One attribution, or several of one model; all prompts run together.
        neurons: A ranking, best first. ``"ffn"`` or ``"attn"``: each prompt's own, as it was
            attributed. A ``RankedNeurons`` or a ``RankedDifferences``
            (``compare(...).ffn_neurons``) for all prompts, a table of neurons of one kind in their
            order (``result.query_neurons(100)``), or a list with one for each.
        tops: How many neurons of the ranking, in the chosen layers; 0 is the plain run, or with
            ``keep`` the run without any.
        keep: Zero all other neurons of the ranking's kind in the chosen layers, not the top ones.
        layers: Where; by default in all layers.

    FFN neurons, and attention neurons summed over source positions, are zeroed at all positions;
    attention neurons of one source position as ``Zeroed`` says, all others of a layer being those
    of the read position.

    Raises:
        InputError: If results are of several models; if a ranking is too short in the chosen
            layers, or of another model; if a layer is out of range.

    Cost: one forward pass of as many rows as there are prompts and numbers.
    """
    several = [results] if isinstance(results, Attribution) else list(results)
    tops = [integer(top, "a number of neurons") for top in tops]
    _check(several, tops)
    host = several[0].host
    chosen = _chosen(host, layers)
    orders = [
        _order(host, result, ranked, chosen, max(tops))
        for result, ranked in zip(several, _rankings(several, neurons), strict=True)
    ]
    cells = [(number, top) for number in range(len(several)) for top in tops]
    prompts = [several[number].captured.prompt for number, _ in cells]

    def mask_of(row: int) -> ZeroMask:
        number, top = cells[row]
        return orders[number].mask(top, keep)

    with torch.no_grad():
        resid = masked_residuals(host, prompts, mask_of)
        out = read_out(host, resid[0], "recomputed", budget=several[0].out.budget)
        targets = [several[number].target for number, _ in cells]
        answers = out.answers(resid, targets)
        log_probs = answers.log_prob.clone()
        contrasts = [row for row, target in enumerate(targets) if target.against is not None]
        if contrasts:
            asked = [targets[row] for row in contrasts]
            log_probs[contrasts] = out.log_prob_of_each(resid[contrasts], asked)
    log_probs, ranks = log_probs.tolist(), answers.rank.tolist()
    probs = answers.log_prob.exp().tolist()
    rows = [
        (
            prompts[row].prompt_id,
            orders[number].kind,
            keep,
            top,
            orders[number].count(top, keep),
            log_probs[row],
            probs[row],
            ranks[row],
            ranks[row] == 1,
        )
        for row, (number, top) in enumerate(cells)
    ]
    return pd.DataFrame(rows, columns=list(CURVE_COLUMNS))


@full_precision()
def random_neurons(
    result: Attribution,
    beside: str | RankedNeurons | pd.DataFrame = "ffn",
    *,
    seed: int = 0,
) -> RankedNeurons:
    """Random neurons to stand beside a ranking: in each place one of the same layer as there.

    So its first N hold as many of each layer as the N best; none is of the ranking, none comes
    twice. They carry their own scores, and go where a ranking goes: ``mask_curve(result,
    random_neurons(result))``, ``zero(random_neurons(result).neurons()[:10])``.

    Args:
        result: What was attributed.
        beside: ``"ffn"`` or ``"attn"``: the result's own ranking, or another of the same run, such
            as ``result.ffn_neurons.first(100)`` or a table of neurons of one kind. Attention
            neurons have their source position.
        seed: The same seed draws the same neurons.

    Raises:
        InputError: If a layer has fewer other neurons than the ranking holds of it; if the ranking
            is empty, of another run, or summed over source positions.

    Cost: one read-out for each neuron drawn, and two a layer.
    """
    generator = torch.Generator().manual_seed(at_least_zero(seed, "seed"))
    (ranked,) = _rankings([result], beside if isinstance(beside, str) else [beside])
    if not len(ranked):
        raise InputError("the ranking is empty, so that there is nothing to draw beside it")
    if ranked.kind == "attn" and ranked.source_pos is None:
        raise InputError(
            "the ranking is summed over source positions; give attention neurons by source "
            "position, as result.attn_neurons has them"
        )
    blocks: Sequence[Decomposition] = result.ffns if ranked.kind == "ffn" else result.attns
    n_neurons = blocks[0].n_neurons
    layer, number = ranked.layer.cpu(), ranked.number.cpu()
    if int(layer.max()) >= len(blocks) or int(number.max()) >= n_neurons:
        raise InputError("the ranking is of another model or prompt; give one of this result's own")
    drawn = torch.empty_like(number)
    for each in layer.unique().tolist():
        here = layer == each
        order = torch.randperm(n_neurons, generator=generator)
        if result.host.n_experts and ranked.kind == "ffn":
            # neurons of experts that did not run would be controls that do nothing
            off = blocks[each].all_coefficients().cpu() == 0
            order = order[off[order].sort(stable=True).indices]
        others = order[~torch.isin(order, number[here])]
        count = int(here.sum())
        if len(others) < count:
            raise InputError(
                f"the ranking holds {count} of the {n_neurons} {ranked.kind} neurons of layer "
                f"{each}, so that there are not as many others; give fewer, as "
                f"result.{ranked.kind}_neurons.first(N) does"
            )
        drawn[here] = others[:count]
    if isinstance(blocks[0], AttnDecomposition):
        head, source_pos, index = (column.tolist() for column in blocks[0].place(drawn))
        places = zip(layer.tolist(), head, index, source_pos, strict=True)
        neurons = [AttnNeuron(*place) for place in places]
    else:
        neurons = [FFNNeuron(*place) for place in zip(layer.tolist(), drawn.tolist(), strict=True)]
    with torch.no_grad():
        return value_neurons(result.host, result.captured, result.out, result.target, neurons)[0]


@dataclass(frozen=True, kw_only=True)
class _Order:
    """The ranking of one prompt: each neuron's place in it, counted in the chosen layers."""

    kind: str
    layers: tuple[int, ...]
    place: Int[Tensor, "layer ..."]
    """From 0, of every neuron of the chosen layers; those that are not ranked come last."""
    by_source: bool

    def mask(self, top: int, keep: bool) -> ZeroMask:
        """What is zeroed when ``top`` neurons are, or are left."""
        zeroed = self.place >= top if keep else self.place < top
        of_layer = {
            layer: mask for layer, mask in zip(self.layers, zeroed, strict=True) if mask.any()
        }
        where = "ffn" if self.kind == "ffn" else "sources" if self.by_source else "attn"
        return ZeroMask(**{"ffn": {}, "attn": {}, "sources": {}, where: of_layer})

    def count(self, top: int, keep: bool) -> int:
        """How many neurons that are."""
        return int((self.place >= top if keep else self.place < top).sum())


def _check(results: Sequence[Attribution], tops: Sequence[int]) -> None:
    if not results:
        raise InputError("there are no attributions to draw a curve of; give at least one")
    if any(result.host.model is not results[0].host.model for result in results):
        raise InputError("the attributions are of several models; draw a curve for each")
    if not tops or min(tops) < 0:
        raise InputError(f"tops must be numbers of neurons, 0 or more; got {[*tops]}")
    if any(result.target.distribution is not None for result in results):
        raise InputError(
            "a whole distribution has no rank and no probability to draw a curve of; attribute the "
            "prompts with tokens, or sets of them, as targets"
        )


def _chosen(host: Host, layers: Iterable[int] | None) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(host.n_layers))
    chosen = sorted({integer(layer, "a layer") for layer in layers})
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < host.n_layers:
        raise InputError(f"layers must be some of 0 to {host.n_layers - 1}, got {chosen}")
    return tuple(chosen)


def _rankings(results: Sequence[Attribution], neurons: Any) -> list[RankedNeurons]:
    """One ranking a prompt."""
    if isinstance(neurons, str):
        if neurons not in ("ffn", "attn"):
            raise InputError(f"neurons must be 'ffn', 'attn' or a ranking, got {neurons!r}")
        return [getattr(result, f"{neurons}_neurons") for result in results]
    each = [neurons] * len(results) if not isinstance(neurons, (list, tuple)) else [*neurons]
    if len(each) != len(results):
        raise InputError(
            f"give one ranking for all prompts, or one for each: there are {len(each)} for "
            f"{len(results)} prompts"
        )
    return [_ranking(result, one) for result, one in zip(results, each, strict=True)]


def _ranking(result: Attribution, given: Any) -> RankedNeurons:
    """One prompt's ranking, in whatever form it was given."""
    if isinstance(given, RankedDifferences):
        return given.neurons
    if isinstance(given, pd.DataFrame):
        neurons = neurons_of(given)
        with torch.no_grad():
            found = value_neurons(result.host, result.captured, result.out, result.target, neurons)
        if len(found) != 1:
            raise InputError(
                "a table that is a ranking must hold neurons, all of one kind; this one holds "
                f"{'both' if found else 'none'}"
            )
        return found[0]
    if not isinstance(given, RankedNeurons):
        raise InputError(
            "a ranking must be a RankedNeurons, like result.ffn_neurons, a comparison's, or a "
            f"table of neurons; got {given!r}"
        )
    return given


def _order(
    host: Host, result: Attribution, ranked: RankedNeurons, chosen: tuple[int, ...], most: int
) -> _Order:
    """Each neuron's place in the ranking, once it is known to be long enough and of this model."""
    n_pos = result.captured.prompt.read_pos + 1
    by_source = ranked.source_pos is not None
    if ranked.kind == "ffn":
        shape: tuple[int, ...] = (host.d_mlp,)
    else:
        shape = (host.n_heads, *((n_pos,) if by_source else ()), host.d_head)
    columns = [ranked.head, ranked.source_pos, ranked.index]
    places = [column.cpu() for column in columns if column is not None]
    layer = ranked.layer.cpu()
    for column, size in zip([layer, *places], (host.n_layers, *shape), strict=True):
        if len(column) and int(column.max()) >= size:
            raise InputError(
                f"the ranking is of another model or of a longer prompt than "
                f"{result.captured.prompt.prompt_id}: it names a neuron that this run has not"
            )
    layers = torch.tensor(chosen)
    here = torch.isin(layer, layers)
    n_ranked = int(here.sum())
    total = len(chosen) * torch.tensor(shape).prod().item()
    if n_ranked < min(most, total):
        raise InputError(
            f"only {n_ranked} {ranked.kind} neurons are ranked in the chosen layers, fewer than "
            f"{most}; rank more with attribute(..., top=...), or give smaller tops"
        )
    place = torch.full((len(chosen), *shape), _NOT_RANKED, dtype=torch.int32)
    where = torch.searchsorted(layers, layer[here])
    place[(where, *(column[here] for column in places))] = torch.arange(n_ranked, dtype=torch.int32)
    return _Order(kind=ranked.kind, layers=chosen, place=place, by_source=by_source)
