"""Everything about one neuron: what it says, what it did here, what set it off, what it sets off.

A neuron is looked at in one run, at one position: by default where the prompt is read, where it has
a score; a query neuron rather at the earlier position where it fires. Its *contribution* there is
its coefficient times its subvalue.

- **Both ends** of the bare subvalue's projection on the vocabulary, in logits per unit of
  coefficient. The sign rule: with a positive coefficient the top is raised, with a negative one the
  bottom (Yu & Ananiadou 2024, section 4).
- **What set it off**: the shares that earlier components have of its pre-activation (``query.py``).
  In nats they are its score, handed down.
- **What it sets off**: later neurons, whose pre-activation the contribution raises or lowers,

      effect = coefficient * (subvalue . key),

  the key being the later neuron's subkey seen through the norm in front of it: gain in, mean out
  (LayerNorm), divided by the scale that norm has in this run at this position. It is the change of
  the pre-activation if the contribution is added and the norm stays frozen.
- **Through the heads**: the contribution as a later head carries it on: through that layer's norm,
  frozen as above, then ``W_V`` and ``W_O``, at an attention weight of 1, and read out. Many shallow
  neurons can be read only there (Yu & Ananiadou, Comparative Neuron Analysis). The head with the
  largest ``TokenEnds.readability`` comes first.
"""

from tl_neuron_attr.cards.card import NeuronCard
from tl_neuron_attr.cards.request import as_head, as_neuron, check_head, check_request, neuron_card

__all__ = ["NeuronCard", "as_head", "as_neuron", "check_head", "check_request", "neuron_card"]
