"""Query scores as a method, and value and query together: what is seen at earlier positions.

A static method looks at the read position, but zeroing a neuron takes it out everywhere. What it
does at earlier positions reaches the answer through value neurons, and is in their scores: query
scores hand those down to what feeds them, without a backward pass.
"""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_neuron_attr.attribution import TOP_VALUES
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.methods.case import Case, in_layers, neuron_shape
from tl_neuron_attr.methods.static import scores_by
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.query import QueryScores
from tl_neuron_attr.topk import Kind


def query(
    case: Case,
    kind: Kind,
    top: int | None = None,
    *,
    of: str = "attn",
    top_values: int = TOP_VALUES,
) -> Float[Tensor, "..."]:
    """How much each neuron feeds the best value neurons, in nats, summed over positions.

    By default of the 30 best attention neurons, as published. A neuron that comes before none of
    them scores 0. Cost: a search for the value neurons where ``attribute`` ranked fewer, one
    forward pass, and a matrix product a layer.

    Raises:
        InputError: If nothing of the kind feeds them: they are all of the first layer, or all
            ill-conditioned; if the model no longer gives what was captured.
    """
    neuron_shape(case.result.host, kind)
    scores = _query_scores(case, of, top_values)
    depth = scores.ffn_depth if kind == "ffn" else scores.attn_depth
    if depth == 0 or bool(scores.left_out.all()):
        why = "come after no" if depth == 0 else "are all ill-conditioned, and have no shares of an"
        raise InputError(
            f"there are no query scores: the best value neurons {why} {kind} neuron; "
            "ask for more value neurons, or of another kind"
        )
    return in_layers(case, kind, _of_kind(case, kind, scores))


@full_precision()
def value_and_query(
    case: Case,
    kind: Kind,
    top: int | None = None,
    *,
    of: str = "both",
    top_values: int = TOP_VALUES,
) -> Float[Tensor, "..."]:
    """What a neuron says itself, and what it has others say: value score plus query score, in nats.

    Both are in nats of log p(w), at first order shares of the same sum, so they add up: the
    log-probability increase at the read position, and what the ``top_values`` best value neurons
    of each kind hand down to it, at all positions. A path through two or more later neurons is
    not counted.

    Cost and errors: of ``log_prob_increase`` and of ``query``; but where nothing is fed the value
    scores stand alone. With ``top`` the best are certified.
    """
    neuron_shape(case.result.host, kind)
    handed_down = _of_kind(case, kind, _query_scores(case, of, top_values))

    def of_increase(
        flat: Int[Tensor, " neuron"], increase: Float[Tensor, " neuron"]
    ) -> Float[Tensor, " neuron"]:
        return increase + handed_down[flat]

    with torch.no_grad():
        return scores_by(case, kind, of_increase, top)


def _query_scores(case: Case, of: str, top_values: int) -> QueryScores:
    with warnings.catch_warnings():
        # that all value neurons are ill-conditioned is said by an error, where it matters
        warnings.simplefilter("ignore")
        return case.result.query_scores(of, top_values=top_values)


def _of_kind(case: Case, kind: Kind, scores: QueryScores) -> Float[Tensor, " neuron"]:
    each = scores.ffn_neurons if kind == "ffn" else scores.attn_neurons
    return each.to(case.result.out.dtype).flatten()
