"""Neurons chosen by name, with their own scores."""

from collections.abc import Sequence

import torch

from tl_neuron_attr.captured import Capture
from tl_neuron_attr.decompose import attn_decomposition, ffn_decomposition
from tl_neuron_attr.errors import InputError
from tl_neuron_attr.host import Host, check_exists
from tl_neuron_attr.neurons import AttnNeuron, FFNNeuron
from tl_neuron_attr.precision import full_precision
from tl_neuron_attr.prompts import Target
from tl_neuron_attr.readout import ReadOut
from tl_neuron_attr.topk import Certificate, Kind, RankedNeurons, exact_scores


@full_precision()
def value_neurons(
    host: Host,
    captured: Capture,
    out: ReadOut,
    target: Target,
    neurons: Sequence[FFNNeuron | AttnNeuron],
) -> tuple[RankedNeurons, ...]:
    """These neurons with their own scores, by kind, in the order given; repeats are dropped.

    Cost: one read-out for each neuron, and one for each layer and kind among them.

    Raises:
        InputError: If the model has no such neuron, or an attention neuron has no source position.
    """
    for neuron in neurons:
        check_value_neuron(host, neuron, captured.prompt.read_pos)
    distinct = list(dict.fromkeys(neurons))
    ffn = [neuron for neuron in distinct if isinstance(neuron, FFNNeuron)]
    attn = [neuron for neuron in distinct if isinstance(neuron, AttnNeuron)]
    found = []
    if ffn:
        index = [neuron.index for neuron in ffn]
        found.append(_scored(host, captured, out, target, "ffn", ffn, index))
    if attn:
        n_pos, d_head = captured.v.shape[1], host.d_head
        number = [
            (neuron.head * n_pos + (neuron.source_pos or 0)) * d_head + neuron.index
            for neuron in attn
        ]
        found.append(_scored(host, captured, out, target, "attn", attn, number))
    return tuple(found)


def _scored(
    host: Host,
    captured: Capture,
    out: ReadOut,
    target: Target,
    kind: Kind,
    neurons: Sequence[FFNNeuron] | Sequence[AttnNeuron],
    numbers: Sequence[int],
) -> RankedNeurons:
    make = ffn_decomposition if kind == "ffn" else attn_decomposition
    layers = sorted({neuron.layer for neuron in neurons})
    blocks = [make(host, captured, layer) for layer in layers]
    device = captured.v.device
    number = torch.tensor(numbers, device=device)
    layer = torch.tensor([neuron.layer for neuron in neurons], device=device)
    place = torch.searchsorted(torch.tensor(layers, device=device), layer)
    bases = torch.stack([block.base for block in blocks])
    before = out.baseline(bases, target, tangent=False)
    score = exact_scores(blocks, out, before, place * blocks[0].n_neurons + number)
    coefficient = torch.empty_like(score)
    for at, block in enumerate(blocks):
        coefficient[place == at] = block.coefficients_of(number[place == at]).to(score.dtype)
    heads = [neuron.head for neuron in neurons if isinstance(neuron, AttnNeuron)]
    sources = [neuron.source_pos for neuron in neurons if isinstance(neuron, AttnNeuron)]
    return RankedNeurons(
        kind=kind,
        layer=layer,
        number=number,
        head=torch.tensor(heads, device=device) if heads else None,
        source_pos=torch.tensor(sources, device=device) if sources else None,
        index=torch.tensor([neuron.index for neuron in neurons], device=device),
        coefficient=coefficient,
        score=score,
        certificate=Certificate.of_all(len(score), score),
    )


def check_value_neuron(host: Host, neuron: FFNNeuron | AttnNeuron, read_pos: int) -> None:
    """Stop where the model has no such value neuron in a prompt read at ``read_pos``.

    Raises:
        InputError: If it has not, or an attention neuron has no source position.
    """
    if isinstance(neuron, AttnNeuron) and neuron.source_pos is None:
        raise InputError(
            f"{neuron} has no source position, which is where it is set off; "
            f"give one, as in {neuron}@{read_pos}"
        )
    check_exists(host, neuron, read_pos)
