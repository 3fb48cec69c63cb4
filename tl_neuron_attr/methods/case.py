"""What a method is asked: one attributed prompt, and whose neurons to score."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tl_neuron_attr.attribution import Attribution
from tl_neuron_attr.decompose import Decomposition
from tl_neuron_attr.display import box, cell, facts, next_calls
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.glance import target_words
from tl_neuron_attr.host import Host
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron
from tl_neuron_attr.prompts import TokenizedPrompt, at_least_one
from tl_neuron_attr.topk import Kind, RankedNeurons, largest


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prompt whose neurons are to be scored, by whatever method.

    Raises:
        InputError: If the corrupted prompt does not line up with the prompt attributed.
    """

    result: Attribution
    """What ``attribute`` found: the model, the run, the answer asked about."""
    corrupted: TokenizedPrompt | None = field(default=None, repr=False)
    """The prompt changed so that the answer is another, token by token as long: what attribution
    patching takes activations from. Of the model's tokenizer: ``tokenize(host, Prompt(...))``."""
    known_ranks: dict[Kind, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """What ``rank`` found, by kind: it is dear, and two methods use it."""

    def __repr__(self) -> str:
        beside = "" if self.corrupted is None else f", corrupted {self.corrupted.text!r}"
        return f"Case({self.result!r}{beside})"

    def _repr_html_(self) -> str:
        prompt, corrupted = self.result.captured.prompt, self.corrupted
        return box(
            "Case: one prompt whose neurons are to be scored",
            facts(
                {
                    "prompt": cell(prompt.token_texts),
                    "target": target_words(self.result.target, self.result.log_prob),
                    "corrupted": "" if corrupted is None else cell(corrupted.token_texts),
                }
            ),
            next_calls({"METHODS['log_prob_increase'](case, 'ffn', None)": "all scores"}),
        )

    def __post_init__(self) -> None:
        if self.corrupted is None:
            return
        prompt = self.result.captured.prompt
        ours, theirs = len(prompt.tokens), len(self.corrupted.tokens)
        if ours != theirs:
            raise InputError(
                f"the corrupted prompt is {theirs} tokens and the prompt {ours}; activations are "
                "compared position by position, so give one of the same number of tokens"
            )
        if self.corrupted.tokens == prompt.tokens:
            raise InputError("the corrupted prompt is the prompt itself; give one that differs")


Method = Callable[[Case, Kind, int | None], Tensor]
"""``method(case, kind, top)``: a score for every neuron of a kind, higher = more important.

Of shape [layer, d_mlp] for ``"ffn"`` and [layer, head, d_head] for ``"attn"``: attention neurons
are the position-free ones, which zeroing a row of ``W_O`` removes. With ``top`` it is enough that
the ``top`` best are true: others may be -inf. With ``None`` all are. Where a method cannot be used
(there is no corrupted prompt, say) it raises ``InputError``.
"""


def neuron_shape(host: Host, kind: str) -> tuple[int, ...]:
    """The shape of a score for every neuron of a kind.

    Raises:
        InputError: If the kind is unknown.
    """
    if kind not in get_args(Kind):
        raise InputError(f"kind must be 'ffn' or 'attn', got {kind!r}")
    if kind == "ffn":
        return (host.n_layers, host.d_mlp)
    return (host.n_layers, host.n_heads, host.d_head)


def blocks_of(case: Case, kind: Kind) -> Sequence[Decomposition]:
    """Each layer as a sum over its neurons of a kind; attention summed over source positions."""
    neuron_shape(case.result.host, kind)
    return case.result.ffns if kind == "ffn" else case.result.attns_over_sources


def in_layers(case: Case, kind: Kind, scores: Float[Tensor, " neuron"]) -> Float[Tensor, "..."]:
    """Scores in the order neurons are numbered across layers, in the shape of a method's."""
    return scores.view(neuron_shape(case.result.host, kind))


def of_ranked(case: Case, ranked: RankedNeurons) -> Float[Tensor, "..."]:
    """The scores of ranked neurons in the shape of a method's, all others -inf."""
    shape = neuron_shape(case.result.host, ranked.kind)
    scores = ranked.score.new_full(shape, -math.inf)
    where = [ranked.layer, ranked.index]
    if ranked.head is not None:
        where.insert(1, ranked.head)
    scores[tuple(where)] = ranked.score
    return scores


def best_neurons(scores: Float[Tensor, "layer ..."], top: int) -> list[FFNNeuron | AttnNeuron]:
    """The ``top`` neurons that a method scores highest, best first; ties by layer, then place.

    ``scores`` is what a method gives: [layer, d_mlp], or [layer, head, d_head] for attention
    neurons, which have no source position. Those that score -inf are not ranked: there may be
    fewer.

    Raises:
        InputError: If ``top`` is below 1, or scores have another number of axes or NaN among them.
    """
    if scores.ndim not in (2, 3) or bool(scores.isnan().any()):
        raise InputError(
            "scores must be numbers of shape [layer, d_mlp] or [layer, head, d_head], as a method "
            f"gives them; got shape {list(scores.shape)}"
            + (" with NaN" if bool(scores.isnan().any()) else "")
        )
    flat = scores.detach().flatten()
    best = largest(flat, min(at_least_one(top, "top"), len(flat)))
    best = best[flat[best] > -math.inf]
    places = torch.stack(torch.unravel_index(best, scores.shape), 1).tolist()
    return [FFNNeuron(*place) if scores.ndim == 2 else AttnNeuron(*place) for place in places]


def how_many(top: int | None, case: Case, kind: Kind) -> int | None:
    """``top`` once it is known to count something; ``None`` where that is about all there are."""
    total = math.prod(neuron_shape(case.result.host, kind))
    return None if top is None or 2 * at_least_one(top, "top") >= total else top
