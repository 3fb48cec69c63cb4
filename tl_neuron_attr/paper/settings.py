"""How much of everything: what a run of the paper's tables is asked for, on a model of any size.

The paper's numbers of neurons are for models of hundreds of thousands. On a smaller model they
would be a large part of it, so that beside a number *as published* there is the same share of the
model, *in proportion* (to GPT2-large), and every table says how many neurons that were.
"""

from dataclasses import dataclass

from tl_neuron_attr.host import Host
from tl_neuron_attr.paper.published import NEURONS
from tl_neuron_attr.prompts import at_least_one, at_least_zero
from tl_neuron_attr.topk import Kind

TOP = 300
"""Value neurons, and query neurons, looked at in each sentence [published]."""

TOP_VALUES = 30
"""Value neurons that query scores are of [published, the Llama notebook]."""

METHOD_TOP = 10
"""FFN neurons that the test of the eight methods zeroes [published]."""

VALUE_ATTN, VALUE_FFN = 200, 100
"""Value neurons zeroed together [published]."""

SHALLOW_QUERY = 1000
"""Shallow query FFN neurons zeroed [published]."""

HEAD_PERCENT = 1.0
"""How many of all heads are zeroed, in per cent [published]."""

SEGMENT_STEPS = 20
"""Steps from the input to the final hidden state."""

SHARE_TOPS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)
"""Numbers of neurons whose share of the total is asked about, as far as the model has them."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is asked for, beside the model and the prompts; part of its identity."""

    seed: int = 0
    """Of random neurons, of the prompts that are sampled, and of the bootstrap."""
    batch_size: int = 32
    """Prompts attributed and kept together."""
    sample: int = 10
    """Prompts of each knowledge type for which the total of all neurons is bounded."""
    limit: int | None = None
    """At most so many prompts, drawn evenly from the knowledge types; ``None`` for all."""

    def __post_init__(self) -> None:
        at_least_zero(self.seed, "the seed")
        at_least_one(self.batch_size, "batch_size")
        at_least_one(self.sample, "sample")
        if self.limit is not None:
            at_least_one(self.limit, "limit")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many neurons and heads of one model are zeroed, and which layers are shallow."""

    top: dict[Kind, int]
    """Value and query neurons in proportion to 300 of GPT2-large."""
    value_attn: int
    value_ffn: int
    shallow_query: int
    heads: int
    shallow_layers: int
    """Layers below this one are shallow: the first half [?: the paper's own border is unknown]."""


def sizes(host: Host) -> Sizes:
    """What the paper's numbers come to on this model; never more than the paper's own."""
    return Sizes(
        top={"ffn": in_proportion(host, "ffn", TOP), "attn": in_proportion(host, "attn", TOP)},
        value_attn=in_proportion(host, "attn", VALUE_ATTN),
        value_ffn=in_proportion(host, "ffn", VALUE_FFN),
        shallow_query=in_proportion(host, "ffn", SHALLOW_QUERY),
        heads=max(1, round(HEAD_PERCENT / 100 * host.n_layers * host.n_heads)),
        shallow_layers=max(1, host.n_layers // 2),
    )


def in_proportion(host: Host, kind: Kind, published: int) -> int:
    """As large a part of this model's neurons of a kind as ``published`` are of GPT2-large's.

    At least 1, and no more than ``published`` itself.
    """
    per_layer = host.d_mlp if kind == "ffn" else host.n_heads * host.d_head
    share = published * host.n_layers * per_layer / NEURONS["gpt2-large"][kind]
    return min(published, max(1, round(share)))
